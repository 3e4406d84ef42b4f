"""Claims about ranks on this machine: they answer together, and none is left behind."""

import os
import time

import psutil
import pytest

from experiments.suites.local_ranks import LocalRanks, RanksFailed
from moe.parallel.collectives import n_ranks, rank, summed_over_ranks


def _who(value):
    import torch

    return rank(), n_ranks(), os.getpid(), int(summed_over_ranks(torch.tensor(value)))


def _fails(who):
    if rank() == who:
        raise KeyError("of rank")


def _stays(who):
    while rank() == who:
        time.sleep(0.1)


def _dies(who):
    if rank() == who:
        os._exit(3)


def alive(ranks):
    return [process for process in ranks.processes if process.is_alive()]


def test_ranks_answer_in_their_order_and_are_gone_afterwards():
    with LocalRanks(2) as ranks:
        answers = ranks.call(_who, 5)
        pids = [pid for *_, pid, _ in answers]
        assert [answer[:2] for answer in answers] == [(0, 2), (1, 2)]
        assert len({*pids, os.getpid()}) == 3
        assert [total for *_, total in answers] == [10, 10]
        assert ranks.call(_who, 1)[0][2] == pids[0]  # the same processes
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    ("function", "said"),
    [(_fails, "KeyError: 'of rank'"), (_dies, "rank 1: it died"), (_stays, "no answer of ranks 1 in 1 s")],
)
def test_a_rank_that_raises_dies_or_hangs_is_named_and_none_is_left(function, said):
    with LocalRanks(2, patience=2.0) as ranks:
        ranks.call(_who, 1)  # they have met
        with pytest.raises(RanksFailed, match=said):
            ranks.call(function, 1, timeout=1.0 if function is _stays else 30.0)
        assert not alive(ranks)
