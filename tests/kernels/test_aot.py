"""Claims about compiling ahead of time: what is compiled, what is refused, and how many blocks fit.

Those about all kernels on all GPUs are marked `aot` and left to `make kernels`: compiling takes minutes.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import aot, tuning
from kernels.machine_code import Loop

ROOT = Path(__file__).parents[2]
NONE = dict.fromkeys(aot.INSTRUCTIONS, 0)
UP = aot.Row(
    "sm_90", "up", "16bit", "many", "even", "128x256x64 w8 s4 tma", tma=True, registers=180, spilled=0, shared=196640,
    blocks=1, counts={**NONE, "HGMMA": 4, "UTMALDG": 4}, loop=Loop(98, 4, 0, 1, 1702),
)  # fmt: skip
PLACE = UP._replace(use="place", tile="w8", tma=False, counts=NONE, loop=None)


def _run(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *(arguments or ("-m", "kernels.aot"))]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=clean | environment)


@pytest.fixture(scope="module")
def compiled():
    """The command's run over all targets: minutes, or seconds where no kernel has changed since the last time."""
    return _run("-m", "kernels.aot", "--cache", "build/aot")


@pytest.mark.aot
@pytest.mark.timeout(3600)
def test_every_kernel_compiles_well_for_every_gpu_and_as_the_table_says(compiled):
    assert compiled.returncode == 0, compiled.stdout[-2000:] + compiled.stderr


@pytest.mark.aot
@pytest.mark.timeout(3600)
def test_every_tile_of_the_tuning_table_is_compiled(compiled):
    listed = {tuple(line.split()[:4]) for line in compiled.stdout.splitlines()}
    for arch, kind, load, use in tuning.table():
        names = ("wgrad_down", "wgrad_up") if use == "wgrad" else (use,)
        assert arch == "interpreter" or {(arch, name, kind, load) for name in names} <= listed


@pytest.mark.aot
@pytest.mark.timeout(3600)
def test_kernels_without_tiles_are_compiled_for_every_gpu(compiled):
    listed = {tuple(line.split()[:2]) for line in compiled.stdout.splitlines()}
    uses = ("count", "scan", "place", "gate", "gate_backward", "combine_weighted", "combine_plain")
    assert {(name, use) for name in aot.TARGETS for use in uses} <= listed


TRIED = """
import json, sys
from kernels import aot

rows = aot.tried("sm_90", {name: True for name in sys.argv[1:]})
print(json.dumps([(row.use, row.registers, row.spilled, row.loop.instructions, row.counts["LDGSTS"]) for row in rows]))
"""


@pytest.mark.aot
@pytest.mark.parametrize("settings", [(), ("ragged",), ("flatten",), ("flatten", "ragged"), ("gluon",)], ids="-".join)
def test_what_a_gpu_has_yet_to_prove_compiles_without_a_spill_and_loads_with_fewer_instructions(settings):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", TRIED, *settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    rows = {use: rest for use, *rest in json.loads(done.stdout)}
    assert len(rows) == 6
    for use, (registers, spilled, steps, copies) in rows.items():
        assert (registers <= 255, spilled) == (True, 0)
        if use.startswith("wgrad"):
            assert (copies <= 39, steps <= 190) == ("ragged" in settings,) * 2
    assert (rows["up"][2] > 1000) == ("flatten" in settings)  # one loop, with the epilogue in it
    assert [rows[use][2] <= 66 for use in ("up", "dh")] == ["gluon" in settings] * 2


FEW = """
import json
import torch
from kernels import aot, aot_cases, fused, gate

rows = []
for name in ("sm_90", "gfx942"):
    with aot.compiling(name) as launches:
        tile = aot.tuning.table()[name, "16bit", "many", "down"]
        plan = fused.Plan(*(aot_cases.new(2048, dtype=torch.int32) for _ in fused.Plan._fields))
        h, w = (aot_cases.new(*shape, dtype=torch.bfloat16) for shape in ((2048, 512), (8, 512, 512)))
        fused.down(h, w, plan, tile, False)
        gate._forward._init_fn(aot_cases.new(64, 8), 2, "softmax", None, True, 1.0, 1, 1, 2)
        rows += [aot._row(name, "16bit", "many", "even", launch) for launch in launches]
print(json.dumps(rows))
"""


