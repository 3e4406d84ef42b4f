"""Candidate tiles may fit, are measured against the present ones, and the best share one height."""

import itertools
import json
import time
import types

import pytest
import torch

from experiments.suites import cases, tune
from experiments.suites.cases import Rows, Wrong, run
from experiments.suites.shapes import SHAPES, Shape
from kernels import aot, tuning
from kernels.quantized import FORMATS
from kernels.tuning import Tile
from tests import fake_cuda
from tests.experiments.bench_command import command
from tests.kernels.test_aot import _run

pytestmark = fake_cuda.interpreted
CPU = torch.device("cpu")
HOPPER = 227 * 1024


def _together(base, *key):
    """The tiles of a key in TOGETHER."""
    return [base._replace(**changes) for changes in tune.TOGETHER.get(key, ())]


@pytest.mark.parametrize(("kind", "load"), list(itertools.product(tuning.TYPES, tuning.LOADS)))
def test_candidates_differ_by_steps_and_fit(kind, load):
    with tuning.target("sm_90"):
        for use in tuning.USES:
            base = tune.present(CPU, use, kind, load)
            assert tune.candidates(CPU, use, kind, load, 0, HOPPER) == [base]
            together = _together(base, "sm_90", kind, load, use)
            for changed in (1, 2):
                found = tune.candidates(CPU, use, kind, load, changed, HOPPER)
                assert len(set(found)) == len(found) > 1
                assert set(together) <= set(found) or changed == 2
                for tile in found:
                    assert sum(a != b for a, b in zip(tile, base, strict=True)) == changed or tile in together
                    assert tune.shared_bytes(tile, use, 2 if kind == "16bit" else 4, "sm_90") <= HOPPER
                    assert tile.block_m * tile.block_n <= 128 * 32 * tile.num_warps
                    if use == "wgrad":
                        assert not tile.tma
                        assert (tile.parts, tile.per_sm) == (base.parts, base.per_sm)


def test_a_gpu_without_a_copy_engine_gets_no_candidate_with_it():
    with tuning.target("sm_80"):
        assert not any(tile.tma for tile in tune.candidates(CPU, "up", "16bit", "many", 1, 163 * 1024))


GPUS = tuple(dict.fromkeys(arch for arch, *_ in tuning.table() if arch != "interpreter"))


@pytest.mark.parametrize("key", tuning.table(), ids="-".join)
def test_every_tile_that_ships_is_a_candidate_and_so_it_is_from_each_of_its_neighbours(key, monkeypatch):
    arch, kind, load, use = key
    shipped, limit = tuning.table()[key], aot.TARGETS[arch].block_shared if arch in aot.TARGETS else HOPPER
    assert tune.fits(shipped, use, 2 if kind == "16bit" else 4, limit, arch)
    with tuning.target(arch):
        assert tune.candidates(CPU, use, kind, load, 0, limit) == [shipped]
        neighbours = tune.candidates(CPU, use, kind, load, 1, limit)
        for tile in set(neighbours) - set(_together(shipped, *key)):
            monkeypatch.setattr(tune, "present", lambda *given, tile=tile: tile)
            changed = next(name for name in tune.VALUES if getattr(tile, name) != getattr(shipped, name))
            if getattr(shipped, changed) in tune.VALUES[changed]:
                assert shipped in tune.candidates(CPU, use, kind, load, 1, limit)
    assert arch == "interpreter" or all(value in tune.VALUES[name] for name, value in shipped._asdict().items())


def test_bytes_in_flight_are_never_more_than_the_compilers_took_and_mostly_the_same():
    exact = 0
    for line in aot.TABLE.read_text().splitlines()[2:]:
        cells = line.replace(" tma", "").split()
        if cells[4].split("-")[0] in FORMATS and cells[1] in ("up", "down"):
            continue  # operands of 8 bits and fewer, whose tiles nobody tunes
        if cells[0] in GPUS and (use := cells[1].split("_")[0]) in tuning.USES:
            m, n, k = map(int, cells[5].split("x"))
            warps, stages, shared = int(cells[6][1:]), int(cells[7][1:]), int(cells[10])
            tile = Tile(m, n, k, 8, 1, warps, stages, False, 0)
            arch, itemsize = cells[0], 2 if cells[2] == "16bit" else 4
            assert tune.shared_bytes(tile, use, itemsize, arch) <= shared, line
            exact += shared - tune.shared_bytes(tile, use, itemsize, arch) < 1024 or cells[2] != "16bit"
    assert exact > 200


