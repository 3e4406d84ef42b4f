"""What ranks tell one another: every rank gets the whole, and a process of its own its own."""

import torch

from moe.parallel.collectives import (
    Ranks,
    all_summed_over_ranks,
    n_ranks,
    rank,
    summed_over_ranks,
    this_rank,
)
from tests.ranks import run_ranks


def test_alone_a_process_is_the_only_rank_and_everything_is_what_went_in():
    value = torch.tensor([1.0, 2.0])
    assert n_ranks() == 1
    assert rank() == 0
    assert this_rank() == Ranks()
    assert summed_over_ranks(value) is value
    assert all_summed_over_ranks([value])[0] is value
    assert Ranks().summed(value) is value
    assert Ranks().gathered(value) is value
    assert Ranks().share(value) is value


def _sums():
    value = torch.tensor([1, 10]) * (rank() + 1)
    counts, square = torch.tensor([2**40 + rank()]), torch.tensor(0.1, dtype=torch.float64)
    return n_ranks(), summed_over_ranks(value), value, all_summed_over_ranks([counts, square, value])


def test_every_rank_gets_the_sum_and_keeps_what_it_gave():
    for number, (ranks, total, value, together) in enumerate(run_ranks(2, _sums)):
        assert ranks == 2
        assert total.tolist() == [3, 30]
        assert value.tolist() == [number + 1, 10 * (number + 1)]
        counts, square, again = together
        assert counts.tolist() == [2**41 + 1]
        assert counts.dtype == torch.int64
        assert square.item() == 0.2
        assert again.tolist() == [3, 30]


def _parts(whole):
    ranks = this_rank()
    mine = ranks.share(whole)
    return mine, ranks.gathered(mine), ranks.summed(mine.sum(0))


def test_the_parts_of_a_batch_make_the_batch_in_its_order():
    whole = torch.arange(24.0).view(8, 3)
    for number, (mine, gathered, total) in enumerate(run_ranks(4, _parts, whole)):
        assert mine.tolist() == whole[2 * number : 2 * number + 2].tolist()
        assert gathered.tolist() == whole.tolist()
        assert total.tolist() == whole.sum(0).tolist()


def _noise():
    torch.manual_seed(7)
    drawn = this_rank().drawn(torch.randn_like, torch.empty(3, 5))
    return drawn, torch.get_rng_state()


def test_a_tokens_noise_is_what_one_process_draws_for_it_whatever_its_rank():
    torch.manual_seed(7)
    whole, state = torch.randn(6, 5), torch.get_rng_state()
    drawn = run_ranks(2, _noise)
    assert torch.equal(torch.cat([noise for noise, _ in drawn]), whole)
    assert all(torch.equal(state, after) for _, after in drawn)
