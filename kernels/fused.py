"""The experts of an MoE layer on Triton kernels: plan, up, down, combine; and their backward.

One autograd function, registered with torch.library, so that torch.compile sees opaque ops and no graph break. It saves
x, the pre-activation z and the routing: 2 D + 4 K F + O(K) bytes a token in 16 bits for swiglu (z has 2 F columns). y
is never kept and h is recomputed; z is not written where nothing wants a gradient, and a gradient that nothing wants is
not computed. Shapes and meaning as in `reference.experts`; nothing here waits for the device.
"""

import torch
from torch import Tensor

from kernels import operands, tuning
from kernels.combine import combine
from kernels.gate import refuse_second_derivative
from kernels.plan import Plan, plan
from kernels.ragged_mm import dh, down, dx, up
from kernels.ragged_wgrad import ragged_wgrad

NAME = "dispatch=triton"


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
    start_T1: Tensor | None, activation: str, tf32: bool, keep_z: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layer's output and z, which has no rows unless it is kept for the backward."""
    where, tile = Plan(*routing), _tiles(x_TD, weight_N, w_up_EFD, tf32)
    with torch.cuda.device_of(x_TD):
        z, h = up(x_TD, w_up_EFD, where, activation, tile("up"), tf32, keep_z)
        y_ND = down(h, w_down_EDF, where, tile("down"), tf32)
        out_TD = combine(y_ND, where.slot_N, weight_N.flatten(), start_T1, where.offset_E1, len(x_TD))
    return out_TD, z


@_forward.register_fake
def _(x_TD, w_up_EFD, w_down_EDF, weight_N, routing, start_T1, activation, tf32, keep_z=True):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TD), x_TD.new_empty(weight_N.numel() if keep_z else 0, w_up_EFD.shape[1])


@torch.library.custom_op("switchyard::fused_experts_backward", mutates_args=())
def _backward(
    dout_TD: Tensor, x_TD: Tensor, z: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, weight_N: Tensor,
    routing: list[Tensor], start_T1: Tensor | None, activation: str, tf32: bool,
    for_x: bool = True, for_up: bool = True, for_down: bool = True, for_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients that are asked for, and nothing in the place of the others."""
    where, tile = Plan(*routing), _tiles(x_TD, weight_N, w_up_EFD, tf32)
    dx_TD, dw_up_EFD, dw_down_EDF = (x_TD.new_empty(0) for _ in range(3))
    with torch.cuda.device_of(x_TD):
        dz, h, dweight_N = dh(
            dout_TD, w_down_EDF, z, weight_N.flatten(), where, activation, tile("dh"), tf32,
            for_z=for_x or for_up, for_h=for_down, for_weight=for_weight,
        )  # fmt: skip
        if for_down:
            dw_down_EDF = ragged_wgrad(dout_TD, h, where, True, len(w_up_EFD), tile("wgrad"), tf32)
        del h
        if for_up:
            dw_up_EFD = ragged_wgrad(dz, x_TD, where, False, len(w_up_EFD), tile("wgrad"), tf32)
        if for_x:
            dx_ND = dx(dz, w_up_EFD, where, tile("dx"), tf32)
            dx_TD = combine(dx_ND, where.slot_N, None, start_T1, where.offset_E1, len(x_TD))
    return dx_TD, dw_up_EFD, dw_down_EDF, dweight_N.view(weight_N.shape) if for_weight else dweight_N


@_backward.register_fake
def _(
    dout_TD, x_TD, z, w_up_EFD, w_down_EDF, weight_N, routing, start_T1, activation, tf32,
    for_x=True, for_up=True, for_down=True, for_weight=True,
):  # type: ignore[no-untyped-def]  # fmt: skip
    return operands.gradients_like((x_TD, w_up_EFD, w_down_EDF, weight_N), (for_x, for_up, for_down, for_weight))


def _tiles(x_TD, weight_N, w_up_EFD, tf32):  # type: ignore[no-untyped-def]
    """Use -> tile, for these shapes."""
    shape = (weight_N.numel(), len(w_up_EFD), tuning.is_even(w_up_EFD))
    return lambda use: tuning.tile(use, x_TD.device, x_TD.dtype, tf32, *shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x_TD, w_up_EFD, w_down_EDF, weight_N, routing, start_T1, ctx.activation, ctx.tf32, keep_z = inputs
    assert keep_z, "a gradient is wanted of a layer that did not keep z"
    ctx.save_for_backward(x_TD, output[1], w_up_EFD, w_down_EDF, weight_N, start_T1, *routing)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or a tensor of zeros as large as z would be made for it


def _autograd_backward(ctx, dout_TD, dz):  # type: ignore[no-untyped-def]
    *tensors, start_T1 = (saved := ctx.saved_tensors)[:6]  # once: activation checkpointing unpacks no tensor twice
    routing, wanted = list(saved[6:]), ctx.needs_input_grad[:4]
    gradients = [None] * 4
    if dout_TD is not None:
        computed = _backward(dout_TD.contiguous(), *tensors, routing, start_T1, ctx.activation, ctx.tf32, *wanted)
        gradients = [gradient if want else None for gradient, want in zip(computed, wanted, strict=True)]
    # None for the rest: an argument that has its default is not among them.
    return *gradients, [None] * len(routing), *[None] * (len(ctx.needs_input_grad) - 5)


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
    autocast x and the weights are rounded to its dtype. Raises `ValueError` for operands the kernels do not take, in a
    debug build (TRITON_DEBUG=1) for wrong rows too, and `NotImplementedError` for forward-mode derivatives."""
    kind = x_TD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_TD, w_up_EFD, w_down_EDF = x_TD.to(dtype), w_up_EFD.to(dtype), w_down_EDF.to(dtype)
    _check(x_TD, w_up_EFD, w_down_EDF, token_N, expert, weight, activation)
    operands.refuse_tangents(NAME, x_TD, w_up_EFD, w_down_EDF, weight)
    n_tokens, n_experts = len(x_TD), len(w_up_EFD)
    expert = operands.rows(NAME, expert, token_N, n_tokens, n_experts)
    start_T1 = None
    if token_N is not None:
        token_N = token_N.contiguous()
        start_T1 = torch.searchsorted(token_N, torch.arange(n_tokens + 1, device=x_TD.device))
    routing = _plan(expert.contiguous(), token_N, n_experts, x_TD.dtype, tf32, tuning.is_even(w_up_EFD))
    floats = (x_TD.contiguous(), w_up_EFD.contiguous(), w_down_EDF.contiguous(), weight.contiguous())
    out_TD, _ = _forward(*floats, list(routing), start_T1, activation, tf32, operands.wants_gradient(*floats))
    return out_TD, Plan(*routing).offset_E1.diff().long()


def _check(
    x_TD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, token_N: Tensor | None, expert: Tensor, weight: Tensor,
    activation: str,
) -> None:  # fmt: skip
    """One sentence for what the kernels do not take."""
    operands.layer(NAME, x_TD, w_up_EFD, w_down_EDF, token_N, expert, weight, activation)
    # Sizes that 32-bit addresses and row numbers still reach.
    width, d = w_up_EFD.shape[1:]
    if width * d >= 2**31:  # an address within one expert's matrix is an int32
        raise ValueError(
            f"dispatch=triton takes experts whose w_up has fewer than 2^31 elements; "
            f"{2 if activation == 'swiglu' else 1}F·D is {width * d}."
        )
    if expert.numel() >= 2**31:
        raise ValueError(f"dispatch=triton takes fewer than 2^31 routed rows; there are {expert.numel()}.")
