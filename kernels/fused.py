"""The experts of an MoE layer on Triton kernels: plan, up, down, combine; and their backward.

One autograd function, registered with torch.library, so that torch.compile sees opaque ops and no graph break. It saves
x, the pre-activation z and the routing: 2 D + 4 K F + O(K) bytes a token in 16 bits for swiglu (z has 2 F columns). y
is never kept and h is recomputed; z is not written where nothing wants a gradient, and a gradient that nothing wants is
not computed. Shapes and meaning as in `reference.experts`; nothing here waits for the device.
"""

import torch
from torch import Tensor

from kernels import operands, tuning
from kernels.bits import to_fp8
from kernels.combine import combine
from kernels.form import Form, form_of
from kernels.fp8 import BLOCK
from kernels.gate import refuse_second_derivative
from kernels.plan import Plan, plan
from kernels.ragged_mm import dh, down, dx, up
from kernels.ragged_wgrad import ragged_sum, ragged_wgrad

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
    x_TD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, weight_N: Tensor, b_up_EF: Tensor | None,
    b_down_ED: Tensor | None, start_T1: Tensor | None, slot_N: Tensor, row_N: Tensor, token_N: Tensor,
    offset_E1: Tensor, tile_expert_J: Tensor, tile_slot_J: Tensor, tile_count: Tensor, activation: str,
    interleaved: bool, alpha: float, limit: float, shift: float, weigh_input: bool, fp8: str, tf32: bool, keep_z: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layer's output and z, which has no rows unless it is kept for the backward."""
    where = Plan(slot_N, row_N, token_N, offset_E1, tile_expert_J, tile_slot_J, tile_count)
    tile = _tiles(x_TD, weight_N, w_up_EFD, tf32)
    form, weight = Form(activation, interleaved, alpha, limit, shift, weigh_input, fp8), weight_N.flatten()
    with torch.cuda.device_of(x_TD):
        # Rounded matrices live as long as their product.
        w_up, scales = to_fp8(w_up_EFD, BLOCK) if fp8 else (w_up_EFD, None)
        z, h = up(
            x_TD, w_up, where, form, tile("up"), tf32, keep_z, b_up_EF, weight if weigh_input else None, scales,
            bool(fp8),
        )  # fmt: skip
        w_down, scales = to_fp8(w_down_EDF, BLOCK) if fp8 else (w_down_EDF, None)
        y_ND = down(h, w_down, where, tile("down"), tf32, b_down_ED, scales, bool(fp8))
        out_TD = combine(
            y_ND, where.slot_N, None if weigh_input else weight, start_T1, where.offset_E1, len(x_TD)
        )  # fmt: skip
    return out_TD, z


@_forward.register_fake
def _(x_TD, w_up_EFD, w_down_EDF, weight_N, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TD), x_TD.new_empty(weight_N.numel() if rest[-1] else 0, w_up_EFD.shape[1])


