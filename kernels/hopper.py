"""Two of ragged_mm's products for sm_90 with warps that load beside warps that multiply, in Gluon: off until a GPU has
proven them.

    up    z = x[token] @ w_up[e]^T, h = silu(gate) up             gate and up columns of w_up in turns
    dh    dh = dout[token] @ w_down[e]; from it, in registers,    w_down as it lies: the tensor cores read it transposed
          dz = act'(z) dh w, h w and dw = <dh, h>

Four warps load and keep few registers: they gather rows (x below is either's) by asynchronous copies and have the
tensor memory accelerator (TMA) bring w. The others multiply, and write finished tiles while the next tile's first
stages arrive, so that only the writing itself keeps the tensor cores waiting. Both walk over the same tiles of the
schedule in the same order. They meet at a ring of stages with two barriers each: `full`, where every loading thread and
the accelerator arrive once their bytes are there, and `empty`, where the multiplying warps arrive once they have read
them.

A tile of the tuning table asks for it with `gluon`. Sums are those of ragged_mm's kernel, in the same order but for
dw's. Only the compiler checks this file on a machine without such a GPU, and a test that runs its lines as Python.
"""

import torch
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
    tensors, schedule, ring, inner_end, INNER: gl.constexpr, COLUMNS: gl.constexpr, K_MAJOR: gl.constexpr,
    BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The loading warps: fill stage after stage, of tile after tile, as soon as it is empty."""
    x, w, token = tensors
    offset, tile_expert, tile_slot, tile_count = schedule
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
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
            corner = [e, tile_n * (BLOCK_N // 2), 0, start] if K_MAJOR else [e, start, tile_n * BLOCK_N]
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
def _read(z, rows, live, start, end, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """z[rows + start:], WIDTH columns below column `end`, as `_store` has them; zeros where nothing is."""
    f = start + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(z + rows[:, None] + f[None, :], mask=live[:, None] & (f < end)[None, :], other=0)


@gluon.jit
def _store(value, out, rows, live, start, end, LAYOUT: gl.constexpr):
    """out[rows + start:] = value, below column `end`, in a layout whose neighbours write neighbours."""
    value = gl.convert_layout(value.to(out.dtype.element_ty), LAYOUT)
    f = start + gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    gl.store(out + rows[:, None] + f[None, :], value, mask=live[:, None] & (f < end)[None, :])


@gluon.jit
def _finished(acc, empty):
    """The sums, once the last product is made; the stage that it read, of this barrier, is given back."""
    y = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty)
    return y


@gluon.jit
def _store_gated(
    acc, empty, z, h, slot, live, start, F: gl.constexpr, PARTS: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr
):
    """Gate and up columns in turns become the halves of z, if there is a z, and h, from column `start` of these on."""
    rows = slot.to(gl.int64) * F
    slices = _columns(_finished(acc, empty), PARTS)
    for part in gl.static_range(PARTS):
        gate, up = slices[part].reshape(slot.shape[0], WIDTH, 2).split()
        if z is not None:
            _store(gate, z, 2 * rows, live, start, F, ROWS)
            _store(up, z + F, 2 * rows, live, start, F, ROWS)
        _store(gate * (1 / (1 + gl.exp(-gate))) * up, h, rows, live, start, F, ROWS)
        start += WIDTH


@gluon.jit
def _store_backward(
    acc, empty, z, h, dz, w, slot, live, start, F: gl.constexpr, PARTS: gl.constexpr, WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """dz and w h, those that there are, from column `start` of dh on; returns <dh, h> over the tile's columns."""
    # A slice of z is on its way while the one before becomes dz, the first while the last product is made: late, or
    # all of z would lie beside the sums.
    rows = slot.to(gl.int64) * F
    next_gate = _read(z, 2 * rows, live, start, F, WIDTH, ROWS)
    next_up = _read(z + F, 2 * rows, live, start, F, WIDTH, ROWS)
    slices = _columns(_finished(acc, empty), PARTS)
    total = gl.zeros([slot.shape[0]], gl.float32, gl.SliceLayout(1, ROWS))
    for part in gl.static_range(PARTS):
        gate, up = next_gate.to(gl.float32), next_up.to(gl.float32)
        if part + 1 < PARTS:
            next_gate = _read(z, 2 * rows, live, start + WIDTH, F, WIDTH, ROWS)
            next_up = _read(z + F, 2 * rows, live, start + WIDTH, F, WIDTH, ROWS)
        dh = gl.convert_layout(slices[part], ROWS)
        share = 1 / (1 + gl.exp(-gate))
        silu = gate * share
        value = silu * up
        total += gl.sum(dh * value, 1)
        dh *= w[:, None]
        if dz is not None:
            _store(dh * (up * (share + silu * (1 - share))), dz, 2 * rows, live, start, F, ROWS)
            _store(dh * silu, dz + F, 2 * rows, live, start, F, ROWS)
        if h is not None:
            _store(value * w[:, None], h, rows, live, start, F, ROWS)
        start += WIDTH
    return total


