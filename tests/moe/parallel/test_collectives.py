"""Sums over ranks: every rank gets the whole, and a process of its own its own."""

import os

import torch
import torch.distributed as dist

from moe.parallel.collectives import n_ranks, summed_over_ranks


def test_alone_a_process_is_the_only_rank_and_a_sum_is_what_went_in():
    value = torch.tensor([1.0, 2.0])
    assert n_ranks() == 1
    assert summed_over_ranks(value) is value


def _rank(rank: int, folder) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    value = torch.tensor([1, 10]) * (rank + 1)
    torch.save([n_ranks(), summed_over_ranks(value), value], folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # now and then a thread of gloo's is still there at an exit, which then aborts


def test_every_rank_gets_the_sum_and_keeps_what_it_gave(tmp_path):
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    for rank in range(2):
        ranks, total, value = torch.load(tmp_path / f"{rank}.pt")
        assert ranks == 2
        assert total.tolist() == [3, 30]
        assert value.tolist() == [rank + 1, 10 * (rank + 1)]
