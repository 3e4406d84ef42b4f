"""Weight gradients of grouped matmuls: for every expert, the product of its rows of two matrices, one of them gathered.

dw_down[e] (D, F) = sum over the expert's slots s of dout[token_s]^T (w h)[s]
dw_up[e]   (F, D) = sum over the expert's slots s of dz[s]^T x[token_s]

A program owns one tile of one expert's gradient and walks over that expert's rows in order, so nothing is added
atomically and an expert with no row gets zeros.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning
from kernels.plan import Plan
from kernels.ragged_mm import accumulator, clamp, dot


@triton.jit
def _ragged_wgrad(
    p, q, out, token, offset,
    M: tl.constexpr, N: tl.constexpr, GATHER_P: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[e] = p[rows]^T q[rows] over expert e's rows; `token` maps a slot to the row of the gathered one."""
    TILES_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    e = tl.program_id(1)
    group = tile // (GROUP_M * TILES_N)
    height = tl.minimum(TILES_M - group * GROUP_M, GROUP_M)
    m = (group * GROUP_M + tile % (GROUP_M * TILES_N) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % (GROUP_M * TILES_N) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    # An asynchronous copy may touch an address whose lane is masked off: every address is a valid one.
    p_column = m if M % BLOCK_M == 0 else clamp(m, M)
    q_column = n if N % BLOCK_N == 0 else clamp(n, N)
    end = tl.load(offset + e + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for first in range(tl.load(offset + e), end, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        live = slot < end
        at = tl.where(live, slot, first)
        source = tl.load(token + at).to(tl.int64)
        # p is read as its transpose: one that is transposed after the load goes through registers on sm_80.
        p_row = p + (source if GATHER_P else at.to(tl.int64))[None, :] * M
        q_row = q + (at.to(tl.int64) if GATHER_P else source)[:, None] * N
        p_tile = tl.load(p_row + p_column[:, None], mask=live[None, :] & (m[:, None] < M), other=0.0)
        q_tile = tl.load(q_row + q_column[None, :], mask=live[:, None] & (n[None, :] < N), other=0.0)
        acc = dot(p_tile, q_tile, acc, PRECISION)
    out_tile = out + e.to(tl.int64) * (M * N) + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def ragged_wgrad(
    p: Tensor, q: Tensor, plan: Plan, gather_p: bool, n_experts: int, tile: tuning.Tile, tf32: bool
) -> Tensor:
    """p^T q by expert: (., M), (., N) -> (E, M, N). Gathered: (T, .) rows of tokens; the other: (N, .) in slots."""
    out = p.new_empty(n_experts, p.shape[1], q.shape[1])
    m, n = p.shape[1], q.shape[1]
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n), n_experts)
    _ragged_wgrad[grid](
        p, q, out, plan.token_N, plan.offset_E1, M=m, N=n, GATHER_P=gather_p,
        PRECISION=tuning.precision(p.device, tf32), ACC=accumulator(p.dtype),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
