"""`up` of ragged_mm for sm_90 with warps that load beside warps that multiply, in Gluon: off until a GPU has proven it.

    z = x[token] @ w_up[e]^T, h = silu(gate) up        gathered rows, gate and up columns of w_up in turns

Four warps load and keep few registers: they gather rows of x by asynchronous copies and have the tensor memory
accelerator (TMA) bring w. The others multiply, and write finished tiles while the next tile's first stages arrive, so
that only the writing itself keeps the tensor cores waiting. Both walk over the same tiles of the schedule in the same
order. They meet at a ring of stages with two barriers each: `full`, where every loading thread and the accelerator
arrive once their bytes are there, and `empty`, where the multiplying warps arrive once they have read them.

A tile of the tuning table asks for it with `gluon`. Sums are those of ragged_mm's kernel, in the same order. Only the
compiler checks this file on a machine without such a GPU, and a test that runs its lines as Python.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import tuning
from kernels.plan import Plan

LOADING_WARPS = gl.constexpr(4)  # one group of warps: registers are dealt out to groups of four
LOADING_REGISTERS = gl.constexpr(56)  # of a loading thread; the multiplying ones share the rest
REGISTERS = 65536  # of a multiprocessor


@gluon.jit
def place(tile, tiles_m, TILES_N: gl.constexpr, GROUP_M: gl.constexpr):
    """Tile of rows, tile of columns: GROUP_M tiles of rows take all columns before the next group, as in ragged_mm."""
    group = tile // (GROUP_M * TILES_N)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + tile % (GROUP_M * TILES_N) % height, tile % (GROUP_M * TILES_N) // height


@gluon.jit
def after(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage, and the parity of its barriers' phase, which changes once a round."""
    stage = (stage + 1) % STAGES
    return stage, phase ^ (stage == 0)


