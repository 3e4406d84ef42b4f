"""A token's rows, summed: with their weights for the layer's output, plain for its input gradient.

A program owns a token or a few, and a stretch of columns; it reads rows in one order and adds in float32 (float64 for
float64), so reruns are bitwise equal. Bound by bytes: N rows read once, T written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import operands
from kernels.plan import power_of_2

UNROLLED = 16  # rows per token that are all in flight at once
CELLS = 1024  # sums that one program keeps


@triton.jit
def _combine(
    y, slot, weight, start, n_live, out, n_tokens,
    D: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = sum of weight[r] y[slot[r]] over token t's rows r: t K to (t + 1) K, or start[t] to start[t + 1]."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = t < n_tokens
    last = tl.load(n_live)  # slots from here on have no expert
    total = tl.zeros((ROWS, BLOCK), dtype=ACC)
    if K > 0:
        for j in tl.static_range(K):
            total += _row(y, slot, weight, t.to(tl.int64) * K + j, live, last, d, D, WEIGHTED, ACC)
    else:
        first = tl.load(start + t, mask=live, other=0)
        n_rows = tl.load(start + t + 1, mask=live, other=0) - first
        for j in range(0, tl.max(n_rows, 0)):
            total += _row(y, slot, weight, first + j, j < n_rows, last, d, D, WEIGHTED, ACC)
    at = t.to(tl.int64)[:, None] * D + d
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live[:, None] & (d < D))


@triton.jit
def _row(y, slot, weight, r, live, last, d, D: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr):
    """Rows r of y, weighted; zeros for a row that is not there or has no expert, whatever its weight."""
    s = tl.load(slot + r, mask=live, other=0)
    live = live & (s < last)
    value = tl.load(y + s.to(tl.int64)[:, None] * D + d, mask=live[:, None] & (d < D), other=0.0).to(ACC)
    if WEIGHTED:
        value *= tl.load(weight + r, mask=live, other=0.0).to(ACC)[:, None]
    return value


def combine(
    y_ND: Tensor, slot_N: Tensor, weight_N: Tensor | None, start_T1: Tensor | None, offset_E1: Tensor, n_tokens: int
) -> Tensor:
    """(N, D) in slots -> (T, D): every token's rows, weighted if weights are given.

    Rows come in token order: token t's are start_T1[t] to start_T1[t + 1], or, without start_T1, N / T each."""
    operands.fit(
        "combine", y=(y_ND, "S D", operands.FLOATS), slot_N=(slot_N, "N", (torch.int32,)),
        weight=(None if weight_N is None else weight_N.flatten(), "N", operands.FLOATS),
        start_T1=(start_T1, "T1", (torch.int64,)), offset_E1=(offset_E1, "E1", (torch.int32,)),
    )  # fmt: skip
    if start_T1 is None and n_tokens and len(slot_N) % n_tokens:
        raise ValueError(f"combine takes as many rows for every token, or start_T1; {len(slot_N)} are of {n_tokens}.")
    out_TD = y_ND.new_empty(n_tokens, y_ND.shape[1])
    if out_TD.numel() == 0:
        return out_TD
    k = len(slot_N) // n_tokens if start_T1 is None else 0
    if start_T1 is None and not 0 < k <= UNROLLED:
        start_T1, k = torch.arange(n_tokens + 1, device=y_ND.device) * k, 0
    d = y_ND.shape[1]
    block = min(CELLS, power_of_2(d))
    rows = min(CELLS // block, power_of_2(n_tokens))
    _combine[(-(-n_tokens // rows), -(-d // block))](
        y_ND, slot_N, weight_N, start_T1, offset_E1[-1:], out_TD, n_tokens,
        D=d, K=k, WEIGHTED=weight_N is not None, ACC=tl.float64 if y_ND.dtype == torch.float64 else tl.float32,
        ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return out_TD
