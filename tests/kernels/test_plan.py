"""The plan against an obvious loop: slots, rows, tokens, offsets and the schedule, at any cut into blocks.

What stands before the first test serves the tests of the other kernels too. Without a GPU all of them run in Triton's
interpreter."""

import math
import mmap
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import plan as module
from kernels import reference
from kernels.plan import plan, power_of_2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Name -> the experts (T, K) of 24 tokens with K=3, of E=5.
LOADS = {
    "even": [[t % 5, (t + 1) % 5, (t + 2) % 5] for t in range(24)],
    "one expert has everything": [[3, 3, 3]] * 24,
    "zipf": [[0, 0, 1] if t % 2 else [0, t % 3, 4 if t == 8 else 0] for t in range(24)],
    "two experts are empty": [[4, 0, 2]] * 24,
    "some rows have no expert": [[-1, t % 5, -1] if t % 3 else [-1, -1, 2] for t in range(24)],
    "no row has an expert": [[-1, -1, -1]] * 24,
}


def _poison(out):
    """NaN, or 99 in integers, unless there is no memory to fill."""
    if out.device.type in ("cpu", "cuda"):
        out.fill_(torch.nan if out.is_floating_point() else 99)
    return out


@contextmanager
def poisoned():
    """Inside, fresh memory is poisoned, so that an element that no kernel wrote shows."""

    def fill(allocate):
        return lambda *args, **kwargs: _poison(allocate(*args, **kwargs))

    with (
        patch.object(torch, "empty", fill(torch.empty)),
        patch.object(torch, "empty_like", fill(torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty)),
    ):
        yield


