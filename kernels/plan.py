"""Which row goes where: routed rows sorted by expert, stably, and a schedule of tiles, without a word to the host.

Three kernels. `_count`: rows per expert in every block of rows. `_scan`: a program adds up the blocks of some experts.
`_place`: a block ranks its rows within their experts and writes both maps; programs beyond the blocks write the
offsets and the schedule, whose size the host bounds by ceil(N / block_m) + E, so that it never waits to learn it. No
atomics: the plan is the same on every run. A row with expert -1 takes part in nothing and lies behind the last
expert's.

Letters: J tiles of the schedule, as many as there can be.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import operands

BLOCK = 512  # rows that one program places, at most
COLUMNS = 32  # experts whose blocks one program adds up, at most
SCHEDULE = 64  # tiles that one program schedules, at most
CELLS = 8192  # counts, or pairs of rows, or of a tile and an expert, that a program holds at a time
WARPS = 8  # CELLS are 32 to a thread: with fewer warps they spill


class Plan(NamedTuple):
    """Where N routed rows lie once sorted by expert, all int32 on the device. Slot s holds row row_N[s]."""

    slot_N: Tensor  # of every row
    row_N: Tensor  # of every slot
    token_N: Tensor  # of every slot
    offset_E1: Tensor  # expert e owns slots offset[e] to offset[e + 1]
    tile_expert_J: Tensor  # of every tile: its expert and its first slot; only the first `tile_count` are written
    tile_slot_J: Tensor
    tile_count: Tensor  # (1,)


@triton.jit
def _key(expert, i, n_rows, E: tl.constexpr):
    """The expert of rows i; E for no expert, for a row that is not there, and for an id that no expert has."""
    e = tl.load(expert + i, mask=i < n_rows, other=-1)
    tl.device_assert(e < E, "an expert id is not below n_experts")
    return tl.where((e < 0) | (e >= E), E, e).to(tl.int32)


@triton.jit
def _count(expert, count, n_rows, E: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """count[b, e]: block b's rows of expert e."""
    block = tl.program_id(0)
    key = _key(expert, block * BLOCK + tl.arange(0, BLOCK), n_rows, E)
    tl.store(count + block * WIDTH + tl.arange(0, WIDTH), tl.histogram(key, WIDTH))


