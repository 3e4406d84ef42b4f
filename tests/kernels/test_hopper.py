"""The product with warps that load and warps that multiply: run as Python against the loops in float64, compiled for a
GPU that is not here, and refused where it cannot run."""

import itertools
import json
import re

import pytest
import torch

from kernels import aot, hopper, tuning
from kernels.ragged_mm import up
from tests.kernels.gluon_as_python import running
from tests.kernels.test_aot import _run
from tests.kernels.test_plan import DEVICE, LOADS, poisoned
from tests.kernels.test_ragged_mm import _error, _loops, _operands

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the kernel itself: see suite=tune")
TILE = tuning.Tile(64, 32, 32, 2, 2, 4, 3, tma=True, per_sm=1, gluon=True)


def _hold(load="zipf", dtype=torch.float16, tile=TILE, d=160, f=20, keep_z=True):
    """z and h are the loops', at most twice as wrong as they are in this dtype; rows without an expert keep their
    NaN."""
    operands = _operands(load, d, f, dtype=dtype, block_m=tile.block_m)
    where = operands[-1]
    live = where.offset_E1[-1].item()
    with poisoned(), tuning.target("sm_90"), running(hopper, "_up"):
        z, h = up(operands[0], operands[1], where, "swiglu", tile, False, keep_z)
    exact = _loops(*(tensor.double() for tensor in operands[:-1]), where, "swiglu")
    rounded = _loops(*operands, "swiglu")
    assert len(z) == (len(h) if keep_z else 0)
    for mine, want, bound in zip((z, h), exact, rounded, strict=False):
        if len(mine):
            assert mine[live:].isnan().all(), "a row without an expert is written"
            assert _error(mine[:live], want) <= 2 * _error(bound, want)


@pytest.mark.parametrize("load", LOADS)
def test_it_is_the_loops_for_any_load(load):
    _hold(load)


@pytest.mark.parametrize(
    "changes",
    [
        dict(per_sm=2), dict(per_sm=0), dict(num_stages=2), dict(num_stages=4), dict(parts=1), dict(group_m=1),
        dict(block_n=128, parts=4), dict(block_m=128, num_warps=8), dict(block_k=64), dict(block_k=128),
    ],
    ids=str,
)  # fmt: skip
def test_it_is_the_loops_for_any_tile(changes):
    _hold("even", tile=TILE._replace(**changes), d=128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "f"), [(32, 1), (32, 64), (96, 33)])
