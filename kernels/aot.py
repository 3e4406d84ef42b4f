"""Proof that every kernel compiles well for GPUs that are not at hand: registers, spills, shared memory, instructions.

    python -m kernels.aot            # compile all, print the table, fail on what is wrong or differs from aot.txt
    python -m kernels.aot --write    # the same, and keep the table in aot.txt
    python -m kernels.aot --cache build/aot    # as the first, but compile only what changed since the last time
    python -m kernels.aot --try sm_90 flatten=1 ragged=1    # what a GPU's 16-bit matmuls would be with other tiles

It calls the functions that production calls, on tensors without memory, with Triton's launch replaced by its compiler:
the constants, specialisations and tiles are those of a run. What the compilers made of it is read off the binaries.

GPUs that take another's tiles (tuning.SAME) compile one layer of 16 bits under many rows, the gate and the plan; those
that have tiles of their own, every tile and every form of a kernel.

Of a matmul the table's last columns tell what a step of k is: loop, its instructions; bars, its barriers; copies and
products, how many groups of asynchronous copies and of matrix instructions its strictest wait leaves in flight (a dot:
it waits for none); outside, the instructions of the kernel that run once a tile.
"""

import argparse
import difflib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import machine_code, tuning
from kernels.aot_cases import CASES, EVEN, layer, route
from kernels.machine_code import Loop

TABLE = Path(__file__).with_name("aot.txt")
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "v_mfma", "LDGSTS", "UTMALDG")  # four matrix units, two asynchronous copies
OF_8_BITS = {"HGMMA": "QGMMA", "HMMA": "QMMA", "UTCHMMA": "UTCQMMA"}  # counted with these


class Target(NamedTuple):
    """What a GPU has. A multiprocessor of either maker is four parts with 512 registers a lane each."""

    gpu: GPUTarget
    matrix: str  # its instruction for 16-bit and tf32 matmuls
    block_shared: int  # bytes that one block may take
    shared: int  # bytes of a multiprocessor
    reserved: int  # bytes that every block takes beside its own
    warps: int  # of a multiprocessor
    blocks: int


KIB = 1024
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "HMMA", 163 * KIB, 164 * KIB, KIB, 64, 32),
    "sm_86": Target(GPUTarget("cuda", 86, 32), "HMMA", 99 * KIB, 100 * KIB, KIB, 48, 16),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "HGMMA", 227 * KIB, 228 * KIB, KIB, 64, 32),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "UTCHMMA", 227 * KIB, 228 * KIB, KIB, 64, 32),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "v_mfma", 64 * KIB, 64 * KIB, 0, 32, 16),
    # With another's tiles, as tuning.SAME has them.
    "sm_87": Target(GPUTarget("cuda", 87, 32), "HMMA", 163 * KIB, 164 * KIB, KIB, 48, 16),
    "sm_89": Target(GPUTarget("cuda", 89, 32), "HMMA", 99 * KIB, 100 * KIB, KIB, 48, 24),
    "sm_103": Target(GPUTarget("cuda", 103, 32), "UTCHMMA", 227 * KIB, 228 * KIB, KIB, 64, 32),
    "sm_120": Target(GPUTarget("cuda", 120, 32), "HMMA", 99 * KIB, 100 * KIB, KIB, 48, 24),
    "sm_121": Target(GPUTarget("cuda", 121, 32), "HMMA", 99 * KIB, 100 * KIB, KIB, 48, 24),
    "gfx90a": Target(GPUTarget("hip", "gfx90a", 64), "v_mfma", 64 * KIB, 64 * KIB, 0, 32, 16),
    "gfx950": Target(GPUTarget("hip", "gfx950", 64), "v_mfma", 160 * KIB, 160 * KIB, 0, 32, 16),
}
TENSOR_COLUMNS = 512  # of tensor memory, where sm_100 keeps accumulators