@contextmanager
def checked():
    """Inside, the interpreter stops at a failed tl.device_assert and at int32 arithmetic that overflows. On a GPU
    kernels are compiled without either."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    object.__setattr__(options, "debug", True)  # frozen, and one for all kernels
    try:
        yield
    finally:
        object.__setattr__(options, "debug", False)


def untouched(*shape, dtype=torch.float16):
    """Memory of which only what is used counts: on a CPU zeros, which the system provides page by page as they are
    touched, so that 2^31 elements cost nothing; on a GPU the real thing."""
    if DEVICE == "cuda":
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    memory = mmap.mmap(-1, dtype.itemsize * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@contextmanager
def far_apart():
    """Inside, kernels may be given more than 2^31 elements: what they allocate is `untouched` too, and the interpreter
    watches for int32 overflow. Skips on a GPU with less than 40 GiB free."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs a GPU with 40 GiB free: here the elements are real")

    def sparse(allocate):
        def allocated(*args, **kwargs):
            like = allocate(*args, **{**kwargs, "device": "meta"})
            return untouched(*like.shape, dtype=like.dtype) if like.numel() else torch.zeros_like(like, device=DEVICE)

        return allocated

    with (
        patch.object(torch, "empty", sparse(torch.empty)),
        patch.object(torch, "empty_like", sparse(torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", sparse(torch.Tensor.new_empty)),
        patch.object(torch.Tensor, "new_zeros", sparse(torch.Tensor.new_zeros)),
        checked(),
    ):
        yield


class LastProgram:
    """A kernel of whose grid the interpreter runs the last program only; a GPU runs them all."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        if DEVICE == "cuda":
            return self.kernel[grid]

        def launch(*args, **kwargs):
            from triton.runtime.interpreter import InterpreterBuilder

            last = (*(each - 1 for each in grid), 0, 0)[:3]
            with patch.object(InterpreterBuilder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", last)):
                self.kernel[(1,)](*args, **kwargs)

        return launch


def _plan(expert, token, n_experts, block_m):
    """`plan` of nested lists; token None: expert is (T, K)."""
    token_N = None if token is None else torch.tensor(token, dtype=torch.int64, device=DEVICE)
    with poisoned():
        return plan(torch.tensor(expert, dtype=torch.int64, device=DEVICE), token_N, n_experts, block_m)


def _disagreements(got, expert, token, n_experts, block_m):
    """Fields of a plan that are not what a loop over the rows finds."""
    row_of = [r for e in range(n_experts) for r, each in enumerate(expert) if each == e]
    offset = [sum(each in range(e) for each in expert) for e in range(n_experts + 1)]
    row_of += [r for r, each in enumerate(expert) if each not in range(n_experts)]
    slot_of = [row_of.index(r) for r in range(len(expert))]
    tiles = [(e, slot) for e in range(n_experts) for slot in range(offset[e], offset[e + 1], block_m)]
    count = got.tile_count.item()
    want = {
        "slot_N": (got.slot_N.tolist(), slot_of),
        "row_N": (got.row_N.tolist(), row_of),
        "token_N": (got.token_N.tolist(), [token[r] for r in row_of]),
        "offset_E1": (got.offset_E1.tolist(), offset),
        "tile_count": (got.tile_count.tolist(), [len(tiles)]),
        "tile_expert_J": (got.tile_expert_J.tolist()[:count], [e for e, _ in tiles]),
        "tile_slot_J": (got.tile_slot_J.tolist()[:count], [slot for _, slot in tiles]),
        "bound": (len(got.tile_expert_J), -(-len(expert) // block_m) + n_experts),
        "dtypes": ({each.dtype for each in got}, {torch.int32}),
        "devices": ({each.device.type for each in got}, {DEVICE}),
    }
    return [name for name, (mine, loops) in want.items() if mine != loops]


def _check_fixed(expert_TK, n_experts, block_m):
    """The plan of (T, K) is the loop's."""
    flat = [e for each in expert_TK for e in each]
    token = [t for t, each in enumerate(expert_TK) for _ in each]
    assert _disagreements(_plan(expert_TK, None, n_experts, block_m), flat, token, n_experts, block_m) == []


def _check_ragged(expert, token, n_experts, block_m):
    """The plan of (N,) with tokens is the loop's."""
    assert _disagreements(_plan(expert, token, n_experts, block_m), expert, token, n_experts, block_m) == []


# Cuts so small that a few rows make many blocks, chunks and programs of the scan, and programs of the schedule; and
# the usual ones.
SMALL = {"BLOCK": 16, "COLUMNS": 2, "SCHEDULE": 4, "CELLS": 16}
USUAL = {name: getattr(module, name) for name in SMALL}


@pytest.mark.parametrize("block_m", [1, 16, 128])
@pytest.mark.parametrize("load", LOADS)
def test_the_plan_is_the_obvious_loops(load, block_m):
    _check_fixed(LOADS[load], 5, block_m)


@pytest.mark.parametrize("load", LOADS)
def test_the_plan_is_the_same_over_many_blocks_chunks_and_schedules(load):
    with patch.multiple(module, **SMALL):
        _check_fixed(LOADS[load], 5, 2)


@pytest.mark.parametrize("n_experts", [1, 2, 70])
def test_the_plan_takes_any_number_of_experts(n_experts):
    _check_fixed([[(7 * t + 3 * k) % n_experts for k in range(4)] for t in range(50)], n_experts, 16)


@pytest.mark.parametrize(("n_experts", "programs"), [(5, 1), (31, 1), (32, 2), (70, 3), (128, 5)])
def test_the_scan_takes_a_program_for_every_32_experts_and_rows_without_one(n_experts, programs):
    scan, grids = module._scan, []

    class Spied:
        def __getitem__(self, grid):
            grids.append(grid)
            return scan[grid]

    with patch.object(module, "_scan", Spied()):
        _check_fixed([[(7 * t + 3 * k) % n_experts - 1 for k in range(4)] for t in range(50)], n_experts, 16)
    assert grids == [(programs,)]


@pytest.mark.parametrize("n_rows", [511, 512, 513, 1100])
def test_rows_up_to_and_past_whole_blocks_are_placed(n_rows):
    _check_ragged([r * r % 11 - 1 for r in range(n_rows)], [r // 2 for r in range(n_rows)], 9, 64)


def test_no_token_and_one_token_are_a_plan():
    got = plan(torch.empty(0, 3, dtype=torch.int64, device=DEVICE), None, 4, 16)
    assert _disagreements(got, [], [], 4, 16) == []
    _check_fixed([[2]], 4, 16)
    _check_fixed([[2, -1, 0]], 4, 16)


def test_a_ragged_list_keeps_its_tokens_and_may_skip_some():
    _check_ragged([1, 0, 2, 2, -1, 1], [0, 0, 0, 3, 3, 9], 3, 16)
    _check_ragged([], [], 3, 16)
    _check_ragged([0], [4], 3, 16)


def test_rows_of_one_expert_keep_their_order():
    got = _plan([[r % 2] for r in range(200)], None, 2, 16)
    assert got.row_N.tolist() == [*range(0, 200, 2), *range(1, 200, 2)]


def test_rows_without_an_expert_lie_in_order_behind_the_last_expert():
    got = _plan([[0], [-1], [1], [-1], [0]], None, 2, 16)
    assert got.row_N.tolist() == [0, 4, 2, 1, 3]
    assert got.offset_E1.tolist() == [0, 2, 3]


@pytest.mark.parametrize("too_high", [5, 6, 8, 63, 2**31 - 1, 2**40])
def test_an_id_that_no_expert_has_counts_as_none(too_high):
    got = _plan([[0], [too_high], [4], [-1], [too_high], [4]], None, 5, 16)
    expected = _plan([[0], [-1], [4], [-1], [-1], [4]], None, 5, 16)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert got.row_N.tolist() == [0, 2, 5, 1, 3, 4]


@pytest.mark.skipif(DEVICE == "cuda", reason="a failed assert on a GPU ends the process's use of it")
def test_a_debug_build_stops_at_an_id_that_no_expert_has():
    with checked():
        _check_fixed([[0, 4], [-1, 2]], 5, 16)
        with pytest.raises(Exception, match="an expert id is not below n_experts"):
            _plan([[0, 5], [-1, 2]], None, 5, 16)


@pytest.mark.parametrize(
    ("counts", "tight"),
    [
        ([1, 1, 1, 1, 1], True),  # every tile holds one row: E tiles for ceil(E / block_m) of rows
        ([17, 1, 1, 33, 16], False),
        ([17, 17, 17, 17, 17], True),
        ([0, 0, 81, 0, 0], False),
    ],
)
def test_the_schedule_covers_every_row_once_within_the_hosts_bound(counts, tight):
    expert = [e for e, count in enumerate(counts) for _ in range(count)]
    got = _plan([[e] for e in expert], None, 5, 16)
    n_tiles, bound = got.tile_count.item(), len(got.tile_expert_J)
    covered = [
        (e, slot)
        for e, first in zip(got.tile_expert_J.tolist()[:n_tiles], got.tile_slot_J.tolist(), strict=False)
        for slot in range(first, min(first + 16, got.offset_E1[e + 1].item()))
    ]
    assert covered == [(e, slot) for slot, e in enumerate(expert)]
    assert n_tiles <= bound
    assert not tight or n_tiles >= bound - 2  # the bound is not loose either


@settings(max_examples=60)
@given(
    st.integers(1, 9).flatmap(lambda e: st.tuples(st.just(e), st.lists(st.integers(-1, e), max_size=40))),
    st.sampled_from((1, 4, 16)),
    st.sampled_from((SMALL, USUAL)),
)
def test_any_list_of_experts_is_planned_as_the_loop_plans_it(case, block_m, cuts):
    n_experts, expert = case
    token = [r // 3 for r in range(len(expert))]
    with patch.multiple(module, **cuts):
        _check_ragged(expert, token, n_experts, block_m)


def test_the_plan_is_the_references():
    expert = torch.tensor(LOADS["some rows have no expert"], device=DEVICE)
    got = plan(expert, None, 5, 16)
    order, slot, offset = reference.plan(expert.flatten(), 5)
    for mine, theirs in ((got.row_N, order), (got.slot_N, slot), (got.offset_E1, offset)):
        torch.testing.assert_close(mine.long(), theirs)


def test_reruns_give_the_same_plan():
    expert = torch.randint(-1, 70, (300, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    first, second = plan(expert, None, 70, 32), plan(expert, None, 70, 32)
    n = first.tile_count.item()
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
    assert all(torch.equal(a[:n], b[:n]) for a, b in zip(first[4:6], second[4:6], strict=True))


def test_a_width_is_the_smallest_power_of_two_that_holds_it():
    widths = [power_of_2(n) for n in range(1, 300)]
    assert all(width.bit_count() == 1 and width >= n > width // 2 for n, width in enumerate(widths, 1))
    assert power_of_2(0) == 1
