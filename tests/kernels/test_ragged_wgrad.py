"""The weight gradients against loops over the experts in float64, on poisoned memory."""

import itertools
from unittest.mock import patch

import pytest
import torch

from kernels import ragged_wgrad as module
from kernels import tuning
from kernels.plan import Plan, plan
from kernels.ragged_wgrad import ragged_wgrad
from tests.kernels.test_plan import DEVICE, LOADS, LastProgram, far_apart, poisoned, untouched

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _tile(block_m=16, block_n=16, block_k=16, group_m=2):
    return tuning.Tile(block_m, block_n, block_k, group_m, 1, 4, 2, False, 0)


def _operands(load="zipf", m=20, n=12, gather_p=True, dtype=torch.float64):
    """p and q, of which one has a row for each of 24 tokens, the other for each of 72 slots; and the plan."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE, dtype)
    p, q = (draw(24, m), draw(72, n)) if gather_p else (draw(72, m), draw(24, n))
    return p, q, plan(torch.tensor(LOADS[load], device=DEVICE), None, 5, 32)


def _loop(p, q, where, gather_p):
    """The product of every expert's rows, in p's dtype."""
    token, offset = where.token_N.long(), where.offset_E1.tolist()
    p, q = (p[token], q) if gather_p else (p, q[token])
    return torch.stack([p[lo:hi].mT @ q[lo:hi] for lo, hi in itertools.pairwise(offset)])


def _error(got, want):
    """Relative Frobenius error; zeros have to be zeros."""
    return ((got.double() - want).norm() / want.norm()).item() if want.any() else got.norm().item()


def _check(load="zipf", gather_p=True, dtype=torch.float64, tile=None, **sizes):
    """Both uses are the loop's, and an expert without rows gets zeros."""
    p, q, where = _operands(load, gather_p=gather_p, dtype=dtype, **sizes)
    want = _loop(p.double(), q.double(), where, gather_p)
    with poisoned():
        got = ragged_wgrad(p, q, where, gather_p, 5, tile or _tile(), False)
    factor = 4 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2  # see test_ragged_mm
    bound = 1e-13 if dtype == torch.float64 else factor * _error(_loop(p, q, where, gather_p), want)
    assert got.dtype == dtype
    assert _error(got, want) <= bound
    for e, rows in enumerate(where.offset_E1.diff().tolist()):
        assert rows or (got[e] == 0).all()


USES = pytest.mark.parametrize("gather_p", [True, False], ids=("down", "up"))


@USES
@pytest.mark.parametrize("load", LOADS)
def test_the_gradient_is_the_loops_for_any_load(load, gather_p):
    _check(load, gather_p)


@USES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_the_loops_in_any_dtype(dtype, gather_p):
    _check("some rows have no expert", gather_p, dtype, m=28, n=44, tile=_tile(32, 32, 16))


@USES
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 17), (33, 5), (16, 32), (24, 40), (48, 80)])
def test_the_gradient_is_the_loops_for_odd_sizes(m, n, gather_p):
    _check(gather_p=gather_p, m=m, n=n)


@pytest.mark.parametrize("sizes", [(16, 64, 16, 1), (64, 16, 32, 3), (16, 16, 64, 2), (32, 16, 16, 5)])
def test_the_gradient_is_the_loops_on_any_tile(sizes):
    _check(tile=_tile(*sizes), m=52, n=36)


def test_more_rows_than_one_step_of_the_sum_are_added():
    """72 rows of one expert, 16 at a time."""
    p, q, where = _operands("one expert has everything")
    got = ragged_wgrad(p, q, where, True, 5, _tile(), False)
    torch.testing.assert_close(got[3], p.repeat_interleave(3, 0).mT @ q, rtol=1e-12, atol=1e-12)
    assert (got[[0, 1, 2, 4]] == 0).all()


@USES
def test_rows_without_an_expert_add_nothing_even_if_they_hold_nan(gather_p):
    load = "some rows have no expert"
    p, q, where = _operands(load, gather_p=gather_p)
    want = ragged_wgrad(p, q, where, gather_p, 5, _tile(), False)
    slots = q if gather_p else p
    slots[where.offset_E1[-1] :] = torch.nan
    assert torch.equal(ragged_wgrad(p, q, where, gather_p, 5, _tile(), False), want)
    tokens = p if gather_p else q
    unused = [t for t, experts in enumerate(LOADS[load]) if set(experts) == {-1}]
    tokens[unused] = torch.nan
    assert torch.equal(ragged_wgrad(p, q, where, gather_p, 5, _tile(), False), want)


def test_an_experts_nan_stays_in_its_gradient():
    p, q, where = _operands("even")
    q[where.offset_E1[1] : where.offset_E1[2]] = torch.nan
    got = ragged_wgrad(p, q, where, True, 5, _tile(block_k=64), False)
    assert got.flatten(1).isnan().any(1).tolist() == [False, True, False, False, False]


def test_no_row_gives_zeros():
    where = plan(torch.empty(0, 3, dtype=torch.int64, device=DEVICE), None, 5, 32)
    p, q = torch.ones(4, 20, device=DEVICE), torch.ones(0, 12, device=DEVICE)
    with poisoned():
        got = ragged_wgrad(p, q, where, True, 5, _tile(), False)
    assert got.shape == (5, 20, 12)
    assert (got == 0).all()


def test_a_sum_of_16_bit_rows_is_kept_in_float32():
    where = plan(torch.zeros(600, 1, dtype=torch.int64, device=DEVICE), None, 1, 32)
    one = torch.ones(600, 1, dtype=torch.bfloat16, device=DEVICE)  # where 256 + 1 is 256
    assert ragged_wgrad(one, one, where, True, 1, _tile(), False).item() == 600


def test_reruns_are_bitwise_equal():
    p, q, where = _operands(dtype=torch.float32)
    first, second = (ragged_wgrad(p, q, where, True, 5, _tile(), False) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("gather_p", [True, False])
def test_rows_tokens_and_experts_past_two_to_the_31_elements_are_addressed(gather_p):
    """Two rows of the last token and the last expert in the last slots, against the same two in small tensors."""
    m = n = 256
    n_rows, last = 2**31 // m + 2, 2**31 // (m * n)
    with far_apart(), patch.object(module, "_ragged_wgrad", LastProgram(module._ragged_wgrad)):
        i32 = lambda *values: torch.tensor(values, dtype=torch.int32, device=DEVICE)
        token_N, offset_E1 = untouched(n_rows, dtype=torch.int32), untouched(last + 2, dtype=torch.int32)
        token_N[-2:], offset_E1[-2:] = n_rows - 1, i32(n_rows - 2, n_rows)
        where = Plan(*[token_N] * 3, offset_E1, *[i32(0)] * 3)
        near = where._replace(token_N=i32(1, 1), offset_E1=i32(0, 2))
        p, q = untouched(n_rows, m), untouched(n_rows, n)
        p[-2:], q[-2:] = torch.randn(2, m, device=DEVICE), torch.randn(2, n, device=DEVICE)
        got = ragged_wgrad(p, q, where, gather_p, last + 1, _tile(64, 64, 16), False)
        want = ragged_wgrad(p[-2:].clone(), q[-2:].clone(), near, gather_p, 1, _tile(64, 64, 16), False)
    assert want[0, -64:, -64:].any()
    assert torch.equal(got[-1, -64:, -64:], want[0, -64:, -64:])  # what the last program writes
