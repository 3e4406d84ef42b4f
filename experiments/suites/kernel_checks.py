"""Whether each kernel computes what the reference says: gate, plan, combine and the five uses of the matmuls.

As `experiments/suites/layer_checks.py`, and into the same file, kernel by kernel, so that a wrong layer has a culprit.

    python -m experiments.gpu_evidence --out DIR --stage correctness    # a row per check -> DIR/gpu-correctness.jsonl
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from experiments.suites.cases import Case, Wrong
from experiments.suites.layer_checks import DTYPES, Layer, Settings, draw, multiplying, poisoned, routed, verdict
from experiments.suites.shapes import Shape
from kernels import quantized, reference, tuning
from kernels.quantized import FORMATS
from moe.routing.contract import rows

# score, selection bias, renormalised, (groups, groups kept): as the router's settings
GATES = (
    ("softmax", False, True, (1, 1)),
    ("softmax", False, False, (1, 1)),
    ("sigmoid", True, True, (1, 1)),
    ("sigmoid", True, True, (4, 2)),
    ("softmax", False, True, (4, 2)),
    ("sqrt_softplus", True, True, (1, 1)),
)


def cases(settings: Settings) -> Iterator[Case]:
    """Small to large."""

    def case(op: str, shape: Shape, kind: str, function: Any, *arguments: Any, load: str = "uniform") -> Case:
        key = {"suite": "correctness", "check": "kernel", "op": op, **shape._asdict(), "dtype": kind, "load": load}
        return Case(key, functools.partial(function, settings, shape, kind, *arguments))

    # The matmuls in every type, at sizes that are copied in blocks and at some that are not.
    regular, odd = settings.regular, settings.odd
    for shape in (regular, odd):
        for kind in settings.dtypes:
            yield case("matmuls", shape, kind, check_matmuls)

    # The plan, which is exact: every load, then no token, one and few.
    for load in settings.loads:
        yield case("plan", regular, "", check_plan, load, load=load)
    for t in settings.tokens:
        yield case("plan", regular._replace(T=t), "", check_plan, "uniform")

    # The gate in the types it takes: every kind of score, then sizes that leave a program part empty.
    for kind in ("bf16", "fp16", "fp32", "fp64"):
        for gate in GATES:
            name = f"gate {gate[0]}{' biased' * gate[1]}{' renormalised' * gate[2]}{' in groups' * (gate[3][0] > 1)}"
            yield case(name, regular, kind, check_gate, gate)
    for shape in (
        odd,
        regular._replace(T=0),
        regular._replace(T=1),
        regular._replace(E=3 * regular.E, K=regular.K + 1),
    ):
        yield case("gate softmax renormalised", shape, "fp32", check_gate, GATES[0])

    # Combine with as many rows for every token, and with a list of them.
    for kind in settings.dtypes:
        for load in ("uniform", "ragged"):
            yield case("combine", odd, kind, check_combine, load, load=load)

    # Experts that are stored in fewer bits.
    for name in FORMATS:
        yield case(f"stored in {name}", regular, "bf16", check_stored, name, load="zipf")


def check_gate(settings: Settings, shape: Shape, kind: str, gate_of: tuple[Any, ...]) -> dict[str, Any]:
    """Choices, weights, log-sum-exp, summed probabilities and the logits' gradient, against float64. Two scores that
    round to the same may be chosen in either order: such tokens are counted and left out."""
    from kernels import gate  # here, because Triton is not everywhere

    (score, biased, renormalize, (groups, k_groups)), dtype = gate_of, DTYPES[kind][0]
    torch.manual_seed(3)
    logits = torch.randn(shape.T, shape.E, device=settings.device, dtype=dtype).requires_grad_()
    bias = torch.randn(shape.E, device=settings.device, dtype=dtype) * 0.1 if biased else None
    arguments = (shape.K, score, bias, renormalize, 1.5, groups, k_groups)
    with poisoned():
        got = gate.gate(logits, *arguments)
    exact = logits.detach().double().requires_grad_()
    bias64 = None if bias is None else bias.double()
    want = reference.gate(exact, shape.K, score, bias64, renormalize, 1.5, groups, k_groups)
    theirs = reference.gate(leaf := logits.detach().requires_grad_(), *arguments)
    swapped = (got[0] != want[0]).any(1)
    if swapped.sum() > 1e-3 * shape.T:
        raise Wrong(f"other experts than the reference for {swapped.sum().item()} of {shape.T} tokens")
    weight = torch.where(swapped[:, None], want[1].to(dtype), got[1])
    results = [weight, got[2], got[3], *_gradient(got, logits, swapped)]
    expected = [want[1], want[2], want[3], *_gradient(want, exact, swapped)]
    names = ("weight", "log-sum-exp", "probability", "dlogits")
    other = [theirs[1], theirs[2], theirs[3], *_gradient(theirs, leaf, swapped)]
    return verdict(settings, kind, names, results, expected, other) | {"swapped": swapped.sum().item()}


def _gradient(outputs: tuple[Tensor, ...], logits: Tensor, swapped: Tensor) -> list[Tensor]:
    """Of all three float outputs, with fixed directions; zero for tokens whose experts are in another order."""
    torch.manual_seed(4)
    directions = [
        torch.randn(output.shape, dtype=torch.float64, device=output.device).to(output.dtype) for output in outputs[1:]
    ]
    (gradient,) = torch.autograd.grad(outputs[1:], logits, directions)
    return [torch.where(swapped[:, None], 0.0, gradient)]


def check_plan(settings: Settings, shape: Shape, kind: str, load: str) -> dict[str, Any]:
    """Both maps, tokens, offsets and the schedule, exactly, for tiles of two heights."""
    from kernels import plan

    # What the reference says, of any height of tiles.
    expert, token_N = routed(shape, load, settings.device)
    tokens, expert_N, _ = rows(token_N, expert, expert)
    order, slot, offset = reference.plan(expert_N, shape.E)
    live = int(offset[-1])
    for block_m in (32, 128):
        with poisoned():
            got = plan.plan(expert, token_N, shape.E, block_m)
        # The schedule by its definition, then part by part; behind the last expert's slots there is nothing to compare.
        schedule = [
            (e, first)
            for e in range(shape.E)
            for first in range(int(offset[e]), int(offset[e + 1]), block_m)
        ]  # fmt: skip
        n = len(schedule)
        same = {
            "slots": torch.equal(got.slot_N.long(), slot),
            "rows": torch.equal(got.row_N.long(), order),
            "tokens": torch.equal(got.token_N.long()[:live], tokens[order][:live]),
            "offsets": torch.equal(got.offset_E1.long(), offset),
            "tile count": got.tile_count.tolist() == [n],
            "schedule": list(zip(got.tile_expert_J[:n].tolist(), got.tile_slot_J[:n].tolist(), strict=True))
            == schedule,
        }
        if not all(same.values()):
            raise Wrong(f"{', '.join(name for name, equal in same.items() if not equal)} differ, block_m={block_m}")
    return {}


def check_combine(settings: Settings, shape: Shape, kind: str, load: str) -> dict[str, Any]:
    """Weighted and plain sums of rows in slots; rows without an expert hold NaN and count for nothing."""
    from kernels import combine, plan

    # Rows in slots, some without an expert: those lie last.
    dtype, device = DTYPES[kind][0], settings.device
    expert, token_N = routed(shape, "ragged" if load == "ragged" else "dropped", device)
    where = plan.plan(expert, token_N, shape.E, 32)
    tokens, expert_N, _ = rows(token_N, expert, expert)
    torch.manual_seed(5)
    y = torch.randn(len(expert_N), shape.D, device=device).to(dtype)
    y[int(where.offset_E1[-1]) :] = torch.nan
    weight = torch.rand(len(expert_N), device=device, dtype=torch.promote_types(dtype, torch.float32))
    start = None
    if token_N is not None:
        start = torch.searchsorted(token_N, torch.arange(shape.T + 1, device=device))

    # Weighted, then plain: ours, the same sums in float64, and in the type as torch adds them.
    live = (expert_N >= 0).nonzero().squeeze(1)
    results: list[Tensor] = []
    expected: list[Tensor] = []
    other: list[Tensor] = []
    for factor in (weight, None):
        with poisoned():
            results.append(combine.combine(y, where.slot_N, factor, start, where.offset_E1, shape.T))
        for kept, number in ((expected, torch.float64), (other, torch.promote_types(dtype, torch.float32))):
            picked = y[where.slot_N[live].long()].to(number)
            picked = picked if factor is None else picked * factor[live, None].to(number)
            sums = torch.zeros(shape.T, shape.D, device=device, dtype=number).index_add_(0, tokens[live], picked)
            kept.append(sums if kept is expected else sums.to(dtype))
    return verdict(settings, kind, ("weighted", "plain"), results, expected, other)


def check_matmuls(settings: Settings, shape: Shape, kind: str) -> dict[str, Any]:
    """up, down, dh, dx and both weight gradients on one plan with dropped rows, each from the reference's inputs
    rounded to the type; beside them the same sums in the type by torch."""
    from kernels import plan, ragged_mm
    from kernels.ragged_wgrad import ragged_wgrad

    # Operands and a plan.
    dtype, tf32, _ = DTYPES[kind]
    layer = draw(shape, settings.device, kind, "dropped")
    tile = lambda use: tuning.tile(use, settings.device, dtype, tf32, layer.expert.numel(), shape.E)
    where = plan.plan(layer.expert, None, shape.E, tile("up").block_m)
    operands = (layer.x_TD, layer.w_up_EFD, layer.w_down_EDF, layer.dout_TD, layer.weight.flatten())
    x, w_up, w_down, dout, weight = (operand.detach() for operand in operands)

    # What every use should give, in float64; and torch's from the same rounded inputs, for the bound.
    exact = expert_by_expert(shape, where, *(operand.double() for operand in (x, w_up, w_down, dout, weight)))
    z, h, dz, wh = (exact[name].to(dtype) for name in ("z", "h", "dz", "wh"))
    with multiplying(tf32):
        theirs = expert_by_expert(shape, where, x, w_up, w_down, dout, weight, z)

    # Ours, each use from the exact inputs of that use; only slots of an expert are compared, d(weight) in slots too.
    live = int(where.offset_E1[-1])
    with poisoned():
        got_z, got_h = ragged_mm.up(x, w_up, where, "swiglu", tile("up"), tf32)
        got_y = ragged_mm.down(h, w_down, where, tile("down"), tf32)
        got_dz, got_wh, dweight = ragged_mm.dh(dout, w_down, z, weight, where, "swiglu", tile("dh"), tf32)
        got_dx = ragged_mm.dx(dz, w_up, where, tile("dx"), tf32)
        dw_down = ragged_wgrad(dout, wh, where, True, shape.E, tile("wgrad"), tf32)
        dw_up = ragged_wgrad(dz, x, where, False, shape.E, tile("wgrad"), tf32)
    by_slot = dweight[where.row_N[:live].long()]
    got = {"z": got_z, "h": got_h, "y": got_y, "dz": got_dz, "wh": got_wh, "dx": got_dx}
    results = {name: rows_in_slots[:live] for name, rows_in_slots in got.items()}
    results |= {"dweight": by_slot, "dw_down": dw_down, "dw_up": dw_up}
    names = tuple(results)
    pick = lambda tensors: [tensors[name][:live] if name in got else tensors[name] for name in names]
    return verdict(settings, kind, names, list(results.values()), pick(exact), pick(theirs))


def expert_by_expert(
    shape: Shape,
    where: Any,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    dout: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every intermediate of forward and backward in slots, one expert after another, in the operands' type; backward
    from `z` where given."""
    n, f = len(where.row_N), shape.F
    new = lambda width: x.new_zeros(n, width)
    tensors = {"z": new(2 * f), "h": new(f), "y": new(shape.D), "dz": new(2 * f), "wh": new(f), "dx": new(shape.D)}
    tensors |= {"dweight": weight.new_zeros(int(where.offset_E1[-1]))}
    tensors |= {"dw_down": torch.zeros_like(w_down), "dw_up": torch.zeros_like(w_up)}
    bounds = where.offset_E1.tolist()
    for e, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        at, token = slice(lo, hi), where.token_N[lo:hi].long()
        w = weight[where.row_N[lo:hi].long()][:, None]
        tensors["z"][at] = x[token] @ w_up[e].T
        leaf = (tensors["z"] if z is None else z)[at].detach().requires_grad_()
        h = reference.activate(leaf, "swiglu")
        tensors["h"][at] = reference.activate(tensors["z"][at], "swiglu")
        tensors["y"][at] = h.detach() @ w_down[e].T
        dh = dout[token] @ w_down[e]
        (tensors["dz"][at],) = torch.autograd.grad(h, leaf, (dh.to(w.dtype) * w).to(h.dtype))
        tensors["wh"][at] = (h.detach() * w).to(h.dtype)
        tensors["dweight"][at] = (dh * h.detach()).to(w.dtype).sum(1)
        tensors["dx"][at] = tensors["dz"][at] @ w_up[e]
        tensors["dw_down"][e] = dout[token].T @ tensors["wh"][at]
        tensors["dw_up"][e] = tensors["dz"][at].T @ x[token]
    return tensors


def check_stored(settings: Settings, shape: Shape, kind: str, name: str) -> dict[str, Any]:
    """Forward alone, of weights in a format of kernels/quantized.py, whose groups are of up to 32."""
    layer = draw(shape._replace(D=-(-shape.D // 32) * 32, F=-(-shape.F // 32) * 32), settings.device, kind, "zipf")
    w_up, w_down = (FORMATS[name](w.detach()) for w in (layer.w_up_EFD, layer.w_down_EDF))

    def output(layer: Layer, dispatch: str) -> Tensor:
        rows = (None, layer.expert, layer.weight.detach())
        return quantized.experts(layer.x_TD.detach(), w_up, w_down, *rows, layer.activation, dispatch=dispatch)[0]

    want, theirs = output(layer.of(torch.float64), "reference"), output(layer, "torch")
    with poisoned():
        got = output(layer, "triton")
    return verdict(settings, kind, ("y",), (got,), (want,), (theirs,))
