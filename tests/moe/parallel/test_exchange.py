"""Claims about rows on their way to experts of other ranks and back, against a double loop over tokens and experts."""

import pytest
import torch
import torch.distributed as dist

from moe.parallel import exchange
from moe.parallel.collectives import this_rank
from tests.ranks import run_ranks

E, D, T = 4, 3, 5

ROUTINGS = {
    "some": lambda rank: torch.randint(-2, E, (2 * T,), generator=torch.Generator().manual_seed(rank)),
    "all rows to one expert": lambda rank: torch.full((2 * T,), 3),
    "a rank without rows": lambda rank: torch.full((2 * T,), -1) if rank == 0 else torch.arange(2 * T) % E,
    "no rows at all": lambda rank: torch.full((2 * T,), -2),
    "experts of one rank alone": lambda rank: torch.arange(2 * T) % 2,
}


def _given(rank: int):
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(2 * T, generator=generator, dtype=torch.float64)
    return x, weight, torch.arange(T).repeat_interleave(2)


def _matrices():
    return torch.randn(E, D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _sent(name: str):
    ranks = this_rank()
    x, weight, token = _given(ranks.rank)
    mine = _matrices().chunk(ranks.n)[ranks.rank].clone().requires_grad_()
    x, weight = x.requires_grad_(), weight.requires_grad_()

    def local(row, expert):
        return torch.einsum("md,mdf->mf", row, mine[expert]).tanh()

    y = exchange.experts(x, token, ROUTINGS[name](ranks.rank), weight, E, local, dist.group.WORLD)
    (y * torch.arange(1.0, 1 + y.numel()).view_as(y)).sum().backward()
    return y.detach(), x.grad, weight.grad, mine.grad


def _by_hand(rank: int, name: str, matrices):
    x, weight, token = _given(rank)
    x, weight, y = x.requires_grad_(), weight.requires_grad_(), []
    for t in range(T):
        total = torch.zeros(D, dtype=torch.float64)
        for row, expert in enumerate(ROUTINGS[name](rank).tolist()):
            if token[row] == t and expert >= 0:
                total = total + weight[row] * (x[t] @ matrices[expert]).tanh()
        y.append(total)
    y = torch.stack(y)
    loss = (y * torch.arange(1.0, 1 + y.numel()).view_as(y)).sum()
    if loss.requires_grad:
        loss.backward()
    zero = lambda value: torch.zeros_like(value) if value.grad is None else value.grad
    return y.detach(), zero(x), zero(weight)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", ROUTINGS)
def test_values_and_gradients_are_those_of_a_double_loop(name, n):
    answers, matrices = run_ranks(n, _sent, name), _matrices().requires_grad_()
    for rank, (y, x_grad, weight_grad, _) in enumerate(answers):
        expected = _by_hand(rank, name, matrices)
        for value, right in zip((y, x_grad, weight_grad), expected, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12)
    together = torch.cat([grad for *_, grad in answers])
    right = torch.zeros_like(matrices) if matrices.grad is None else matrices.grad
    torch.testing.assert_close(together, right, rtol=1e-12, atol=1e-12)


def test_rows_come_home_the_same_to_the_bit_on_a_rerun():
    first, again = run_ranks(2, _sent, "some"), run_ranks(2, _sent, "some")
    for before, after in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