class Launch(NamedTuple):
    """A kernel that was compiled instead of launched."""

    name: str
    options: dict[str, Any]
    kernel: Any

    @property
    def tuned(self) -> bool:
        """Whether its tile stands in the tuning table: whether it is a matmul."""
        return "GROUP_M" in self.options


class Row(NamedTuple):
    """One line of the table."""

    target: str
    use: str
    type: str
    load: str
    shape: str
    tile: str
    tma: bool  # asked for
    registers: int
    spilled: int  # bytes per thread
    shared: int  # bytes per block
    blocks: int  # per multiprocessor
    counts: dict[str, int]  # of INSTRUCTIONS; of a matmul on cuda, and of every kernel on hip
    loop: Loop | None  # of a matmul


class _Driver:
    """Stands in for the GPU that Triton looks for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling(name: str) -> Iterator[list[Launch]]:
    """Inside, launching a kernel compiles it for this target, afresh, and appends it to the list; nothing runs."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launches.append(Launch(self.__name__, options, run(self, *args, grid=grid, warmup=True, **options)))

    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), tuning.target(name):
        triton.knobs.cache.dir = folder
        with patch.object(JITFunction, "run", compile_only), patch.object(driver, "_active", _Driver(name)):
            yield launches


def _jobs(name: str) -> list[tuple[str, str, str, Callable[[], None]]]:
    """(shape, type, load, what launches its kernels) of a target."""
    cases = (EVEN,) if name in tuning.SAME else CASES
    layers = [(case.shape, case.type, case.load, partial(layer, case)) for case in cases]
    plain, grouped = partial(route, 16384, 64, 8, "softmax"), partial(route, 16384, 256, 8, "sigmoid", 8, 4)
    wide = partial(route, 16384, 2048, 64, "sqrt_softplus", dtype=torch.bfloat16)
    routes = [("even", "fp32", "many", plain), ("grouped", "fp32", "many", grouped), ("wide", "16bit", "many", wide)]
    return [*layers, *(routes[:1] if name in tuning.SAME else routes)]


def _use(launch: Launch, shape: str) -> str:
    """What a launch is for. Of matrices by columns, it is the other one that is read along its rows."""
    options, by_rows = launch.options, shape != "columns"
    if "EPILOGUE" in options:
        store = "down" if options["K_MAJOR"] == by_rows else "dx"
        return {"activate": "up", "backward": "dh", "store": store}[options["EPILOGUE"]]
    if launch.name == "_ragged_wgrad":
        return "wgrad_down" if options["GATHER_P"] == by_rows else "wgrad_up"
    if launch.name == "_combine":
        return "combine_weighted" if options["WEIGHTED"] else "combine_plain"
    return launch.name.removeprefix("_")


def table(name: str) -> list[Row]:
    """Compile everything for one target. A binary that cases share is listed once, a matmul once per type and load."""
    rows: dict[tuple, Row] = {}
    with compiling(name) as launches:
        for shape, kind, load, launch_all in _jobs(name):
            launches.clear()
            launch_all()
            for launch in launches:
                key = (launch.kernel, kind, load) if launch.tuned else (launch.kernel,)
                if key not in rows:
                    rows[key] = _row(name, kind, load, shape, launch)
    return list(rows.values())


def tried(name: str, changes: dict[str, Any]) -> list[Row]:
    """The matmuls of one layer in 16 bits, with these settings of their tiles changed."""
    kept = tuning.table()
    changed = {key: entry._replace(**changes) if key[0] == name else entry for key, entry in kept.items()}
    with patch.object(tuning, "table", lambda: changed), compiling(name) as launches:
        layer(EVEN)
        return [_row(name, EVEN.type, EVEN.load, EVEN.shape, launch) for launch in launches if launch.tuned]


