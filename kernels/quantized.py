"""Experts whose weights are stored in fewer bits, for inference: the formats, what they stand for, and the layer.

    int8     w[e, n, :] = values[e, n, :] · scales[e, n]            8 bits a weight, and 32 for each row
    mxfp4    w[e, n, 32 g + i] = E2M1(values) · 2^(scales[e, n, g] - 127)       4.25 bits a weight
    fp8      w[e, n, m] = E4M3(values) · scales[e, n // 128, m // 128]          8 bits a weight (`kernels.fp8`)

mxfp4 is the Open Compute Project's (OCP Microscaling Formats v1.0, 2023), laid out as gpt-oss's checkpoints are
(2508.10925): two values to a byte, the earlier one in the low four bits. The activations keep their type, or with fp8
weights and a form that says so are rounded too; what is read of the weights gets smaller, which is what a light load
waits for.

Letters: N rows of a matrix and M the width they sum over, beside those of `moe/__init__.py`; G = M / 32 groups.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kernels import grouped, operands, reference, tuning
from kernels.form import Form, form_of
from kernels.fp8 import BLOCK, Fp8, blocks, quantize, widen

GROUP = 32  # values of mxfp4 that share a scale
LARGEST = 127  # of int8: -128 has no counterpart
# The magnitudes of E2M1, by code (two bits of exponent, one of mantissa; bit 3 is the sign), and halves between them.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDDLES = tuple((low + high) / 2 for low, high in pairwise(E2M1))


class Int8(NamedTuple):
    """Stacked matrices of int8 with a scale for each row, symmetric around 0."""

    values: Tensor  # (E, N, M) int8
    scales: Tensor  # (E, N) float32

    @property
    def shape(self) -> torch.Size:
        """(E, N, M), of the weights that these stand for."""
        return self.values.shape


class Mxfp4(NamedTuple):
    """Stacked matrices of 4-bit floats with a power of two for each 32; `*_blocks` and `*_scales` of a checkpoint."""

    values: Tensor  # (E, N, G, 16) uint8: E2M1, two to a byte, low bits first
    scales: Tensor  # (E, N, G) uint8: E8M0, 2^(s - 127); 255 is NaN

    @property
    def shape(self) -> torch.Size:
        """(E, N, M), of the weights that these stand for."""
        return torch.Size((*self.scales.shape[:-1], GROUP * self.scales.shape[-1]))


Quantized: TypeAlias = Int8 | Mxfp4 | Fp8
KINDS: dict[torch.dtype, Callable[[Tensor, Tensor], Quantized]]
KINDS = {torch.int8: Int8, torch.uint8: Mxfp4, torch.float8_e4m3fn: Fp8}  # by the type of their values


def quantize_int8(w_ENM: Tensor) -> Int8:
    """Round to 127 steps either side of 0, a row's largest magnitude being the last: (E, N, M) -> `Int8`. Off by half a
    step at most, where float32 holds the scale; a row of zeros has scale 0. Raises `ValueError` for another shape or
    type, and for rows whose scale is not finite in float32."""
    w_ENM = _wide("int8", w_ENM, 1)
    scale_EN = (w_ENM.abs().amax(-1) / LARGEST).float()
    if not scale_EN.isfinite().all():
        raise ValueError("int8 takes finite weights with magnitudes that float32 holds; some are not.")
    step = torch.where(scale_EN > 0, scale_EN, 1)[..., None].to(w_ENM.dtype)
    values = (w_ENM / step).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return Int8(values, scale_EN)


def quantize_mxfp4(w_ENM: Tensor) -> Mxfp4:
    """Round to 4-bit floats, 32 neighbours at a time under one power of two: (E, N, M) -> `Mxfp4`.

    As the specification's section 6.3 has it: the scale is the power of two at or below a group's largest magnitude, by
    4 (E2M1's largest power of two); what then exceeds 6 becomes 6; ties go to the even mantissa. Raises `ValueError`
    for another shape or type, for M no multiple of 32, and for weights that are not finite."""
    w_ENM = _wide("mxfp4", w_ENM, GROUP)
    if not w_ENM.isfinite().all():
        raise ValueError("mxfp4 takes finite weights; some are not.")
    groups = w_ENM.unflatten(-1, (-1, GROUP))

    # The scale. frexp's exponent is that of the next power of two above; a group of zeros takes the smallest scale.
    largest = groups.abs().amax(-1)
    exponent = (torch.frexp(largest).exponent.int() - 1 - 2).masked_fill(largest == 0, -127)
    scales = (exponent.clamp(-127, 127) + 127).to(torch.uint8)

    # The codes: how many halves between magnitudes lie below. One that is hit goes to its even neighbour.
    scaled = groups.double() / _power_of_2(scales)[..., None]
    magnitude, code = scaled.abs(), torch.zeros(groups.shape, dtype=torch.uint8, device=w_ENM.device)
    for lower, middle in enumerate(MIDDLES):
        code += magnitude >= middle if lower % 2 else magnitude > middle
    code |= torch.signbit(scaled).to(torch.uint8) << 3
    return Mxfp4(code[..., ::2] | code[..., 1::2] << 4, scales)


def quantize_fp8(w_ENM: Tensor) -> Fp8:
    """Round to E4M3, 128 by 128 weights under one power of two: (E, N, M) -> `Fp8`; see `kernels.fp8`. Raises
    `ValueError` for another shape or type, and for weights that are not finite in float32."""
    fp8 = Fp8(*quantize(_wide("fp8", w_ENM, 1), BLOCK))
    if not fp8.scales.isfinite().all():
        raise ValueError("fp8 takes finite weights with magnitudes that float32 holds; some are not.")
    return fp8


FORMATS: dict[str, Callable[[Tensor], Quantized]] = {
    "int8": quantize_int8,
    "mxfp4": quantize_mxfp4,
    "fp8": quantize_fp8,
}


def dequantize(w: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that these stand for, rounded once: -> (E, N, M) in `dtype`. Raises `ValueError` for values and
    scales of shapes or types that do not fit."""
    _fit("dequantize", "w", w)
    wide = Widening(w, dtype)
    w_ENM = torch.empty(w.shape, dtype=dtype, device=w.values.device)
    for e, w_NM in enumerate(w_ENM):
        w_NM.copy_(wide[e])
    return w_ENM


class Widening:
    """Stacked matrices that are widened one at a time, as they are asked for: all at once, and in float64 on the way,
    they would take many times what is stored."""

    def __init__(self, stored: Quantized, dtype: torch.dtype) -> None:
        self.stored, self.dtype = stored, dtype

    def __len__(self) -> int:
        return len(self.stored.values)

    @property
    def shape(self) -> torch.Size:
        """(E, N, M)."""
        return self.stored.shape

    def __getitem__(self, e: int) -> Tensor:
        """Expert e's matrix, (N, M)."""
        values, scales = self.stored.values[e], self.stored.scales[e]
        match self.stored:
            case Int8():
                return (values.double() * scales.double()[:, None]).to(self.dtype)
            case Fp8():
                return widen(values, scales, torch.float64).to(self.dtype)
        magnitudes = torch.tensor(E2M1, dtype=torch.float64, device=values.device)
        table = torch.cat((magnitudes, -magnitudes))
        codes = torch.stack((values & 15, values >> 4), -1).flatten(-2)
        return (table[codes.int()] * _power_of_2(scales)[..., None]).flatten(-2).to(self.dtype)


def _wide(name: str, w_ENM: Tensor, group: int) -> Tensor:
    """Weights to be quantised, in float32 at least. Raises `ValueError`."""
    operands.fit(name, w=(w_ENM.contiguous(), "E N M", operands.FLOATS))
    if not w_ENM.shape[-1] or w_ENM.shape[-1] % group:
        raise ValueError(f"{name} takes rows of {group} weights or a multiple; they are {w_ENM.shape[-1]} long.")
    return w_ENM.detach().to(reference.wide(w_ENM.dtype))


def _power_of_2(scale: Tensor) -> Tensor:
    """2^(scale - 127) of bytes, 255 being NaN: float64, where each of them is a normal number, by its exponent."""
    power = ((scale.long() - 127 + 1023) << 52).view(torch.float64)
    return power.masked_fill(scale == 255, torch.nan)


def _fit(name: str, key: str, w: Quantized) -> None:
    """Raises `ValueError` for values and scales that do not belong together."""
    match w:
        case Int8():
            kinds = (w.values, "E N M", (torch.int8,)), (w.scales, "E N", (torch.float32,))
        case Mxfp4():
            kinds = (w.values, "E N G 16", (torch.uint8,)), (w.scales, "E N G", (torch.uint8,))
        case Fp8():
            kinds = (w.values, "E N M", (torch.float8_e4m3fn,)), (w.scales, "E H G", (torch.float32,))
        case _:
            raise ValueError(f"{name} takes {key} as Int8, Mxfp4 or Fp8; it is {type(w).__name__}.")
    operands.fit(name, **{f"{key}.values": kinds[0], f"{key}.scales": kinds[1]})
    if isinstance(w, Mxfp4) and w.values.shape[-1] != GROUP // 2:
        raise ValueError(f"{name} takes {key}.values with 16 bytes to a scale; they are {w.values.shape[-1]}.")
    if isinstance(w, Fp8) and w.scales.shape[1:] != blocks(w.shape):
        raise ValueError(
            f"{name} takes {key}.scales (E, {', '.join(map(str, blocks(w.shape)))}), a scale for 128 by 128 weights; "
            f"they are {tuple(w.scales.shape)}."
        )


def experts(
    x_TD: Tensor,
    w_up: Quantized,
    w_down: Quantized,
    token_N: Tensor | None,
    expert: Tensor,
    weight: Tensor,
    form: Form | str,
    tf32: bool = False,
    b_up_EF: Tensor | None = None,
    b_down_ED: Tensor | None = None,
    dispatch: str = "triton",
) -> tuple[Tensor, Tensor]:
    """`fused.experts` of quantised weights, forward alone: -> the weighted sum (T, D) and the rows of every expert (E,)
    int64.

    w_up stands for (E, 2F, D) for swiglu and (E, F, D) for others, w_down for (E, D, F); the two may have different
    formats. dispatch: reference and torch widen one expert's weights after another to x's type and go on as with those;
    triton reads them as they are and widens in registers, where scales of int8 and fp8 multiply sums, so that no weight
    is rounded. A form with fp8 rounds what enters either product too, for weights in fp8. Raises `ValueError` for
    operands that do not fit and where a gradient is wanted, before anything is computed."""
    name, form = f"dispatch={dispatch}", form_of(form)
    if dispatch not in ("reference", "torch", "triton"):
        raise ValueError(f"dispatch={dispatch!r} is not one of reference, torch, triton")
    x_TD, b_up_EF, b_down_ED = operands.under_autocast(x_TD, b_up_EF, b_down_ED)
    _check(name, x_TD, w_up, w_down, token_N, expert, weight, form, b_up_EF, b_down_ED)
    expert = operands.rows(name, expert, token_N, len(x_TD), len(w_up.values)).contiguous()
    stored, biases = (*w_up, *w_down), (b_up_EF, b_down_ED)
    if dispatch == "triton":
        token_N = None if token_N is None else token_N.contiguous()
        return _on_kernels(x_TD.contiguous(), *stored, token_N, expert, weight.contiguous(), *biases, *form, tf32)

    # As with weights of x's type, over rows that name their tokens; they are rounded already.
    form = form._replace(fp8="activations" if form.fp8 else "")
    if token_N is None:
        token_N = torch.arange(len(x_TD), device=x_TD.device).repeat_interleave(expert.shape[1])
    expert = expert.flatten()
    out_TD = _on_matmuls(x_TD, *stored, token_N, expert, weight.flatten(), *biases, *form, dispatch)
    return out_TD, reference.count(expert, len(w_up.values))


def _check(
    name: str, x_TD: Tensor, w_up: Quantized, w_down: Quantized, token_N: Tensor | None, expert: Tensor,
    weight: Tensor, form: Form, b_up_EF: Tensor | None, b_down_ED: Tensor | None,
) -> None:  # fmt: skip
    """One sentence for what does not fit: of the formats, of the layer, of what is asked of it."""
    for key, w in (("w_up", w_up), ("w_down", w_down)):
        _fit(name, key, w)
        if form.fp8 and not isinstance(w, Fp8):
            raise ValueError(
                f"{name} rounds activations (fp8={form.fp8!r}) for weights in fp8; {key} is {type(w).__name__}."
            )
        if w.shape[1] * w.shape[2] >= 2**31:  # an address within one expert's matrix is an int32
            raise ValueError(f"{name} takes {key} with fewer than 2^31 weights an expert; it is {tuple(w.shape)}.")
    like_up, like_down = (x_TD.new_empty(()).expand(w.shape) for w in (w_up, w_down))
    operands.layer(name, x_TD, like_up, like_down, token_N, expert, weight, form, b_up_EF, b_down_ED)
    operands.one_device(name, x_TD, *w_up, *w_down)
    operands.contiguous(name, b_up=b_up_EF, b_down=b_down_ED)
    if operands.wants_gradient(x_TD, *w_up, *w_down, weight, b_up_EF, b_down_ED):
        raise ValueError(f"{name} has no backward for quantised weights; call it under torch.no_grad().")
    operands.refuse_tangents(name, x_TD, w_up.scales, w_down.scales, weight, b_up_EF, b_down_ED)


@torch.library.custom_op("switchyard::quantized_experts", mutates_args=())
def _on_kernels(
    x_TD: Tensor, up_values: Tensor, up_scales: Tensor, down_values: Tensor, down_scales: Tensor,
    token_N: Tensor | None, expert: Tensor, weight: Tensor, b_up_EF: Tensor | None, b_down_ED: Tensor | None,
    activation: str, interleaved: bool, alpha: float, limit: float, shift: float, weigh_input: bool, fp8: str,
    tf32: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from kernels import combine, plan, ragged_mm  # here, because Triton is not everywhere

    form = Form(activation, interleaved, alpha, limit, shift, weigh_input, fp8)
    # Tiles of a light load, whose registers have room to widen in.
    shape = (x_TD.device, x_TD.dtype, tf32, weight.numel(), len(up_values))
    up_tile, down_tile = (tuning.tile(use, *shape, even=False) for use in ("up", "down"))
    start_T1, flat_N = None if token_N is None else operands.starts(token_N, len(x_TD)), weight.flatten()
    with torch.cuda.device_of(x_TD):
        where = plan.plan(expert, token_N, len(up_values), up_tile.block_m)
        _, h_NF = ragged_mm.up(
            x_TD, up_values, where, form, up_tile, tf32, False, b_up_EF, flat_N if weigh_input else None, up_scales,
            bool(fp8),
        )  # fmt: skip
        y_ND = ragged_mm.down(h_NF, down_values, where, down_tile, tf32, b_down_ED, down_scales, bool(fp8))
        out_TD = combine.combine(
            y_ND, where.slot_N, None if weigh_input else flat_N, start_T1, where.offset_E1, len(x_TD)
        )  # fmt: skip
    return out_TD, where.offset_E1.diff().long()


@_on_kernels.register_fake
def _(x_TD, up_values, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TD), x_TD.new_empty(len(up_values), dtype=torch.int64)


@torch.library.custom_op("switchyard::widened_experts", mutates_args=())
def _on_matmuls(
    x_TD: Tensor, up_values: Tensor, up_scales: Tensor, down_values: Tensor, down_scales: Tensor,
    token_N: Tensor, expert_N: Tensor, weight_N: Tensor, b_up_EF: Tensor | None, b_down_ED: Tensor | None,
    activation: str, interleaved: bool, alpha: float, limit: float, shift: float, weigh_input: bool, fp8: str,
    dispatch: str,
) -> Tensor:  # fmt: skip
    stacks = (up_values, up_scales), (down_values, down_scales)
    w_up, w_down = (Widening(KINDS[values.dtype](values, scales), x_TD.dtype) for values, scales in stacks)
    biases, form = (b_up_EF, b_down_ED), Form(activation, interleaved, alpha, limit, shift, weigh_input, fp8)
    if dispatch == "reference":
        return reference.forward(x_TD, w_up, w_down, token_N, expert_N, weight_N, form, *biases)
    slot_N, offset_E1, n_slots = grouped.slots(expert_N, len(w_up))
    rows = (weight_N, *biases, token_N, slot_N)
    return grouped.forward(grouped.spans(offset_E1), x_TD, w_up, w_down, *rows, n_slots, form, False)[0]


@_on_matmuls.register_fake
def _(x_TD, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TD)