@triton.jit
def _scan(count, base, total, n_blocks, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """base[b, e]: rows of expert e in the blocks before b; total[e]: in all of them. COLUMNS experts a program."""
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros((COLUMNS,), dtype=tl.int32)
    for first in range(0, n_blocks, CHUNK):
        b = first + tl.arange(0, CHUNK)
        at = b[:, None] * WIDTH + e[None, :]
        rows = tl.load(count + at, mask=b[:, None] < n_blocks, other=0)
        tl.store(base + at, before[None, :] + tl.cumsum(rows, 0) - rows, mask=b[:, None] < n_blocks)
        before += tl.sum(rows, 0)
    tl.store(total + e, before)


@triton.jit
def _place(
    expert, token, base, total, slot_of, row_of, token_of, offset, tile_expert, tile_slot, tile_count, n_rows, n_tiles,
    n_blocks, K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SCHEDULE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The first n_blocks programs place the rows, the others write the offsets and the schedule."""
    block = tl.program_id(0)
    rows_E = tl.load(total + tl.arange(0, WIDTH))  # beyond E whatever lies there, which nothing below reads
    start_E = tl.cumsum(rows_E, 0) - rows_E  # where each expert's slots begin; behind the last, where they end
    if block < n_blocks:
        _place_rows(
            block, expert, token, base, start_E, slot_of, row_of, token_of, n_rows, K, E, WIDTH, BLOCK, CHUNK
        )  # fmt: skip
    else:
        _schedule(
            block - n_blocks, rows_E, start_E, offset, tile_expert, tile_slot, tile_count, n_tiles, E, WIDTH, SCHEDULE,
            BLOCK_M,
        )  # fmt: skip


@triton.jit
def _place_rows(
    block, expert, token, base, start_E, slot_of, row_of, token_of, n_rows,
    K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Both maps, and the token of every slot: row // K, or as given when K = 0.

    A row's slot is where its expert's slots begin, plus that expert's rows in earlier blocks, plus those before it in
    its own."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    e = _key(expert, row, n_rows, E)
    rank = tl.zeros((BLOCK,), dtype=tl.int32)  # rows of the same expert before this one in the block
    for first in range(0, BLOCK, CHUNK):
        other = block * BLOCK + first + tl.arange(0, CHUNK)
        same = e[:, None] == _key(expert, other, n_rows, E)[None, :]
        rank += tl.sum((same & (other[None, :] < row[:, None])).to(tl.int32), 1)
    live = row < n_rows
    slot = tl.gather(start_E, e, 0) + tl.load(base + block * WIDTH + e) + rank
    tl.store(slot_of + row, slot, mask=live)
    tl.store(row_of + slot, row, mask=live)
    source = row // K if K > 0 else tl.load(token + row, mask=live, other=0).to(tl.int32)
    tl.store(token_of + slot, source, mask=live)


@triton.jit
def _schedule(
    part, rows_E, start_E, offset, tile_expert, tile_slot, tile_count, n_tiles,
    E: tl.constexpr, WIDTH: tl.constexpr, SCHEDULE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Expert and first slot of SCHEDULE tiles; of the first of them also the offsets, and how many tiles there are."""
    e = tl.arange(0, WIDTH)
    tiles = tl.where(e < E, (rows_E + BLOCK_M - 1) // BLOCK_M, 0)
    if part == 0:
        tl.store(offset + e, start_E, mask=e <= E)
        tl.store(tile_count, tl.sum(tiles))
    tile = part * SCHEDULE + tl.arange(0, SCHEDULE)
    end = tl.cumsum(tiles, 0)
    mine = tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), 1)  # how many experts end at or before this tile
    live = (mine < E) & (tile < n_tiles)
    chosen = e[None, :] == mine[:, None]
    first = tl.sum(tl.where(chosen, (start_E - (end - tiles) * BLOCK_M)[None, :], 0), 1)
    tl.store(tile_expert + tile, mine, mask=live)
    tl.store(tile_slot + tile, first + tile * BLOCK_M, mask=live)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, 1 or more; Triton's own takes longer than the rest of a launch."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def plan(expert: Tensor, token_N: Tensor | None, n_experts: int, block_m: int) -> Plan:
    """Sort routed rows by expert: expert (T, K), or (N,) with token_N (N,) int64 -> the plan for tiles of block_m rows.

    -1 is no expert. An id of E or more and tokens that do not ascend are errors that a debug build (TRITON_DEBUG=1)
    stops at; without it a row of such an id is treated as having no expert. Raises `ValueError` for other types, and
    for rows that are not contiguous."""
    operands.ids("plan", expert, token_N)
    rows = "T K" if token_N is None else "N"
    operands.fit("plan", expert=(expert, rows, (torch.int64,)), token_N=(token_N, "N", (torch.int64,)))
    expert = operands.rows("plan", expert, token_N, 2**31, n_experts)
    n_rows, k = expert.numel(), 0 if token_N is not None else expert.shape[-1]
    empty = functools.partial(expert.new_empty, dtype=torch.int32)
    n_blocks, n_tiles = -(-n_rows // BLOCK), -(-n_rows // block_m) + n_experts
    width = power_of_2(n_experts + 1)
    out = Plan(
        empty(n_rows), empty(n_rows), empty(n_rows), empty(n_experts + 1), empty(n_tiles), empty(n_tiles), empty(1)
    )  # fmt: skip
    block, columns = min(BLOCK, max(16, power_of_2(n_rows))), min(COLUMNS, width)
    (count, base), total = empty((2, n_blocks, width)), empty(width)
    common = dict(E=n_experts, WIDTH=width)
    if n_blocks:
        _count[(n_blocks,)](expert, count, n_rows, **common, BLOCK=block)
    chunk = min(CELLS // columns, power_of_2(n_blocks))
    _scan[(n_experts // columns + 1,)](
        count, base, total, n_blocks, WIDTH=width, COLUMNS=columns, CHUNK=chunk, num_warps=WARPS
    )  # fmt: skip
    schedule = max(1, min(SCHEDULE, CELLS // width))
    _place[(n_blocks - (-n_tiles // schedule),)](
        expert, token_N, base, total, *out, n_rows, n_tiles, n_blocks, K=k, **common, BLOCK=block,
        CHUNK=min(CELLS // BLOCK, block), SCHEDULE=schedule, BLOCK_M=block_m, num_warps=WARPS,
    )  # fmt: skip
    return out