@gluon.jit
def _load_tiles(
    x, w, token, schedule, ring, inner_end, COLUMNS: gl.constexpr, INNER: gl.constexpr, GROUP_M: gl.constexpr
):
    """The loading warps: fill stage after stage, of tile after tile, as soon as it is empty."""
    offset, tile_expert, tile_slot, tile_count = schedule
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BLOCK_N: gl.constexpr = 2 * w_ring.shape[2]
    TILES_N: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    # A thread copies 16 bytes at a time, neighbours a row.
    LANES: gl.constexpr = BLOCK_K // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [LOADING_WARPS, 1], [1, 0])
    inner = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
    tiles_m = gl.load(tile_count)
    stage, phase = 0, 1  # nothing was read yet: the phase before the first counts as over
    for tile in range(gl.program_id(0), tiles_m * TILES_N, gl.num_programs(0)):
        # Whose tile it is, and where its rows of x begin. A row past the expert's last reads one that exists.
        tile_m, tile_n = place(tile, tiles_m, TILES_N, GROUP_M)
        e = gl.load(tile_expert + tile_m)
        slot = gl.load(tile_slot + tile_m) + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
        source = gl.load(token + slot, mask=slot < gl.load(offset + e + 1), other=0)
        x_rows = x + source.to(gl.int64)[:, None] * INNER + inner[None, :]

        # BLOCK_K of the summed width at a time, both sides into one stage.
        for start in range(0, inner_end, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), BLOCK_N * BLOCK_K * (w.dtype.primitive_bitwidth // 8))
            corner = [e, tile_n * (BLOCK_N // 2), 0, start]
            tma.async_copy_global_to_shared(w, corner, full.index(stage), w_ring.index(stage))
            async_copy.async_copy_global_to_shared(x_ring.index(stage), x_rows + start)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            stage, phase = after(stage, phase, STAGES)


@gluon.jit
def _columns(y, PARTS: gl.constexpr):
    """y (rows, columns) cut into PARTS (a power of 2) slices of columns, as a tuple."""
    if PARTS == 1:
        slices = (y,)
    else:
        left, right = y.reshape(y.shape[0], 2, y.shape[1] // 2).permute(0, 2, 1).split()
        slices = _columns(left, PARTS // 2) + _columns(right, PARTS // 2)
    return slices


@gluon.jit
def _store(value, out, rows, live, start, end, LAYOUT: gl.constexpr):
    """out[rows + start:] = value, below column `end`, in a layout whose neighbours write neighbours."""
    value = gl.convert_layout(value.to(out.dtype.element_ty), LAYOUT)
    f = start + gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    gl.store(out + rows[:, None] + f[None, :], value, mask=live[:, None] & (f < end)[None, :])


@gluon.jit
def _multiply_tiles(z, h, schedule, ring, inner_end, COLUMNS: gl.constexpr, GROUP_M: gl.constexpr, PARTS: gl.constexpr):
    """The multiplying warps: sum up stage after stage, then write the tile's z, if there is a z, and h."""
    offset, tile_expert, tile_slot, tile_count = schedule
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BLOCK_N: gl.constexpr = 2 * w_ring.shape[2]
    TILES_N: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    F: gl.constexpr = COLUMNS // 2
    # Sums lie 16 rows to a warp, all columns; what is written of a slice lies 16 bytes to a thread.
    WARPS: gl.constexpr = gl.num_warps()
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    WIDTH: gl.constexpr = BLOCK_N // PARTS
    LANES: gl.constexpr = min(WIDTH // 16, 32)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    tiles_m = gl.load(tile_count)
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), tiles_m * TILES_N, gl.num_programs(0)):
        # Whose tile it is: asked for now, needed at its end.
        tile_m, tile_n = place(tile, tiles_m, TILES_N, GROUP_M)
        first = gl.load(tile_slot + tile_m)
        end = gl.load(offset + gl.load(tile_expert + tile_m) + 1)

        # The product. A stage is given back when the next one's product is under way and its own is finished.
        acc = warpgroup_mma_init(gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SUMS))
        before = stage
        for start in range(0, inner_end, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            fence_async_shared()  # threads copied x, tensor cores read it
            w_tile = w_ring.index(stage).reshape([BLOCK_N, BLOCK_K]).permute([1, 0])
            acc = warpgroup_mma(x_ring.index(stage), w_tile, acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(empty.index(before), pred=start > 0)
            before = stage
            stage, phase = after(stage, phase, STAGES)
        y = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(before))

        # Store, in PARTS slices of columns: gate and up columns in turns become the halves of z, and h.
        slot = first + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, ROWS))
        live = slot < end
        h_rows = slot.to(gl.int64) * F
        slices = _columns(y, PARTS)
        for part in gl.static_range(PARTS):
            gate, up = slices[part].reshape(BLOCK_M, WIDTH // 2, 2).split()
            start = tile_n * (BLOCK_N // 2) + part * (WIDTH // 2)
            if z is not None:
                _store(gate, z, 2 * h_rows, live, start, F, ROWS)
                _store(up, z + F, 2 * h_rows, live, start, F, ROWS)
            _store(gate * (1 / (1 + gl.exp(-gate))) * up, h, h_rows, live, start, F, ROWS)


@gluon.jit
def _up(
    x, w, z, h, token, offset, tile_expert, tile_slot, tile_count, inner_end,
    COLUMNS: gl.constexpr, INNER: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The ring, and the two kinds of warps around it."""
    X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], w.dtype)
    x_ring = gl.allocate_shared_memory(w.dtype, [STAGES, BLOCK_M, BLOCK_K], X_LAYOUT)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, 1, BLOCK_N // 2, 2, BLOCK_K], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=32 * LOADING_WARPS + 1)
        mbarrier.init(empty.index(stage), count=1)

    schedule = (offset, tile_expert, tile_slot, tile_count)
    ring = (x_ring, w_ring, full, empty)
    gl.warp_specialize(
        [
            (_multiply_tiles, (z, h, schedule, ring, inner_end, COLUMNS, GROUP_M, PARTS)),
            (_load_tiles, (x, w, token, schedule, ring, inner_end, COLUMNS, INNER, GROUP_M)),
        ],
        [LOADING_WARPS],
        [LOADING_REGISTERS],
    )


def up(x_TD: Tensor, w_up_EFD: Tensor, z: Tensor | None, h: Tensor, plan: Plan, tile: tuning.Tile) -> None:
    """`ragged_mm.up` for swiglu: x (T, D), w_up (E, 2F, D) into z (N, 2F), unless it is None, and h (N, F), in slots.
    Raises `ValueError` for a GPU other than sm_90, types other than 16-bit ones, and sizes and tiles that it cannot
    cut."""
    n_experts, n_columns, inner = w_up_EFD.shape
    _check(x_TD, inner, tile)
    if not len(h) or not n_columns:
        return

    # A block of w is half as many pairs of a gate row and its up row.
    block = [1, tile.block_n // 2, 2, tile.block_k]
    strides = [n_columns * inner, inner, n_columns // 2 * inner, 1]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    w = TensorDescriptor(w_up_EFD, [n_experts, n_columns // 2, 2, inner], strides, block, layout)

    # As many programs as tiles at most, and registers for `per_sm` of them on a multiprocessor.
    total = len(plan.tile_expert_J) * triton.cdiv(n_columns, tile.block_n)
    threads = 32 * (tile.num_warps + LOADING_WARPS.value) * max(tile.per_sm, 1)
    _up[(min(total, tuning.programs(x_TD.device, tile)),)](
        x_TD, w, z, h, plan.token_N, plan.offset_E1, plan.tile_expert_J, plan.tile_slot_J, plan.tile_count, inner,
        COLUMNS=n_columns, INNER=inner, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m, PARTS=tile.parts, STAGES=tile.num_stages,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=min(REGISTERS // threads // 8 * 8, 248),
    )  # fmt: skip


def _check(x_TD: Tensor, inner: int, tile: tuning.Tile) -> None:
    """One sentence for what the kernel does not take."""
    name = tuning.architecture(x_TD.device)
    if name != "sm_90":
        raise ValueError(f"A tile with gluon runs on sm_90; the device is {name}.")
    if x_TD.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"A tile with gluon takes bfloat16 or float16; x is {x_TD.dtype}.")
    if inner % tile.block_k or x_TD.data_ptr() % 16:
        raise ValueError(
            f"A tile with gluon takes rows of x that start on 16 bytes and are a multiple of block_k={tile.block_k} "
            f"wide; D is {inner}."
        )
    fits = tile.block_k in (32, 64, 128) and tile.num_warps in (4, 8) and tile.block_m % (16 * tile.num_warps) == 0
    if not fits or tile.block_n // tile.parts < 16 or tile.num_stages < 2:  # one stage would wait for the next
        raise ValueError(
            f"A tile with gluon has a block_k of 32, 64 or 128, 4 or 8 warps, a multiple of 16 rows for every warp, at "
            f"least 16 columns for every part and 2 stages or more; it is {tile}."
        )
