"""Rows grouped by expert times that expert's matrix, the gather before it and the activation after it fused in.

One kernel, four uses (slots as `plan` lays them out; rows of one expert lie side by side):

    up      z = x[token] @ w_up[e]^T, h = act(z)          gathered rows     epilogue activate
    down    y = h @ w_down[e]^T                           contiguous rows   epilogue store
    dh      dh = dout[token] @ w_down[e]; from it, in registers, dz = act'(z) dh w, h w, and dw = <dh, h>
                                                          gathered rows     epilogue backward
    dx      dx = dz @ w_up[e]                             contiguous rows   epilogue store

A program walks over tiles of the schedule (block_m rows of one expert by block_n columns), so the host never learns how
many rows an expert got. Sums are in float32 (float64 for float64); no atomics; every element is written by one program,
in one order: reruns are bitwise equal. A swiglu tile reads gate and up columns in turns, so one accumulator holds both.

Letters: J tiles of the schedule. In BLOCK_M, BLOCK_N and BLOCK_K alone, M, N, K are a tile's rows, its columns and the
part of the summed width that is loaded at a time, as in every matmul kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import hopper, operands, tuning
from kernels.plan import Plan

# Triton's interpreter multiplies bfloat16 bit patterns; there (only) operands are widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MAPS = (torch.int32,)  # what a plan's parts are


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, in acc's dtype."""
    if INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def clamp(index, SIZE: tl.constexpr):
    """index, which holds aligned runs of 16, where it is below SIZE; elsewhere another index below SIZE.

    Runs stay runs, of the largest power of two up to 16 that divides SIZE, and the compiler is told so: else it would
    load element by element and without asynchronous copies."""
    RUN: tl.constexpr = (SIZE | 16) & -(SIZE | 16)
    return tl.max_contiguous(tl.multiple_of(tl.where(index < SIZE, index, index % RUN), RUN), RUN)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """An ungated activation and its derivative."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        cdf = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        slope = 1.5957691216057308 * (1 + 0.134145 * z * z)
        return z * cdf, cdf + z * cdf * (1 - cdf) * slope
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.maximum(z, 0.0)
        return positive * positive, 2 * positive


@triton.jit
def columns(acc, PARTS: tl.constexpr):
    """acc (rows, columns) cut into PARTS (1, 2 or 4) slices of columns, as a tuple."""
    if PARTS == 1:
        slices = (acc,)
    else:
        tl.static_assert(acc.shape[1] % PARTS == 0)
        left, right = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
        slices = columns(left, PARTS // 2) + columns(right, PARTS // 2)
    return slices


@triton.jit
def _store(y, out, slot, live, start, COLUMNS: tl.constexpr):
    """out[slot, start:] = y."""
    column = start + tl.arange(0, y.shape[1])[None, :]
    tl.store(
        out + slot.to(tl.int64)[:, None] * COLUMNS + column,
        y.to(out.dtype.element_ty),
        mask=live[:, None] & (column < COLUMNS),
    )


@triton.jit
def _store_activated(y, z, h, slot, live, start, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr):
    """z = y, if there is a z, and h = act(y). For swiglu y holds gate and up columns in turns, z keeps them in two
    halves."""
    at = slot.to(tl.int64)[:, None]
    if ACTIVATION == "swiglu":
        gate, up = y.reshape(y.shape[0], y.shape[1] // 2, 2).split()
        f = start // 2 + tl.arange(0, y.shape[1] // 2)[None, :]
        keep = live[:, None] & (f < COLUMNS // 2)
        if z is not None:
            tl.store(z + at * COLUMNS + f, gate.to(z.dtype.element_ty), mask=keep)
            tl.store(z + at * COLUMNS + (COLUMNS // 2 + f), up.to(z.dtype.element_ty), mask=keep)
        tl.store(h + at * (COLUMNS // 2) + f, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=keep)
    else:
        if z is not None:
            _store(y, z, slot, live, start, COLUMNS)
        # Of z as it is stored, as the backward will read it; in its fewer bits it also takes fewer registers.
        value, _ = activate(y.to(h.dtype.element_ty).to(y.dtype), ACTIVATION)
        _store(value, h, slot, live, start, COLUMNS)


@triton.jit
def _store_backward(dh, z, dz, h, w, slot, live, start, F: tl.constexpr, ACTIVATION: tl.constexpr):
    """dz = act'(z) dh w and w h, those that there are; returns <dh, h> over these columns, the gradient of w."""
    at = slot.to(tl.int64)[:, None]
    f = start + tl.arange(0, dh.shape[1])[None, :]
    keep = live[:, None] & (f < F)
    if ACTIVATION == "swiglu":
        gate = tl.load(z + at * (2 * F) + f, mask=keep, other=0.0).to(dh.dtype)
        up = tl.load(z + at * (2 * F) + (F + f), mask=keep, other=0.0).to(dh.dtype)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        value = silu * up
        if dz is not None:
            dgate = dh * w[:, None] * up * (sigmoid + silu * (1 - sigmoid))
            tl.store(dz + at * (2 * F) + f, dgate.to(dz.dtype.element_ty), mask=keep)
            tl.store(dz + at * (2 * F) + (F + f), (dh * w[:, None] * silu).to(dz.dtype.element_ty), mask=keep)
    else:
        value, slope = activate(tl.load(z + at * F + f, mask=keep, other=0.0).to(dh.dtype), ACTIVATION)
        if dz is not None:
            _store(dh * w[:, None] * slope, dz, slot, live, start, F)
    if h is not None:
        _store(value * w[:, None], h, slot, live, start, F)
    return tl.sum(dh * value, 1)


