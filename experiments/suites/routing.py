"""Suite routing: everything of an MoE layer that is no matmul of experts, on any machine.

Per size, gate, plan and combine of every backend that works here, and of the eager torch sequence that people write by
hand, taking turns. Beside them the whole layer, for the share of its time that is routing.

    python -m experiments.bench suite=routing    # -> runs/bench

Letters: R slots, as in kernels/grouped.py.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.pages import tables
from experiments.suites import timing
from experiments.suites.cases import Case, Wrong
from experiments.suites.kernels import gate_by_hand, plan_by_hand
from experiments.suites.timing import relative_error
from kernels import grouped, reference, tuning
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.model.layer import MoELayer
from moe.routing.contract import rows

BACKENDS = ("reference", "torch", "triton")
PARTS = ("gate", "plan", "combine")
HEADINGS = ("T", "E", "K", "by hand µs", "reference µs", "is", "torch µs", "is", "triton µs", "is", "of the layer")

Function = Callable[[], Any]


@dataclass
class Settings:
    """What the suite goes through."""

    device: torch.device
    tokens: Sequence[int] = (1024, 4096, 16384)
    experts: Sequence[int] = (8, 64, 256)
    choices: Sequence[int] = (1, 2, 8)
    width: int = 256  # D of the rows that are combined, and of the layer
    d_expert: int = 128  # F of the layer
    backends: Sequence[str] = BACKENDS
    rounds: int = 5
    seconds: float = 0.1  # of calls per part and contestant


def settings(device: torch.device, full: bool, rounds: int = 5, **given: Any) -> Settings:
    """The sweep, or seconds of it, with what is `given`. Triton's interpreter takes part in the small one alone."""
    if not full:
        return Settings(device, (64,), (4,), (1, 2), rounds=1, seconds=0.0, **given)
    backends = BACKENDS if device.type == "cuda" else BACKENDS[:2]
    return Settings(device, backends=backends, rounds=rounds, **given)


def cases(settings: Settings) -> Iterator[Case]:
    """One row per size, small ones first."""
    for t in settings.tokens:
        for e in settings.experts:
            for k in settings.choices:
                if k <= e:
                    yield Case(
                        {"suite": "routing", "T": t, "E": e, "K": k, "D": settings.width, "F": settings.d_expert},
                        functools.partial(measured, t, e, k, settings),
                    )


def measured(t: int, e: int, k: int, settings: Settings) -> dict[str, Any]:
    """One row: seconds of every part of every contestant; what cannot run here says why. Raises `Wrong`."""
    # Every contestant on the same logits and rows; a backend that cannot run here says why.
    torch.manual_seed(0)
    device = settings.device
    logits, y_ND = torch.randn(t, e, device=device), torch.randn(t * k, settings.width, device=device)
    contestants: dict[str, dict[str, Function]] = {"by hand": by_hand(logits, k, y_ND)}
    absent = {}
    for backend in BACKENDS:
        if backend in settings.backends and not (backend == "triton" and tuning.obstacle(device)):
            contestants[backend] = BUILD[backend](logits, k, y_ND)
        else:
            absent[backend] = tuning.obstacle(device) or "left to sizes=smoke: it would be Triton's interpreter"

    # What is not right is not timed.
    want = contestants["by hand"]["combine"]()
    for name, parts in contestants.items():
        if not (error := relative_error(parts["combine"](), want)) <= 1e-5:
            raise Wrong(f"relative error of {name}'s sums is {error:.2g}")

    # Every part of every contestant in turns, and the whole layer on the backend that it would choose here.
    layer, x_BSD = layer_of(e, k, settings), torch.randn(1, t, settings.width, device=device)
    backend = "triton" if "triton" in contestants and device.type == "cuda" else "torch"

    @torch.no_grad()
    def whole() -> Any:
        return layer(x_BSD, backend)

    functions = {f"{name}/{part}": function for name, parts in contestants.items() for part, function in parts.items()}
    with torch.no_grad():
        median = timing.medians(functions | {"layer": whole}, device, settings.rounds, settings.seconds)

    # Sums of the parts, against the sequence by hand and against the layer.
    seconds = {name: {part: median[f"{name}/{part}"] for part in PARTS} for name in contestants}
    total = {name: sum(parts.values()) for name, parts in seconds.items()}
    return {
        "seconds_of": seconds,
        "total_s": total,
        "by_hand_over_this": {name: total["by hand"] / total[name] for name in total},
        "absent": absent,
        "layer_backend": backend,
        "layer_s": median["layer"],
        "routing_of_layer": total[backend] / median["layer"] if backend in total else None,
        "threads": torch.get_num_threads(),
    }


