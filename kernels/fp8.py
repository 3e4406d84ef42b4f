"""Products of rows and matrices in 8 bits: the format, and what the experts compute with it, in plain torch.

Numbers are E4M3 (four bits of exponent, three of mantissa, up to 448; 2209.05433). A row has a scale for every 128 of
its numbers, a matrix one for every 128 by 128 (DeepSeek-V3, 2412.19437). A scale is the smallest power of two that
brings its numbers within 448: so nothing but the numbers is rounded, widened ones are exact in 16 bits (but float16 has
no 65536, which 65504 goes to), and rounding them again changes nothing.

A layer whose form has `fp8` rounds what enters either product; sums are in float32, though those of 128 products, which
they are sums of, have 14 bits on sm_90 (2412.19437, section 3.5.2). Its derivatives are those of the products without
rounding, at the z that was computed, in the operands' type.

Letters: N rows of a matrix and M the width they sum over, beside those of `moe/__init__.py`; G = ceil(M / 128) groups,
and H = ceil(N / 128).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.form import Form

BLOCK = 128  # numbers that share a scale, along either side


class Fp8(NamedTuple):
    """Stacked matrices of E4M3 with a float32 scale for each block: `weight` and `weight_scale_inv` of a checkpoint."""

    values: Tensor  # (E, N, M) float8_e4m3fn
    scales: Tensor  # (E, H, G) float32

    @property
    def shape(self) -> torch.Size:
        """(E, N, M), of the weights that these stand for."""
        return self.values.shape


def blocks(shape: torch.Size) -> tuple[int, int]:
    """How many scales a matrix has along either side, H and G: of (..., N, M)."""
    return -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK)


def quantize(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Round to E4M3, blocks of `rows` (1 or 128) by 128 under one scale: (..., N, M) -> values (..., N, M), scales
    (..., ceil(N / rows), G). Of x in float32; a block with an infinity or a NaN has scale NaN."""
    n, m = x.shape[-2:]
    padded = F.pad(x.detach().float(), (0, -m % BLOCK, 0, -n % rows))
    grouped = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))
    largest = grouped.abs().amax((-3, -1))
    mantissa, exponent = torch.frexp(largest)  # 448 is 0.875 · 2^9
    exponent = torch.where(largest > 0, exponent - 9 + (mantissa > 0.875), -126).clamp(min=-126).int()
    scales = ((exponent + 127) << 23).view(torch.float32).masked_fill(~largest.isfinite(), torch.nan)
    values = (grouped / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return values.flatten(-2).flatten(-3, -2)[..., :n, :m].contiguous(), scales


def widen(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that these stand for: (..., N, M), (..., ceil(N / rows), G) -> (..., N, M). Scales that are powers of
    two round nothing."""
    n, m = values.shape[-2:]
    wide = torch.promote_types(dtype, torch.float32)
    rows = 1 if scales.shape[-2] == n else BLOCK
    scale = scales.to(wide).repeat_interleave(rows, -2)[..., :n, :].repeat_interleave(BLOCK, -1)[..., :m]
    return (values.to(wide) * scale).to(dtype)


def rounded(x: Tensor, rows: int) -> Tensor:
    """x as `quantize` leaves it, in its own type and without gradients."""
    return widen(*quantize(x, rows), x.dtype)


def operands(x: Tensor, w: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """What a layer of this form multiplies: rows (N, M) and a matrix (W, M), rounded where it says so."""
    x = rounded(x, 1) if form.fp8 else x
    return x, rounded(w, BLOCK) if form.fp8 == "all" else w
