"""A token's rows summed, against a loop over the tokens in float64, on poisoned memory."""

import itertools
from unittest.mock import patch

import pytest
import torch

from kernels import combine as module
from kernels.combine import UNROLLED, combine
from kernels.plan import plan
from tests.kernels.test_plan import DEVICE, LOADS, LastProgram, far_apart, poisoned, untouched

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LIST = ([0, 0, 0, 2, 5, 5, 9], [1, -1, 1, 0, 2, 2, -1])  # tokens 1, 3, 4, 6, 7, 8 of ten have no row, 9 no expert


def _draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE, dtype)


def _fixed(n_tokens, k, n_experts=3):
    """Experts (T, K) with a -1 here and there."""
    return torch.tensor([[(t * k + j) % (n_experts + 1) - 1 for j in range(k)] for t in range(n_tokens)], device=DEVICE)


def _loop(y, slot, weight, start, live):
    """Token by token, row by row."""
    rows = [[r for r in range(lo, hi) if slot[r] < live] for lo, hi in itertools.pairwise(start)]
    scale = torch.ones(len(slot), dtype=torch.float64, device=DEVICE) if weight is None else weight.flatten().double()
    zero = torch.zeros(y.shape[1], dtype=torch.float64, device=DEVICE)
    return torch.stack([sum((scale[r] * y[slot[r]].double() for r in each), zero) for each in rows])


# Of the one conversion of a sum: half a unit in the last place, a whole one where the interpreter truncates.
TOLERANCE = {
    torch.float64: dict(rtol=1e-13, atol=1e-14),
    torch.float32: dict(rtol=1e-6, atol=1e-6),
    torch.float16: dict(rtol=2**-11, atol=1e-6),
    torch.bfloat16: dict(rtol=2**-7 if DEVICE == "cpu" else 2**-8, atol=1e-6),
}


def _check(expert, token=None, n_tokens=None, d=5, weighted=True, dtype=torch.float64):
    """The sum is the loop's, whatever the slots of rows without an expert hold, and whatever their weights."""
    where = plan(expert, token, 5, 16)
    n_tokens, live = n_tokens or len(expert), where.offset_E1[-1].item()
    y, weight, start = _draw(expert.numel(), d, dtype=dtype), None, None
    y[live:] = torch.nan
    if weighted:
        weight = _draw(*expert.shape, dtype=dtype if dtype == torch.float64 else torch.float32, seed=1)
        weight = weight.masked_fill(expert < 0, torch.nan)
    if token is None:
        bounds = [t * expert.shape[1] for t in range(n_tokens + 1)]
    else:
        start = torch.searchsorted(token, torch.arange(n_tokens + 1, device=DEVICE))
        bounds = start.tolist()
    with poisoned():
        got = combine(y, where.slot_N, weight, start, where.offset_E1, n_tokens)
    want = _loop(y, where.slot_N.tolist(), weight, bounds, live)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])
    return got


WEIGHTED = pytest.mark.parametrize("weighted", [True, False], ids=("weighted", "plain"))


@WEIGHTED
@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 17, 40])
def test_the_sum_is_the_loops_for_any_k(k, weighted):
    assert UNROLLED == 16  # both ways of walking over a token's rows are taken
    _check(_fixed(6, k), weighted=weighted)


@WEIGHTED
@pytest.mark.parametrize("load", LOADS)
def test_the_sum_is_the_loops_for_any_load(load, weighted):
    _check(torch.tensor(LOADS[load], device=DEVICE), weighted=weighted)


@WEIGHTED
def test_a_ragged_tokens_rows_are_summed_and_a_token_without_rows_gets_zeros(weighted):
    token, expert = (torch.tensor(each, device=DEVICE) for each in LIST)
    got = _check(expert, token, 10, weighted=weighted)
    assert (got[[1, 3, 4, 6, 7, 8, 9]] == 0).all()
    assert got[[0, 2, 5]].all()


def test_a_ragged_list_may_give_one_token_everything_or_be_empty():
    zeros = torch.zeros(50, dtype=torch.int64, device=DEVICE)
    _check(zeros % 3, zeros + 3, 5)
    assert (_check(zeros[:0], zeros[:0], 5) == 0).all()


@WEIGHTED
@pytest.mark.parametrize("n_tokens", [1, 3, 33])
def test_the_sum_is_the_loops_for_any_number_of_tokens(n_tokens, weighted):
    _check(_fixed(n_tokens, 3), weighted=weighted)


def test_no_token_gives_nothing():
    where = plan(torch.empty(0, 3, dtype=torch.int64, device=DEVICE), None, 5, 16)
    assert combine(_draw(0, 7), where.slot_N, None, None, where.offset_E1, 0).shape == (0, 7)


@pytest.mark.parametrize("cells", [4, 64])
@pytest.mark.parametrize("d", [1, 8, 33])
def test_the_sum_is_the_loops_for_any_width_and_cut(d, cells):
    token, expert = (torch.tensor(each, device=DEVICE) for each in LIST)
    with patch.object(module, "CELLS", cells):
        _check(_fixed(5, 3), d=d)
        _check(expert, token, 10, d=d)


@pytest.mark.parametrize("k", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_the_loops_in_any_dtype(dtype, k):
    _check(_fixed(9, k), d=37, dtype=dtype)
    _check(_fixed(9, k), d=37, dtype=dtype, weighted=False)


@pytest.mark.parametrize("k", [16, 300])
def test_16_bit_rows_are_summed_in_float32(k):
    where = plan(torch.zeros(1, k, dtype=torch.int64, device=DEVICE), None, 1, 16)
    y = torch.ones(k, 1, dtype=torch.bfloat16, device=DEVICE)
    y[0] = 256  # in bfloat16 256 + 1 is 256, and from 512 on there are multiples of four only
    assert abs(combine(y, where.slot_N, None, None, where.offset_E1, 1).item() - (255 + k)) < 4


def test_reruns_are_bitwise_equal():
    expert = _fixed(40, 7)
    where = plan(expert, None, 5, 16)
    y, weight = _draw(280, 33, dtype=torch.float32), _draw(40, 7, dtype=torch.float32)
    first, second = (combine(y, where.slot_N, weight, None, where.offset_E1, 40) for _ in range(2))
    assert torch.equal(first, second)


def test_slots_past_two_to_the_31_elements_are_read():
    d = 512
    n_rows = 2**31 // d + 2
    with far_apart():
        y, i32 = untouched(n_rows, d), lambda *values: torch.tensor(values, dtype=torch.int32, device=DEVICE)
        y[-2:] = torch.randn(2, d, device=DEVICE)
        got = combine(y, i32(n_rows - 1, n_rows - 2), None, None, i32(0, n_rows), 1)
    torch.testing.assert_close(got[0].float(), y[-2:].float().sum(0), rtol=2**-11, atol=1e-6)


def test_tokens_past_two_to_the_31_elements_are_written():
    """Of the grid's programs the interpreter runs the last; a row of zeros is every other token's."""
    n_tokens, d = 2**31 // 1024 + 2, 1024
    with far_apart(), patch.object(module, "_combine", LastProgram(module._combine)):
        slot_N, i32 = (
            untouched(n_tokens, dtype=torch.int32),
            lambda *each: torch.tensor(each, dtype=torch.int32).to(DEVICE),
        )
        slot_N[-1] = 1
        y = torch.stack([torch.zeros(d), torch.randn(d)]).to(DEVICE, torch.float16)
        got = combine(y, slot_N, None, None, i32(0, 2), n_tokens)
    assert torch.equal(got[-1], y[1])
