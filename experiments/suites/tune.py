"""Suite tune: time candidate tiles of the matmul kernels on this GPU, in the form of kernels/tuning.jsonl.

Candidates are the tile of the present table, then tiles with one setting a step away and those of TOGETHER, then, for
16 bits, with two that trade the same resource; those that cannot fit in shared memory or registers are never made. A
candidate that does not compile, spills, or gives another result is counted and not timed. `up`, `down`, `dh` and `dx`
walk over one schedule, so the best height of its tiles is the one whose four best times have the smallest sum. Repeat
it on its own result to go on.

    python -m experiments.bench suite=tune                 # on a GPU: a row per candidate -> runs/bench
    python -m experiments.bench suite=tune shape=small     # the same on other widths than OLMoE's
    python -m experiments.gpu_evidence --out DIR --stage tune    # the same rows -> DIR/gpu-tune.jsonl

Either puts the best tiles beside its rows, in tuning-<architecture>.jsonl.
"""

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.pages import tables
from experiments.suites import timing
from experiments.suites.cases import Case, Wrong
from experiments.suites.shapes import SHAPES, Shape
from kernels import tuning
from kernels.tuning import Tile
from moe.run.jsonl import write_lines

HEADINGS = ("use", "type", "load", "tile", "µs", "over the present")
CHANGES = ("use", "type", "load", "present tile", "µs", "best tile", "µs", "is")
GAIN = 1.02  # a tile that is less than this much faster than the present one changes nothing

# What each setting may be; a candidate takes the next smaller or larger value.
VALUES: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128),
    "num_stages": (1, 2, 3, 4, 5, 6, 7, 8),
    "num_warps": (4, 8),
    "parts": (1, 2, 4, 8, 16),
    "group_m": (1, 4, 8, 16),
    "tma": (False, True),
    "per_sm": (0, 1, 2, 3),
    "flatten": (False, True),
    "ragged": (False, True),
    "gluon": (False, True),
}
# Changes that are tried at once, because a step of them spills, does not run or gains little; keys as tuning.table's.
TOGETHER: dict[tuple[str, str, str, str], tuple[dict[str, Any], ...]] = {
    ("sm_90", "16bit", "many", "dh"): (
        dict(block_n=256, parts=16, gluon=True),  # as wide as the other uses' tiles
        dict(parts=16, num_warps=4, num_stages=3, per_sm=2),  # two programs, each of which writes while the other sums
    ),
    ("sm_90", "16bit", "few", "up"): (dict(num_warps=4, gluon=True),),  # each multiplying warp takes 16 rows
    ("sm_90", "16bit", "few", "dh"): (dict(num_warps=4, gluon=True),),
}
TRADED = ("block_m", "block_n", "block_k", "num_stages", "num_warps")  # shared memory and registers for one another
SAME = 3e-2  # relative error between two tiles' results: rounding to 16 bits, or another order of sums


class Spilled(RuntimeError):
    """A candidate whose registers do not fit."""


@dataclass
class Settings:
    """What the suite goes through: the sizes that stand for each load, as kernels/tuning.py names them."""

    device: torch.device
    shapes: dict[str, Shape]
    types: Sequence[str] = ("16bit", "tf32", "fp32")
    changed: int = 2  # settings that a candidate has different, at most
    workers: int = 0  # processes that compile ahead
    rounds: int = 3
    seconds: float = 0.03
    kept: Callable[[dict[str, Any]], Any] = lambda key: None  # the row of a key, where it need not be made again
    until: float = math.inf  # on the monotonic clock: a minute before, nothing is compiled ahead any more


def settings(device: torch.device, full: bool, rounds: int = 3, **given: Any) -> Settings:
    """OLMoE's widths at two loads, or what the interpreter does in seconds, with what is `given`: `shapes` too."""
    if not full:
        shapes = {"many": Shape(128, 32, 32, 1, 1), "few": Shape(8, 32, 32, 2, 1)}
        return Settings(device, shapes, ("16bit",), changed=0, rounds=1, seconds=0.0, **given)
    return Settings(device, given.pop("shapes", None) or loads(SHAPES["olmoe"]), workers=8, rounds=rounds, **given)