def _changes(words: list[str]) -> tuple[str, dict[str, Any]]:
    """What --try asks for. Refuses what it cannot."""
    name, *settings = words
    tiled = sorted(TARGETS.keys() - tuning.SAME.keys())
    if name not in tiled:
        refuse(f"--try {name} is no GPU with tiles of its own; accepted are {', '.join(tiled)}")
    changes = {}
    for word in settings:
        key, _, value = word.partition("=")
        if key not in tuning.Tile._fields or not value.isdigit():
            refuse(
                f"--try {name} {word} is no setting of a tile; accepted are {', '.join(tuning.Tile._fields)}, "
                "each =NUMBER"
            )
        changes[key] = type(tuning.table()[name, "16bit", "many", "up"]._asdict()[key])(int(value))
    return name, changes


def _inputs(name: str) -> str:
    """A digest of all that decides what a target's kernels compile to: this folder's sources and tiles (the cases and
    the targets among them), the versions of Triton and torch, and what Triton is told by the environment."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(f"{name} triton {triton.__version__} torch {torch.__version__}".encode())
    for path in (*sorted(folder.glob("*.py")), tuning.TABLE):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    told = sorted((key, value) for key, value in os.environ.items() if key.startswith("TRITON_"))
    digest.update(json.dumps(told).encode())
    return digest.hexdigest()


def cached_table(name: str, cache: Path | None) -> list[Row]:
    """`table`, kept as a file in the folder `cache`, or read from there if nothing it follows from has changed."""
    if cache is None:
        return table(name)
    path, inputs = cache / f"{name}.json", _inputs(name)
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["inputs"] == inputs:
            return [Row._make((*row, loop and Loop(*loop))) for *row, loop in kept["rows"]]
    rows = table(name)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"inputs": inputs, "rows": rows}))
    unfinished.replace(path)  # whole or not at all
    return rows


def _row(name: str, kind: str, load: str, shape: str, launch: Launch) -> Row:
    target, use, asm, metadata = TARGETS[name], _use(launch, shape), launch.kernel.asm, launch.kernel.metadata
    tile, tma = f"w{metadata.num_warps}", False
    if launch.tuned:
        tma = tuning.table()[tuning.SAME.get(name, name), kind, load, use.split("_")[0]].tma
        sizes = "x".join(str(launch.options[f"BLOCK_{axis}"]) for axis in "MNK")
        tile = f"{sizes} {tile} s{metadata.num_stages}" + " tma" * tma
    cuda = target.gpu.backend == "cuda"
    read = machine_code.nvidia(asm["cubin"], launch.tuned) if cuda else machine_code.amd(asm["amdgcn"], launch.tuned)
    columns = getattr(metadata, "tmem_size", 0)
    blocks = blocks_per_multiprocessor(target, read.registers, metadata.num_warps, metadata.shared, columns)
    counted = {key: read.instructions[key] + read.instructions[OF_8_BITS.get(key, "")] for key in INSTRUCTIONS}
    numbers = (read.registers, read.spilled, metadata.shared, blocks, counted, read.loop)
    return Row(name, use, kind, load, shape, tile, tma, *numbers)


def blocks_per_multiprocessor(target: Target, registers: int, warps: int, shared: int, columns: int = 0) -> int:
    """How many blocks of so many warps are resident at once.

    Each of the four parts deals its registers to warps in eights per lane, so 4 (512 // registers) warps fit; shared
    memory, tensor memory (512 columns) and the limits on warps and blocks divide likewise."""
    resident = min(4 * (512 // (-(-registers // 8) * 8)), target.warps)
    limits = [resident // warps, target.shared // (shared + target.reserved or 1), target.blocks]
    return min([*limits, TENSOR_COLUMNS // columns] if columns else limits)


def check(rows: list[Row]) -> list[str]:
    """What is wrong with these kernels, a sentence each."""
    wrong = []
    for row in rows:
        target = TARGETS[row.target]
        who = f"{row.use} ({row.type}, {row.load}, {row.shape}, {row.tile}) on {row.target}"
        if row.spilled:
            wrong.append(f"{who} spills {row.spilled} bytes per thread.")
        if row.shared > target.block_shared:
            wrong.append(f"{who} takes {row.shared} bytes of shared memory; a block may take {target.block_shared}.")
        if row.use.split("_")[0] in tuning.USES and row.type != "fp32" and not row.counts[target.matrix]:
            wrong.append(f"{who} has no {target.matrix} instruction.")
        if row.tma and row.shape == "even" and not row.counts["UTMALDG"]:
            wrong.append(f"{who} asks for tma and has no UTMALDG instruction.")
    return wrong


NUMBERS = ("regs", "spill", "shared", "blocks", *INSTRUCTIONS)
OF_LOOP = ("loop", "bars", "copies", "products", "outside")  # as the fields of Loop
HEADER = ("target", "use", "type", "load", "shape", "tile", *NUMBERS, *OF_LOOP)
WIDTHS = (7, 17, 6, 5, 11, 25, 5, 6, 7, 7, *(len(name) + 2 for name in (*INSTRUCTIONS, *OF_LOOP)))


def render(rows: list[Row]) -> str:
    """The table as aot.txt keeps it."""
    lines: list[tuple] = [HEADER]
    for row in rows:
        counts = [row.counts[instruction] for instruction in INSTRUCTIONS]
        # Of a loop zero is a number: it is a wait for all.
        loop = [value if value is None else str(value) for value in row.loop or [None] * len(OF_LOOP)]
        numbers = (row.registers, row.spilled, row.shared, row.blocks, *counts, *loop)
        lines.append((row.target, row.use, row.type, row.load, row.shape, row.tile, *numbers))
    body = "".join(
        "".join(str(cell or ".").ljust(width) for cell, width in zip(line, WIDTHS, strict=True)).rstrip() + "\n"
        for line in lines
    )
    return f"# triton {triton.__version__}\n{body}"


def compare(new: str, kept: str) -> tuple[list[str], str]:
    """What differs between two tables: a sentence or none, and a unified diff or a remark."""
    now, then = new.splitlines(True), kept.splitlines(True)
    if now[0] != then[0]:
        return [], f"aot.txt was written with {then[0][2:-1]}, this is {now[0][2:-1]}: the tables are not compared.\n"
    if now == then:
        return [], ""
    diff = difflib.unified_diff(then, now, "aot.txt", "now", n=0)
    return ["The table differs from aot.txt; if that is meant, keep it with --write."], "".join(diff)


def refuse(message: str) -> NoReturn:
    """One sentence on stderr in place of argparse's usage, and exit status 2."""
    unknown = message.removeprefix("unrecognized arguments: ")
    if unknown != message:
        message = (
            f"{unknown} is no option; accepted are --write, --cache FOLDER, --try GPU SETTING=NUMBER, --jobs NUMBER "
            "and --help"
        )
    print(f"error: {message}.", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    """Compile, print, check, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the table in aot.txt instead of comparing with it")
    parser.add_argument("--cache", type=Path, help="a folder: targets whose kernels have not changed are read from it")
    parser.add_argument(
        "--try", nargs="+", dest="tried", metavar="GPU SETTING=NUMBER", help="compile these tiles alone"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets that compile at the same time")
    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_args()
    if not arguments.jobs >= 1:
        refuse(f"--jobs {arguments.jobs} is out of range: accepted is at least 1")
    asked = _changes(arguments.tried) if arguments.tried else None
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: there is nothing to compile; unset it.")
    if asked:
        rows = tried(*asked)
        print(render(rows), end="")
        for sentence in (wrong := check(rows)):
            print(sentence, file=sys.stderr)
        raise SystemExit(bool(wrong))
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        tables = pool.map(partial(cached_table, cache=arguments.cache), TARGETS)
        rows = [row for target_rows in tables for row in target_rows]
    text = render(rows)
    print(text, end="")
    wrong = check(rows)
    if arguments.write:
        TABLE.write_text(text)
    else:
        changed, remark = compare(text, TABLE.read_text())
        wrong += changed
        print(remark, end="")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
