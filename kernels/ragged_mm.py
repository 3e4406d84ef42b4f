"""Rows grouped by expert times that expert's matrix, the gather before it and the activation after it fused in.

One kernel, four uses (slots as `plan` lays them out; rows of one expert lie side by side):

    up      z = x[token] @ w_up[e]^T + b_up[e], h = act(z)    gathered rows     epilogue activate
    down    y = h @ w_down[e]^T + b_down[e]                   contiguous rows   epilogue store
    dh      dh = dout[token] @ w_down[e]; from it, in registers, dz = act'(z) dh w, h w, and dw = <dh, h>
            (+ <dout[token], b_down[e]>)                      gathered rows     epilogue backward
    dx      dx = dz @ w_up[e]                                 contiguous rows   epilogue store

A program walks over tiles of the schedule (block_m rows of one expert by block_n columns), so the host never learns how
many rows an expert got. Sums are in float32 (float64 for float64); no atomics; every element is written by one program,
in one order: reruns are bitwise equal. A swiglu tile reads gate and up columns in turns, or where they lie in another
order as many of either, so one accumulator holds both. A matrix may be stored by rows or by columns.

Letters: J tiles of the schedule. In BLOCK_M, BLOCK_N and BLOCK_K alone, M, N, K are a tile's rows, its columns and the
part of the summed width that is loaded at a time, as in every matmul kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, store_ragged
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import bits, fp8, hopper, operands, tuning
from kernels.bits import clamp
from kernels.epilogue import add_bias, columns, store, store_activated, store_backward, store_gated
from kernels.form import Form, form_of
from kernels.plan import Plan

# Triton's interpreter multiplies bfloat16 bit patterns; there (only) operands are widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MAPS = (torch.int32,)  # what a plan's parts are
STORED = {torch.int8: "int8", torch.uint8: "mxfp4", torch.float8_e4m3fn: "fp8"}  # of quantised weights, by type
RAGGED_ROWS = 2**30  # that a descriptor of ragged rows reaches


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, in acc's dtype."""
    if INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _ragged_mm(
    a, b, out, h, z, weight, dweight, bias, token, row, offset, tile_expert, tile_slot, tile_count, inner_end, scale,
    a_scale,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, K_MAJOR: tl.constexpr, GATHER: tl.constexpr, EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGH: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    SHIFT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, A_TMA: tl.constexpr, B_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    QUANT: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    """Each expert's rows of a (INNER wide) times its matrix in b, COLUMNS wide, and the epilogue on the product. QUANT:
    in what format the matrix is; a is in fp8 if it has scales. IN_FP8: the GPU multiplies that, nothing is widened."""
    # Where gates and others lie apart, a tile takes both: in turns, or, of a matrix whose columns are contiguous, in
    # halves, so that it reads runs of either.
    PAIRED: tl.constexpr = ACTIVATION == "swiglu" and EPILOGUE == "activate" and not INTERLEAVED
    HALVES: tl.constexpr = PAIRED and not K_MAJOR
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    GROUPS: tl.constexpr = (INNER + bits.BLOCK - 1) // bits.BLOCK
    tiles_m = tl.load(tile_count)
    for tile in tl.range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0), flatten=FLATTEN):
        # Which tile: GROUP_M tiles of rows take all columns before the next group, so a matrix stays in cache.
        group = tile // (GROUP_M * TILES_N)
        height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        tile_m = group * GROUP_M + tile % (GROUP_M * TILES_N) % height
        tile_n = tile % (GROUP_M * TILES_N) // height

        # Whose it is: an expert, its slots from the schedule (the last tile of an expert is not full), and columns.
        e = tl.load(tile_expert + tile_m)
        first = tl.load(tile_slot + tile_m)
        slot = first + tl.arange(0, BLOCK_M)
        end = tl.load(offset + e + 1)
        live = slot < end
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)

        # Where its rows and columns begin. An asynchronous copy may touch an address whose lane is masked off: every
        # address is a valid one.
        if not A_TMA or a_scale is not None:
            # A row past the expert's last reads one that exists; nothing of it is stored.
            source = tl.load(token + slot, mask=live, other=0) if GATHER else tl.where(live, slot, first)
            if not A_TMA:
                a_rows = a + source.to(tl.int64)[:, None] * INNER
            if a_scale is not None:
                scale_rows = a_scale + source.to(tl.int64) * GROUPS
        if not B_TMA or QUANT == "fp8":
            if HALVES:
                f = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N) % (BLOCK_N // 2)
                is_column = f < COLUMNS // 2
                within = f if COLUMNS % BLOCK_N == 0 else clamp(f, COLUMNS // 2)
                b_column = tl.arange(0, BLOCK_N) // (BLOCK_N // 2) * (COLUMNS // 2) + within
            else:
                is_column = column < COLUMNS
                within = column if COLUMNS % BLOCK_N == 0 else clamp(column, COLUMNS)
                b_column = (within % 2) * (COLUMNS // 2) + within // 2 if PAIRED else within
            if QUANT == "mxfp4":
                b_columns = b + e.to(tl.int64) * (COLUMNS * INNER // 2) + b_column * (INNER // 2)
                scale_columns = scale + e.to(tl.int64) * (COLUMNS * INNER // 32) + b_column * (INNER // 32)
            elif QUANT == "fp8":
                scale_columns = scale + e.to(tl.int64) * ((COLUMNS + bits.BLOCK - 1) // bits.BLOCK * GROUPS)
            if QUANT != "mxfp4" and not B_TMA:
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
                if HALVES:
                    b_tile = b.load([e, start_k, 0, tile_n * (BLOCK_N // 2)]).reshape(BLOCK_K, BLOCK_N)
                elif PAIRED:
                    b_tile = b.load([e, tile_n * (BLOCK_N // 2), 0, start_k]).reshape(BLOCK_N, BLOCK_K).T
                elif K_MAJOR:
                    b_tile = b.load([e, tile_n * BLOCK_N, start_k]).reshape(BLOCK_N, BLOCK_K).T
                else:
                    b_tile = b.load([e, start_k, tile_n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            elif QUANT == "mxfp4":
                b_tile = bits.mxfp4_tile(b_columns, scale_columns, start_k, INNER, BLOCK_K)
            else:
                if INNER % BLOCK_K == 0 and COLUMNS % BLOCK_N == 0:
                    b_tile = tl.load(b_columns + (start_k + inner)[:, None] * (1 if K_MAJOR else COLUMNS))
                else:
                    at = clamp(start_k + inner, INNER)[:, None] * (1 if K_MAJOR else COLUMNS)
                    b_tile = tl.load(
                        b_columns + at, mask=(start_k + inner < INNER)[:, None] & is_column[None, :], other=0.0
                    )
            if QUANT == "fp8":
                block_k = start_k // bits.BLOCK
                of_rows = tl.load(scale_rows + block_k) if a_scale is not None else None
                of_columns = bits.column_scales(
                    scale_columns, tile_n, b_column, block_k, COLUMNS, GROUPS, BLOCK_N, PAIRED
                )  # fmt: skip
                acc += bits.fp8_product(a_tile, b_tile, of_rows, of_columns, ACC, PRECISION, IN_FP8, INTERPRETED)
            else:
                if QUANT != "":
                    # The interpreter would take whole numbers for bit patterns of bfloat16.
                    b_tile = b_tile.to(tl.float32).to(a_tile.dtype) if INTERPRETED else b_tile.to(a_tile.dtype)
                acc = dot(a_tile, b_tile, acc, PRECISION)
        if QUANT == "int8":  # a column's scale is one factor of its whole sum
            acc *= tl.load(scale + e.to(tl.int64) * COLUMNS + b_column).to(ACC)[None, :]

        # What the epilogue needs of every row. Weights stand by row, not by slot.
        WIDTH: tl.constexpr = BLOCK_N // PARTS
        total = tl.zeros((BLOCK_M,), dtype=ACC)
        source_row = slot
        w = total
        if EPILOGUE == "backward" or (EPILOGUE == "activate" and WEIGH):
            source_row = tl.load(row + slot, mask=live, other=0)
            w = tl.load(weight + source_row, mask=live, other=0.0).to(ACC)
        if dweight is not None and bias is not None:  # noqa: SIM102  # the compiler knows this, and not which tile
            if tile_n == 0:
                total = _along(a_rows, bias + e.to(tl.int64) * INNER, inner_end, INNER, BLOCK_M, BLOCK_K, ACC)

        # Epilogue and store, in PARTS slices of columns, so that one slice's temporaries are live at a time.
        slices = columns(acc, 2 * PARTS if HALVES else PARTS)
        for part in tl.static_range(PARTS):
            start = tile_n * BLOCK_N + part * WIDTH
            if EPILOGUE == "store":
                y = add_bias(slices[part], bias, e, start, COLUMNS, COLUMNS, 0)
                if OUT_TMA:
                    store_ragged(out, first, end - first, [0, start], y.to(out.dtype))
                else:
                    store(y, out, slot, live, start, COLUMNS, COLUMNS, 0)
            elif EPILOGUE == "activate":
                if ACTIVATION == "swiglu":
                    y = slices[part]
                    if HALVES:
                        y = tl.join(slices[part], slices[part + PARTS]).reshape(BLOCK_M, WIDTH)
                    store_gated(
                        y, out, h, bias, w, e, slot, live, start // 2, COLUMNS // 2, INTERLEAVED, WEIGH, ALPHA, LIMIT,
                        SHIFT,
                    )  # fmt: skip
                else:
                    store_activated(
                        slices[part], out, h, bias, w, e, slot, live, start, COLUMNS, ACTIVATION, WEIGH
                    )  # fmt: skip
            else:
                tl.static_assert(EPILOGUE == "backward")
                total += store_backward(
                    slices[part], z, out, h, w, slot, live, start, COLUMNS, ACTIVATION, INTERLEAVED, WEIGH, ALPHA,
                    LIMIT, SHIFT,
                )  # fmt: skip
        if dweight is not None:
            # Each tile of columns leaves its part of d(weight); the host adds them up.
            tl.store(dweight + source_row.to(tl.int64) * TILES_N + tile_n, total, mask=live)


@triton.jit
def _along(rows, vector, end, INNER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """The inner product of every one of these rows and a vector, INNER wide."""
    total = tl.zeros((BLOCK_M,), dtype=ACC)
    for start in range(0, end, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inside = inner < INNER
        row = tl.load(rows + inner[None, :], mask=inside[None, :], other=0.0).to(ACC)
        total += tl.sum(row * tl.load(vector + inner, mask=inside, other=0.0).to(ACC)[None, :], 1)
    return total


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums of this dtype are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def up(
    x_TD: Tensor, w_up_EFD: Tensor, plan: Plan, form: Form | str, tile: tuning.Tile, tf32: bool, keep_z: bool = True,
    b_up_EF: Tensor | None = None, weight_N: Tensor | None = None, scales: Tensor | None = None,
    rounds: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """z = x[token] @ w_up[e]^T + b_up[e] and h = act(z): -> (N, F) or (N, 2F) for swiglu, without a row unless kept;
    (N, F), in slots. weight_N: the rows' weights, which a form with weights on the input takes: h = act(w z). scales:
    of weights that are quantised, w_up being the values. rounds: x is rounded to fp8, for weights that are in it."""
    form = form_of(form)
    _fit("up", plan, (w_up_EFD, "E W D"), scales, x=(x_TD, "T D"), b_up=(b_up_EF, "E W"))
    n_rows, width = len(plan.row_N), w_up_EFD.shape[1]
    z = x_TD.new_empty(n_rows if keep_z else 0, width)
    h = x_TD.new_empty(n_rows, width // form.width(1))
    kept = z if keep_z else None
    plain = form == Form("swiglu") and b_up_EF is None and scales is None and w_up_EFD.is_contiguous()
    if tile.gluon and plain and hopper.takes(x_TD, w_up_EFD, tile):
        hopper.up(x_TD, w_up_EFD, kept, h, plan, tile)
        return z, h
    _launch(
        x_TD, w_up_EFD, kept, plan, tile, tf32, "activate", form, gather=True, bias=b_up_EF, h=h, weight=weight_N,
        scales=scales, rounds=rounds,
    )  # fmt: skip
    return z, h


def down(
    h_NF: Tensor, w_down_EDF: Tensor, plan: Plan, tile: tuning.Tile, tf32: bool, b_down_ED: Tensor | None = None,
    scales: Tensor | None = None, rounds: bool = False,
) -> Tensor:  # fmt: skip
    """y = h @ w_down[e]^T + b_down[e]: (N, F) -> (N, D), in slots. scales, rounds: as in `up`."""
    _fit("down", plan, (w_down_EDF, "E D F"), scales, h=(h_NF, "N F"), b_down=(b_down_ED, "E D"))
    y = h_NF.new_empty(len(h_NF), w_down_EDF.shape[1])
    _launch(
        h_NF, w_down_EDF, y, plan, tile, tf32, "store", None, gather=False, bias=b_down_ED, scales=scales, rounds=rounds
    )  # fmt: skip
    return y


def dh(
    dout_TD: Tensor, w_down_EDF: Tensor, z: Tensor, weight_N: Tensor, plan: Plan, form: Form | str, tile: tuning.Tile,
    tf32: bool, for_z: bool = True, for_h: bool = True, for_weight: bool = True, b_down_ED: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dL/dz, the weighted hidden rows w h (h for weights on the input), and dL/dw: -> (as z), (N, F), in slots; (N,) by
    row, 0 without expert. Those that are not asked for have no row."""
    form = form_of(form)
    _fit("dh", plan, (w_down_EDF, "E D F"), dout=(dout_TD, "T D"), z=(z, "N W"), b_down=(b_down_ED, "E D"))
    operands.fit("dh", weight=(weight_N, "N", operands.FLOATS), row_N=(plan.row_N, "N", MAPS))
    n_rows, width = len(z), w_down_EDF.shape[2]
    if z.shape[1] != form.width(width):
        raise ValueError(f"dh takes the z of w_down's F={width} and {form.activation}; it is {tuple(z.shape)}.")
    dz = z.new_empty(n_rows if for_z else 0, z.shape[1])
    h = z.new_empty(n_rows if for_h else 0, width)
    parts = weight_N.new_zeros(n_rows if for_weight else 0, -(-width // tile.block_n))
    wanted = dz if for_z else None, h if for_h else None, parts if for_weight else None
    plain = form._replace(fp8="") == Form("swiglu") and b_down_ED is None and w_down_EDF.is_contiguous()
    if tile.gluon and plain and hopper.takes(dout_TD, w_down_EDF, tile):
        hopper.dh(dout_TD, w_down_EDF, z, weight_N, *wanted, plan, tile)
        return dz, h, parts.sum(1)
    _launch(
        dout_TD, w_down_EDF.mT, wanted[0], plan, tile, tf32, "backward", form, gather=True,
        bias=None if form.weigh_input else b_down_ED, h=wanted[1], z=z, weight=weight_N, dweight=wanted[2],
    )  # fmt: skip
    return dz, h, parts.sum(1)


def dx(dz: Tensor, w_up_EFD: Tensor, plan: Plan, tile: tuning.Tile, tf32: bool) -> Tensor:
    """dx = dz @ w_up[e]: -> (N, D), in slots."""
    _fit("dx", plan, (w_up_EFD, "E W D"), dz=(dz, "N W"))
    out = dz.new_empty(len(dz), w_up_EFD.shape[2])
    _launch(dz, w_up_EFD.mT, out, plan, tile, tf32, "store", None, gather=False)
    return out


def _fit(
    name: str, plan: Plan, matrix: tuple[Tensor, str], scales: Tensor | None = None,
    **floats: tuple[Tensor | None, str],
) -> None:  # fmt: skip
    """Operands of one type, and those in slots of as many rows as the plan has; a stack of matrices by rows or by
    columns, or quantised and by rows."""
    w, letters = matrix
    key = "w_up" if name in ("up", "dx") else "w_down"
    if scales is not None:
        return _fit_quantized(name, plan, key, w, letters, scales, floats)
    if not operands.dense(w):
        raise ValueError(f"{name} takes {key} stored by rows or by columns; its strides are {tuple(w.stride())}.")
    if not w.is_contiguous():
        first, *last = letters.split()
        w, letters = w.mT, " ".join((first, *reversed(last)))
    dtypes = (w.dtype,) if w.dtype in operands.FLOATS else operands.FLOATS
    kinds = {key: (tensor, letters, dtypes) for key, (tensor, letters) in {**floats, key: (w, letters)}.items()}
    operands.fit(name, **kinds, token_N=(plan.token_N, "N", MAPS))


def _fit_quantized(
    name: str, plan: Plan, key: str, w: Tensor, letters: str, scales: Tensor,
    floats: dict[str, tuple[Tensor | None, str]],
) -> None:  # fmt: skip
    """`_fit` of values and scales; the other operands are of the activations' type, which come first."""
    (a, _), (e, n, k) = next(iter(floats.values())), letters.split()
    assert a is not None
    dtypes = (a.dtype,) if a.dtype in operands.FLOATS else operands.FLOATS
    kinds: dict[str, operands.Operand] = {other: (*operand, dtypes) for other, operand in floats.items()}
    if w.dtype == torch.int8:
        kinds |= {key: (w, letters, (torch.int8,)), "scales": (scales, f"{e} {n}", (torch.float32,))}
    elif w.dtype == torch.float8_e4m3fn:
        kinds |= {key: (w, letters, (torch.float8_e4m3fn,)), "scales": (scales, f"{e} H G", (torch.float32,))}
    else:
        kinds |= {key: (w, f"{e} {n} G 16", (torch.uint8,)), "scales": (scales, f"{e} {n} G", (torch.uint8,))}
    operands.fit(name, **kinds, token_N=(plan.token_N, "N", MAPS))
    if w.dtype == torch.uint8 and (w.shape[3], 32 * w.shape[2]) != (16, a.shape[1]):
        raise ValueError(f"{name} takes mxfp4 {key} with 16 bytes for 32 of {k}={a.shape[1]}; it is {tuple(w.shape)}.")
    if w.dtype == torch.float8_e4m3fn and scales.shape[1:] != fp8.blocks(w.shape):
        raise ValueError(
            f"{name} takes scales of {key} for {fp8.blocks(w.shape)} blocks; they are {tuple(scales.shape)}."
        )


def _launch(
    a: Tensor, b_ENK: Tensor, out: Tensor | None, plan: Plan, tile: tuning.Tile, tf32: bool, epilogue: str,
    form: Form | None, gather: bool, bias: Tensor | None = None, h: Tensor | None = None, z: Tensor | None = None,
    weight: Tensor | None = None, dweight: Tensor | None = None, scales: Tensor | None = None, rounds: bool = False,
) -> None:  # fmt: skip
    """One use of the kernel: b_ENK is (E, columns, inner), stored in this order (k_major) or by columns; mxfp4's
    (E, columns, groups, 16). An output that is None is not written. rounds: a is rounded to fp8 first."""
    n_columns, inner = b_ENK.shape[1], a.shape[1]
    if not len(plan.row_N) or not n_columns:
        return
    k_major = b_ENK.is_contiguous()
    b = b_ENK if k_major else b_ENK.mT
    form = form or Form("")
    precision, acc = tuning.precision(a.device, tf32), accumulator(a.dtype)

    # Operands of 8 bits: as such where the GPU multiplies them, else as bytes to be widened.
    quant = "" if scales is None else STORED[b.dtype]
    in_fp8 = rounds and tuning.multiplies_fp8(a.device, a.dtype)
    a_scales = None
    if rounds:
        a, a_scales = bits.to_fp8(a, 1)
        a = a if in_fp8 else a.view(torch.uint8)
    tile = tuning.for_stored(tile, quant, in_fp8)
    if quant == "fp8" and not in_fp8:
        b = b.view(torch.uint8)

    # Which side goes through the copy engine: it gathers nothing, and wants rows that start on 16 bytes.
    paired = epilogue == "activate" and form.gated and not form.interleaved
    run = b.shape[2] // (2 if paired and not k_major else 1)  # contiguous elements
    b_tma = tile.tma and (scales is None or in_fp8) and run * b.element_size() % 16 == 0
    a_tma = tile.tma and not gather and inner * a.element_size() % 16 == 0
    a_source: Tensor | TensorDescriptor = a
    b_source: Tensor | TensorDescriptor = b
    if a_tma:
        a_source = TensorDescriptor(a, [len(a), inner], [inner, 1], [tile.block_m, tile.block_k])
    if b_tma:
        b_source = _described(b, paired, k_major, tile)

    # Which rows it writes: all but those past an expert's last. Triton's interpreter has no such descriptors.
    target: Tensor | TensorDescriptor | None = out
    out_tma = tile.ragged and epilogue == "store" and not INTERPRETED and len(a) <= RAGGED_ROWS
    if out_tma := out_tma and out is not None and n_columns * out.element_size() % 16 == 0:
        target = create_ragged_descriptor(out, [tile.block_m, tile.block_n // tile.parts])

    # As many programs as tiles at most: the schedule's bound, because the host does not know their count.
    total = len(plan.tile_expert_J) * -(-n_columns // tile.block_n)
    _ragged_mm[(min(total, tuning.programs(a.device, tile)),)](
        a_source, b_source, target, h, z, weight, dweight, bias, plan.token_N, plan.row_N, plan.offset_E1,
        plan.tile_expert_J, plan.tile_slot_J, plan.tile_count, inner, scales, a_scales,
        COLUMNS=n_columns, INNER=inner, K_MAJOR=k_major, GATHER=gather, EPILOGUE=epilogue, ACTIVATION=form.activation,
        INTERLEAVED=form.interleaved, WEIGH=form.weigh_input, ALPHA=form.alpha, LIMIT=form.limit, SHIFT=form.shift,
        PRECISION=precision, ACC=acc, A_TMA=a_tma, B_TMA=b_tma, OUT_TMA=out_tma, FLATTEN=tile.flatten,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m, PARTS=tile.parts,
        QUANT=quant, IN_FP8=in_fp8, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _described(b: Tensor, paired: bool, k_major: bool, tile: tuning.Tile) -> TensorDescriptor:
    """Stacked matrices for the copy engine, in blocks of a tile's columns and its part of the summed width."""
    if paired and k_major:  # gates and others in turns
        n_columns, inner = b.shape[1:]
        shape, strides = [len(b), n_columns // 2, 2, inner], [n_columns * inner, inner, n_columns // 2 * inner, 1]
        return TensorDescriptor(b, shape, strides, [1, tile.block_n // 2, 2, tile.block_k])
    if paired:  # in halves
        inner, n_columns = b.shape[1:]
        shape, strides = [len(b), inner, 2, n_columns // 2], [n_columns * inner, n_columns, n_columns // 2, 1]
        return TensorDescriptor(b, shape, strides, [1, tile.block_k, 2, tile.block_n // 2])
    block = [1, tile.block_n, tile.block_k] if k_major else [1, tile.block_k, tile.block_n]
    return TensorDescriptor(b, list(b.shape), list(b.stride()), block)
