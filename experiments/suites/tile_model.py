"""A model of what a tile costs, in clocks: it orders tiles for a GPU that is not at hand, and measures nothing.

A step of k takes the longest of three: the tensor cores' clocks for its products, shared memory's for what is written
there and read back, and the L2 cache's for the operands, when all multiprocessors read at once. A tile takes its steps
and a fixed cost, which other blocks of the multiprocessor overlap; the busiest multiprocessor's tiles are the whole.
Loads of the experts are taken as even, the activation as swiglu.

It sees a tile's three sizes, its warps and how many blocks share a multiprocessor; stages, slices and the order in
which tiles are taken it does not see: of tiles that differ in these alone the one nearest to the present tile stands
for all. Only orders and ratios of clocks mean anything.

    python -m experiments.bench suite=tune modelled=true arch=sm_90 shape=olmoe    # on any machine

Letters: m and n are the rows and columns of one expert's product, k the width it is summed over.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from experiments.pages import tables
from experiments.suites import tune
from experiments.suites.shapes import Shape
from kernels import tuning
from kernels.tuning import Tile
from moe.errors import BadInput

# Assumptions, the same for every GPU, until a GPU says better: what a calibration has to set.
L2_BYTES_PER_CLOCK = 5120  # that the L2 cache gives to all multiprocessors together
LAUNCH_CLOCKS = 7000  # before a tile's first product and after its last: filling the pipeline, epilogue, store

KINDS = ("16bit", "tf32")  # what tensor cores multiply
HEADINGS = ("use", "rank", "tile", "tensor", "shared", "L2", "bound by", "steps", "tiles", "clocks", "present")
SHOWN = 4  # tiles of a use in the table, beside the present one


class Machine(NamedTuple):
    """What a multiprocessor does per clock, as its maker states."""

    arch: str
    multiprocessors: int
    products: int  # multiply-adds of 16 bits, summed in float32; tf32 has half of them
    shared: int  # bytes of shared memory, read and written
    rows: int  # of a tile that one matrix instruction reads from shared memory; 0: operands come through registers
    block_shared: int  # bytes that a block may take
    registers: int = 65536  # or the words of the memory that holds sums


KIB = 1024
MACHINES = {
    gpu.arch: gpu
    for gpu in (
        Machine("sm_80", 108, 1024, 128, 0, 163 * KIB),  # A100
        Machine("sm_86", 84, 512, 128, 0, 99 * KIB),  # A40
        Machine("sm_90", 132, 2048, 128, 64, 227 * KIB),  # H100 SXM
        Machine("sm_100", 148, 4096, 128, 128, 227 * KIB),  # B200
        Machine("gfx942", 304, 1024, 128, 0, 64 * KIB, 131072),  # MI300X
    )
}


class Product(NamedTuple):
    """A matmul that every expert does."""

    m: int
    n: int
    k: int


class Clocks(NamedTuple):
    """What a step of k keeps busy, and for how long."""

    tensor: float
    shared: float
    l2: float


def machine(arch: str) -> Machine:
    """The machine of an architecture's name, or of the one whose tiles it takes. Raises `BadInput`."""
    if (name := tuning.SAME.get(arch, arch)) not in MACHINES:
        raise BadInput(f"arch={arch} is not one of {', '.join((*MACHINES, *tuning.SAME))}.")
    return MACHINES[name]


def products(use: str, shape: Shape) -> list[Product]:
    """What an expert multiplies in one use, its rows being its even share."""
    rows = math.ceil(shape.T * shape.K / shape.E)
    d, f = shape.D, shape.F
    return {
        "up": [Product(rows, 2 * f, d)],
        "down": [Product(rows, d, f)],
        "dh": [Product(rows, f, d)],
        "dx": [Product(rows, d, 2 * f)],
        "wgrad": [Product(d, f, rows), Product(2 * f, d, rows)],
    }[use]


def step(tile: Tile, kind: str, gpu: Machine) -> Clocks:
    """Clocks of one step of k, of element type `kind` (one of KINDS)."""
    itemsize, rate = (2, gpu.products) if kind == "16bit" else (4, gpu.products / 2)
    loaded = (tile.block_m + tile.block_n) * tile.block_k * itemsize
    read = read_back(tile, gpu) * tile.block_k * itemsize
    return Clocks(
        tensor=tile.block_m * tile.block_n * tile.block_k / rate,
        shared=(loaded + read) / gpu.shared,
        l2=loaded * gpu.multiprocessors / L2_BYTES_PER_CLOCK,
    )


