"""The four uses of the grouped matmul, each against loops over the experts in float64, on poisoned memory.

A use may be at most twice as wrong as the same loops in the same dtype. Triton's interpreter truncates float32 to
bfloat16 where a GPU rounds: the error of every conversion doubles, and there the bound does too."""

import itertools
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl

from kernels import ragged_mm as module
from kernels import reference, tuning
from kernels.plan import Plan, plan
from kernels.ragged_mm import clamp, dh, down, dx, up
from tests.kernels.test_plan import DEVICE, LOADS, far_apart, poisoned, untouched

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu2")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("z", "h", "y", "dz", "weighted h", "dweight", "dx")


def _tile(block_m=16, block_n=32, block_k=16, group_m=2, parts=1, tma=False, per_sm=0):
    return tuning.Tile(block_m, block_n, block_k, group_m, parts, 4, 2, tma, per_sm)


def _operands(load="zipf", d=20, f=12, activation="swiglu", dtype=torch.float64, block_m=16):
    """x, both weights, the gradient of the output and the rows' weights, at unit scale; and the plan."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape, by=1.0: (torch.randn(shape, dtype=torch.float64, generator=generator) / by).to(DEVICE, dtype)
    expert = torch.tensor(LOADS[load], device=DEVICE)
    width = 2 * f if activation == "swiglu" else f
    matrices = draw(24, d), draw(5, width, d, by=d**0.5), draw(5, d, f, by=f**0.5), draw(24, d)
    weight = torch.rand(72, dtype=torch.float64, generator=generator).to(DEVICE)
    weight = (weight + 0.5).to(dtype if dtype == torch.float64 else torch.float32)
    return *matrices, weight, plan(expert, None, 5, block_m)


def _loops(x, w_up, w_down, dout, weight, where, activation):
    """What `_uses` returns, for the rows that have an expert, in the operands' dtype."""
    offset = where.offset_E1.tolist()
    live, token, row = offset[-1], where.token_N[: offset[-1]].long(), where.row_N[: offset[-1]].long()
    spans = list(itertools.pairwise(offset))
    product = lambda a, b_E: torch.cat([a[lo:hi] @ b for (lo, hi), b in zip(spans, b_E, strict=True)])
    z = product(x[token], w_up.mT).requires_grad_()
    h = reference.activate(z, activation)
    dhidden, w = product(dout[token], w_down), weight[row, None].to(x.dtype)
    (dz,) = torch.autograd.grad(h, z, dhidden * w)
    dweight = torch.zeros_like(weight).index_put((row,), (dhidden * h.detach()).sum(1).to(weight.dtype))
    z, h = z.detach(), h.detach()
    assert len(z) == live
    return z, h, product(h, w_down.mT), dz, h * w, dweight, product(dz, w_up)


def _uses(x, w_up, w_down, dout, weight, where, activation, tile, tf32=False, fed=None):
    """The outputs of all four uses, as in NAMES. `fed`: z, h and dz that they read, or else their own."""
    z, h = up(x, w_up, where, activation, tile, tf32)
    z_in, h_in, dz_in = fed or (z, h, None)
    y = down(h_in, w_down, where, tile, tf32)
    dz, weighted, dweight = dh(dout, w_down, z_in, weight, where, activation, tile, tf32)
    return z, h, y, dz, weighted, dweight, dx(dz if dz_in is None else dz_in, w_up, where, tile, tf32)


def _error(got, want):
    """Relative Frobenius error; nothing against nothing is right."""
    return ((got.double() - want).norm() / want.norm()).item() if want.numel() and want.any() else got.norm().item()


def _check(load="zipf", activation="swiglu", dtype=torch.float64, tile=None, **sizes):
    """All four uses are the loops; rows without an expert keep their NaN."""
    tile = tile or _tile()
    operands = _operands(load, activation=activation, dtype=dtype, block_m=tile.block_m, **sizes)
    where = operands[-1]
    exact = _loops(*(each.double() for each in operands[:-1]), where, activation)
    live = where.offset_E1[-1].item()
    with poisoned():
        got = _uses(*operands, activation, tile)
    if dtype == torch.float64:
        bounds = [1e-13] * len(NAMES)
    else:
        factor = 4 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2
        bounds = [factor * _error(a, b) for a, b in zip(_loops(*operands, activation), exact, strict=True)]
    for name, mine, want, bound in zip(NAMES, got, exact, bounds, strict=True):
        if name != "dweight":
            assert mine[live:].isnan().all(), f"{name}: a row without an expert is written"
            mine = mine[:live]
        assert _error(mine, want) <= bound, f"{name}: {_error(mine, want)} > {bound}"