def test_two_kernels_compile_well_for_a_gpu_of_each_maker():
    """What `make kernels` does with all of them, in seconds."""
    done = _run("-c", FEW)
    assert done.returncode == 0, done.stderr
    rows = [aot.Row(*row) for row in json.loads(done.stdout)]
    assert [(row.target, row.use) for row in rows] == [
        ("sm_90", "down"), ("sm_90", "gate"), ("gfx942", "down"), ("gfx942", "gate"),
    ]  # fmt: skip
    assert aot.check(rows) == []
    assert all(row.registers > 0 and row.blocks > 0 for row in rows)
    assert [row.counts["UTMALDG"] > 0 for row in rows] == [rows[0].tma, False, False, False]
    loops = [row.loop and Loop(*row.loop) for row in rows]
    assert loops[1] is loops[3] is None, "no matmul"
    for loop in loops[::2]:
        assert loop.outside > loop.instructions > 30
        assert loop.barriers > 0
    assert loops[0].products == 1, "the loads of the next step overlap with the product of this one"


MANY = """
import json
import torch
from kernels import aot, aot_cases

rows = []
for name in ("sm_90", "gfx942"):
    with aot.compiling(name) as launches:
        aot_cases.route(16, 2048, 64, "sqrt_softplus", dtype=torch.bfloat16)
        for launch in launches[:2]:
            asm = launch.kernel.asm
            row = aot._row(name, "16bit", "many", "wide", launch)
            rows.append((row, (asm.get("ptx") or asm["amdgcn"]).count("\\n")))
print(json.dumps(rows))
"""


def test_a_gate_of_2048_experts_and_64_choices_is_no_longer_than_one_of_few():
    """As rounds were once written out, forward had 36,000 lines and took minutes to compile."""
    done = _run("-c", MANY)
    assert done.returncode == 0, done.stderr
    rows = [(aot.Row(*row), lines) for row, lines in json.loads(done.stdout)]
    assert [row.use for row, _ in rows] == ["gate", "gate_backward"] * 2
    assert aot.check([row for row, _ in rows]) == []
    assert all(lines < 5000 for _, lines in rows), rows