@gluon.jit
def _multiply_tiles(
    tensors, schedule, ring, inner_end, EPILOGUE: gl.constexpr, COLUMNS: gl.constexpr, K_MAJOR: gl.constexpr,
    BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The multiplying warps: sum up stage after stage, then write what becomes of the tile's sums."""
    z, h, dz, dweight, weight, row = tensors
    offset, tile_expert, tile_slot, tile_count = schedule
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    TILES_N: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    # Sums lie 16 rows to a warp, all columns; what is read or written of a slice lies 16 bytes to a thread, in the same
    # 16 rows, so that no warp waits for another.
    WARPS: gl.constexpr = gl.num_warps()
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    WIDTH: gl.constexpr = BLOCK_N // PARTS // (2 if K_MAJOR else 1)
    LANES: gl.constexpr = min(WIDTH // 8, 32)
    ROWS: gl.constexpr = gl.BlockedLayout([max(LANES // 2, 1), 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
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
            if K_MAJOR:
                w_tile = w_ring.index(stage).reshape([BLOCK_N, BLOCK_K]).permute([1, 0])
            else:
                w_tile = w_ring.index(stage).reshape([BLOCK_K, BLOCK_N])
            acc = warpgroup_mma(x_ring.index(stage), w_tile, acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(empty.index(before), pred=start > 0)
            before = stage
            stage, phase = after(stage, phase, STAGES)

        # Store, in PARTS slices of columns. What is read for it is asked for while the last product is under way.
        slot = first + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, ROWS))
        live = slot < end
        last = empty.index(before)
        if EPILOGUE == "activate":
            _store_gated(acc, last, z, h, slot, live, tile_n * BLOCK_N // 2, COLUMNS // 2, PARTS, WIDTH, ROWS)
        else:
            source = gl.load(row + slot, mask=live, other=0)
            w = gl.load(weight + source, mask=live, other=0).to(gl.float32)
            total = _store_backward(acc, last, z, h, dz, w, slot, live, tile_n * BLOCK_N, COLUMNS, PARTS, WIDTH, ROWS)
            if dweight is not None:
                # Each tile of columns leaves its part of d(weight); the host adds them up.
                gl.store(dweight + source.to(gl.int64) * TILES_N + tile_n, total, mask=live)


@gluon.jit
def _specialized_mm(
    x, w, z, h, dz, dweight, weight, row, token, offset, tile_expert, tile_slot, tile_count, inner_end,
    COLUMNS: gl.constexpr, INNER: gl.constexpr, K_MAJOR: gl.constexpr, EPILOGUE: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The ring, and the two kinds of warps around it."""
    X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], w.dtype)
    x_ring = gl.allocate_shared_memory(w.dtype, [STAGES, BLOCK_M, BLOCK_K], X_LAYOUT)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_shape, w.layout)  # noqa: RUF005  # no stars here
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=32 * LOADING_WARPS + 1)
        mbarrier.init(empty.index(stage), count=1)

    schedule = (offset, tile_expert, tile_slot, tile_count)
    ring = (x_ring, w_ring, full, empty)
    tensors = (z, h, dz, dweight, weight, row)
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (tensors, schedule, ring, inner_end, EPILOGUE, COLUMNS, K_MAJOR, BLOCK_N, GROUP_M, PARTS),
            ),
            (_load_tiles, ((x, w, token), schedule, ring, inner_end, INNER, COLUMNS, K_MAJOR, BLOCK_N, GROUP_M)),
        ],
        [LOADING_WARPS],
        [LOADING_REGISTERS],
    )


def takes(x_TD: Tensor, w: Tensor, tile: tuning.Tile) -> bool:
    """Whether rows of both lie as the copies need them; where they do not, ragged_mm's own kernel takes them."""
    rows = x_TD.shape[1] % tile.block_k == 0 and x_TD.data_ptr() % 16 == 0
    return rows and w.shape[2] % 8 == 0 and w.data_ptr() % 16 == 0


def up(x_TD: Tensor, w_up_EFD: Tensor, z: Tensor | None, h: Tensor, plan: Plan, tile: tuning.Tile) -> None:
    """`ragged_mm.up` for swiglu: x (T, D), w_up (E, 2F, D) into z (N, 2F), unless it is None, and h (N, F), in slots.
    Raises `ValueError` for a GPU other than sm_90, types other than 16-bit ones, and sizes and tiles that it cannot
    cut."""
    n_experts, n_columns, inner = w_up_EFD.shape
    # A block of w is half as many pairs of a gate row and its up row.
    shape, strides = [n_experts, n_columns // 2, 2, inner], [n_columns * inner, inner, n_columns // 2 * inner, 1]
    view = shape, strides, [1, tile.block_n // 2, 2, tile.block_k]
    _launch("activate", x_TD, w_up_EFD, view, n_columns, plan, tile, z, h)


def dh(
    dout_TD: Tensor, w_down_EDF: Tensor, z: Tensor, weight_N: Tensor, dz: Tensor | None, h: Tensor | None,
    dweight: Tensor | None, plan: Plan, tile: tuning.Tile,
) -> None:  # fmt: skip
    """`ragged_mm.dh` for swiglu: dout (T, D), w_down (E, D, F), z (N, 2F) and the rows' weights (N,) into dz (N, 2F),
    the weighted hidden rows h (N, F), both in slots, and dweight (N, tiles of columns), by row, each unless it is None.
    Raises as `up` does."""
    view = list(w_down_EDF.shape), list(w_down_EDF.stride()), [1, tile.block_k, tile.block_n]
    _launch(
        "backward", dout_TD, w_down_EDF, view, w_down_EDF.shape[2], plan, tile, z, h, dz, dweight, weight_N
    )  # fmt: skip


def _launch(
    epilogue: str, x_TD: Tensor, w: Tensor, view: tuple[list[int], list[int], list[int]], n_columns: int, plan: Plan,
    tile: tuning.Tile, z: Tensor | None, h: Tensor | None, dz: Tensor | None = None, dweight: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:  # fmt: skip
    """One use of the kernel. view: the shape, the strides and the block by which the copy engine is to see w."""
    _check(x_TD, w, tile)
    if not len(plan.row_N) or not n_columns:
        return
    shape, strides, block = view
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    w_source = TensorDescriptor(w, shape, strides, block, layout)

    # As many programs as tiles at most, and registers for `per_sm` of them on a multiprocessor.
    total = len(plan.tile_expert_J) * -(-n_columns // tile.block_n)
    threads = 32 * (tile.num_warps + LOADING_WARPS.value) * max(tile.per_sm, 1)
    _specialized_mm[(min(total, tuning.programs(x_TD.device, tile)),)](
        x_TD, w_source, z, h, dz, dweight, weight, plan.row_N, plan.token_N, plan.offset_E1, plan.tile_expert_J,
        plan.tile_slot_J, plan.tile_count, x_TD.shape[1],
        COLUMNS=n_columns, INNER=x_TD.shape[1], K_MAJOR=epilogue == "activate", EPILOGUE=epilogue,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m, PARTS=tile.parts,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=min(REGISTERS // threads // 8 * 8, 248),
    )  # fmt: skip


def _check(x_TD: Tensor, w: Tensor, tile: tuning.Tile) -> None:
    """One sentence for what the kernel does not take."""
    name, d = tuning.architecture(x_TD.device), x_TD.shape[1]
    if name != "sm_90":
        raise ValueError(f"A tile with gluon runs on sm_90; the device is {name}.")
    if x_TD.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"A tile with gluon takes bfloat16 or float16; its operands are {x_TD.dtype}.")
    if not takes(x_TD, w, tile):
        raise ValueError(
            f"A tile with gluon takes rows that start on 16 bytes, those of x or dout a multiple of block_k="
            f"{tile.block_k} wide; they are {d} and {w.shape[2]} wide."
        )
    fits = tile.block_k in (32, 64, 128) and tile.num_warps in (4, 8) and tile.block_m % (16 * tile.num_warps) == 0
    if not fits or tile.block_n // tile.parts < 16 or tile.num_stages < 2:  # one stage would wait for the next
        raise ValueError(
            f"A tile with gluon has a block_k of 32, 64 or 128, 4 or 8 warps, a multiple of 16 rows for every warp, at "
            f"least 16 columns for every part and 2 stages or more; it is {tile}."
        )