def test_the_loads_of_a_layer_are_many_and_few_rows_an_expert():
    for shape in SHAPES.values():
        loads = tune.loads(shape)
        assert loads["many"] == shape
        assert loads["few"].T * shape.K < tuning.FEW * shape.E <= shape.T * shape.K
    shapes = tune.loads(SHAPES["small"])
    assert tune.settings(CPU, full=True, shapes=shapes).shapes == shapes
    assert tune.settings(CPU, full=True).shapes["many"] == SHAPES["olmoe"]


@pytest.mark.parametrize("name", ["flatten", "ragged"])
def test_a_loop_is_flattened_where_there_is_one_and_rows_are_ragged_where_they_can_be(name):
    for arch, use in itertools.product(("sm_80", "sm_90", "sm_100", "gfx942"), tuning.USES):
        with tuning.target(arch):
            candidates = tune.candidates(CPU, use, "16bit", "many", 1, HOPPER)
            walks = bool(tune.present(CPU, use, "16bit", "many").per_sm)
        wanted = use != "wgrad" and walks
        if name == "ragged":
            wanted = arch in ("sm_90", "sm_100") and use in ("down", "dx", "wgrad")
        assert [getattr(tile, name) for tile in candidates].count(True) == wanted, f"{arch} {use}"


def test_a_candidate_with_gluon_is_of_swiglus_uses_on_hopper_in_16_bits_alone():
    cases = itertools.product(("sm_80", "sm_90", "sm_100"), tuning.USES, tuning.TYPES, tuning.LOADS)
    for arch, use, kind, load in cases:
        with tuning.target(arch):
            found = [tile for tile in tune.candidates(CPU, use, kind, load, 1, HOPPER) if tile.gluon]
        wanted = 0
        if (arch, kind) == ("sm_90", "16bit"):
            wanted = {("up", "many"): 1, ("dh", "many"): 2, ("up", "few"): 1, ("dh", "few"): 1}.get((use, load), 0)
        assert len(found) == wanted, f"{arch} {use} {kind} {load}"
        assert all(tile.block_m % (16 * tile.num_warps) == 0 for tile in found), "16 rows to a multiplying warp"


def test_what_is_tried_together_is_no_candidate_of_itself(monkeypatch):
    key = ("sm_90", "16bit", "many", "dh")
    tile, two = _together(tuning.table()[key], *key)
    assert (tile.block_n, tile.parts, tile.gluon) == (256, 16, True)
    assert 2 * tune.shared_bytes(two, "dh", 2, "sm_90") <= HOPPER
    monkeypatch.setattr(tune, "present", lambda *given: tile)
    with tuning.target("sm_90"):
        assert tile not in tune.candidates(CPU, "dh", "16bit", "many", 1, HOPPER)
        assert tune.candidates(CPU, "dh", "16bit", "many", 0, HOPPER) == [tile]


COMPILED = """
import json
from unittest.mock import patch
from experiments.suites import tune
from kernels import aot, tuning

table, found = tuning.table(), []
for key, alternatives in tune.TOGETHER.items():
    name, kind, load, use = key
    case = aot.EVEN._replace(type=kind, tokens={"many": 16384, "few": 64}[load])
    for changes in alternatives:
        changed = table | {key: table[key]._replace(**changes)}
        with patch.object(tuning, "table", lambda: changed), aot.compiling(name) as launches:
            aot._layer(case)
            rows = [aot._row(name, kind, load, case.shape, launch) for launch in launches if launch.tuned]
        (row,) = [row for row in rows if row.use == use]
        found.append((aot.check([row]), row.blocks, changed[key].per_sm))
print(json.dumps(found))
"""