@torch.library.custom_op("switchyard::fused_experts_backward", mutates_args=())
def _backward(
    dout_TD: Tensor, x_TD: Tensor, z: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, weight_N: Tensor,
    b_up_EF: Tensor | None, b_down_ED: Tensor | None, start_T1: Tensor | None, slot_N: Tensor, row_N: Tensor,
    token_N: Tensor, offset_E1: Tensor, tile_expert_J: Tensor, tile_slot_J: Tensor, tile_count: Tensor, activation: str,
    interleaved: bool, alpha: float, limit: float, shift: float, weigh_input: bool, fp8: str, tf32: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients that are asked for, and nothing in the place of the others."""
    where = Plan(slot_N, row_N, token_N, offset_E1, tile_expert_J, tile_slot_J, tile_count)
    tile = _tiles(x_TD, weight_N, w_up_EFD, tf32)
    form, weight = Form(activation, interleaved, alpha, limit, shift, weigh_input, fp8), weight_N.flatten()
    n_experts = len(w_up_EFD)
    for_x, for_up, for_down, for_weight, for_b_up, for_b_down = wanted
    likes = (x_TD, w_up_EFD, w_down_EDF, weight_N, b_up_EF, b_down_ED)
    dx_TD, dw_up_EFD, dw_down_EDF, dweight_N, db_up_EF, db_down_ED = operands.gradients_like(likes, (False,) * 6)
    with torch.cuda.device_of(x_TD):
        for_z = for_x or for_up or for_b_up
        if for_z or for_down or for_weight:
            dz, h, dweight_N = dh(
                dout_TD, w_down_EDF, z, weight, where, form, tile("dh"), tf32, for_z, for_down, for_weight, b_down_ED
            )  # fmt: skip
        if for_down:
            dw_down_EDF = _weight_gradient(dout_TD, h, w_down_EDF, where, True, tile("wgrad"), tf32)
            del h
        if for_b_down:
            db_down_ED = ragged_sum(dout_TD, None if weigh_input else weight, where, True, n_experts)
        if for_up:
            dw_up_EFD = _weight_gradient(dz, x_TD, w_up_EFD, where, False, tile("wgrad"), tf32)
        if for_b_up:
            db_up_EF = ragged_sum(dz, None, where, False, n_experts)
        if for_x:
            dx_ND = dx(dz, w_up_EFD, where, tile("dx"), tf32)
            dx_TD = combine(dx_ND, where.slot_N, None, start_T1, where.offset_E1, len(x_TD))
    dweight_N = dweight_N.view(weight_N.shape) if for_weight else dweight_N
    return dx_TD, dw_up_EFD, dw_down_EDF, dweight_N, db_up_EF, db_down_ED


@_backward.register_fake
def _(dout_TD, x_TD, z, w_up_EFD, w_down_EDF, weight_N, b_up_EF, b_down_ED, *rest):  # type: ignore[no-untyped-def]
    return operands.gradients_like((x_TD, w_up_EFD, w_down_EDF, weight_N, b_up_EF, b_down_ED), rest[-1])


def _weight_gradient(  # type: ignore[no-untyped-def]
    p: Tensor, q: Tensor, w: Tensor, where: Plan, gather_p: bool, tile, tf32: bool
) -> Tensor:
    """p^T q by expert, stored as w is: by columns, it is the transpose of q^T p."""
    if w.is_contiguous():
        return ragged_wgrad(p, q, where, gather_p, len(w), tile, tf32)
    return ragged_wgrad(q, p, where, not gather_p, len(w), tile, tf32).mT


def _tiles(x_TD, weight_N, w_up_EFD, tf32):  # type: ignore[no-untyped-def]
    """Use -> tile, for these shapes."""
    shape = (weight_N.numel(), len(w_up_EFD), tuning.is_even(w_up_EFD))
    return lambda use: tuning.tile(use, x_TD.device, x_TD.dtype, tf32, *shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, activation, interleaved, alpha, limit, shift, weigh_input, fp8, tf32, keep_z = inputs
    assert keep_z, "a gradient is wanted of a layer that did not keep z"
    ctx.settings = (activation, interleaved, alpha, limit, shift, weigh_input, fp8, tf32)
    ctx.save_for_backward(tensors[0], output[1], *tensors[1:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or a tensor of zeros as large as z would be made for it


def _autograd_backward(ctx, dout_TD, dz):  # type: ignore[no-untyped-def]
    wanted, rest = list(ctx.needs_input_grad[:6]), [None] * (len(ctx.needs_input_grad) - 6)
    if dout_TD is None:
        return *[None] * 6, *rest
    computed = _backward(dout_TD.contiguous(), *ctx.saved_tensors, *ctx.settings, wanted)
    return *(gradient if want else None for gradient, want in zip(computed, wanted, strict=True)), *rest


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward.register_autograd(refuse_second_derivative)


def experts(
    x_TD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    token_N: Tensor | None,
    expert: Tensor,
    weight: Tensor,
    form: Form | str,
    tf32: bool = False,
    b_up_EF: Tensor | None = None,
    b_down_ED: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.experts` on a GPU: -> the weighted sum (T, D) and the rows of every expert (E,) int64.

    expert and weight are (T, K) with token_N None, or (N,) with token_N (N,) ascending; -1 is no expert (of another
    rank's, say: ids are of the weights that are given). Each expert's matrix is stored by rows or by columns (the
    transpose of an (E, D, 2F) tensor is taken without a copy). tf32: float32 may be multiplied in tf32 (10 bits of
    mantissa), where the GPU's matrix cores do that, instead of exactly. Under autocast x, the weights and the biases
    are rounded to its dtype. Raises `ValueError` for operands the kernels do not take, in a debug build
    (TRITON_DEBUG=1) for wrong rows too, and `NotImplementedError` for forward-mode derivatives."""
    form = form_of(form)
    x_TD, w_up_EFD, w_down_EDF, b_up_EF, b_down_ED = operands.under_autocast(
        x_TD, w_up_EFD, w_down_EDF, b_up_EF, b_down_ED
    )
    _check(x_TD, w_up_EFD, w_down_EDF, token_N, expert, weight, form, b_up_EF, b_down_ED)
    operands.refuse_tangents(NAME, x_TD, w_up_EFD, w_down_EDF, weight, b_up_EF, b_down_ED)
    n_tokens, n_experts = len(x_TD), len(w_up_EFD)
    expert = operands.rows(NAME, expert, token_N, n_tokens, n_experts)
    start_T1 = None
    if token_N is not None:
        token_N = token_N.contiguous()
        start_T1 = operands.starts(token_N, n_tokens)
    routing = _plan(expert.contiguous(), token_N, n_experts, x_TD.dtype, tf32, tuning.is_even(w_up_EFD))
    floats = (x_TD.contiguous(), w_up_EFD, w_down_EDF, weight.contiguous(), b_up_EF, b_down_ED)
    out_TD, _ = _forward(*floats, start_T1, *routing, *form, tf32, operands.wants_gradient(*floats))
    return out_TD, Plan(*routing).offset_E1.diff().long()


def _check(
    x_TD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, token_N: Tensor | None, expert: Tensor, weight: Tensor,
    form: Form, b_up_EF: Tensor | None, b_down_ED: Tensor | None,
) -> None:  # fmt: skip
    """One sentence for what the kernels do not take."""
    operands.layer(NAME, x_TD, w_up_EFD, w_down_EDF, token_N, expert, weight, form, b_up_EF, b_down_ED)
    for name, w in (("w_up", w_up_EFD), ("w_down", w_down_EDF)):
        if not operands.dense(w):
            raise ValueError(
                f"{NAME} takes {name} with each expert's matrix stored by rows or by columns, without gaps; its "
                f"strides are {tuple(w.stride())}: {name}.contiguous() is a copy that is."
            )
    operands.contiguous(NAME, b_up=b_up_EF, b_down=b_down_ED)
    if form.fp8 == "activations":
        raise ValueError(
            f"{NAME} rounds weights with the activations, fp8='all'; those that are stored in fp8 are "
            "kernels.quantized.experts'."
        )

    # Sizes that 32-bit addresses and row numbers still reach.
    width, d = w_up_EFD.shape[1:]
    if width * d >= 2**31:  # an address within one expert's matrix is an int32
        raise ValueError(
            f"{NAME} takes experts whose w_up has fewer than 2^31 elements; {form.width(1)}F·D is {width * d}."
        )
    if expert.numel() >= 2**31:
        raise ValueError(f"{NAME} takes fewer than 2^31 routed rows; there are {expert.numel()}.")
