"""The experts of an MoE layer on Triton kernels: plan, up, down, combine; and their backward.

One autograd function, registered with torch.library, so that torch.compile sees opaque ops and no graph break. It saves
x, the pre-activation z and the routing: 2 D + 4 K F + O(K) bytes a token in 16 bits for swiglu (z has 2 F columns). y
is never kept and h is recomputed. Shapes and meaning as in `reference.experts`; nothing here waits for the device.
"""

import torch
from torch import Tensor

from kernels import tuning
from kernels.combine import combine
from kernels.gate import refuse_second_derivative
from kernels.plan import Plan, plan
from kernels.ragged_mm import dh, down, dx, up
from kernels.ragged_wgrad import ragged_wgrad

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu2")


@torch.library.custom_op("switchyard::plan", mutates_args=())
def _plan(
    expert: Tensor, token_N: Tensor | None, n_experts: int, dtype: torch.dtype, tf32: bool, even: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Tiles are looked up in here: torch.compile cannot trace the look-up.
    block_m = tuning.block_m(expert.device, dtype, tf32, expert.numel(), n_experts, even)
    with torch.cuda.device_of(expert):  # Triton launches on the current device
        return tuple(plan(expert, token_N, n_experts, block_m))  # type: ignore[return-value]


@_plan.register_fake
def _(expert, token_N, n_experts, dtype, tf32, even=True):  # type: ignore[no-untyped-def]
    n_rows = expert.numel()
    block_m = tuning.block_m(expert.device, dtype, tf32, n_rows, n_experts, even)
    n_tiles = (n_rows + block_m - 1) // block_m + n_experts
    sizes = (n_rows, n_rows, n_rows, n_experts + 1, n_tiles, n_tiles, 1)
    return tuple(torch.empty(size, dtype=torch.int32, device=expert.device) for size in sizes)


@torch.library.custom_op("switchyard::fused_experts", mutates_args=())
def _forward(
    x_TD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, weight_N: Tensor, routing: list[Tensor],
    start_T1: Tensor | None, activation: str, tf32: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    where, tile = Plan(*routing), _tiles(x_TD, weight_N, w_up_EFD, tf32)
    with torch.cuda.device_of(x_TD):
        z, h = up(x_TD, w_up_EFD, where, activation, tile("up"), tf32)
        y_ND = down(h, w_down_EDF, where, tile("down"), tf32)
        return combine(y_ND, where.slot_N, weight_N, start_T1, where.offset_E1, len(x_TD)), z


@_forward.register_fake
def _(x_TD, w_up_EFD, w_down_EDF, weight_N, routing, start_T1, activation, tf32):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TD), x_TD.new_empty(weight_N.numel(), w_up_EFD.shape[1])


@torch.library.custom_op("switchyard::fused_experts_backward", mutates_args=())
def _backward(
    dout_TD: Tensor, x_TD: Tensor, z: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, weight_N: Tensor,
    routing: list[Tensor], start_T1: Tensor | None, activation: str, tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    where, tile = Plan(*routing), _tiles(x_TD, weight_N, w_up_EFD, tf32)
    with torch.cuda.device_of(x_TD):
        dz, h, dweight_N = dh(dout_TD, w_down_EDF, z, weight_N, where, activation, tile("dh"), tf32)
        dw_down_EDF = ragged_wgrad(dout_TD, h, where, True, len(w_up_EFD), tile("wgrad"), tf32)
        del h
        dw_up_EFD = ragged_wgrad(dz, x_TD, where, False, len(w_up_EFD), tile("wgrad"), tf32)
        dx_ND = dx(dz, w_up_EFD, where, tile("dx"), tf32)
        dx_TD = combine(dx_ND, where.slot_N, None, start_T1, where.offset_E1, len(x_TD))
    return dx_TD, dw_up_EFD, dw_down_EDF, dweight_N.view(weight_N.shape)


@_backward.register_fake
def _(dout_TD, x_TD, z, w_up_EFD, w_down_EDF, weight_N, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TD), torch.empty_like(w_up_EFD), torch.empty_like(w_down_EDF), torch.empty_like(weight_N)


def _tiles(x_TD, weight_N, w_up_EFD, tf32):  # type: ignore[no-untyped-def]
    """Use -> tile, for these shapes."""
    shape = (weight_N.numel(), len(w_up_EFD), tuning.is_even(w_up_EFD))
    return lambda use: tuning.tile(use, x_TD.device, x_TD.dtype, tf32, *shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x_TD, w_up_EFD, w_down_EDF, weight_N, routing, start_T1, ctx.activation, ctx.tf32 = inputs
    ctx.save_for_backward(x_TD, output[1], w_up_EFD, w_down_EDF, weight_N, start_T1, *routing)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or a tensor of zeros as large as z would be made for it


def _autograd_backward(ctx, dout_TD, dz):  # type: ignore[no-untyped-def]
    *tensors, start_T1 = (saved := ctx.saved_tensors)[:6]  # once: activation checkpointing unpacks no tensor twice
    routing = list(saved[6:])
    if dout_TD is None:
        return *[None] * 4, [None] * len(routing), None, None, None
    dx_TD, dw_up, dw_down, dweight = _backward(
        dout_TD.contiguous(), *tensors, routing, start_T1, ctx.activation, ctx.tf32
    )
    return dx_TD, dw_up, dw_down, dweight, [None] * len(routing), None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward.register_autograd(refuse_second_derivative)


def experts(
    x_TD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    token_N: Tensor | None,
    expert: Tensor,
    weight: Tensor,
    activation: str,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """`reference.experts` on a GPU: -> the weighted sum (T, D) and the rows of every expert (E,) int64.

    expert and weight are (T, K) with token_N None, or (N,) with token_N (N,) ascending; -1 is no expert. tf32: float32
    may be multiplied in tf32 (10 bits of mantissa), where the GPU's matrix cores do that, instead of exactly. Under
    autocast x and the weights are rounded to its dtype. Raises `ValueError` for operands the kernels do not take."""
    kind = x_TD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_TD, w_up_EFD, w_down_EDF = x_TD.to(dtype), w_up_EFD.to(dtype), w_down_EDF.to(dtype)
    _check(x_TD, w_up_EFD, w_down_EDF, token_N, expert, weight, activation)
    n_tokens, n_experts = len(x_TD), len(w_up_EFD)
    start_T1 = None
    if token_N is not None:
        token_N = token_N.contiguous()
        start_T1 = torch.searchsorted(token_N, torch.arange(n_tokens + 1, device=x_TD.device))
    routing = _plan(expert.contiguous(), token_N, n_experts, x_TD.dtype, tf32, tuning.is_even(w_up_EFD))
    operands = (x_TD.contiguous(), w_up_EFD.contiguous(), w_down_EDF.contiguous(), weight.contiguous())
    out_TD, _ = _forward(*operands, list(routing), start_T1, activation, tf32)
    return out_TD, Plan(*routing).offset_E1.diff().long()


def _check(
    x_TD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, token_N: Tensor | None, expert: Tensor, weight: Tensor,
    activation: str,
) -> None:  # fmt: skip
    """One sentence for what the kernels do not take."""
    # What kind of operands they are, wherever they lie.
    e, d, f = len(w_up_EFD), x_TD.shape[-1], w_down_EDF.shape[-1]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}.")
    if x_TD.dtype not in DTYPES or not x_TD.dtype == w_up_EFD.dtype == w_down_EDF.dtype:
        raise ValueError(
            f"dispatch=triton takes x and both weights in one of bfloat16, float16, float32, float64; they are "
            f"{x_TD.dtype}, {w_up_EFD.dtype}, {w_down_EDF.dtype}. dispatch=reference takes any."
        )
    operands = (x_TD, w_up_EFD, w_down_EDF, expert, weight, token_N)
    devices = {tensor.device for tensor in operands if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"dispatch=triton takes operands on one device; they are on {sorted(map(str, devices))}.")

    # Shapes: of the layer and its weights, then of the routing.
    gate = 2 if activation == "swiglu" else 1
    if x_TD.dim() != 2 or w_up_EFD.shape != (e, gate * f, d) or w_down_EDF.shape != (e, d, f):
        raise ValueError(
            f"dispatch=triton takes x (T, D), w_up (E, {gate}F, D), w_down (E, D, F); they are {tuple(x_TD.shape)}, "
            f"{tuple(w_up_EFD.shape)}, {tuple(w_down_EDF.shape)}."
        )
    rows = (len(x_TD), expert.shape[-1]) if token_N is None else token_N.shape
    if expert.shape != weight.shape or expert.shape != rows:
        raise ValueError(
            f"dispatch=triton takes expert and weight (T, K), or (N,) with token_N (N,); they are "
            f"{tuple(expert.shape)}, {tuple(weight.shape)}, {None if token_N is None else tuple(token_N.shape)}."
        )

    # Sizes that 32-bit addresses and row numbers still reach.
    if gate * f * d >= 2**31:  # an address within one expert's matrix is an int32
        raise ValueError(
            f"dispatch=triton takes experts whose w_up has fewer than 2^31 elements; {gate}F·D is {gate * f * d}."
        )
    if expert.numel() >= 2**31:
        raise ValueError(f"dispatch=triton takes fewer than 2^31 routed rows; there are {expert.numel()}.")
