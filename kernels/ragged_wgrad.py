"""Gradients of weights and biases of grouped matmuls: for every expert, the product of its rows of two matrices, one of
them gathered, and the sum of its rows of one.

dw_down[e] (D, F) = sum over the expert's slots s of dout[token_s]^T (w h)[s]     db_down[e] (D) = of w dout[token_s]
dw_up[e]   (F, D) = sum over the expert's slots s of dz[s]^T x[token_s]           db_up[e]   (F) = of dz[s]

A program owns one tile of one expert's gradient and walks over that expert's rows in order, so nothing is added
atomically and an expert with no row gets zeros. BLOCK_M, BLOCK_N, BLOCK_K are a tile's rows, its columns and the slots
that are summed over at a time.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged

from kernels import operands, tuning
from kernels.bits import clamp
from kernels.plan import Plan
from kernels.ragged_mm import INTERPRETED, MAPS, RAGGED_ROWS, accumulator, dot

ROWS, COLUMNS = 32, 128  # of a bias' gradient, that one program adds at a time


@triton.jit
def _ragged_wgrad(
    p, q, out, token, offset, P_WIDTH: tl.constexpr, Q_WIDTH: tl.constexpr, GATHER_P: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[e] = p[rows]^T q[rows] over expert e's rows; `token` maps a slot to the row of the gathered one. TMA: the
    other one comes by the copy engine, which gives zeros for slots that are not the expert's."""
    TILES_M: tl.constexpr = (P_WIDTH + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (Q_WIDTH + BLOCK_N - 1) // BLOCK_N

    # Which tile of which expert: GROUP_M tiles of rows take all columns before the next group, as in ragged_mm.
    tile = tl.program_id(0)
    e = tl.program_id(1)
    group = tile // (GROUP_M * TILES_N)
    height = tl.minimum(TILES_M - group * GROUP_M, GROUP_M)
    first_m = (group * GROUP_M + tile % (GROUP_M * TILES_N) % height) * BLOCK_M
    first_n = tile % (GROUP_M * TILES_N) // height * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    # An asynchronous copy may touch an address whose lane is masked off: every address is a valid one.
    p_column = m if P_WIDTH % BLOCK_M == 0 else clamp(m, P_WIDTH)
    q_column = n if Q_WIDTH % BLOCK_N == 0 else clamp(n, Q_WIDTH)

    # The expert's slots in order, BLOCK_K at a time: load their rows of p and q, multiply, add.
    end = tl.load(offset + e + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for first in range(tl.load(offset + e), end, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        live = slot < end
        at = tl.where(live, slot, first)
        source = tl.load(token + at).to(tl.int64)
        # p is read as its transpose: one that is transposed after the load goes through registers on sm_80.
        if TMA and not GATHER_P:
            p_tile = load_ragged(p, first, end - first, [0, first_m]).T
        else:
            p_row = p + (source if GATHER_P else at.to(tl.int64))[None, :] * P_WIDTH
            p_tile = tl.load(p_row + p_column[:, None], mask=live[None, :] & (m[:, None] < P_WIDTH), other=0.0)
        if TMA and GATHER_P:
            q_tile = load_ragged(q, first, end - first, [0, first_n])
        else:
            q_row = q + (at.to(tl.int64) if GATHER_P else source)[:, None] * Q_WIDTH
            q_tile = tl.load(q_row + q_column[None, :], mask=live[:, None] & (n[None, :] < Q_WIDTH), other=0.0)
        acc = dot(p_tile, q_tile, acc, PRECISION)

    # Store: an expert without a slot stores its zeros.
    out_tile = out + e.to(tl.int64) * (P_WIDTH * Q_WIDTH) + m.to(tl.int64)[:, None] * Q_WIDTH + n[None, :]
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=(m[:, None] < P_WIDTH) & (n[None, :] < Q_WIDTH))


@triton.jit
def _ragged_sum(
    p, out, token, row, weight, offset,
    WIDTH: tl.constexpr, GATHER: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of p[rows], weighted if there are weights, over expert e's rows; one BLOCK of columns a program."""
    e = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(offset + e + 1)
    total = tl.zeros((BLOCK,), dtype=ACC)
    for first in range(tl.load(offset + e), end, ROWS):
        slot = first + tl.arange(0, ROWS)
        live = slot < end
        source = (tl.load(token + slot, mask=live, other=0) if GATHER else slot).to(tl.int64)
        at = p + source[:, None] * WIDTH + column[None, :]
        value = tl.load(at, mask=live[:, None] & (column < WIDTH)[None, :], other=0.0).to(ACC)
        if weight is not None:
            at = tl.load(row + slot, mask=live, other=0)
            value *= tl.load(weight + at, mask=live, other=0.0).to(ACC)[:, None]
        total += tl.sum(value, 0)
    tl.store(out + e.to(tl.int64) * WIDTH + column, total.to(out.dtype.element_ty), mask=column < WIDTH)


def ragged_sum(p: Tensor, weight_N: Tensor | None, plan: Plan, gather: bool, n_experts: int) -> Tensor:
    """p summed by expert: -> (E, width of p). Gathered, p is (T, .), rows of tokens; else (N, .), in slots. weight_N
    (N,) by row multiplies them."""
    operands.fit(
        "ragged_sum", p=(p, "T P" if gather else "N P", operands.FLOATS), weight=(weight_N, "N", operands.FLOATS),
        token_N=(plan.token_N, "N", MAPS), row_N=(plan.row_N, "N", MAPS),
    )  # fmt: skip
    width = p.shape[1]
    out = p.new_empty(n_experts, width)
    _ragged_sum[(triton.cdiv(width, COLUMNS), n_experts)](
        p, out, plan.token_N, plan.row_N, weight_N, plan.offset_E1, WIDTH=width, GATHER=gather,
        ACC=accumulator(p.dtype), ROWS=ROWS, BLOCK=COLUMNS,
    )  # fmt: skip
    return out


def ragged_wgrad(
    p: Tensor, q: Tensor, plan: Plan, gather_p: bool, n_experts: int, tile: tuning.Tile, tf32: bool
) -> Tensor:
    """p^T q by expert: -> (E, width of p, width of q). The gathered one is (T, .), rows of tokens; the other (N, .), in
    slots."""
    operands.fit(
        "ragged_wgrad", p=(p, "T P" if gather_p else "N P", operands.FLOATS),
        q=(q, "N Q" if gather_p else "T Q", (p.dtype,)), token_N=(plan.token_N, "N", MAPS),
    )  # fmt: skip
    p_width, q_width = p.shape[1], q.shape[1]
    out = p.new_empty(n_experts, p_width, q_width)
    grid = (triton.cdiv(p_width, tile.block_m) * triton.cdiv(q_width, tile.block_n), n_experts)
    # The side that is not gathered may come by the copy engine: Triton's interpreter has no such descriptors.
    in_slots, block = (q, tile.block_n) if gather_p else (p, tile.block_m)
    tma = tile.ragged and not INTERPRETED and in_slots.stride(0) * p.element_size() % 16 == 0
    tma = tma and 0 < len(in_slots) <= RAGGED_ROWS
    rows = create_ragged_descriptor(in_slots, [tile.block_k, block]) if tma else in_slots
    p_source, q_source = (p, rows) if gather_p else (rows, q)
    _ragged_wgrad[grid](
        p_source, q_source, out, plan.token_N, plan.offset_E1, P_WIDTH=p_width, Q_WIDTH=q_width, GATHER_P=gather_p,
        TMA=tma, PRECISION=tuning.precision(p.device, tf32), ACC=accumulator(p.dtype),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
