"""Suite kernels: gate, plan and combine, each against what one writes by hand in torch and against its floor in bytes.

These are microseconds, so launches count: `us` is a replay of a CUDA graph of the call, `eager_us` the call from
Python, for both contestants. A replay of a graph of one tiny kernel takes `launch` seconds (in `ceilings`), which are
not subtracted. Every output is compared with torch's before anything is timed.

    python -m experiments.bench suite=kernels                       # on a GPU -> runs/bench
    python -m experiments.gpu_evidence --out DIR --stage kernels    # the same rows -> DIR/gpu-kernels.jsonl
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.pages import tables
from experiments.suites import shapes, timing
from experiments.suites.cases import Case, LeftOut, Wrong
from experiments.suites.shapes import Shape
from experiments.suites.timing import Ceilings

OPS = ("gate_plan", "gate", "plan", "combine", "combine_backward", "gate_backward")
HEADINGS = ("kernel", "T", "D", "E", "K", "µs", "floor µs", "over floor", "eager µs", "torch µs", "torch is", "targets")
ROOM = 24 * 2**30  # bytes of rows that a combine may take

# Sizes by importance: the ones that the promises name first, then the sweep over each letter.
TOKENS = (16384, 4096, 32768, 1024, 65536)
CHOICES = ((64, 8), (128, 8), (8, 2), (32, 4), (256, 8), (8, 1), (512, 8), (64, 1), (128, 2), (512, 16), (256, 4))
WIDTHS = (2048, 4096, 768)


@dataclass
class Settings:
    """What the suite goes through."""

    device: torch.device
    ceilings: Ceilings
    tokens: Sequence[int] = TOKENS
    choices: Sequence[tuple[int, int]] = CHOICES  # (E, K)
    widths: Sequence[int] = WIDTHS  # D, of combine
    ops: Sequence[str] = OPS
    dtype: torch.dtype = torch.bfloat16  # of combine; the gate's logits are float32
    rounds: int = 5
    seconds: float = 0.02


def settings(device: torch.device, full: bool, rounds: int = 5) -> Settings:
    """The sweep, or what the interpreter does in seconds; the roofs are measured."""
    ceilings = timing.ceilings(device, full=full)
    if full:
        return Settings(device, ceilings, rounds=rounds)
    return Settings(device, ceilings, (33,), ((4, 2),), (40,), rounds=1, seconds=0.0)


class Pair(NamedTuple):
    """The same work twice, each a function without arguments, and what is checked before they are timed."""

    ours: Callable[[], Any]
    by_hand: Callable[[], Any]
    check: Callable[[], None]
    n_bytes: int
    captured_by_hand: bool = True  # autograd's backward is no graph


def cases(settings: Settings) -> Iterator[Case]:
    """By importance: first every kernel at the first sizes, then the sweep."""
    for e, k in settings.choices:
        for t in settings.tokens:
            for op in settings.ops:
                for d in settings.widths if op.startswith("combine") else (0,):
                    if op.startswith("combine") and e != _first_experts(settings, k):
                        continue  # a combine does not depend on E
                    shape = Shape(t, d, 0, e, k)
                    key = {"suite": "kernels", "op": op, "T": t, "D": d, "E": e, "K": k}
                    yield Case(key, functools.partial(measured, op, shape, settings))


def _first_experts(settings: Settings, k: int) -> int:
    """The E that comes first with this K."""
    return next(e for e, choices in settings.choices if choices == k)


def measured(op: str, shape: Shape, settings: Settings) -> dict[str, Any]:
    """One row. Raises `Wrong` when ours and torch's differ, `LeftOut` for rows that do not fit."""
    # What is not right is not timed.
    device = settings.device
    pair = build(op, shape, device, settings.dtype)
    pair.check()

    # Everything in turns: both contestants from Python and, on a GPU, as graphs.
    functions: dict[str, Callable[[], Any]] = {"eager": pair.ours, "torch eager": pair.by_hand}
    if graph := timing.captured(pair.ours, device):
        functions["graph"] = graph.replay
        with contextlib.suppress(RuntimeError):  # what torch cannot capture it is timed without
            by_hand = timing.captured(pair.by_hand, device) if pair.captured_by_hand else None
            functions |= {"torch graph": by_hand.replay} if by_hand else {}
    median = timing.medians(functions, device, settings.rounds, settings.seconds)
    us = {name: 1e6 * seconds for name, seconds in median.items()}

    # The best of ours against the bytes that have to move, and against torch.
    floor_us, best = 1e6 * pair.n_bytes / settings.ceilings.copy, us.get("graph", us["eager"])
    ratio = us["torch eager"] / us["eager"]
    if "torch graph" in us:  # like with like
        ratio = us["torch graph"] / us["graph"]
    return {
        "us": us.get("graph"),
        "eager_us": us["eager"],
        "torch_us": us.get("torch graph"),
        "torch_eager_us": us["torch eager"],
        "torch_over_ours": ratio,
        "bytes": pair.n_bytes,
        "floor_us": floor_us,
        "over_floor": best / floor_us,
        "ceilings": settings.ceilings._asdict(),
        "targets": targets(op, shape, best, floor_us) if device.type == "cuda" else [],
    }