@triton.jit
def _ragged_mm(
    a,
    b,
    out,
    h,
    z,
    weight,
    dweight,
    token,
    row,
    offset,
    tile_expert,
    tile_slot,
    tile_count,
    inner_end,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    K_MAJOR: tl.constexpr,
    GATHER: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    A_TMA: tl.constexpr,
    B_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Each expert's rows of a (INNER wide) times its matrix in b, COLUMNS wide, and the epilogue on the product."""
    PAIRED: tl.constexpr = (
        ACTIVATION == "swiglu" and EPILOGUE == "activate"
    )  # columns are gate 0, up 0, gate 1, up 1, ...
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.load(tile_count)
    for tile in range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0)):
        # Which tile: GROUP_M tiles of rows take all columns before the next group, so a matrix stays in cache.
        group = tile // (GROUP_M * TILES_N)
        height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        tile_m = group * GROUP_M + tile % (GROUP_M * TILES_N) % height
        tile_n = tile % (GROUP_M * TILES_N) // height

        # Whose it is: an expert, its slots from the schedule (the last tile of an expert is not full), and columns.
        e = tl.load(tile_expert + tile_m)
        first = tl.load(tile_slot + tile_m)
        slot = first + tl.arange(0, BLOCK_M)
        live = slot < tl.load(offset + e + 1)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)

        # Where its rows and columns begin. An asynchronous copy may touch an address whose lane is masked off: every
        # address is a valid one.
        if not A_TMA:
            # A row past the expert's last reads one that exists; nothing of it is stored.
            source = tl.load(token + slot, mask=live, other=0) if GATHER else tl.where(live, slot, first)
            a_rows = a + source.to(tl.int64)[:, None] * INNER
        if not B_TMA:
            within = column if COLUMNS % BLOCK_N == 0 else clamp(column, COLUMNS)
            b_column = (within % 2) * (COLUMNS // 2) + within // 2 if PAIRED else within
            b_columns = b + e.to(tl.int64) * (COLUMNS * INNER) + b_column[None, :] * (INNER if K_MAJOR else 1)

        # The product, BLOCK_K of the summed width at a time: load a piece of either side, multiply, add.
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for start_k in range(0, inner_end, BLOCK_K):  # INNER, known at run time, or the compiler would unroll the loop
            if A_TMA:
                a_tile = a.load([first, start_k])
            elif INNER % BLOCK_K == 0:
                a_tile = tl.load(a_rows + (start_k + inner)[None, :])
            else:
                inside = start_k + inner < INNER
                a_tile = tl.load(a_rows + clamp(start_k + inner, INNER)[None, :], mask=inside[None, :], other=0.0)
            if B_TMA:
                if PAIRED:
                    b_tile = b.load([e, tile_n * (BLOCK_N // 2), 0, start_k]).reshape(BLOCK_N, BLOCK_K).T
                elif K_MAJOR:
                    b_tile = b.load([e, tile_n * BLOCK_N, start_k]).reshape(BLOCK_N, BLOCK_K).T
                else:
                    b_tile = b.load([e, start_k, tile_n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            else:
                if INNER % BLOCK_K == 0 and COLUMNS % BLOCK_N == 0:
                    b_tile = tl.load(b_columns + (start_k + inner)[:, None] * (1 if K_MAJOR else COLUMNS))
                else:
                    at = clamp(start_k + inner, INNER)[:, None] * (1 if K_MAJOR else COLUMNS)
                    b_tile = tl.load(
                        b_columns + at, mask=(start_k + inner < INNER)[:, None] & (column < COLUMNS)[None, :], other=0.0
                    )
            acc = dot(a_tile, b_tile, acc, PRECISION)

        # Epilogue and store, in PARTS slices of columns, so that one slice's temporaries are live at a time.
        WIDTH: tl.constexpr = BLOCK_N // PARTS
        total = tl.zeros((BLOCK_M,), dtype=ACC)
        source_row = slot
        w = total
        if EPILOGUE == "backward":  # weights stand by row, not by slot
            source_row = tl.load(row + slot, mask=live, other=0)
            w = tl.load(weight + source_row, mask=live, other=0.0).to(ACC)
        slices = columns(acc, PARTS)
        for part in tl.static_range(PARTS):
            start = tile_n * BLOCK_N + part * WIDTH
            if EPILOGUE == "store":
                _store(slices[part], out, slot, live, start, COLUMNS)
            elif EPILOGUE == "activate":
                _store_activated(slices[part], out, h, slot, live, start, COLUMNS, ACTIVATION)
            else:
                tl.static_assert(EPILOGUE == "backward")
                total += _store_backward(slices[part], z, out, h, w, slot, live, start, COLUMNS, ACTIVATION)
        if dweight is not None:
            # Each tile of columns leaves its part of d(weight); the host adds them up.
            tl.store(dweight + source_row.to(tl.int64) * TILES_N + tile_n, total, mask=live)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums of this dtype are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def up(
    x_TD: Tensor, w_up_EFD: Tensor, plan: Plan, activation: str, tile: tuning.Tile, tf32: bool, keep_z: bool = True
) -> tuple[Tensor, Tensor]:
    """z = x[token] @ w_up[e]^T and h = act(z): -> (N, F) or (N, 2F) for swiglu, without a row unless kept; (N, F), in
    slots."""
    _fit("up", plan, x=(x_TD, "T D"), w_up=(w_up_EFD, "E W D"))
    n_rows, width = len(plan.row_N), w_up_EFD.shape[1]
    z = x_TD.new_empty(n_rows if keep_z else 0, width)
    h = x_TD.new_empty(n_rows, width // 2 if activation == "swiglu" else width)
    kept = z if keep_z else None
    if tile.gluon and activation == "swiglu":
        hopper.up(x_TD, w_up_EFD, kept, h, plan, tile)
        return z, h
    _launch(x_TD, w_up_EFD, kept, plan, tile, tf32, "activate", activation, gather=True, k_major=True, h=h)
    return z, h


def down(h_NF: Tensor, w_down_EDF: Tensor, plan: Plan, tile: tuning.Tile, tf32: bool) -> Tensor:
    """y = h @ w_down[e]^T: (N, F) -> (N, D), in slots."""
    _fit("down", plan, h=(h_NF, "N F"), w_down=(w_down_EDF, "E D F"))
    y = h_NF.new_empty(len(h_NF), w_down_EDF.shape[1])
    _launch(h_NF, w_down_EDF, y, plan, tile, tf32, "store", "", gather=False, k_major=True)
    return y


def dh(
    dout_TD: Tensor, w_down_EDF: Tensor, z: Tensor, weight_N: Tensor, plan: Plan, activation: str, tile: tuning.Tile,
    tf32: bool, for_z: bool = True, for_h: bool = True, for_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dL/dz, the weighted hidden rows w h, and dL/dw: -> (as z), (N, F), in slots; (N,) by row, 0 without expert. Those
    that are not asked for have no row."""
    _fit("dh", plan, dout=(dout_TD, "T D"), w_down=(w_down_EDF, "E D F"), z=(z, "N W"))
    operands.fit("dh", weight=(weight_N, "N", operands.FLOATS), row_N=(plan.row_N, "N", MAPS))
    n_rows, width = len(z), w_down_EDF.shape[2]
    if z.shape[1] != (2 * width if activation == "swiglu" else width):
        raise ValueError(f"dh takes the z of w_down's F={width} and {activation}; it is {tuple(z.shape)}.")
    dz = z.new_empty(n_rows if for_z else 0, z.shape[1])
    h = z.new_empty(n_rows if for_h else 0, width)
    parts = weight_N.new_zeros(n_rows if for_weight else 0, triton.cdiv(width, tile.block_n))
    _launch(
        dout_TD, w_down_EDF, dz if for_z else None, plan, tile, tf32, "backward", activation, gather=True,
        k_major=False, h=h if for_h else None, z=z, weight=weight_N, dweight=parts if for_weight else None,
    )  # fmt: skip
    return dz, h, parts.sum(1)


def dx(dz: Tensor, w_up_EFD: Tensor, plan: Plan, tile: tuning.Tile, tf32: bool) -> Tensor:
    """dx = dz @ w_up[e]: -> (N, D), in slots."""
    _fit("dx", plan, dz=(dz, "N W"), w_up=(w_up_EFD, "E W D"))
    out = dz.new_empty(len(dz), w_up_EFD.shape[2])
    _launch(dz, w_up_EFD, out, plan, tile, tf32, "store", "", gather=False, k_major=False)
    return out


def _fit(name: str, plan: Plan, **floats: tuple[Tensor | None, str]) -> None:
    """Operands of one type, and those in slots of as many rows as the plan has."""
    (first, _), *_ = floats.values()
    dtypes = operands.FLOATS if first is None or first.dtype not in operands.FLOATS else (first.dtype,)
    kinds = {key: (tensor, letters, dtypes) for key, (tensor, letters) in floats.items()}
    operands.fit(name, **kinds, token_N=(plan.token_N, "N", MAPS))


def _launch(
    a: Tensor, b: Tensor, out: Tensor | None, plan: Plan, tile: tuning.Tile, tf32: bool, epilogue: str, activation: str,
    gather: bool, k_major: bool, h: Tensor | None = None, z: Tensor | None = None, weight: Tensor | None = None,
    dweight: Tensor | None = None,
) -> None:  # fmt: skip
    """One use of the kernel: b is (E, columns, inner) when k_major, else (E, inner, columns). An output that is None is
    not written."""
    n_experts, n_columns, inner = b.shape if k_major else (b.shape[0], b.shape[2], b.shape[1])
    if not len(plan.row_N) or not n_columns:
        return

    # Which side goes through the copy engine: it gathers nothing, and wants rows that start on 16 bytes.
    b_tma = tile.tma and b.shape[2] * b.element_size() % 16 == 0
    a_tma = tile.tma and not gather and inner * a.element_size() % 16 == 0
    a_source: Tensor | TensorDescriptor = a
    b_source: Tensor | TensorDescriptor = b
    if a_tma:
        a_source = TensorDescriptor(a, [len(a), inner], [inner, 1], [tile.block_m, tile.block_k])
    if b_tma and epilogue == "activate" and activation == "swiglu":  # gate and up columns in turns
        shape = [n_experts, n_columns // 2, 2, inner]
        strides = [n_columns * inner, inner, n_columns // 2 * inner, 1]
        b_source = TensorDescriptor(b, shape, strides, [1, tile.block_n // 2, 2, tile.block_k])
    elif b_tma:
        block = [1, tile.block_n, tile.block_k] if k_major else [1, tile.block_k, tile.block_n]
        b_source = TensorDescriptor(b, list(b.shape), list(b.stride()), block)

    # As many programs as tiles at most: the schedule's bound, because the host does not know their count.
    total = len(plan.tile_expert_J) * triton.cdiv(n_columns, tile.block_n)
    _ragged_mm[(min(total, tuning.programs(a.device, tile)),)](
        a_source, b_source, out, h, z, weight, dweight, plan.token_N, plan.row_N, plan.offset_E1,
        plan.tile_expert_J, plan.tile_slot_J, plan.tile_count, inner,
        COLUMNS=n_columns, INNER=inner, K_MAJOR=k_major, GATHER=gather, EPILOGUE=epilogue, ACTIVATION=activation,
        PRECISION=tuning.precision(a.device, tf32), ACC=accumulator(a.dtype), A_TMA=a_tma, B_TMA=b_tma,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m, PARTS=tile.parts,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