def test_a_target_is_compiled_again_only_if_what_it_follows_from_changes(monkeypatch, tmp_path):
    tables = []
    monkeypatch.setattr(aot, "table", lambda name: tables.append(name) or [UP, PLACE])
    read = lambda: aot.cached_table("sm_90", tmp_path / "cache")
    assert read() == read() == [UP, PLACE]
    assert tables == ["sm_90"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["sm_90.json"]
    aot.cached_table("sm_80", tmp_path / "cache")
    assert tables.pop() == "sm_80"

    sources = shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(aot, "__file__", str(sources / "aot.py"))
    monkeypatch.setattr(tuning, "TABLE", sources / "tuning.jsonl")
    read()
    assert len(tables) == 1, "the same bytes elsewhere"
    for name in ("ragged_mm.py", "plan.py", "tuning.jsonl"):
        with (sources / name).open("a") as file:
            file.write("\n")
        assert read() == read() == [UP, PLACE]
        assert tables.pop() == "sm_90", name
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    read()
    monkeypatch.setenv("TRITON_PTXAS_PATH", "another")
    read()
    read()
    assert len(tables) == 3, "another Triton, another assembler"


def test_without_a_folder_everything_is_compiled(monkeypatch):
    monkeypatch.setattr(aot, "table", lambda name: [UP] if name == "sm_90" else [])
    assert aot.cached_table("sm_90", None) == [UP]


def test_the_interpreter_is_refused_in_one_sentence():
    done = _run(TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert done.stderr.strip() == "TRITON_INTERPRET is set: there is nothing to compile; unset it."
    assert not done.stdout


def test_a_kernel_that_is_well_is_passed():
    assert aot.check([UP, PLACE]) == []


@pytest.mark.parametrize("row", [UP, PLACE, UP._replace(shape="odd")], ids=["up", "place", "odd"])
def test_a_spill_fails_and_is_named(row):
    (sentence,) = aot.check([UP, row._replace(spilled=20)])
    assert sentence == f"{row.use} (16bit, many, {row.shape}, {row.tile}) on sm_90 spills 20 bytes per thread."


@pytest.mark.parametrize(
    ("name", "limit"),
    [("sm_80", 166912), ("sm_86", 101376), ("sm_90", 232448), ("sm_100", 232448), ("gfx942", 65536)],
)
def test_more_shared_memory_than_a_block_may_take_fails(name, limit):
    row = PLACE._replace(target=name, shared=limit)
    assert aot.check([row]) == []
    (sentence,) = aot.check([row._replace(shared=limit + 1)])
    assert sentence.endswith(f"on {name} takes {limit + 1} bytes of shared memory; a block may take {limit}.")


@pytest.mark.parametrize("use", ["up", "down", "dh", "dx", "wgrad_down", "wgrad_up"])
@pytest.mark.parametrize(
    ("name", "matrix"),
    [("sm_80", "HMMA"), ("sm_86", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")],
)
def test_a_matmul_needs_its_gpus_own_matrix_instruction(name, matrix, use):
    for kind in ("16bit", "tf32"):
        row = PLACE._replace(target=name, use=use, type=kind, shared=1024)
        assert aot.check([row._replace(counts={**NONE, matrix: 1})]) == []
        others = {**dict.fromkeys(aot.INSTRUCTIONS, 9), matrix: 0}
        (sentence,) = aot.check([row._replace(counts=others)])
        assert sentence.endswith(f"on {name} has no {matrix} instruction.")


def test_exact_float32_and_kernels_that_multiply_nothing_need_no_matrix_instruction():
    assert aot.check([UP._replace(type="fp32", tma=False, counts=NONE), PLACE]) == []


def test_tma_that_was_asked_for_and_not_used_fails_but_for_odd_sizes():
    row = UP._replace(counts={**UP.counts, "UTMALDG": 0})
    (sentence,) = aot.check([row])
    assert sentence.endswith("asks for tma and has no UTMALDG instruction.")
    assert aot.check([row._replace(shape="odd"), row._replace(tma=False)]) == []


def test_a_table_that_differs_fails_with_a_diff():
    then, now = aot.render([UP, PLACE]), aot.render([UP._replace(registers=181), PLACE])
    assert aot.compare(then, then) == ([], "")
    (sentence,), diff = aot.compare(now, then)
    assert "--write" in sentence
    assert diff.count("\n") == 5  # two names, a place, the line as it was and as it is
    assert [(line[:10], line.split()[9]) for line in diff.splitlines()[3:]] == [
        ("-sm_90  up", "180"),
        ("+sm_90  up", "181"),
    ]


def test_tables_of_two_triton_versions_are_not_compared_and_it_says_so(monkeypatch):
    then = aot.render([UP])
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    wrong, remark = aot.compare(aot.render([UP._replace(registers=181)]), then)
    assert wrong == []
    assert "9.9.9" in remark
    assert "not compared" in remark


def test_the_kept_table_has_a_column_for_every_number():
    header, first = aot.render([UP]).splitlines()[1:]
    assert len(header.split()) == len(aot.HEADER)
    start = {name: header.index(name) for name in ("regs", "spill", "shared", "blocks", "HGMMA", "UTMALDG")}
    read = {name: first[at:].split()[0] for name, at in start.items()}
    assert read == dict(regs="180", spill=".", shared="196640", blocks="1", HGMMA="4", UTMALDG="4")


def test_of_a_loop_a_wait_for_all_is_zero_and_no_wait_is_a_dot():
    for row, cells in (
        (UP, ["98", "4", "0", "1", "1702"]),
        (UP._replace(loop=Loop(91, 0, None, 2, 621)), ["91", "0", ".", "2", "621"]),
        (PLACE, ["."] * 5),
    ):
        assert aot.render([row]).split()[-5:] == cells
    assert aot.HEADER[-5:] == ("loop", "bars", "copies", "products", "outside")


def test_every_gpu_that_has_tiles_or_takes_anothers_is_compiled():
    assert set(aot.TARGETS) == {arch for arch, *_ in tuning.table()} - {"interpreter"} | set(tuning.SAME)
    for name, target in aot.TARGETS.items():
        arch = str(target.gpu.arch)
        assert name == (arch if target.gpu.backend == "hip" else f"sm_{arch}")
        kinds = {(kind, load) for _, kind, load, _ in aot._jobs(name)}
        few = {("16bit", "many"), ("fp32", "many")}  # the gate's numbers are float32
        assert kinds == (few if name in tuning.SAME else set(product(tuning.TYPES, tuning.LOADS)))


@pytest.mark.parametrize(
    ("name", "registers", "warps", "shared", "columns", "blocks", "limit"),
    [
        ("sm_80", 97, 4, 6144, 0, 4, "registers: 104 a lane leave 4 warps to each of 4 parts"),
        ("sm_90", 128, 8, 1024, 0, 2, "registers: 128 a lane leave 4 warps to each of 4 parts"),
        ("sm_90", 129, 8, 1024, 0, 1, "registers: 136 a lane leave 3 warps to each of 4 parts"),
        ("sm_90", 32, 4, 76800, 0, 3, "shared memory: 3 (75 + 1) KiB fill 228"),
        ("sm_90", 32, 4, 76801, 0, 2, "shared memory: a byte more and 3 do not"),
        ("sm_86", 16, 8, 0, 0, 6, "warps: 48 / 8"),
        ("sm_86", 16, 1, 0, 0, 16, "blocks"),
        ("sm_100", 64, 4, 1024, 256, 2, "tensor memory: 512 / 256 columns"),
        ("gfx942", 128, 4, 16384, 0, 4, "registers and shared memory: 4 each"),
        ("gfx942", 294, 4, 0, 0, 1, "registers: 296 a lane leave 1 warp to each of 4 parts"),
        ("gfx942", 8, 4, 0, 0, 8, "warps: 32 / 4"),
    ],
)
def test_blocks_of_a_multiprocessor_agree_with_a_count_by_hand(name, registers, warps, shared, columns, blocks, limit):
    assert aot.blocks_per_multiprocessor(aot.TARGETS[name], registers, warps, shared, columns) == blocks, limit


def test_compiling_leaves_nothing_behind_whatever_happens_inside():
    cpu = torch.device("cpu")
    state = lambda: (JITFunction.run, driver._active, triton.knobs.cache.dir, tuning.architecture(cpu))
    before = state()
    with contextlib.suppress(KeyError), aot.compiling("sm_90") as launches:
        assert driver.active.get_current_target().arch == 90
        assert not set(state()) & set(before)
        raise KeyError
    assert launches == []
    assert state() == before


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ["--wirte"],
            "--wirte is no option; accepted are --write, --cache FOLDER, --try GPU SETTING=NUMBER, --jobs NUMBER and "
            "--help.",
        ),
        (
            ["--try", "sm_89", "flatten=1"],
            "--try sm_89 is no GPU with tiles of its own; accepted are gfx942, sm_100, sm_80, sm_86, sm_90.",
        ),
        (
            ["--try", "sm_90", "flat=1"],
            f"--try sm_90 flat=1 is no setting of a tile; accepted are {', '.join(tuning.Tile._fields)}, each =NUMBER.",
        ),
        (["--jobs", "many"], "argument --jobs: invalid int value: 'many'."),
        (["--jobs", "0"], "--jobs 0 is out of range: accepted is at least 1."),
    ],
)
def test_a_command_line_that_means_nothing_is_refused_before_anything_is_compiled(given, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aot.py", *given])
    monkeypatch.setattr(aot, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("something was compiled"))
    with pytest.raises(SystemExit, match="2"):
        aot.main()
    assert capsys.readouterr().err == f"error: {sentence}\n"