@pytest.mark.parametrize("load", LOADS)
def test_every_use_is_the_loops_for_any_load(load):
    _check(load)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_use_is_the_loops_for_any_activation_and_dtype(activation, dtype):
    _check("some rows have no expert", activation, dtype, _tile(16, 32, 32), d=44, f=28)


@pytest.mark.parametrize(("d", "f"), [(1, 1), (3, 17), (33, 5), (16, 32)])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_every_use_is_the_loops_for_odd_sizes(d, f, activation):
    _check(activation=activation, tile=_tile(32, 16, 16), d=d, f=f)


TILES = {
    "wide": _tile(16, 64, 32),
    "tall": _tile(64, 16, 16, group_m=1),
    "deep": _tile(16, 16, 64, group_m=3),
    "two parts": _tile(32, 32, 16, parts=2),
    "four parts": _tile(16, 64, 16, parts=4),
    "slices of 8": _tile(16, 64, 16, parts=8),
    "two programs": _tile(16, 32, 32, per_sm=2),
    "one program": _tile(16, 32, 16, group_m=3, parts=2, per_sm=1),
}


@pytest.mark.parametrize(
    ("tile", "activation"),
    [*((tile, "swiglu") for tile in TILES), ("two parts", "gelu"), ("four parts", "relu2"), ("one program", "gelu")],
)
def test_every_use_is_the_loops_on_any_tile(tile, activation):
    with patch.object(tuning, "multiprocessors", lambda device: 1):
        _check(activation=activation, tile=TILES[tile], d=20, f=36)


def test_the_order_of_the_tiles_changes_no_bit():
    operands = _operands(d=17, f=9)
    with patch.object(tuning, "multiprocessors", lambda device: 1):
        walks = [
            _uses(*operands, "swiglu", _tile(16, 16, 32, group_m=g, per_sm=p)) for g, p in ((1, 0), (3, 0), (2, 2))
        ]
    for walk in walks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(walks[0], walk, strict=True))


@triton.jit
def _clamped(out, N: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + n, clamp(n, N))


@pytest.mark.parametrize(("n", "run"), [(1, 1), (6, 2), (20, 4), (24, 8), (80, 16), (96, 16), (33, 1)])
def test_a_clamped_index_exists_and_lies_in_the_aligned_runs_that_the_compiler_is_promised(n, run):
    out = torch.full((128,), -1, dtype=torch.int32, device=DEVICE)
    _clamped[(4,)](out, n, 32)
    assert out[:n].tolist() == list(range(n))
    assert ((out >= 0) & (out < n)).all()
    runs = out.view(-1, run)
    assert (runs[:, 0] % run == 0).all()
    assert (runs == runs[:, :1] + torch.arange(run, device=DEVICE)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "f"), [(24, 40), (48, 80), (40, 36)])
def test_every_use_is_the_loops_where_tiles_end_past_sizes_that_are_multiples(d, f, dtype):
    for activation in ("swiglu", "gelu"):
        _check(activation=activation, dtype=dtype, tile=_tile(16, 64, 32), d=d, f=f)


