"""Claims about the table of tiles and how one is looked up."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from kernels import tuning

GPUS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def _properties(monkeypatch, hip=None, **properties):
    """Pretend that the machine has one GPU, with these properties."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.version, "hip", hip)


def _up(dtype=torch.bfloat16, tf32=False, rows=4096, device=CPU):
    return tuning.tile("up", device, dtype, tf32, rows, 64)


def test_every_gpu_type_load_and_use_has_a_tile_and_nothing_else_does():
    assert set(tuning.table()) == set(product((*GPUS, "interpreter"), tuning.TYPES, tuning.LOADS, tuning.USES))
    assert len(tuning.table()) == len(tuning.TABLE.read_text().splitlines())  # no key twice


def test_the_uses_that_walk_over_one_schedule_have_tiles_of_one_height():
    for arch, kind, load in product((*GPUS, "interpreter"), tuning.TYPES, tuning.LOADS):
        heights = {tuning.table()[arch, kind, load, use].block_m for use in tuning.USES if use != "wgrad"}
        assert len(heights) == 1, f"{arch} {kind} {load}: {heights}"


@pytest.mark.parametrize("key", tuning.table(), ids="-".join)
def test_a_tile_is_one_that_triton_takes(key):
    tile = tuning.table()[key]
    for size in (tile.block_m, tile.block_n, tile.block_k, tile.parts, tile.num_warps):
        assert size.bit_count() == 1
    assert min(tile.block_m, tile.block_n, tile.block_k) >= 16
    assert tile.block_n // tile.parts >= (8 if key[3] == "dh" and not tile.gluon else 16)
    assert min(tile.group_m, tile.num_stages) >= 1
    assert tile.per_sm >= 0
    assert not tile.tma or key[0] in ("sm_90", "sm_100")  # the others have no such engine
    assert not tile.gluon or (*key[:2], key[3]) in (("sm_90", "16bit", use) for use in ("up", "dh"))


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "sm_90"), ((8, 9), "sm_86"), ((12, 0), "sm_86")])
def test_a_gpu_takes_its_own_tiles_or_those_of_one_like_it(monkeypatch, capability, name):
    _properties(monkeypatch, major=capability[0], minor=capability[1])
    assert tuning.architecture(GPU) == name
    assert _up(device=GPU) == tuning.table()[name, "16bit", "many", "up"]


@pytest.mark.parametrize("name", ["gfx942:sramecc+:xnack-", "gfx90a:sramecc+:xnack-"])
def test_an_amd_gpu_is_known_by_its_name_without_features(monkeypatch, name):
    _properties(monkeypatch, hip="6.4", gcnArchName=name)
    assert tuning.architecture(GPU) == "gfx942"


def test_whatever_is_said_to_be_alike_has_tiles():
    assert set(tuning.SAME.values()) <= set(GPUS)
    assert not set(tuning.SAME) & set(GPUS)


def test_an_unknown_gpu_is_refused_in_one_sentence_that_names_the_known_ones():
    said = pytest.raises(ValueError, match=r"has no tiles for sm_70; .*sm_90.* Use dispatch=torch\.")
    with tuning.target("sm_70"), said:
        _up()


def test_few_rows_are_fewer_than_64_an_expert_on_average():
    for rows, load in ((0, "few"), (64 * 64 - 1, "few"), (64 * 64, "many"), (2**31, "many")):
        with tuning.target("sm_90"):
            assert _up(rows=rows) == tuning.table()["sm_90", "16bit", load, "up"]


def test_the_element_type_chooses_the_row_and_tf32_speaks_of_float32_alone():
    kinds = [
        (torch.bfloat16, False, "16bit"), (torch.float16, True, "16bit"), (torch.float32, False, "fp32"),
        (torch.float32, True, "tf32"), (torch.float64, True, "fp32"),
    ]  # fmt: skip
    with tuning.target("sm_90"):
        for dtype, tf32, kind in kinds:
            assert _up(dtype, tf32) == tuning.table()["sm_90", kind, "many", "up"], f"{dtype}, tf32={tf32}"


def test_the_schedules_block_is_the_tiles():
    for name in GPUS:
        with tuning.target(name):
            assert tuning.block_m(CPU, torch.bfloat16, False, 2**20, 64) == _up(rows=2**20).block_m


def test_a_target_ends_with_its_block_and_nests():
    assert tuning.architecture(CPU) == "interpreter"
    with tuning.target("sm_90"):
        with tuning.target("sm_80"):
            assert tuning.architecture(CPU) == "sm_80"
        assert tuning.architecture(CPU) == "sm_90"
        with pytest.raises(KeyError), tuning.target("gfx942"):
            raise KeyError
        assert tuning.architecture(CPU) == "sm_90"
    assert tuning.architecture(CPU) == "interpreter"


