"""Claims about the sizes of the meshes: every way that multiplies and divides is taken, and no other."""

import itertools

import pytest

from moe.config.parallel import Layout, ParallelConfig, check_experts, check_products, layout
from moe.errors import BadInput

WORLDS = range(1, 9)


@pytest.mark.parametrize("world", WORLDS)
def test_sizes_are_taken_when_they_multiply_to_the_ranks_and_ep_divides_shard(world):
    for replicate, shard, ep in itertools.product(range(1, world + 1), repeat=3):
        fits = replicate * shard == world and shard % ep == 0
        cfg = ParallelConfig(replicate, shard, ep)
        if fits:
            assert layout(cfg, world) == (replicate, shard, ep)
            continue
        with pytest.raises(BadInput, match=r"parallel\.(replicate|shard|ep)="):
            layout(cfg, world)


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_0_is_derived(world):
    assert layout(ParallelConfig(), world) == Layout(1, world, 1)
    assert layout(ParallelConfig(shard=1), world) == Layout(world, 1, 1)
    assert layout(ParallelConfig(replicate=world), world) == Layout(world, 1, 1)
    assert layout(ParallelConfig(ep=0), world) == Layout(1, world, world)


def test_the_ranks_of_an_experts_copy_are_what_ep_leaves_of_shard():
    assert Layout(2, 8, 4).expert_shard() == 2


def test_experts_are_taken_when_every_rank_gets_as_many():
    for experts, ep in itertools.product(range(1, 17), range(1, 9)):
        if experts % ep:
            with pytest.raises(BadInput, match=f"parallel.ep={ep} does not divide model.moe.n_experts={experts}:"):
                check_experts(experts, ep)
        else:
            check_experts(experts, ep)


def test_products_in_fp8_are_for_experts_that_are_whole_on_every_rank():
    for in_fp8, ep in ((False, 1), (False, 4), (True, 1)):
        check_products(in_fp8, ep)
    with pytest.raises(
        BadInput, match=r"parallel.ep=4 with model.moe.precision=fp8: .* accepted are parallel.ep=1 and"
    ):
        check_products(True, 4)


def test_what_would_be_accepted_is_named():
    with pytest.raises(BadInput, match="accepted are 1, 2, 3, 6, or 0 for what is left"):
        layout(ParallelConfig(shard=4), 6)
    with pytest.raises(BadInput, match=r"parallel.ep=4 does not divide parallel.shard=6, .* accepted are 1, 2, 3, 6"):
        layout(ParallelConfig(ep=4), 6)