@pytest.mark.parametrize("keep_z", [True, False])
def test_it_is_the_loops_for_any_sizes_that_it_takes(dtype, d, f, keep_z):
    _hold("some rows have no expert", dtype, d=d, f=f, keep_z=keep_z)


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
    "float32": (dict(dtype=torch.float32), "sm_90", "takes bfloat16 or float16; x is torch.float32."),
    "a width": (dict(d=100), "sm_90", "a multiple of block_k=32 wide; D is 100."),
    "one stage": (dict(num_stages=1), "sm_90", "2 stages or more; it is Tile"),
    "rows": (dict(block_m=96), "sm_90", "a multiple of 16 rows for every warp"),
    "warps": (dict(num_warps=2), "sm_90", "4 or 8 warps"),
    "columns": (dict(parts=4), "sm_90", "at least 16 columns for every part"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused_in_a_sentence_before_anything_is_launched(name, monkeypatch):
    changes, arch, sentence = REFUSED[name]
    monkeypatch.setattr(hopper, "_up", None)
    sizes = {key: changes[key] for key in ("d", "dtype") if key in changes}
    tile = TILE._replace(**{key: value for key, value in changes.items() if key not in sizes})
    x, w_up, *_, where = _operands(**{"d": 64, "dtype": torch.float16, **sizes})
    with tuning.target(arch), pytest.raises(ValueError, match=r"^A tile with gluon .*\.$") as refused:
        up(x, w_up, where, "swiglu", tile, False)
    assert sentence in str(refused.value)


def test_another_activation_takes_the_tested_path_whatever_the_tile_asks_for(monkeypatch):
    monkeypatch.setattr(hopper, "up", lambda *_: pytest.fail("there is no such epilogue"))
    x, w_up, _, _, _, where = _operands(d=64, activation="gelu", dtype=torch.float32)
    z, _ = up(x, w_up, where, "gelu", TILE._replace(block_m=16, tma=False), False)
    assert z[: where.offset_E1[-1]].isfinite().all()


def test_no_rows_launch_nothing(monkeypatch):
    monkeypatch.setattr(hopper, "_up", None)
    _, w_up, *_, where = _operands("no row has an expert", d=64, dtype=torch.float16)
    none = where._replace(token_N=where.token_N[:0], row_N=where.row_N[:0])
    with tuning.target("sm_90"):
        z, h = up(torch.zeros(0, 64, dtype=torch.float16), w_up, none, "swiglu", TILE, False)
    assert (len(z), len(h)) == (0, 0)


COMPILED = """
import json, subprocess, sys, tempfile
from kernels import aot, hopper, tuning

tile = tuning.table()["sm_90", "16bit", "many", "up"]._replace(**json.loads(sys.argv[1]))
new = lambda *shape: aot._new(*shape, dtype=aot.torch.bfloat16)
where = aot.fused.Plan(*(aot._new(size, dtype=aot.torch.int32) for size in (4096, 4096, 4096, 9, 40, 40, 1)))
with aot.compiling("sm_90") as launches:
    z = new(4096, 2048) if json.loads(sys.argv[2]) else None
    hopper.up(new(2048, 2048), new(8, 2048, 2048), z, new(4096, 1024), where, tile)
kernel = launches[0].kernel
reading = aot.machine_code.nvidia(kernel.asm["cubin"], True)
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


@pytest.mark.aot
@pytest.mark.parametrize(
    ("changes", "keep_z", "registers", "columns"),
    [
        (dict(parts=2, gluon=True), True, 168, 256), (dict(parts=8, gluon=True), False, 168, 256),
        (dict(parts=2, gluon=True, block_m=64, block_n=128, num_warps=4, per_sm=2), True, 128, 128),
    ],
    ids=str,
)  # fmt: skip
def test_it_compiles_to_an_unspilled_loop_of_products_beside_a_loop_of_copies(changes, keep_z, registers, columns):
    done = _run("-c", COMPILED, json.dumps(changes), json.dumps(keep_z))
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    code = compiled.pop("code")
    tile = tuning.table()["sm_90", "16bit", "many", "up"]._replace(**changes)

    # Registers: as many as the programs of a multiprocessor leave, then dealt out again; nothing on the stack.
    assert compiled["registers"] == registers
    assert compiled["warps"] == tile.num_warps + 4
    assert (compiled["spilled"], compiled["LDL"], compiled["STL"]) == (0, 0, 0)
    target, blocks = aot.TARGETS["sm_90"], (registers, compiled["warps"], compiled["shared"])
    assert aot.blocks_per_multiprocessor(target, *blocks) == tile.per_sm
    assert {"ALLOC", "DEALLOC"} <= set(re.findall(r"USETMAXREG\.(?:TRY_)?(\w+)\.", code))

    # The multiplying warps: four products of 16 from shared memory, one step under way while the next is awaited.
    products = _loop(code, "HGMMA")
    shapes = [re.search(r"HGMMA\.(\w+)\.F32\.BF16 R\d+, gdesc", text) for text in products if "HGMMA" in text]
    assert [shape and shape[1] for shape in shapes] == [f"64x{columns}x16"] * 4
    assert compiled["HGMMA"] == 4
    assert any("WARPGROUP.DEPBAR.LE gsb0, 0x1" in text for text in products)
    assert not any("LDGSTS" in text or "UTMALDG" in text for text in products)
    assert len(products) <= 66

    # The loading warps: one block of w by the copy engine, 16 bytes of x at a time past the first cache.
    copies = _loop(code, "UTMALDG")
    assert sum("UTMALDG.4D" in text for text in copies) == 1
    rows = [text for text in copies if "LDGSTS." in text]
    assert len(rows) == compiled["LDGSTS"] == tile.block_m * tile.block_k // (8 * 128)
    assert all("LDGSTS.E.BYPASS.128" in text for text in rows)
    assert any("ARRIVES.LDGSTSBAR" in text for text in copies)
    assert not any("HGMMA" in text for text in copies)