def test_a_persistent_tile_starts_so_many_programs_a_multiprocessor_and_another_has_no_limit(monkeypatch):
    tuning.multiprocessors.cache_clear()
    _properties(monkeypatch, multi_processor_count=132)
    tile = tuning.table()["sm_90", "16bit", "many", "up"]
    assert tuning.programs(GPU, tile._replace(per_sm=2)) == 264
    assert tuning.programs(GPU, tile._replace(per_sm=0)) >= 2**31 - 1
    assert tuning.programs(CPU, tile._replace(per_sm=2)) == 2
    tuning.multiprocessors.cache_clear()


def test_sizes_that_need_masks_take_the_tiles_of_a_light_load():
    for width, d, even in ((2048, 2048, True), (2816, 576, True), (2048, 100, False), (104, 2048, False)):
        assert tuning.is_even(torch.empty(4, width, d, device="meta")) == even, f"2F={width} D={d}"
    with tuning.target("sm_90"):
        tile = tuning.tile("dh", CPU, torch.bfloat16, False, 2**20, 64, even=False)
        assert tile == tuning.table()["sm_90", "16bit", "few", "dh"]
        height = tuning.block_m(CPU, torch.bfloat16, False, 2**20, 64, even=False)
        assert height == tile.block_m


def test_tf32_is_a_permission_that_a_gpu_without_it_does_not_use():
    for name in ("gfx90a", "gfx950"):
        with tuning.target(name):
            assert [tuning.precision(CPU, tf32) for tf32 in (True, False)] == ["ieee", "ieee"]
            assert _up(torch.float32, tf32=True) == tuning.table()["gfx942", "fp32", "many", "up"]
            assert tuning.block_m(CPU, torch.float32, True, 4096, 64) == _up(torch.float32, tf32=False).block_m
            assert _up(torch.bfloat16, tf32=True) == tuning.table()["gfx942", "16bit", "many", "up"]
    for name in (*GPUS, "sm_89"):
        with tuning.target(name):
            assert [tuning.precision(CPU, tf32) for tf32 in (True, False)] == ["tf32", "ieee"]


@pytest.mark.parametrize("name", ["gfx90a:sramecc+:xnack-", "gfx950:sramecc+:xnack-"])
def test_a_gpu_with_anothers_tiles_keeps_its_own_precision(monkeypatch, name):
    _properties(monkeypatch, hip="7.0", gcnArchName=name)
    assert tuning.precision(GPU, True) == "ieee"


def test_what_no_gpu_has_proven_no_tile_that_ships_asks_for():
    assert [key for key, tile in tuning.table().items() if tile.flatten or tile.ragged or tile.gluon] == []


def test_stored_weights_take_a_tile_of_the_same_rows_that_their_scales_and_registers_allow():
    """A step of mxfp4 is within a scale's 32, one of fp8 within a scale's 128, of no more bytes than 16 bits take; and
    two accumulators fit, of 128 columns at most."""
    for (*_, use), tile in tuning.table().items():
        if use not in ("up", "down"):
            continue
        assert tuning.for_stored(tile, "", False) == tuning.for_stored(tile, "int8", False) == tile
        for stored, in_fp8, most in (("mxfp4", False, 32), ("fp8", False, 128), ("fp8", True, 128)):
            got = tuning.for_stored(tile, stored, in_fp8)
            assert (got.block_m, got.num_warps) == (tile.block_m, tile.num_warps)
            assert most % got.block_k == 0
            if stored == "fp8":
                assert got.block_n <= 128
                assert got.block_k <= tile.block_k * (2 if in_fp8 else 1)


@pytest.mark.parametrize(("name", "answer"), [
    ("sm_80", False), ("sm_86", False), ("sm_89", True), ("sm_90", True), ("sm_100", True), ("sm_120", True),
    ("gfx90a", False), ("gfx942", False), ("gfx950", True), ("interpreter", False),
])  # fmt: skip
def test_fp8_is_multiplied_where_a_gpu_multiplies_e4m3_and_not_for_sums_in_float64(name, answer):
    """gfx942's 8-bit floats have another bias; Ampere has none."""
    with tuning.target(name):
        assert tuning.multiplies_fp8(CPU, torch.bfloat16) == answer
        assert not tuning.multiplies_fp8(CPU, torch.float64)