def layer_of(e: int, k: int, settings: Settings) -> MoELayer:
    """An MoE layer of these sizes with random weights."""
    moe = MoEConfig(n_experts=e, k=k, d_expert=settings.d_expert)
    layer = MoELayer(ModelConfig(d_model=settings.width, moe=moe), moe, RouterConfig())
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return layer.to(settings.device)


def by_hand(logits: Tensor, k: int, y_ND: Tensor) -> dict[str, Function]:
    """softmax, topk; argsort, bincount; index_select, weigh, sum."""
    n_tokens, n_experts = logits.shape
    weight, expert = gate_by_hand(logits, k)
    _, slot, _, _ = plan_by_hand(expert, n_experts)

    def plan() -> Any:
        flat = expert.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return order, inverse, torch.bincount(flat, minlength=n_experts)

    def combine() -> Tensor:
        return (y_ND.index_select(0, slot).view(n_tokens, k, -1) * weight[:, :, None]).sum(1)

    return {"gate": lambda: gate_by_hand(logits, k), "plan": plan, "combine": combine}


def of_reference(logits: Tensor, k: int, y_ND: Tensor) -> dict[str, Function]:
    """The definition: sort, sort, add row by row."""
    expert, weight, _, _ = reference.gate(logits, k, "softmax")
    token_N, expert_N, weight_N = rows(None, expert, weight)
    order_N, _, _ = reference.plan(expert_N, logits.shape[1])

    def combine() -> Tensor:
        out = y_ND.new_zeros(len(logits), y_ND.shape[1])
        return out.index_add(0, token_N[order_N], y_ND * weight_N[order_N, None])

    return {
        "gate": lambda: reference.gate(logits, k, "softmax"),
        "plan": lambda: reference.plan(expert_N, logits.shape[1]),
        "combine": combine,
    }


def of_torch(logits: Tensor, k: int, y_ND: Tensor) -> dict[str, Function]:
    """dispatch=torch: the reference's gate, slots at multiples, and a sum by embedding_bag."""
    expert, weight, _, _ = reference.gate(logits, k, "softmax")
    token_N, expert_N, weight_N = rows(None, expert, weight)
    # The rows of every contestant lie as the plan has them; here some slots between experts are empty.
    slot_N, _, n_slots = grouped.slots(expert_N, logits.shape[1])
    _, dense_N, _ = reference.plan(expert_N, logits.shape[1])
    y_RD = y_ND.new_zeros(n_slots, y_ND.shape[1]).index_copy_(0, slot_N, y_ND[dense_N])
    return {
        "gate": lambda: reference.gate(logits, k, "softmax"),
        "plan": lambda: grouped.slots(expert_N, logits.shape[1]),
        "combine": lambda: grouped.combine(y_RD, slot_N, token_N, weight_N, len(logits)),
    }


def of_triton(logits: Tensor, k: int, y_ND: Tensor) -> dict[str, Function]:
    """dispatch=triton: one kernel each, three for the plan."""
    from kernels import combine, gate, plan  # here, because Triton is not everywhere

    expert, weight, _, _ = gate.gate(logits, k, "softmax")
    where = plan.plan(expert, None, logits.shape[1], 128)
    return {
        "gate": lambda: gate.gate(logits, k, "softmax"),
        "plan": lambda: plan.plan(expert, None, logits.shape[1], 128),
        "combine": lambda: combine.combine(y_ND, where.slot_N, weight.flatten(), None, where.offset_E1, len(logits)),
    }


BUILD = {"reference": of_reference, "torch": of_torch, "triton": of_triton}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row: gate, plan and combine together, and their speed over the sequence by hand."""
    head = f"{row['T']:,}", str(row["E"]), str(row["K"])
    if row["status"] != "measured":
        return *head, row["status"], *[""] * 6, row["error"][:60]
    words = [f"{1e6 * row['total_s']['by hand']:,.0f}"]
    for backend in BACKENDS:
        seconds = row["total_s"].get(backend)
        words.append(tables.number(None if seconds is None else 1e6 * seconds, ",.0f"))
        words.append(tables.number(row["by_hand_over_this"].get(backend), ".2f", "×"))
    return *head, *words, tables.number(row["routing_of_layer"], ".0%")
