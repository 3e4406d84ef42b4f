"""The experts on ordinary matmuls, one per expert: the fast path wherever there is no GPU.

One autograd function. Forward gathers the rows into slots in expert order, multiplies expert by expert, and combines;
it keeps x, the pre-activation z and the routing, and recomputes the rest. Backward writes each expert's weight gradient
into its own place of one tensor (indexing `w[e]` under autograd would allocate a full-size zero gradient per expert).
Registered with torch.library, so `torch.compile` sees two opaque ops and no graph break. Shapes and meaning as in
`reference.experts`.

Letters: R slots, which are room for the N rows and what lies empty between the experts' (`slots`).
"""

from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fp8, operands, reference
from kernels.form import Form, form_of

NAME = "dispatch=torch"

Matrices: TypeAlias = Any  # a stack (E, N, M), a tensor or what gives a matrix when it is asked for one
Span = tuple[int, int, int]  # an expert, its first slot, its last slot + 1


@torch.library.custom_op("switchyard::grouped_experts", mutates_args=())
def _forward(
    x_TD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, weight_N: Tensor, b_up_EF: Tensor | None,
    b_down_ED: Tensor | None, token_N: Tensor, slot_N: Tensor, offset_E1: Tensor, n_slots: int, activation: str,
    interleaved: bool, alpha: float, limit: float, shift: float, weigh_input: bool, fp8: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layer's output and z, which has no rows unless it is kept for the backward."""
    tensors = (x_TD, w_up_EFD, w_down_EDF, weight_N, b_up_EF, b_down_ED, token_N, slot_N)
    form = Form(activation, interleaved, alpha, limit, shift, weigh_input, fp8)
    return forward(spans(offset_E1), *tensors, n_slots, form, keep_z)


def forward(
    spans: list[Span], x_TD: Tensor, w_up_EFD: Matrices, w_down_EDF: Matrices, weight_N: Tensor, b_up_EF: Tensor | None,
    b_down_ED: Tensor | None, token_N: Tensor, slot_N: Tensor, n_slots: int, form: Form, keep_z: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `_forward` computes, with the experts' slots told by the host: so its memory can be walked without data."""
    # Up and its bias: z is what backward will read, before a weight on the input multiplies it.
    end = spans[-1][2] if spans else 0
    x_RD = x_TD.index_select(0, _to_slots(token_N, slot_N, n_slots))
    z_RF = x_TD.new_empty(n_slots, w_up_EFD.shape[1])
    for e, lo, hi in spans:
        x, w = fp8.operands(x_RD[lo:hi], w_up_EFD[e], form)
        torch.mm(x, w.T, out=z_RF[lo:hi])
        if b_up_EF is not None:
            z_RF[lo:hi] += b_up_EF[e]
    z_RF[end:] = 0
    weighed = z_RF * _to_slots(weight_N, slot_N, n_slots)[:, None].to(z_RF.dtype) if form.weigh_input else z_RF

    # Down, its bias, and each token's sum.
    h_RF, y_RD = reference.activate(weighed, form), torch.empty_like(x_RD)
    for e, lo, hi in spans:
        h, w = fp8.operands(h_RF[lo:hi], w_down_EDF[e], form)
        torch.mm(h, w.T, out=y_RD[lo:hi])
        if b_down_ED is not None:
            y_RD[lo:hi] += b_down_ED[e]
    y_RD[end:] = 0
    out_TD = combine(y_RD, slot_N, token_N, None if form.weigh_input else weight_N, len(x_TD))
    return out_TD, z_RF if keep_z else z_RF.new_empty(0, z_RF.shape[1])


@_forward.register_fake
def _(x_TD, w_up_EFD, w_down_EDF, weight_N, b_up, b_down, token_N, slot_N, offset_E1, n_slots, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TD), x_TD.new_empty(n_slots if rest[-1] else 0, w_up_EFD.shape[1])


@torch.library.custom_op("switchyard::grouped_experts_backward", mutates_args=())
def _backward(
    dout_TD: Tensor, x_TD: Tensor, z_RF: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, weight_N: Tensor,
    b_up_EF: Tensor | None, b_down_ED: Tensor | None, token_N: Tensor, slot_N: Tensor, offset_E1: Tensor,
    activation: str, interleaved: bool, alpha: float, limit: float, shift: float, weigh_input: bool, fp8: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients that are asked for, and nothing in the place of the others."""
    tensors = (dout_TD, x_TD, z_RF, w_up_EFD, w_down_EDF, weight_N, b_up_EF, b_down_ED, token_N, slot_N)
    form = Form(activation, interleaved, alpha, limit, shift, weigh_input, fp8)
    return backward(spans(offset_E1), *tensors, form, wanted)


def backward(
    spans: list[Span], dout_TD: Tensor, x_TD: Tensor, z_RF: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor,
    weight_N: Tensor, b_up_EF: Tensor | None, b_down_ED: Tensor | None, token_N: Tensor, slot_N: Tensor, form: Form,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `_backward` computes, with the experts' slots told by the host; `wanted`: of x, w_up, w_down, the rows'
    weights, b_up and b_down, whose gradients."""
    for_x, for_up, for_down, for_weight, for_b_up, for_b_down = wanted
    end = spans[-1][2] if spans else 0
    token_R = _to_slots(token_N, slot_N, len(z_RF))
    # Empty slots read token 0 and weigh nothing: whatever they compute, they add zero to every gradient.
    weight_R1 = _to_slots(weight_N, slot_N, len(z_RF))[:, None].to(x_TD.dtype)
    dout_RD = dout_TD.index_select(0, token_R)

    # Through down and the activation. Of the unweighted output; 0 for rows with no expert.
    dh_RF = torch.zeros_like(z_RF[:, : w_down_EDF.shape[2]])
    if for_x or for_up or for_weight or for_b_up:
        for e, lo, hi in spans:
            torch.mm(dout_RD[lo:hi], w_down_EDF[e], out=dh_RF[lo:hi])
    if form.weigh_input:  # the weight's gradient is that of z's factor
        h_RF, dfactor_RF = _activate_backward(z_RF * weight_R1, dh_RF, form)
        dz_RF, dweight_of, factor_R1 = dfactor_RF * weight_R1, (dfactor_RF, z_RF), None
    else:
        h_RF, dz_RF = _activate_backward(z_RF, dh_RF * weight_R1, form)
        dweight_of, factor_R1 = (dh_RF, h_RF), weight_R1
    weighed = lambda side: side if factor_R1 is None else side * factor_R1  # what leaves an expert

    # What is wanted of the rest.
    likes = (x_TD, w_up_EFD, w_down_EDF, weight_N, b_up_EF, b_down_ED)
    dx_TD, dw_up_EFD, dw_down_EDF, dweight_N, db_up_EF, db_down_ED = operands.gradients_like(likes, (False,) * 6)
    if for_weight:
        dweight_R = torch.linalg.vecdot(*(side.to(weight_N.dtype) for side in dweight_of))
        if b_down_ED is not None and not form.weigh_input:
            for e, lo, hi in spans:
                dweight_R[lo:hi] += (dout_RD[lo:hi] @ b_down_ED[e]).to(weight_N.dtype)
        dweight_N = dweight_R.index_select(0, slot_N)
    if for_down:
        dw_down_EDF = _weight_gradient(dout_RD, weighed(h_RF), w_down_EDF, spans)
    if for_up:
        dw_up_EFD = _weight_gradient(dz_RF, x_TD.index_select(0, token_R), w_up_EFD, spans)
    if for_b_up:
        db_up_EF = _bias_gradient(dz_RF, w_up_EFD.shape[:2], spans)
    if for_b_down:
        db_down_ED = _bias_gradient(weighed(dout_RD), w_down_EDF.shape[:2], spans)
    if for_x:
        dx_RD = torch.empty_like(dout_RD)
        for e, lo, hi in spans:
            torch.mm(dz_RF[lo:hi], w_up_EFD[e], out=dx_RD[lo:hi])
        dx_RD[end:] = 0
        dx_TD = combine(dx_RD, slot_N, token_N, None, len(x_TD))
    return dx_TD, dw_up_EFD, dw_down_EDF, dweight_N, db_up_EF, db_down_ED


@_backward.register_fake
def _(dout_TD, x_TD, z_RF, w_up_EFD, w_down_EDF, weight_N, b_up_EF, b_down_ED, token_N, *rest):  # type: ignore[no-untyped-def]
    return operands.gradients_like((x_TD, w_up_EFD, w_down_EDF, weight_N, b_up_EF, b_down_ED), rest[-1])


def _weight_gradient(p: Tensor, q: Tensor, w: Tensor, spans: list[Span]) -> Tensor:
    """p^T q over every expert's slots, written in its place of one tensor like w; 0 for an expert without rows."""
    dw = torch.empty_like(w)
    if without := sorted(set(range(len(w))) - {e for e, _, _ in spans}):
        dw[without] = 0
    for e, lo, hi in spans:
        torch.mm(p[lo:hi].T, q[lo:hi], out=dw[e])
    return dw


def _bias_gradient(p: Tensor, size: torch.Size, spans: list[Span]) -> Tensor:
    """p summed over every expert's slots; 0 for an expert without rows."""
    db = p.new_zeros(size)
    for e, lo, hi in spans:
        torch.sum(p[lo:hi], 0, out=db[e])
    return db


def slots(expert_N: Tensor, n_experts: int) -> tuple[Tensor, Tensor, int]:
    """A slot for every routed row: (N,) -> slot (N,), offset (E + 1,), how many slots to allocate.

    `reference.plan` with every expert's first slot at a multiple of a power of two, at most 32 and an eighth of an
    expert's mean rows: a CPU's matmul library compiles a kernel per shape, and loads differ at every step. Slots
    between an expert's last row and the next expert's first are empty."""
    operands.ids("slots", expert_N)
    align = 1
    while align < 32 and 16 * align * n_experts <= len(expert_N):
        align *= 2
    _, slot_N, offset_E1 = reference.plan(expert_N, n_experts)
    count_E = offset_E1.diff()
    aligned_E1 = F.pad(((count_E + align - 1) // align * align).cumsum(0), (1, 0))
    key_N = torch.where(expert_N < 0, n_experts, expert_N)
    return slot_N + (aligned_E1 - offset_E1)[key_N], aligned_E1, len(expert_N) + n_experts * (align - 1)


def _to_slots(value_N: Tensor, slot_N: Tensor, n_slots: int) -> Tensor:
    """Every row's value in its slot, 0 in the others."""
    return value_N.new_zeros(n_slots).index_copy_(0, slot_N, value_N)


def spans(offset_E1: Tensor) -> list[Span]:
    """Of every expert with rows: offsets as `slots` gives them, which the host waits for here."""
    return [(e, lo, hi) for e, (lo, hi) in enumerate(pairwise(offset_E1.tolist())) if lo < hi]


def combine(y_RD: Tensor, slot_N: Tensor, token_N: Tensor, weight_N: Tensor | None, n_tokens: int) -> Tensor:
    """Each token's sum of its rows' slots, weighted or not, in float32 at least; rows come in token order."""
    start_T = operands.starts(token_N, n_tokens)[:-1]
    weight = None if weight_N is None else weight_N.to(y_RD.dtype)
    return F.embedding_bag(slot_N, y_RD, start_T, mode="sum", per_sample_weights=weight)


def _activate_backward(z: Tensor, dh: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """h and dL/dz from z and dL/dh."""
    match form.activation:
        case "swiglu":
            (gate, up), dz = reference.gates(z, form), torch.empty_like(z)
            dgate, dup = reference.gates(dz, form)
            if (form.alpha, form.limit, form.shift) == (1, 0, 0):
                silu = F.silu(gate)
                dgate.copy_(torch.ops.aten.silu_backward(dh * up, gate))
                torch.mul(dh, silu, out=dup)
                return silu * up, dz
            low, middle = gate, up
            if form.limit:
                low, middle = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
            share = torch.sigmoid(form.alpha * low)
            slope = share * (1 + form.alpha * low * (1 - share))
            dgate.copy_(torch.where(gate <= low, dh * (middle + form.shift) * slope, 0))
            dup.copy_(torch.where(up == middle, dh * low * share, 0))
            return low * share * (middle + form.shift), dz
        case "gelu" | "gelu_tanh":
            approximate = "tanh" if form.activation == "gelu_tanh" else "none"
            return F.gelu(z, approximate=approximate), torch.ops.aten.gelu_backward(dh, z, approximate=approximate)
    assert form.activation == "relu2"
    positive = F.relu(z)
    return positive.square(), 2 * positive * dh


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, _, activation, interleaved, alpha, limit, shift, weigh_input, fp8, keep_z = inputs
    assert keep_z, "a gradient is wanted of a layer that did not keep z"
    ctx.form = (activation, interleaved, alpha, limit, shift, weigh_input, fp8)
    ctx.save_for_backward(tensors[0], output[1], *tensors[1:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or an (R, F) tensor of zeros would be made for z


def _autograd_backward(ctx, dout_TD, dz_RF):  # type: ignore[no-untyped-def]
    wanted, rest = list(ctx.needs_input_grad[:6]), [None] * (len(ctx.needs_input_grad) - 6)
    if dout_TD is None:
        return *[None] * 6, *rest
    computed = _backward(dout_TD.contiguous(), *ctx.saved_tensors, *ctx.form, wanted)
    return *(gradient if want else None for gradient, want in zip(computed, wanted, strict=True)), *rest


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def experts(
    x_TD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    form: Form | str,
    b_up_EF: Tensor | None = None,
    b_down_ED: Tensor | None = None,
) -> Tensor:
    """`reference.experts` with one sort and no per-expert gradient copies. `token_N` must be ascending.

    Under autocast, x, the weights and the biases are rounded to its dtype first; sums accumulate in float32. Raises
    `ValueError` for operands of other types and shapes, in a debug build (TRITON_DEBUG=1) for wrong rows too, and
    `NotImplementedError` for forward-mode derivatives."""
    form = form_of(form)
    x_TD, w_up_EFD, w_down_EDF, b_up_EF, b_down_ED = operands.under_autocast(
        x_TD, w_up_EFD, w_down_EDF, b_up_EF, b_down_ED
    )
    operands.layer(NAME, x_TD, w_up_EFD, w_down_EDF, token_N, expert_N, weight_N, form, b_up_EF, b_down_ED)
    floats = (x_TD, w_up_EFD, w_down_EDF, weight_N, b_up_EF, b_down_ED)
    operands.refuse_tangents(NAME, *floats)
    expert_N = operands.rows(NAME, expert_N, token_N, len(x_TD), len(w_up_EFD))
    where = slots(expert_N, len(w_up_EFD))
    return _forward(*floats, token_N, *where, *form, operands.wants_gradient(*floats))[0]