def read_back(tile: Tile, gpu: Machine) -> int:
    """Rows and columns that are read from shared memory in a step. An instruction that reads there itself reads a's
    rows once, and all of b for every `gpu.rows` of them. Else a warp reads what its part of the tile needs: the parts
    lie in the grid of warps that reads the least."""
    if gpu.rows:
        return tile.block_m + math.ceil(tile.block_m / gpu.rows) * tile.block_n
    grids = [(down, tile.num_warps // down) for down in (1, 2, 4, 8, 16) if tile.num_warps % down == 0]
    return min(tile.block_m * across + tile.block_n * down for down, across in grids)


def clocks(tile: Tile, use: str, kind: str, shape: Shape, gpu: Machine) -> float:
    """Clocks of one use of a layer: of the multiprocessor with the most tiles."""
    longest, cost = max(step(tile, kind, gpu)), LAUNCH_CLOCKS / resident(tile, use, kind, gpu)
    total = 0.0
    for product in products(use, shape):
        turns = math.ceil(n_tiles(tile, product) * shape.E / gpu.multiprocessors)
        total += turns * (math.ceil(product.k / tile.block_k) * longest + cost)
    return total


def resident(tile: Tile, use: str, kind: str, gpu: Machine) -> int:
    """Blocks that share a multiprocessor: those that the tile asks for, as far as shared memory holds their operands
    and half of the registers their sums."""
    operands = tune.shared_bytes(tile, use, 2 if kind == "16bit" else 4, gpu.arch)
    room = min(gpu.block_shared // operands, gpu.registers // (2 * tile.block_m * tile.block_n))
    return max(1, min(tile.per_sm, room))


def n_tiles(tile: Tile, product: Product) -> int:
    """Tiles of one expert."""
    return math.ceil(product.m / tile.block_m) * math.ceil(product.n / tile.block_n)


def ranking(use: str, kind: str, shape: Shape, arch: str) -> Iterator[dict[str, Any]]:
    """Rows of a use's tiles, the fewest clocks first: of the tuner's candidates those that the model tells apart.
    Raises `BadInput` for an architecture that it does not know."""
    # Candidates in the tuner's order, so that the nearest to the present tile stands for those that are alike.
    gpu, device = machine(arch), torch.device("cpu")
    load = "few" if shape.T * shape.K < tuning.FEW * shape.E else "many"
    alike: dict[tuple[int, ...], list[Tile]] = {}
    with tuning.target(tuning.SAME.get(arch, arch)):
        present = tune.present(device, use, kind, load)
        for changed in range(3):
            for tile in tune.candidates(device, use, kind, load, changed, gpu.block_shared):
                warps, blocks = 0 if gpu.rows else tile.num_warps, resident(tile, use, kind, gpu)
                seen = (tile.block_m, tile.block_n, tile.block_k, warps, blocks)
                alike.setdefault(seen, []).append(tile)

    # Their clocks, and what each is bound by.
    whole = clocks(present, use, kind, shape, gpu)
    tiles = [(clocks(same[0], use, kind, shape, gpu), same) for same in alike.values()]
    for rank, (total, same) in enumerate(sorted(tiles, key=lambda pair: pair[0]), 1):
        of_step, wanted = step(same[0], kind, gpu), products(use, shape)
        yield {
            "suite": "tune", "status": "modelled", "arch": arch, "type": kind, "load": load, "use": use,
            "shape": shape._asdict(), "rank": rank, "tile": same[0]._asdict(), "alike": len(same),
            "step": of_step._asdict(), "bound": max(of_step._fields, key=lambda name: getattr(of_step, name)),
            "steps": [math.ceil(product.k / same[0].block_k) for product in wanted],
            "tiles": [n_tiles(same[0], product) * shape.E for product in wanted],
            "clocks_over_present": total / whole, "present": same[0] == present,
        }  # fmt: skip


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the table has room for: the first of every use, and the present tile."""
    return [row for row in rows if row["rank"] <= SHOWN or row["present"]]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row: clocks of a step, steps and tiles of each product, clocks of all against the
    present tile's."""
    joined = lambda name: " + ".join(f"{number:,}" for number in row[name])
    step_clocks = (tables.number(row["step"][name], ",.0f") for name in Clocks._fields)
    head = row["use"], str(row["rank"]), tune.short(Tile(**row["tile"])), *step_clocks, row["bound"]
    rest = f"{row['clocks_over_present']:.2f}×", "yes" if row["present"] else ""
    return *head, joined("steps"), joined("tiles"), *rest
