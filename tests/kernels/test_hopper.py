"""The products with warps that load and warps that multiply: run as Python against the loops in float64, compiled for a
GPU that is not here, and refused where they cannot run."""

import itertools
import json
import re

import pytest
import torch

from kernels import aot, hopper, tuning
from kernels.form import Form, form_of
from kernels.ragged_mm import dh, up
from tests.kernels.gluon_as_python import running
from tests.kernels.test_aot import _run
from tests.kernels.test_plan import DEVICE, LOADS, poisoned
from tests.kernels.test_ragged_mm import NAMES, _error, _loops, _operands

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the kernel itself: see suite=tune")
TILE = tuning.Tile(64, 32, 32, 2, 2, 4, 3, tma=True, per_sm=1, gluon=True)
USES = pytest.mark.parametrize("use", ["up", "dh"])


def _call(use, operands, tile, wanted=(True, True, True), z=None):
    """The outputs of one use by name; those that are not wanted are empty. `dh` reads this z."""
    x, w_up, w_down, dout, weight, where = operands
    if use == "up":
        return dict(zip(("z", "h"), up(x, w_up, where, "swiglu", tile, False, wanted[0]), strict=True))
    outputs = dh(dout, w_down, z, weight, where, "swiglu", tile, False, *wanted)
    return dict(zip(("dz", "weighted h", "dweight"), outputs, strict=True))


def _hold(use, load="zipf", dtype=torch.float16, tile=TILE, d=160, f=24, wanted=(True, True, True), eager=False):
    """Each output is the loops', at most twice as wrong as they are in this dtype; rows without an expert keep their
    NaN, their weights have no gradient; what is not wanted has no row."""
    operands = _operands(load, d, f, dtype=dtype, block_m=tile.block_m)
    where, live = operands[-1], operands[-1].offset_E1[-1].item()
    rounded = dict(zip(NAMES, _loops(*operands, "swiglu"), strict=True))
    z = torch.full((len(where.row_N), 2 * f), torch.nan, dtype=dtype)
    z[:live] = rounded["z"]
    with poisoned(), tuning.target("sm_90"), running(hopper, "_specialized_mm", eager=eager):
        got = _call(use, operands, tile, wanted, z)
    exact = dict(zip(NAMES, _loops(*(tensor.double() for tensor in operands[:-1]), where, "swiglu"), strict=True))
    expected = {name: mine for (name, mine), want in zip(got.items(), wanted, strict=False) if want}
    assert [name for name, mine in got.items() if len(mine)] == list(expected)
    for name, mine in expected.items():
        if name != "dweight":
            assert mine[live:].isnan().all(), f"{name}: a row without an expert is written"
            mine = mine[:live]
        assert _error(mine, exact[name]) <= 2 * _error(rounded[name], exact[name]), name


@pytest.mark.parametrize("load", LOADS)
@USES
def test_it_is_the_loops_for_any_load(use, load):
    _hold(use, load)


@pytest.mark.parametrize("num_stages", [2, 3])
@USES
def test_a_stage_is_given_back_once_it_was_read_and_no_sooner(use, num_stages):
    _hold(use, tile=TILE._replace(num_stages=num_stages), eager=True)


@pytest.mark.parametrize(
    "changes",
    [
        dict(per_sm=2), dict(per_sm=0), dict(num_stages=2), dict(num_stages=4), dict(parts=1), dict(group_m=1),
        dict(block_n=128, parts=4), dict(block_m=128, num_warps=8), dict(block_k=64), dict(block_k=128),
    ],
    ids=str,
)  # fmt: skip
@USES
def test_it_is_the_loops_for_any_tile(use, changes):
    _hold(use, "even", tile=TILE._replace(**changes), d=128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("use", "d", "f"), [
    ("up", 32, 1), ("up", 32, 64), ("up", 96, 33), ("dh", 32, 8), ("dh", 32, 64), ("dh", 96, 40),
])  # fmt: skip
def test_it_is_the_loops_for_any_sizes_that_it_takes(use, dtype, d, f):
    _hold(use, "some rows have no expert", dtype, d=d, f=f)


@pytest.mark.parametrize("wanted", [
    ("up", False, True), *(("dh", *wanted) for wanted in itertools.product((True, False), repeat=3) if any(wanted)),
], ids=str)  # fmt: skip
def test_what_is_not_wanted_is_not_written_and_changes_nothing_else(wanted):
    _hold(wanted[0], "some rows have no expert", wanted=wanted[1:])


