"""The experts on ordinary matmuls, one per expert: the fast path wherever there is no GPU.

One autograd function. Forward gathers the rows into expert order, multiplies expert by expert, and combines; it keeps
x, the pre-activation z and the routing, and recomputes the rest. Backward writes each expert's weight gradient into its
own place of one tensor (indexing `w[e]` under autograd would allocate a full-size zero gradient per expert). Registered
with torch.library, so `torch.compile` sees two opaque ops and no graph break. Shapes and meaning as in
`reference.experts`.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference


@torch.library.custom_op("switchyard::grouped_experts", mutates_args=())
def _forward(
    x_TD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    weight_N: Tensor,
    token_N: Tensor,
    order_N: Tensor,
    slot_N: Tensor,
    offset_E1: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    spans = _spans(offset_E1)
    x_ND = x_TD.index_select(0, token_N[order_N])
    z_NF = x_TD.new_empty(len(order_N), w_up_EFD.shape[1])
    for e, lo, hi in spans:
        torch.mm(x_ND[lo:hi], w_up_EFD[e].T, out=z_NF[lo:hi])
    z_NF[offset_E1[-1] :] = 0  # rows with no expert
    h_NF, y_ND = reference.activate(z_NF, activation), torch.zeros_like(x_ND)
    for e, lo, hi in spans:
        torch.mm(h_NF[lo:hi], w_down_EDF[e].T, out=y_ND[lo:hi])
    return _combine(y_ND, slot_N, token_N, weight_N, len(x_TD)), z_NF


@_forward.register_fake
def _(x_TD, w_up_EFD, w_down_EDF, weight_N, token_N, order_N, slot_N, offset_E1, activation):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TD), x_TD.new_empty(order_N.shape[0], w_up_EFD.shape[1])


@torch.library.custom_op("switchyard::grouped_experts_backward", mutates_args=())
def _backward(
    dout_TD: Tensor,
    x_TD: Tensor,
    z_NF: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    weight_N: Tensor,
    token_N: Tensor,
    order_N: Tensor,
    slot_N: Tensor,
    offset_E1: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spans, n_experts = _spans(offset_E1), len(w_up_EFD)
    source_N = token_N[order_N]
    x_ND, dout_ND = x_TD.index_select(0, source_N), dout_TD.index_select(0, source_N)
    dw_up_EFD, dw_down_EDF = torch.empty_like(w_up_EFD), torch.empty_like(w_down_EDF)
    for e in set(range(n_experts)) - {e for e, _, _ in spans}:
        dw_up_EFD[e], dw_down_EDF[e] = 0, 0
    dh_NF = torch.zeros_like(z_NF[:, : w_down_EDF.shape[2]])  # of the unweighted output; 0 for rows with no expert
    for e, lo, hi in spans:
        torch.mm(dout_ND[lo:hi], w_down_EDF[e], out=dh_NF[lo:hi])
    weight_N1 = weight_N.index_select(0, order_N)[:, None].to(x_TD.dtype)
    h_NF, dz_NF = _activate_backward(z_NF, dh_NF * weight_N1, activation)
    dweight_N = torch.linalg.vecdot(dh_NF.to(weight_N.dtype), h_NF.to(weight_N.dtype)).index_select(0, slot_N)
    h_NF = h_NF * weight_N1
    dx_ND = torch.zeros_like(x_ND)
    for e, lo, hi in spans:
        torch.mm(dout_ND[lo:hi].T, h_NF[lo:hi], out=dw_down_EDF[e])
        torch.mm(dz_NF[lo:hi].T, x_ND[lo:hi], out=dw_up_EFD[e])
        torch.mm(dz_NF[lo:hi], w_up_EFD[e], out=dx_ND[lo:hi])
    return _combine(dx_ND, slot_N, token_N, None, len(x_TD)), dw_up_EFD, dw_down_EDF, dweight_N


@_backward.register_fake
def _(dout_TD, x_TD, z_NF, w_up_EFD, w_down_EDF, weight_N, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TD), torch.empty_like(w_up_EFD), torch.empty_like(w_down_EDF), torch.empty_like(weight_N)


def _spans(offset_E1: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first slot, last slot + 1) of every expert with rows."""
    return [(e, lo, hi) for e, (lo, hi) in enumerate(pairwise(offset_E1.tolist())) if lo < hi]


def _combine(y_ND: Tensor, slot_N: Tensor, token_N: Tensor, weight_N: Tensor | None, n_tokens: int) -> Tensor:
    """Each token's sum of its rows' slots, weighted or not, in float32 at least; rows come in token order."""
    start_T = torch.searchsorted(token_N, torch.arange(n_tokens, device=token_N.device))
    weight = None if weight_N is None else weight_N.to(y_ND.dtype)
    return F.embedding_bag(slot_N, y_ND, start_T, mode="sum", per_sample_weights=weight)


def _activate_backward(z: Tensor, dh: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """h and dL/dz from z and dL/dh."""
    match activation:
        case "swiglu":
            (gate, up), dz = z.chunk(2, dim=-1), torch.empty_like(z)
            silu, width = F.silu(gate), z.shape[-1] // 2
            dz[:, :width] = torch.ops.aten.silu_backward(dh * up, gate)
            torch.mul(dh, silu, out=dz[:, width:])
            return silu * up, dz
        case "gelu" | "gelu_tanh":
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            return F.gelu(z, approximate=approximate), torch.ops.aten.gelu_backward(dh, z, approximate=approximate)
        case "relu2":
            positive = F.relu(z)
            return positive.square(), 2 * positive * dh
    raise ValueError(f"activation={activation!r}")


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x_TD, w_up_EFD, w_down_EDF, weight_N, token_N, order_N, slot_N, offset_E1, ctx.activation = inputs
    ctx.save_for_backward(x_TD, output[1], w_up_EFD, w_down_EDF, weight_N, token_N, order_N, slot_N, offset_E1)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or an (N, F) tensor of zeros would be made for z


def _autograd_backward(ctx, dout_TD, dz_NF):  # type: ignore[no-untyped-def]
    if dout_TD is None:
        return (None,) * 9
    dx, dw_up, dw_down, dweight = _backward(dout_TD.contiguous(), *ctx.saved_tensors, ctx.activation)
    return dx, dw_up, dw_down, dweight, None, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def experts(
    x_TD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    activation: str,
) -> Tensor:
    """`reference.experts` with one sort and no per-expert gradient copies. `token_N` must be ascending.

    Under autocast, x and the weights are rounded to its dtype first; sums accumulate in float32."""
    kind = x_TD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_TD, w_up_EFD, w_down_EDF = x_TD.to(dtype), w_up_EFD.to(dtype), w_down_EDF.to(dtype)
    order_N, slot_N, offset_E1 = reference.plan(expert_N, len(w_up_EFD))
    out_TD, _ = _forward(x_TD, w_up_EFD, w_down_EDF, weight_N, token_N, order_N, slot_N, offset_E1, activation)
    return out_TD