def targets(op: str, shape: Shape, us: float, floor_us: float) -> list[dict[str, Any]]:
    """What is promised of a kernel at these sizes, and whether it is kept."""
    if op == "gate_plan" and shapes.gate_plan_promised(shape):
        return [shapes.target("gate and plan, µs", us, shapes.GATE_PLAN_US, at_most=True)]
    if op.startswith("combine"):
        return [shapes.target("combine over its floor", us / floor_us, shapes.COMBINE_OVER_FLOOR, at_most=True)]
    return []


def build(op: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Pair:
    """Random inputs and both contestants."""
    torch.manual_seed(0)
    if op.startswith("combine"):
        return combine_pair(shape, op == "combine", device, dtype)
    logits = torch.randn(shape.T, shape.E, device=device)
    match op:
        case "gate":
            return gate_pair(logits, shape)
        case "plan":
            return plan_pair(logits.topk(shape.K).indices, shape)
        case "gate_plan":
            return gate_plan_pair(logits, shape)
        case "gate_backward":
            return gate_backward_pair(logits, shape)
    raise ValueError(f"op={op!r} is not one of {', '.join(OPS)}")


def gate_by_hand(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """softmax, topk, renormalise: (T, E) -> weight (T, K), expert (T, K). Ours also leaves what the losses read."""
    weight_TK, expert_TK = logits_TE.softmax(-1).topk(k)
    return weight_TK / weight_TK.sum(-1, keepdim=True), expert_TK


def plan_by_hand(expert_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """argsort and counts: -> order (N,), slot (N,), token of every slot (N,), offset (E + 1,).

    Counted by scatter_add: bincount waits for the device."""
    flat_N = expert_TK.flatten()
    order_N = flat_N.argsort(stable=True)
    slot_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=flat_N.device))
    count_E1 = torch.zeros(n_experts + 1, dtype=torch.int64, device=flat_N.device)
    count_E1.scatter_add_(0, flat_N + 1, torch.ones_like(flat_N))
    return order_N, slot_N, order_N // expert_TK.shape[1], count_E1.cumsum(0)


def gate_pair(logits: Tensor, shape: Shape) -> Pair:
    """(T, E) float32 to choices, weights, log-sum-exp and summed probabilities."""
    from kernels import gate  # here, because Triton is not everywhere

    ours, by_hand = lambda: gate.gate(logits, shape.K, "softmax"), lambda: gate_by_hand(logits, shape.K)

    def check() -> None:
        (expert, weight, lse, prob), (want_weight, want_expert) = ours(), by_hand()
        close("weights", weight, want_weight)
        close("chosen logits", logits.gather(1, expert), logits.gather(1, want_expert))
        close("log-sum-exp", lse, logits.logsumexp(-1))
        close("summed probabilities", prob, logits.softmax(-1).sum(0))

    return Pair(ours, by_hand, check, shapes.gate_bytes(shape))


def plan_pair(expert: Tensor, shape: Shape) -> Pair:
    """Choices (T, K) to maps, offsets and, ours, the schedule of tiles."""
    from kernels import plan

    ours = lambda: plan.plan(expert, None, shape.E, 128)
    by_hand = lambda: plan_by_hand(expert, shape.E)
    return Pair(ours, by_hand, lambda: same_plan(ours(), by_hand()), shapes.plan_bytes(shape))


def gate_plan_pair(logits: Tensor, shape: Shape) -> Pair:
    """Logits to a plan: all that stands between the router's matmul and the first expert's."""
    from kernels import gate, plan

    choose = lambda: gate.gate(logits, shape.K, "softmax")[0]
    ours = lambda: plan.plan(choose(), None, shape.E, 128)
    by_hand = lambda: plan_by_hand(gate_by_hand(logits, shape.K)[1], shape.E)
    # On one set of choices: of two probabilities that round to the same, torch's topk may take the other first.
    check = lambda: same_plan(ours(), plan_by_hand(choose(), shape.E))
    return Pair(ours, by_hand, check, shapes.gate_plan_bytes(shape))


def gate_backward_pair(logits: Tensor, shape: Shape) -> Pair:
    """All three gradients to the logits': ours the kernel alone, torch's its autograd on what `gate_by_hand` kept."""
    from kernels import gate

    expert = gate.gate(logits, shape.K, "softmax")[0]
    dweight, dlse, dprob = torch.randn(shape.T, shape.K), torch.randn(shape.T), torch.randn(shape.E)
    dweight, dlse, dprob = (gradient.to(logits.device) for gradient in (dweight, dlse, dprob))
    leaf = logits.detach().requires_grad_()
    weight = gate_by_hand(leaf, shape.K)[0]
    ours = lambda: gate._backward(logits, expert, dweight, dlse, dprob, "softmax", True, 1.0)
    by_hand = lambda: torch.autograd.grad(weight, leaf, dweight, retain_graph=True)

    def check() -> None:
        want = torch.autograd.grad(
            (weight, leaf.logsumexp(-1), leaf.softmax(-1).sum(0)), leaf, (dweight, dlse, dprob), retain_graph=True
        )
        close("logits' gradient", ours(), want[0])

    return Pair(ours, by_hand, check, shapes.gate_backward_bytes(shape), captured_by_hand=False)


def combine_pair(shape: Shape, weighted: bool, device: torch.device, dtype: torch.dtype) -> Pair:
    """(N, D) rows in slots to (T, D): weighted, as forward's last step, or plain, as the last step of dx."""
    from kernels import combine, plan

    # Rows in slots, if there is room for them.
    rows = shape.T * shape.K
    if (needed := 2 * dtype.itemsize * rows * shape.D) > ROOM:  # the rows, and torch's copy of them
        raise LeftOut(f"takes {needed / 2**30:.0f} GiB; {ROOM / 2**30:.0f} are allowed")
    expert = torch.randn(shape.T, shape.E, device=device).topk(shape.K).indices
    where = plan.plan(expert, None, shape.E, 128)
    y, weight = torch.randn(rows, shape.D, device=device, dtype=dtype), torch.rand(shape.T, shape.K, device=device)

    # Both contestants, and what both should give for some tokens, summed in float32.
    slot, ones = where.slot_N.long(), torch.ones_like(weight)

    def ours() -> Tensor:
        flat = weight.flatten() if weighted else None
        return combine.combine(y, where.slot_N, flat, None, where.offset_E1, shape.T)

    def by_hand() -> Tensor:
        picked = y.index_select(0, slot).view(shape.T, shape.K, shape.D)
        return torch.bmm((weight if weighted else ones)[:, None].to(dtype), picked).squeeze(1)

    def check() -> None:
        sample = torch.arange(min(shape.T, 512), device=device)  # of tokens: in float32 all would need twice the room
        picked = y[slot.view(shape.T, shape.K)[sample]].float()
        want = ((weight if weighted else ones)[sample][:, :, None] * picked).sum(1)
        close("sums", ours()[sample], want, 4 * torch.finfo(dtype).eps)
        close("torch's sums", by_hand()[sample], want, 4 * torch.finfo(dtype).eps)

    return Pair(ours, by_hand, check, shapes.combine_bytes(shape, weighted, dtype.itemsize))


def same_plan(got: Any, want: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Raises `Wrong` unless both maps, tokens and offsets are equal."""
    ours = got.row_N, got.slot_N, got.token_N, got.offset_E1
    for name, a, b in zip(("order", "slot", "token", "offset"), ours, want, strict=True):
        if not torch.equal(a.long(), b):
            raise Wrong(f"the plan's {name} differs from torch's at {(a.long() != b).sum().item()} places")


def close(name: str, got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    """Raises `Wrong` when the relative error exceeds `bound`, or is NaN."""
    if not (error := timing.relative_error(got, want)) <= bound:
        raise Wrong(f"relative error of {name} is {error:.2g}; {bound:.2g} is rounding")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row."""
    head = row["op"], f"{row['T']:,}", str(row["D"] or ""), str(row["E"]), str(row["K"])
    if row["status"] != "measured":
        return *head, row["status"], *[""] * 5, row["error"][:60]
    words = [f"{'met' if target['met'] else 'missed'}: {target['what']}" for target in row["targets"]]
    return (
        *head,
        tables.number(row["us"], ",.1f"),
        tables.number(row["floor_us"], ",.1f"),
        tables.number(row["over_floor"], ",.2f", "×"),
        tables.number(row["eager_us"], ",.1f"),
        tables.number(row["torch_us"] or row["torch_eager_us"], ",.1f"),
        tables.number(row["torch_over_ours"], ",.2f", "×"),
        ", ".join(words),
    )
