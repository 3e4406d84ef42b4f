"""Numbers of 4 and 8 bits in registers, read and written by integer instructions: on any GPU, whatever its types.

Formats: E2M1 and E8M0 as in `kernels.quantized`, E4M3 as in `kernels.fp8`. `to_fp8` is what stores rows and matrices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import fp8

BLOCK = tl.constexpr(fp8.BLOCK)
ROWS = 16  # of activations, that one program rounds


@triton.jit
def clamp(index, SIZE: tl.constexpr):
    """index, which holds aligned runs of 16, where it is below SIZE; elsewhere another index below SIZE.

    Runs stay runs, of the largest power of two up to 16 that divides SIZE, and the compiler is told so: else it would
    load element by element and without asynchronous copies."""
    RUN: tl.constexpr = (SIZE | 16) & -(SIZE | 16)
    return tl.max_contiguous(tl.multiple_of(tl.where(index < SIZE, index, index % RUN), RUN), RUN)


@triton.jit
def e2m1(code):
    """The numbers of 4-bit floats, uint32 -> float32: exact."""
    # Sign, exponent and mantissa go where a float32 has them: twice shifted by one product, the rest masked off. The
    # exponent's bias is then a factor, which makes a number of the subnormals (0.5) too.
    return ((code * ((1 << 28) + (1 << 22))) & 0x81C00000).to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def e8m0(scale):
    """2^(scale - 127), uint8 -> float32: 0 is a subnormal there, 255 is NaN."""
    scale = scale.to(tl.int32)
    return ((scale << 23) | tl.where((scale == 0) | (scale == 255), 1 << 22, 0)).to(tl.float32, bitcast=True)


@triton.jit
def mxfp4_tile(values, scales, start_k, INNER: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K numbers of mxfp4 from start_k on, of the columns that begin at these pointers: (BLOCK_K, columns)
    float32. Past INNER they are tiny and finite, so that their products with zeros are zeros."""
    tl.static_assert(INNER % 32 == 0)
    GROUPS: tl.constexpr = (BLOCK_K + 31) // 32  # a part of one, or some
    byte = start_k // 2 + tl.arange(0, BLOCK_K // 2)
    group = start_k // 32 + tl.arange(0, GROUPS)
    if INNER % BLOCK_K == 0:
        scale = tl.load(scales[:, None] + group[None, :])
    else:
        byte = clamp(byte, INNER // 2)
        inside = group < INNER // 32
        scale = tl.load(scales[:, None] + tl.where(inside, group, 0)[None, :], mask=inside[None, :], other=0)
    packed = tl.load(values[:, None] + byte[None, :]).to(tl.uint32)
    numbers = tl.interleave(e2m1(packed & 15), e2m1(packed >> 4))
    numbers = numbers.reshape(values.shape[0], GROUPS, BLOCK_K // GROUPS)
    return (numbers * e8m0(scale)[:, :, None]).reshape(values.shape[0], BLOCK_K).T


@triton.jit
def e4m3(code):
    """The numbers of 8-bit floats, uint8 -> float32: exact, NaN included."""
    code = code.to(tl.uint32)
    number = (((code & 0x80) << 24) | ((code & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((code & 0x7F) == 0x7F, float("nan"), number)


@triton.jit
def to_e4m3(x):
    """The codes of numbers within ±448, float32 -> uint8: to the nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 steps are of 2^-9, which is what a sum with 2^14 is rounded to.
    sum = tl.abs(x) + 16384.0
    code = tl.where(size < (121 << 23), sum.to(tl.uint32, bitcast=True) - 0x46800000, normal)
    return ((bits >> 24) & 0x80 | code).to(tl.uint8)


@triton.jit
def fp8_product(
    a_tile, b_tile, a_scale, b_scale, ACC: tl.constexpr, PRECISION: tl.constexpr, IN_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """a @ b, in ACC, of a part of the summed width that no block of scales ends in: b in fp8, and a where its rows have
    scales. IN_FP8: the GPU multiplies that."""
    if not IN_FP8:
        # Each E4M3 is a bfloat16.
        if a_scale is not None:
            a_tile = e4m3(a_tile).to(tl.float64 if tl.float64 == ACC else tl.bfloat16)
        b_tile = e4m3(b_tile).to(a_tile.dtype)
    if INTERPRETED:
        if IN_FP8:
            a_tile = a_tile.to(tl.float32)
            b_tile = b_tile.to(tl.float32)
        a_tile = a_tile.to(ACC)
        b_tile = b_tile.to(ACC)
    factor = b_scale.to(ACC)[None, :]
    if a_scale is not None:
        factor = factor * a_scale.to(ACC)[:, None]
    return tl.dot(a_tile, b_tile, input_precision=PRECISION, out_dtype=ACC) * factor


@triton.jit
def column_scales(
    scales, tile_n, b_column, group, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """The scales of a tile's columns of one matrix, (BLOCK_N,), read once where they are one, or PAIRED two."""
    WIDTH: tl.constexpr = COLUMNS // 2 if PAIRED else COLUMNS
    PART: tl.constexpr = BLOCK_N // 2 if PAIRED else BLOCK_N
    if PART > BLOCK or (PAIRED and WIDTH // BLOCK * BLOCK != WIDTH):
        return tl.load(scales + b_column // BLOCK * GROUPS + group)
    first = scales + tile_n * PART // BLOCK * GROUPS + group
    scale = tl.load(first)
    if PAIRED:
        return tl.where(tl.arange(0, BLOCK_N) % 2 == 0, scale, tl.load(first + WIDTH // BLOCK * GROUPS))
    return scale + tl.zeros((BLOCK_N,), dtype=tl.float32)


@triton.jit
def _to_fp8(
    x, values, scales, n_rows, x_stack, x_row, x_column, WIDTH: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr
):
    """ROWS rows by 128 columns, with a scale for each row or, SHARED, one for all."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e = tl.program_id(2).to(tl.int64)
    GROUPS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    live = (row < n_rows)[:, None] & (column < WIDTH)[None, :]
    block = tl.load(x + e * x_stack + row[:, None] * x_row + column[None, :] * x_column, mask=live, other=0.0)
    block = block.to(tl.float32)

    # The smallest power of two that brings the largest within 448 = 1.75 · 2^8, read off its bits.
    largest = tl.max(tl.abs(block).to(tl.uint32, bitcast=True), 1)  # NaN is the largest of all
    if SHARED:
        largest = tl.max(largest, 0) + tl.zeros((ROWS,), dtype=tl.uint32)
    biased = (largest >> 23).to(tl.int32)
    power = tl.maximum(biased - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
    scale = tl.where(biased == 255, 0x7FC00000, power << 23).to(tl.float32, bitcast=True)
    inverse = tl.where(biased == 255, 0, (254 - power) << 23).to(tl.float32, bitcast=True)

    tl.store(
        values + e * n_rows * WIDTH + row[:, None] * WIDTH + column[None, :], to_e4m3(block * inverse[:, None]), live
    )
    if SHARED:
        at = (e * tl.num_programs(0) + tl.program_id(0)) * GROUPS + tl.program_id(1)
        tl.store(scales + at, tl.max(scale, 0))
    else:
        tl.store(scales + row * GROUPS + tl.program_id(1), scale, row < n_rows)


def to_fp8(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """`fp8.quantize` in one pass: rows (N, M) with rows=1 or matrices (E, N, M) with 128 -> values, scales."""
    stacked = x[None] if rows == 1 else x
    n_stacked, n_rows, width = stacked.shape
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    groups, height = -(-width // fp8.BLOCK), rows if rows > 1 else ROWS
    scales = x.new_empty((*x.shape[:-2], -(-n_rows // rows), groups), dtype=torch.float32)
    if x.numel():
        _to_fp8[(-(-n_rows // height), groups, n_stacked)](
            stacked, values.view(torch.uint8), scales, n_rows, *stacked.stride(), WIDTH=width, ROWS=height,
            SHARED=rows > 1, num_warps=8 if rows > 1 else 4,
        )  # fmt: skip
    return values, scales
