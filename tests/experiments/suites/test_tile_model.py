"""The model of tiles on cases that can be worked out by hand, and the order that follows."""

import pytest

from experiments.suites import cases, tile_model, tune
from experiments.suites.shapes import SHAPES, Shape
from experiments.suites.tile_model import Clocks, Machine, Product
from kernels import aot, tuning
from kernels.tuning import Tile
from moe.errors import BadInput
from tests.experiments.bench_command import command

TILE = Tile(128, 256, 64, 8, 1, 8, 4, True, 1)
HOPPER = tile_model.MACHINES["sm_90"]
GPU = Machine("sm_90", 10, 1024, 128, 64, 227 * 1024)  # ten multiprocessors


def test_a_step_by_hand():
    """128 x 256 x 64 products at 2048 a clock; 48 KiB that go into shared memory once, 16 + 2 x 32 KiB that come out at
    128 bytes a clock; the same 48 KiB from a cache that 132 share."""
    assert tile_model.step(TILE, "16bit", HOPPER) == Clocks(
        tensor=1024, shared=(49152 + 16384 + 65536) / 128, l2=49152 * 132 / tile_model.L2_BYTES_PER_CLOCK
    )
    half = tile_model.step(TILE._replace(block_k=32), "tf32", HOPPER)  # half the width of twice the bytes
    assert half == tile_model.step(TILE, "16bit", HOPPER)


def test_warps_that_take_operands_through_registers_read_in_the_best_grid():
    registers = tile_model.MACHINES["sm_80"]
    assert tile_model.read_back(TILE._replace(num_warps=8), registers) == 128 * 4 + 256 * 2 == 256 * 2 + 128 * 4
    assert tile_model.read_back(TILE._replace(block_m=64, block_n=64, num_warps=4), registers) == 64 * 2 + 64 * 2
    assert tile_model.read_back(TILE, HOPPER) == 128 + 2 * 256
    assert tile_model.read_back(TILE, tile_model.MACHINES["sm_100"]) == 128 + 256


@pytest.mark.parametrize(
    ("faster", "bound"), [({"shared": 10**9, "multiprocessors": 1}, "tensor"), ({"multiprocessors": 1}, "shared"),
                          ({"products": 10**9, "shared": 10**9}, "l2")],
)  # fmt: skip
def test_the_longest_of_three_is_what_a_step_takes(faster, bound):
    gpu = HOPPER._replace(**({"products": 4096} if bound == "shared" else {}) | faster)
    step = tile_model.step(TILE, "16bit", gpu)
    assert getattr(step, bound) == max(step)
    shape = Shape(1280, 640, 640, 1, 1)  # down: 10 x 3 tiles (2.5 columns of them) of 10 steps
    turns = -(-30 // gpu.multiprocessors)
    want = turns * (10 * getattr(step, bound) + tile_model.LAUNCH_CLOCKS)
    assert tile_model.clocks(TILE, "down", "16bit", shape, gpu) == pytest.approx(want)


def test_the_busiest_multiprocessor_counts_and_the_last_tile_is_a_whole_one():
    one = tile_model.clocks(TILE, "down", "16bit", Shape(128, 256, 64, 1, 1), GPU)
    assert tile_model.clocks(TILE, "down", "16bit", Shape(1280, 256, 64, 1, 1), GPU) == one
    assert tile_model.clocks(TILE, "down", "16bit", Shape(1281, 256, 64, 1, 1), GPU) == 2 * one
    assert tile_model.clocks(TILE, "down", "16bit", Shape(1, 1, 1, 1, 1), GPU) == one
    assert tile_model.clocks(TILE, "down", "16bit", Shape(1280, 256, 64, 10, 1), GPU) == one, "one tile an expert"


def test_two_blocks_of_a_multiprocessor_halve_the_fixed_cost_if_they_fit():
    small = TILE._replace(block_n=64, num_stages=2)
    assert tile_model.resident(small._replace(per_sm=2), "up", "16bit", HOPPER) == 2
    assert tile_model.resident(TILE._replace(per_sm=2), "up", "16bit", HOPPER) == 1, "no room"
    assert tile_model.resident(small._replace(per_sm=0), "up", "16bit", HOPPER) == 1
    shape = Shape(128, 64, 64, 1, 1)
    one, two = (tile_model.clocks(small._replace(per_sm=per_sm), "down", "16bit", shape, HOPPER) for per_sm in (1, 2))
    assert one - two == tile_model.LAUNCH_CLOCKS / 2


def test_the_products_of_all_uses_have_the_layers_flops():
    for shape in SHAPES.values():
        flops = {
            use: 2 * shape.E * sum(m * n * k for m, n, k in tile_model.products(use, shape)) for use in tuning.USES
        }
        forward = 6 * shape.T * shape.K * shape.F * shape.D
        assert flops["up"] + flops["down"] == forward
        assert flops["dh"] + flops["dx"] == flops["wgrad"] == forward
    assert tile_model.products("wgrad", Shape(64, 32, 16, 4, 2)) == [Product(32, 16, 32), Product(32, 32, 32)]


@pytest.mark.parametrize("arch", [*tile_model.MACHINES, "sm_120"])
def test_a_ranking_is_in_order_tells_tiles_apart_and_has_the_present_one(arch):
    for use in tuning.USES:
        rows = list(tile_model.ranking(use, "16bit", SHAPES["olmoe"], arch))
        cost = [row["clocks_over_present"] for row in rows]
        assert cost == sorted(cost)
        assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
        (present,) = [row for row in rows if row["present"]]
        assert present["clocks_over_present"] == 1
        assert Tile(**present["tile"]) == tuning.table()[tuning.SAME.get(arch, arch), "16bit", "many", use]
        gpu = tile_model.machine(arch)
        assert all(
            tune.fits(Tile(**row["tile"]), use, 2, gpu.block_shared, gpu.arch) and row["bound"] in Clocks._fields
            for row in rows
        )


def test_machines_are_those_that_have_tiles_and_their_blocks_have_the_memory_that_compilers_are_held_to():
    assert set(tile_model.MACHINES) == {arch for arch, *_ in tuning.table()} - {"interpreter"}
    for name, gpu in tile_model.MACHINES.items():
        assert gpu.block_shared == aot.TARGETS[name].block_shared
    with pytest.raises(BadInput, match=r"arch=sm_70 is not one of sm_80, .*gfx950"):
        tile_model.machine("sm_70")


def test_the_command_prints_an_order_and_no_rate(monkeypatch, tmp_path, capsys):
    out = tmp_path / "tiles.jsonl"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command(monkeypatch, "suite=tune", "modelled=true", "arch=sm_89", "shape=small", f"out={out}")
    printed = capsys.readouterr().out
    assert "A model: the order and the ratios are what it says; nothing was measured." in printed
    assert "TF" not in printed
    rows = cases.read(out)
    assert {row["use"] for row in rows} == set(tuning.USES)
    assert all(row["status"] == "modelled" and row["shape"] == SHAPES["small"]._asdict() for row in rows)
    for row in rows:
        assert (tune.short(Tile(**row["tile"])) in printed) or row["rank"] > tile_model.SHOWN


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["suite=tune", "arch=h100"], "arch=h100 is not one of sm_80"),
        (["suite=layer"], "modelled=true means nothing to suite=layer"),
        (["suite=tune", "shape=large"], "shape has 'large'; accepted are olmoe, mixtral, fine, qwen3, small."),
    ],
)
def test_what_has_no_model_is_refused(given, words, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "modelled=true", *given)
    assert words in capsys.readouterr().err