def loads(shape: Shape) -> dict[str, Shape]:
    """A layer's sizes at its own number of tokens and at half the rows per expert below which they are few."""
    return {"many": shape, "few": shape._replace(T=max(1, tuning.FEW * shape.E // (2 * shape.K)))}


def cases(settings: Settings) -> Iterator[Case]:
    """By importance: the present tiles, one change, two changes; within each, types and loads in order. fp32 has no
    tensor cores to keep busy: a quarter of the rows will do."""
    limit = shared_memory(settings.device)
    groups = itertools.product(range(settings.changed + 1), settings.types, settings.shapes.items())
    for changed, kind, (load, shape) in groups:
        if changed == 2 and kind != "16bit":
            continue
        shape = shape._replace(T=max(1, shape.T // 4)) if kind == "fp32" and load == "many" else shape
        bench = Bench(settings, kind, load, shape)
        key_of = {
            (use, tile): _key(settings, use, kind, load, tile)
            for use in tuning.USES
            for tile in candidates(settings.device, use, kind, load, changed, limit)
        }
        compile_ahead(settings, kind, shape, [candidate for candidate, key in key_of.items() if not settings.kept(key)])
        for (use, tile), key in key_of.items():
            yield Case(key, functools.partial(bench.measure, use, tile))


def _key(settings: Settings, use: str, kind: str, load: str, tile: Tile) -> dict[str, Any]:
    arch = tuning.architecture(settings.device)
    return {"suite": "tune", "arch": arch, "type": kind, "load": load, "use": use, "tile": tile._asdict()}


def present(device: torch.device, use: str, kind: str, load: str) -> Tile:
    """The tile in kernels/tuning.jsonl."""
    return tuning.table()[tuning.architecture(device), kind, load, use]


def candidates(device: torch.device, use: str, kind: str, load: str, changed: int, limit: int) -> list[Tile]:
    """Tiles that are `changed` settings away from the present one, each by a step, and may fit; with those of one
    change, what is tried together."""
    base, itemsize, arch = present(device, use, kind, load), 2 if kind == "16bit" else 4, tuning.architecture(device)
    tiles = []
    for names in itertools.combinations(VALUES if changed < 2 else TRADED, changed):
        for values in itertools.product(*(_neighbours(name, getattr(base, name)) for name in names)):
            tiles.append(base._replace(**dict(zip(names, values, strict=True))))
    if changed == 1:
        tiles += [base._replace(**together) for together in TOGETHER.get((arch, kind, load, use), ())]
    return [tile for tile in tiles if (tile != base or not changed) and fits(tile, use, itemsize, limit, arch)]


def _neighbours(name: str, value: Any) -> list[Any]:
    """The next smaller and the next larger value."""
    smaller = [other for other in VALUES[name] if other < value]
    larger = [other for other in VALUES[name] if other > value]
    return smaller[-1:] + larger[:1]


def fits(tile: Tile, use: str, itemsize: int, limit: int, arch: str) -> bool:
    """Whether a tile may work: operands in flight within shared memory, at most 128 registers of sums per thread,
    slices of at least 16 columns (8 of dh's), the copy engine where there is one, and settings that a kernel reads."""
    shared = shared_bytes(tile, use, itemsize, arch)
    sums = tile.block_m * tile.block_n / (32 * tile.num_warps)
    narrowest = 8 if use == "dh" and not tile.gluon else 16
    if shared > limit or sums > 128 or sums < 4 or tile.block_n // tile.parts < narrowest:
        return False
    hopper = arch.startswith("sm_") and int(arch[3:]) >= 90
    if tile.tma and not hopper:
        return False
    if tile.ragged and not (hopper and use in ("down", "dx", "wgrad")):
        return False
    if tile.flatten and (use == "wgrad" or not tile.per_sm):
        return False
    if tile.gluon and ((arch, itemsize, tile.tma) != ("sm_90", 2, True) or use not in ("up", "dh")):
        return False
    if tile.gluon and tile.block_m % (16 * tile.num_warps):
        return False
    # The weight gradient's kernel has one program per tile, no slices, and its own use of the copy engine.
    return use != "wgrad" or (tile.parts, tile.per_sm, tile.tma) == (1, 0, False)


def shared_bytes(tile: Tile, use: str, itemsize: int, arch: str) -> int:
    """Bytes of shared memory that a tile's operands in flight take, as kernels/aot.txt has them.

    One stage needs none, but where matrix instructions read shared memory while the next operands arrive. The weight
    gradient loads where its rows lie before it loads them: a stage each."""
    ahead = (tile.num_stages - 1) // 2 if use == "wgrad" else tile.num_stages - 1
    read_there = arch in ("sm_90", "sm_100") and itemsize == 2
    stages = max(1, ahead) + read_there
    return stages * tile.block_k * (tile.block_m + tile.block_n) * itemsize


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may take; without a GPU, Hopper's."""
    if device.type != "cuda":
        return 227 * 1024
    from triton.runtime import driver  # here, because Triton is not everywhere

    return driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


class Bench:
    """Operands of all uses at one size and type, and what is timed on them."""

    def __init__(self, settings: Settings, kind: str, load: str, shape: Shape) -> None:
        self.settings, self.kind, self.load, self.shape = settings, kind, load, shape
        self.dtype = torch.bfloat16 if kind == "16bit" else torch.float32
        self.plans: dict[int, Any] = {}
        self.wanted: dict[str, tuple[Tensor, ...]] = {}

    @functools.cached_property
    def operands(self) -> dict[str, Tensor]:
        """Random, of unit scale; rows that no kernel has written yet are random too."""
        (t, d, f, e, k), device = self.shape, self.settings.device
        torch.manual_seed(0)
        draw = lambda *shape, scale=1.0: torch.randn(*shape, device=device, dtype=self.dtype) * scale
        return {
            "x": draw(t, d), "dout": draw(t, d), "w_up": draw(e, 2 * f, d, scale=d**-0.5),
            "w_down": draw(e, d, f, scale=f**-0.5), "z": draw(t * k, 2 * f), "dz": draw(t * k, 2 * f),
            "h": draw(t * k, f), "weight": torch.rand(t * k, device=device),
            "expert": torch.randn(t, e, device=device).topk(k).indices,
        }  # fmt: skip

    def plan(self, block_m: int) -> Any:
        """The plan for tiles of this height."""
        from kernels.plan import plan  # here, because Triton is not everywhere

        if block_m not in self.plans:
            self.plans[block_m] = plan(self.operands["expert"], None, self.shape.E, block_m)
        return self.plans[block_m]

    def call(self, use: str, tile: Tile) -> tuple[Tensor, ...]:
        """One use with this tile."""
        from kernels import ragged_mm
        from kernels.ragged_wgrad import ragged_wgrad

        o, tf32, e = self.operands, self.kind == "tf32", self.shape.E
        where = self.plan(tile.block_m if use != "wgrad" else 128)
        match use:
            case "up":
                return ragged_mm.up(o["x"], o["w_up"], where, "swiglu", tile, tf32)
            case "down":
                return (ragged_mm.down(o["h"], o["w_down"], where, tile, tf32),)
            case "dh":
                return ragged_mm.dh(o["dout"], o["w_down"], o["z"], o["weight"], where, "swiglu", tile, tf32)
            case "dx":
                return (ragged_mm.dx(o["dz"], o["w_up"], where, tile, tf32),)
        down = ragged_wgrad(o["dout"], o["h"], where, True, e, tile, tf32)
        return down, ragged_wgrad(o["dz"], o["x"], where, False, e, tile, tf32)

    def measure(self, use: str, tile: Tile) -> dict[str, Any]:
        """One row. Raises `Spilled` and `Wrong`."""
        now = present(self.settings.device, use, self.kind, self.load)
        if use not in self.wanted:
            self.wanted[use] = self.call(use, now)
        with compiled() as new:
            got = self.call(use, tile)
        if spills := max((kernel.n_spills or 0 for kernel in new), default=0):
            raise Spilled(f"{spills} words per thread")
        for a, b in zip(got, self.wanted[use], strict=True):
            if not (error := timing.relative_error(a, b)) <= SAME:
                raise Wrong(f"differs from the present tile's by {error:.2g}")
        del got
        functions = {"this": lambda: self.call(use, tile), "present": lambda: self.call(use, now)}
        median = timing.medians(functions, self.settings.device, self.settings.rounds, self.settings.seconds)
        us = {name: 1e6 * seconds for name, seconds in median.items()}
        return {"us": us["this"], "present_us": us["present"], "present": tile == now, "shape": self.shape._asdict()}


@contextmanager
def compiled() -> Iterator[list[Any]]:
    """Inside, the matmul kernels that Triton makes ready for a launch; its interpreter makes none."""
    before, new = {id(kernel) for kernel in _ready()}, list[Any]()
    yield new
    new += [kernel for kernel in _ready() if id(kernel) not in before]


def _ready() -> list[Any]:
    from kernels.hopper import _specialized_mm
    from kernels.ragged_mm import _ragged_mm
    from kernels.ragged_wgrad import _ragged_wgrad

    caches = [getattr(kernel, "device_caches", {}) for kernel in (_ragged_mm, _specialized_mm, _ragged_wgrad)]
    return [kernel for cache in caches for entry in cache.values() for kernel in entry[0].values()]


def compile_ahead(settings: Settings, kind: str, shape: Shape, todo: Sequence[tuple[str, Tile]]) -> None:
    """Compile candidates in processes of their own, into Triton's cache on disk: they are read from there when timed.
    What fails there fails again here, and is counted here."""
    if not settings.workers or not todo or time.monotonic() > settings.until - 60:
        return
    few = shape._replace(T=16, E=2, K=1)  # the same widths: the same kernels
    job = functools.partial(_compile, str(settings.device), kind, few)
    try:
        with ProcessPoolExecutor(min(settings.workers, len(todo)), mp_context=get_context("spawn")) as pool:
            list(pool.map(job, todo))
    except BrokenProcessPool:
        print("compiling ahead stopped: a candidate ended its process; the rest is compiled one by one", flush=True)


def _compile(device: str, kind: str, shape: Shape, candidate: tuple[str, Tile]) -> str:
    """Run one candidate on few rows; what it raises comes back as words."""
    try:
        Bench(Settings(torch.device(device), {}), kind, "", shape).call(*candidate)
    except Exception as error:
        return type(error).__name__
    return ""


def name(device: torch.device) -> str:
    """The file that the best tiles are written to."""
    return f"tuning-{tuning.architecture(device)}.jsonl"


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the form of kernels/tuning.jsonl, with the tile's time and the present one's in the same turns: the best
    tile of every use, at one height per type and load for all but wgrad. A type and load of which a use was not
    measured is left out."""
    entries = []
    timed = [row for row in rows if row["status"] == "measured"]
    for arch, kind, load in dict.fromkeys((row["arch"], row["type"], row["load"]) for row in timed):
        mine = [row for row in timed if (row["arch"], row["type"], row["load"]) == (arch, kind, load)]
        fastest: dict[tuple[str, int], dict[str, Any]] = {}
        for row in sorted(mine, key=lambda row: -row["us"]):
            fastest[row["use"], row["tile"]["block_m"] if row["use"] != "wgrad" else 0] = row
        uses = [use for use in tuning.USES if use != "wgrad"]
        heights = {height for use, height in fastest if use != "wgrad"}
        whole = [height for height in heights if all((use, height) in fastest for use in uses)]
        chosen = []
        if whole:
            height = min(whole, key=lambda height: sum(fastest[use, height]["us"] for use in uses))
            chosen = [fastest[use, height] for use in uses]
        chosen += [fastest["wgrad", 0]] if ("wgrad", 0) in fastest else []
        for row in chosen:
            entries.append({key: row[key] for key in ("arch", "type", "load", "use", "tile", "us", "present_us")})
    return entries


def conclude(rows: Sequence[dict[str, Any]], device: torch.device, path: Path) -> None:
    """Write the best tiles to `path`, print what would change against the present table, and count what was skipped."""
    chosen = best(rows)
    write_lines(path, chosen)
    changes = []
    for row in chosen:
        gain, old = row["present_us"] / row["us"], present(device, row["use"], row["type"], row["load"])
        if row["tile"] != old._asdict() and gain >= GAIN:
            names, tiles = (row["use"], row["type"], row["load"]), (short(old), short(Tile(**row["tile"])))
            changes.append(
                (*names, tiles[0], f"{row['present_us']:,.1f}", tiles[1], f"{row['us']:,.1f}", f"{gain:.2f}×")
            )
    if changes:
        tables.print_table(CHANGES, changes)
    else:
        print("Nothing is faster than the present table by 2% or more.")
    count = Counter(row["status"] for row in rows)
    spilled = sum(row["status"] == "failed" and row["error"].startswith("Spilled") for row in rows)
    print(
        f"{count['measured']} tiles timed; skipped: {count['failed'] - spilled} did not compile or run, "
        f"{spilled} spill, {count['wrong']} give another result, {count['left out']} for want of time. "
        f"Best tiles: {path.name}"
    )


def short(tile: Tile) -> str:
    """A tile in a few characters, as kernels/aot.txt writes it."""
    words = [f"{tile.block_m}x{tile.block_n}x{tile.block_k}", f"w{tile.num_warps}", f"s{tile.num_stages}"]
    words += [f"g{tile.group_m}", f"p{tile.parts}", f"per_sm{tile.per_sm}"]
    return " ".join(
        words + ["tma"] * tile.tma + [name for name in ("flatten", "ragged", "gluon") if getattr(tile, name)]
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row."""
    head = row["use"], row["type"], row["load"], short(Tile(**row["tile"]))
    if row["status"] != "measured":
        return *head, row["status"], row["error"][:60]
    return *head, f"{row['us']:,.1f}", "present" if row["present"] else f"{row['present_us'] / row['us']:.2f}×"