class Spy:
    """A kernel that notes the constants and the arguments it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches, self.arguments = kernel, [], []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append(constants)
            self.arguments.append(args)
            self.kernel[grid](*args, **constants)

        return launch


TMA = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU with a tensor memory accelerator",
)


@TMA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_every_use_is_the_loops_through_tensor_descriptors(activation, dtype):
    spy = Spy(module._ragged_mm)
    with patch.object(module, "_ragged_mm", spy):
        _check("some rows have no expert", activation, dtype, _tile(32, 32, 16, parts=2, tma=True), d=40, f=24)
    # up and dh gather their rows, which descriptors cannot
    assert [each["B_TMA"] for each in spy.launches] == [True] * 4
    assert [each["A_TMA"] for each in spy.launches] == [False, True, False, True]


@TMA
def test_rows_that_do_not_start_on_16_bytes_take_pointers_instead():
    spy = Spy(module._ragged_mm)
    with patch.object(module, "_ragged_mm", spy):
        _check("even", "relu2", torch.float16, _tile(tma=True), d=20, f=24)
    # of up and dx the weights are (., D), of down and dh (., F); down reads rows of F, dx too
    assert [each["B_TMA"] for each in spy.launches] == [False, True, True, False]
    assert [each["A_TMA"] for each in spy.launches] == [False, True, False, True]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_tile_writes_its_own_experts_rows_only(activation):
    operands = _operands("zipf", activation=activation)
    x, w_up, w_down, dout, weight, where = operands
    full = _uses(*operands, activation, _tile())
    for tile in range(where.tile_count.item()):
        e, first = where.tile_expert_J[tile].item(), where.tile_slot_J[tile].item()
        mine = range(first, min(first + 16, where.offset_E1[e + 1].item()))
        one = where._replace(
            tile_expert_J=where.tile_expert_J[tile:], tile_slot_J=where.tile_slot_J[tile:],
            tile_count=torch.ones_like(where.tile_count),
        )  # fmt: skip
        with poisoned():
            got = _uses(x, w_up, w_down, dout, weight, one, activation, _tile(), fed=(full[0], full[1], full[3]))
        for name, part, whole in zip(NAMES, got, full, strict=True):
            if name == "dweight":
                assert set(part.nonzero().flatten().tolist()) == set(where.row_N[list(mine)].tolist())
                continue
            assert part.isnan().all(1).logical_not().nonzero().flatten().tolist() == list(mine), name
            assert torch.equal(part[list(mine)], whole[list(mine)])


def test_nan_where_no_expert_is_reaches_nothing():
    load = "some rows have no expert"
    operands = _operands(load)
    x, w_up, w_down, dout, weight, where = operands
    z, h, y, dz, weighted, dweight, dx_ND = _uses(*operands, "swiglu", _tile())
    live, unused = where.offset_E1[-1].item(), torch.tensor(LOADS[load], device=DEVICE).flatten() < 0
    weight = weight.masked_fill(unused, torch.nan)
    fed = [each.clone() for each in (z, h, dz)]
    for each in fed:
        each[live:] = torch.nan
    got = _uses(x, w_up, w_down, dout, weight, where, "swiglu", _tile(), fed=fed)
    for mine, want in zip(got, (z, h, y, dz, weighted, dweight, dx_ND), strict=True):
        n = len(mine) if mine.dim() == 1 else live
        assert torch.equal(mine[:n], want[:n])
    assert (got[5][unused] == 0).all()


def test_an_experts_nan_stays_in_its_rows():
    x, w_up, w_down, dout, weight, where = _operands("even")
    w_up[1], w_down[1] = torch.nan, torch.nan
    lo, hi = where.offset_E1[1:3].tolist()
    for name, each in zip(NAMES, _uses(x, w_up, w_down, dout, weight, where, "swiglu", _tile()), strict=True):
        rows = where.row_N[lo:hi].tolist() if name == "dweight" else range(lo, hi)
        spoilt = each.view(72, -1).isnan().any(1).nonzero().flatten().tolist()
        assert spoilt == sorted(rows), name


def test_no_row_launches_nothing():
    x, w_up, w_down, dout, weight, _ = _operands()
    where = plan(torch.empty(0, 3, dtype=torch.int64, device=DEVICE), None, 5, 16)
    shapes = [tuple(each.shape) for each in _uses(x, w_up, w_down, dout, weight[:0], where, "swiglu", _tile())]
    assert shapes == [(0, 24), (0, 12), (0, 20), (0, 24), (0, 12), (0,), (0, 20)]


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_reaches_every_product(tf32):
    spy = Spy(module._ragged_mm)
    operands = _operands(dtype=torch.float32)
    with patch.object(module, "_ragged_mm", spy):
        _uses(*operands, "swiglu", _tile(), tf32)
    assert [each["PRECISION"] for each in spy.launches] == ["tf32" if tf32 else "ieee"] * 4


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_rows_tokens_and_experts_past_two_to_the_31_elements_are_addressed(activation):
    """Two rows of the last token and the last expert in the last slots, against the same two in small tensors."""
    d = f = 256
    width, last = 2 * f if activation == "swiglu" else f, 2**31 // (d * f)
    n_rows = 2**31 // f + 2
    tile = _tile(16, 128, 64)
    with far_apart():
        i32 = lambda *values: torch.tensor(values, dtype=torch.int32, device=DEVICE)
        where = Plan(
            untouched(1, dtype=torch.int32), *(untouched(n_rows, dtype=torch.int32) for _ in range(2)),
            untouched(last + 2, dtype=torch.int32), i32(last), i32(n_rows - 2), i32(1),
        )  # fmt: skip
        where.row_N[-2:], where.token_N[-2:], where.offset_E1[-1] = i32(n_rows - 1, n_rows - 2), n_rows - 1, n_rows
        near = Plan(i32(0), i32(1, 0), i32(1, 1), i32(0, 2), i32(0), i32(0), i32(1))
        shapes = (n_rows, d), (last + 1, width, d), (last + 1, d, f), (n_rows, d), (n_rows,)
        far = [untouched(*shape) for shape in shapes]
        small = [torch.randn(min(shape[0], 2), *shape[1:], device=DEVICE).half() / 8 for shape in shapes]
        for a, b in zip(far, small, strict=True):
            a[-len(b) :] = b
        small = [each[-1:] if each.dim() == 3 else each for each in small]
        got = _uses(*far, where, activation, tile)
        want = _uses(*small, near, activation, tile)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.equal(a[-2:], b), name
        assert b.any()