@pytest.mark.aot
def test_what_is_tried_together_compiles_without_a_spill_to_as_many_programs_as_it_asks_for():
    done = _run("-c", COMPILED)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[[], per_sm, per_sm] for per_sm in (1, 2, 2, 2)]


def _settings(**changes):
    return tune.settings(CPU, full=False, **changes)


def test_sizes_are_of_the_load_they_stand_for():
    for settings in (_settings(), tune.settings(CPU, full=True)):
        for load, shape in settings.shapes.items():
            few = shape.T * shape.K < tuning.FEW * shape.E
            assert few == (load == "few")


def test_every_use_is_timed_and_rows_that_are_kept_are_not_compiled(tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(tune, "compile_ahead", lambda settings, kind, shape, todo: compiled.append(len(todo)))
    path, common = tmp_path / "gpu-tune.jsonl", {"commit": "c", "code": "k", "device": "d"}
    for expected in (5, 0):
        out = Rows(path, common, resume=True)
        settings = _settings(kept=out.kept)
        settings.shapes = {"few": settings.shapes["few"]}
        found = run(tune.cases(settings), out, CPU)
        assert compiled.pop() == expected
        assert [row["use"] for row in found] == list(tuning.USES)
        assert all(row["status"] == "measured" and row["present"] for row in found)
    tune.conclude(found, CPU, tmp_path / tune.name(CPU))
    assert "Nothing is faster" in capsys.readouterr().out
    table = [json.loads(line) for line in (tmp_path / "tuning-interpreter.jsonl").read_text().splitlines()]
    for row in table:
        assert tuning.table()[row["arch"], row["type"], row["load"], row["use"]] == Tile(**row["tile"])
        assert row["us"] > 0
        assert row["present_us"] > 0


def test_compiling_ahead_runs_each_candidate_on_few_rows_and_says_nothing_of_failures():
    shape, tile = Shape(16, 32, 32, 2, 1), tune.present(CPU, "down", "16bit", "few")
    assert tune._compile("cpu", "16bit", shape, ("down", tile)) == ""
    assert tune._compile("cpu", "16bit", shape, ("down", tile._replace(block_n=24))) != ""


def test_compiling_ahead_survives_a_process_that_dies(monkeypatch, capsys):
    class Pool:
        def __init__(self, workers, mp_context):
            assert (workers, mp_context.get_start_method()) == (2, "spawn")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, job, todo):
            raise tune.BrokenProcessPool

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    settings = _settings()
    tune.compile_ahead(settings, "16bit", settings.shapes["few"], [None, None])  # no workers: no pool
    settings.workers = 8
    tune.compile_ahead(settings, "16bit", settings.shapes["few"], [])  # nothing to do: none either
    settings.until = time.monotonic() + 30
    tune.compile_ahead(settings, "16bit", settings.shapes["few"], [None, None])  # half a minute left: none either
    assert not capsys.readouterr().out
    settings.until = time.monotonic() + 90
    tune.compile_ahead(settings, "16bit", settings.shapes["few"], [None, None])
    assert "compiled one by one" in capsys.readouterr().out


def _bench():
    settings = _settings()
    return tune.Bench(settings, "16bit", "few", settings.shapes["few"])


@pytest.mark.parametrize("kernel", ["ragged_mm._ragged_mm", "hopper._specialized_mm"])
def test_a_candidate_that_spills_is_not_timed(kernel, monkeypatch):
    old, new = types.SimpleNamespace(n_spills=9), types.SimpleNamespace(n_spills=3)
    cache = {"old": old}
    monkeypatch.setattr(f"kernels.{kernel}.device_caches", {0: (cache, None)}, raising=False)
    bench, call = _bench(), tune.Bench.call

    def launching(self, use, tile):
        if "timed" in cache:
            raise AssertionError("timed")
        cache["new"] = new
        return call(self, use, tile)

    bench.wanted["down"] = bench.call("down", tune.present(CPU, "down", "16bit", "few"))
    monkeypatch.setattr(tune.Bench, "call", launching)
    with pytest.raises(tune.Spilled, match="3 words"):
        bench.measure("down", tune.present(CPU, "down", "16bit", "few")._replace(block_n=16))