@pytest.mark.parametrize(("tiles_m", "tiles_n", "group_m"), list(itertools.product((1, 5, 16), (1, 3), (1, 4, 8))))
def test_every_tile_of_rows_meets_every_tile_of_columns_once_and_a_group_before_the_next(tiles_m, tiles_n, group_m):
    places = [hopper.place.fn(tile, tiles_m, tiles_n, group_m) for tile in range(tiles_m * tiles_n)]
    assert sorted(places) == list(itertools.product(range(tiles_m), range(tiles_n)))
    groups = [m // group_m for m, _ in places]
    assert groups == sorted(groups)
    assert all(places[i] == (i, 0) for i in range(min(group_m, tiles_m))), "rows first: they share columns"


def test_stages_follow_one_another_in_a_ring_and_the_parity_changes_once_a_round():
    walk = [(0, 1)]
    for _ in range(7):
        walk.append(hopper.after.fn(*walk[-1], 3))
    assert walk == [(0, 1), (1, 1), (2, 1), (0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]


REFUSED = {
    "another GPU": (dict(), "sm_100", "runs on sm_90; the device is sm_100."),
    "the interpreter": (dict(), "interpreter", "runs on sm_90; the device is interpreter."),
    "float32": (dict(dtype=torch.float32), "sm_90", "takes bfloat16 or float16; its operands are torch.float32."),
    "one stage": (dict(num_stages=1), "sm_90", "2 stages or more; it is Tile"),
    "rows": (dict(block_m=96), "sm_90", "a multiple of 16 rows for every warp"),
    "warps": (dict(num_warps=2), "sm_90", "4 or 8 warps"),
    "columns": (dict(parts=4), "sm_90", "at least 16 columns for every part"),
}


def _refused(use, changes, arch, monkeypatch):
    """What a use says of these sizes and this tile."""
    monkeypatch.setattr(hopper, "_specialized_mm", None)
    sizes = {key: changes[key] for key in ("d", "f", "dtype") if key in changes}
    tile = TILE._replace(**{key: value for key, value in changes.items() if key not in sizes})
    sizes = {"d": 64, "f": 24, "dtype": torch.float16} | sizes
    z = torch.zeros(72, 2 * sizes["f"], dtype=sizes["dtype"])
    with tuning.target(arch), pytest.raises(ValueError, match=r"^A tile with gluon .*\.$") as refused:
        _call(use, _operands(**sizes), tile, z=z)
    return str(refused.value)


@pytest.mark.parametrize("name", REFUSED)
@USES
def test_what_it_cannot_do_is_refused_in_a_sentence_before_anything_is_launched(use, name, monkeypatch):
    changes, arch, sentence = REFUSED[name]
    assert sentence in _refused(use, changes, arch, monkeypatch)


@pytest.mark.parametrize(("d", "f"), [(100, 24), (64, 20)])
def test_widths_that_the_copies_do_not_take_are_refused_where_nothing_falls_back(d, f):
    _, _, w_down, dout, weight, where = _operands(d=d, f=f, dtype=torch.float16)
    with tuning.target("sm_90"), pytest.raises(ValueError, match=f"they are {d} and {f} wide"):
        hopper.dh(dout, w_down, torch.zeros(72, 2 * f), weight, None, None, None, where, TILE)


def _columns_first(w):
    return w.mT.contiguous().mT


@pytest.mark.parametrize("other", ["gelu", "weights on the input", "a bias", "by columns", "a width"])
def test_another_form_takes_the_tested_path_whatever_the_tile_asks_for(other, monkeypatch):
    monkeypatch.setattr(hopper, "_launch", lambda *_: pytest.fail("there is no such epilogue"))
    form = "gelu" if other == "gelu" else Form("swiglu", weigh_input=other == "weights on the input")
    stored = _columns_first if other == "by columns" else torch.Tensor.contiguous
    d, f = (100, 20) if other == "a width" else (64, 24)
    x, w_up, w_down, dout, weight, where = _operands(d=d, f=f, activation=form_of(form).activation)
    b_up, b_down = (w_up[:, :, 0].contiguous(), dout[:5].contiguous()) if other == "a bias" else (None, None)
    tile = TILE._replace(block_m=16, tma=False)
    weight_in = weight if other == "weights on the input" else None
    live = where.offset_E1[-1]
    z, h = up(x, stored(w_up), where, form, tile, False, True, b_up, weight_in)
    dz, *_ = dh(dout, stored(w_down), z, weight, where, form, tile, False, b_down_ED=b_down)
    assert all(tensor[:live].isfinite().all() for tensor in (z, h, dz))


@USES
def test_no_rows_launch_nothing(use, monkeypatch):
    monkeypatch.setattr(hopper, "_specialized_mm", None)
    x, w_up, w_down, dout, weight, where = _operands("no row has an expert", d=64, f=24, dtype=torch.float16)
    none = where._replace(token_N=where.token_N[:0], row_N=where.row_N[:0])
    with tuning.target("sm_90"):
        outputs = _call(use, (x, w_up, w_down, dout, weight[:0], none), TILE, z=torch.zeros(0, 48, dtype=x.dtype))
    assert not any(map(len, outputs.values()))


COMPILED = """
import json, subprocess, sys, tempfile
import torch
from kernels import aot, aot_cases, fused, hopper, machine_code, tuning

use, changes, unwanted = json.loads(sys.argv[1])
tile = tuning.table()["sm_90", "16bit", "many", use]._replace(**changes)
new = lambda *shape: aot_cases.new(*shape, dtype=torch.bfloat16)
where = fused.Plan(*(aot_cases.new(size, dtype=torch.int32) for size in (4096, 4096, 4096, 9, 40, 40, 1)))
x, z, h = new(2048, 2048), new(4096, 2048), new(4096, 1024)
with aot.compiling("sm_90") as launches:
    if use == "up":
        hopper.up(x, new(8, 2048, 2048), None if unwanted == "z" else z, h, where, tile)
    else:
        dz, h = (None if unwanted == name else like for name, like in (("dz", new(*z.shape)), ("h", h)))
        hopper.dh(x, new(8, 2048, 1024), z, aot_cases.new(4096), dz, h, aot_cases.new(4096, 4), where, tile)
kernel = launches[0].kernel
reading = machine_code.nvidia(kernel.asm["cubin"], True)
registers, spilled, counts = reading.registers, reading.spilled, reading.instructions
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(kernel.asm["cubin"])
    file.flush()
    tool = aot.triton.knobs.nvidia.nvdisasm.path
    code = subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout
keys = ("HGMMA", "LDGSTS", "UTMALDG", "USETMAXREG", "SYNCS", "LDL", "STL")
numbers = dict(warps=kernel.metadata.num_warps, shared=kernel.metadata.shared, registers=registers, spilled=spilled)
print(json.dumps(numbers | {key: counts[key] for key in keys} | {"code": code}))
"""


def _loop(code, instruction):
    """The instructions of the innermost loop with this one."""
    lines = re.findall(r"^(\.L_x_\d+):|^ +/\*[0-9a-f]{4,}\*/ +(.+?) ;?$", code, re.MULTILINE)
    start, loops = {}, []
    for at, (label, text) in enumerate(lines):
        start[label] = at
        if (back := re.search(r"BRA `\((\.L_x_\d+)\)", text)) and back[1] in start:
            loops.append([text for _, text in lines[start[back[1]] : at + 1] if text])
    return min((loop for loop in loops if any(instruction in text for text in loop)), key=len)


WIDE = dict(block_n=256, parts=16)
TWO = dict(block_m=64, block_n=128, num_warps=4, per_sm=2)  # programs of a multiprocessor


@pytest.mark.aot
@pytest.mark.parametrize(
    ("use", "changes", "unwanted", "registers", "columns"),
    [
        ("up", dict(parts=2), "", 168, 256), ("up", dict(parts=8), "z", 168, 256),
        ("up", dict(parts=2) | TWO, "", 128, 128),
        ("dh", WIDE, "", 168, 256), ("dh", WIDE, "h", 168, 256), ("dh", WIDE, "dz", 168, 256),
        ("dh", dict(), "", 168, 128), ("dh", TWO, "", 128, 128),
    ],
    ids=str,
)  # fmt: skip
def test_it_compiles_to_an_unspilled_loop_of_products_beside_a_loop_of_copies(
    use, changes, unwanted, registers, columns
):  # fmt: skip
    done = _run("-c", COMPILED, json.dumps((use, changes, unwanted)))
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    code = compiled.pop("code")
    tile = tuning.table()["sm_90", "16bit", "many", use]._replace(**changes)

    # Registers: as many as the programs of a multiprocessor leave, then dealt out again; nothing on the stack, but for
    # five words where dh's dz is not wanted and the other two are.
    assert compiled["registers"] == registers
    assert compiled["warps"] == tile.num_warps + 4
    assert compiled["spilled"] <= (20 if unwanted == "dz" else 0)
    assert unwanted == "dz" or (compiled["LDL"], compiled["STL"]) == (0, 0)
    target, blocks = aot.TARGETS["sm_90"], (registers, compiled["warps"], compiled["shared"])
    assert aot.blocks_per_multiprocessor(target, *blocks) == tile.per_sm
    assert {"ALLOC", "DEALLOC"} <= set(re.findall(r"USETMAXREG\.(?:TRY_)?(\w+)\.", code))

    # The multiplying warps: four products of 16 from shared memory, one step under way while the next is awaited.
    products = _loop(code, "HGMMA")
    shapes = [re.search(r"HGMMA\.(\w+)\.F32\.BF16 R\d+, gdesc(.*), R", text) for text in products if "HGMMA" in text]
    assert [shape and shape[1] for shape in shapes] == [f"64x{columns}x16"] * 4
    assert [".tnspB" in shape[2] for shape in shapes] == [use == "dh"] * 4
    assert compiled["HGMMA"] == 4
    assert any("WARPGROUP.DEPBAR.LE gsb0, 0x1" in text for text in products)
    assert not any("LDG" in text for text in products)  # of the loaders' copies none, and of z
    assert len(products) <= 66

    # The loading warps: one block of w by the copy engine, 16 bytes of x at a time past the first cache.
    copies = _loop(code, "UTMALDG")
    assert sum(f"UTMALDG.{4 if use == 'up' else 3}D" in text for text in copies) == 1
    rows = [text for text in copies if "LDGSTS." in text]
    assert len(rows) == compiled["LDGSTS"] == tile.block_m * tile.block_k // (8 * 128)
    assert all("LDGSTS.E.BYPASS.128" in text for text in rows)
    assert any("ARRIVES.LDGSTSBAR" in text for text in copies)
    assert not any("HGMMA" in text for text in copies)