def test_a_candidate_with_another_result_is_not_timed(monkeypatch):
    bench, call = _bench(), tune.Bench.call
    bench.wanted["dx"] = bench.call("dx", tune.present(CPU, "dx", "16bit", "few"))
    monkeypatch.setattr(tune.Bench, "call", lambda self, use, tile: (call(self, use, tile)[0] * 1.1,))
    with pytest.raises(Wrong, match=r"differs from the present tile's by 0\.1"):
        bench.measure("dx", tune.present(CPU, "dx", "16bit", "few"))


TILE = Tile(64, 64, 32, 8, 1, 4, 3, False, 1)


def _row(use, us, status="measured", load="many", error="", **changes):
    tile = TILE._replace(**changes)
    key = {"arch": "sm_90", "type": "16bit", "load": load, "use": use, "tile": tile._asdict()}
    return key | {"status": status, "us": us, "present_us": 100.0, "present": not changes, "error": error}


def test_the_best_tiles_share_the_height_with_the_smallest_sum_and_wgrad_has_its_own():
    found = [_row(use, 100.0) for use in tuning.USES]
    found += [_row("up", 40.0, block_m=128), _row("down", 150.0, block_m=128), _row("dh", 90.0, block_m=128)]
    found += [_row("dx", 90.0, block_m=128), _row("dx", 95.0, block_m=128, num_warps=8)]
    found += [_row("up", 10.0, block_m=32), _row("wgrad", 50.0, block_m=256)]  # at 32 the other uses were not measured
    chosen = {row["use"]: row for row in tune.best(found)}
    assert [chosen[use]["tile"]["block_m"] for use in tuning.USES] == [128, 128, 128, 128, 256]
    assert chosen["dx"]["us"] == 90.0
    assert list(chosen["up"]) == ["arch", "type", "load", "use", "tile", "us", "present_us"]


def test_a_load_of_which_a_use_was_not_measured_gives_no_tiles_but_wgrads():
    found = [_row("up", 1.0, load="few"), _row("wgrad", 1.0, load="few"), _row("down", 1.0, "failed", load="few")]
    assert [row["use"] for row in tune.best(found)] == ["wgrad"]


def test_changes_are_printed_from_two_percent_on_and_what_was_skipped_is_counted(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(tune, "present", lambda device, use, kind, load: TILE)
    found = [_row(use, 99.0, num_warps=8) for use in tuning.USES if use != "up"] + [_row("up", 50.0, num_warps=8)]
    found += [_row("up", 0, "failed", error="Spilled: 3 words"), _row("up", 0, "failed", error="OutOfResources: x")]
    found += [_row("up", 0, "wrong"), _row("up", 0, "left out")]
    tune.conclude(found, CPU, tmp_path / "tuning.jsonl")
    out = capsys.readouterr().out
    assert (
        "| up  | 16bit | many | 64x64x32 w4 s3 g8 p1 per_sm1 | 100.0 | 64x64x32 w8 s3 g8 p1 per_sm1 | 50.0 | 2.00× |"
        in out
    )
    assert "down" not in out
    assert "5 tiles timed; skipped: 1 did not compile or run, 1 spill, 1 give another result, 1 for want of time" in out
    assert len(cases.read(tmp_path / "tuning.jsonl")) == 5


def test_a_row_in_the_table():
    assert tune.cells(_row("up", 50.0, tma=True))[3:] == ("64x64x32 w4 s3 g8 p1 per_sm1 tma", "50.0", "2.00×")
    assert tune.cells(_row("up", 50.0))[5] == "present"
    assert tune.cells(_row("up", 0, "failed", error="Spilled: 3 words"))[4:] == ("failed", "Spilled: 3 words")


def test_tiles_are_tuned_beside_the_rows(monkeypatch, tmp_path, capsys):
    command(monkeypatch, "suite=tune", "sizes=smoke", "budget=0.001", f"out={tmp_path / 'tune.jsonl'}")
    found = cases.read(tmp_path / "tune.jsonl")
    assert [row["status"] for row in found].count("left out") >= 9
    assert (tmp_path / "tuning-interpreter.jsonl").exists()
    assert "for want of time" in capsys.readouterr().out
