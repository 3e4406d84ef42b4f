"""Claims about ranks on machines and transfers between them, by hand."""

import dataclasses

import pytest

from experiments.stats.cluster import (
    Group,
    LinkConfig,
    MachineConfig,
    all_reduce,
    check_layout,
    gather,
    group,
    layout_of,
    meshes,
    transfer,
)
from moe.config.parallel import Layout, ParallelConfig
from moe.errors import BadInput

FREE = MachineConfig(
    gpus=4, nvlink=LinkConfig(100.0, 0.5, 0.0), network=LinkConfig(10.0, 0.5, 0.0), launch=0.0
)  # no hop costs anything


def test_a_transfer_is_hops_and_bytes_over_what_is_reached():
    assert transfer(LinkConfig(50e9, 0.8, 2e-6), 4e9, hops=3) == pytest.approx(6e-6 + 4e9 / 40e9)


def test_a_gather_in_a_node_receives_all_parts_but_its_own():
    assert gather(FREE, Group(4, 4), 400.0) == pytest.approx(400 * 3 / 4 / 50)
    assert gather(FREE, Group(1, 1), 400.0) == 0


def test_between_nodes_every_card_takes_its_share_of_what_other_nodes_have():
    """8 ranks on 2 nodes of 4: half of the bytes come from outside, a quarter of them through each card."""
    assert gather(FREE, Group(8, 4), 800.0) == pytest.approx(max(800 / 2 / 4 / 5, 800 * 7 / 8 / 50))
    slow = dataclasses.replace(FREE, nvlink=LinkConfig(2.0, 0.5, 0.0))
    assert gather(slow, Group(8, 4), 800.0) == pytest.approx(800 * 7 / 8 / 1)


def test_ranks_alone_in_their_nodes_use_no_nvlink():
    assert gather(FREE, Group(3, 1), 300.0) == pytest.approx(300 * 2 / 3 / 5)


def test_a_ring_takes_as_many_steps_as_there_are_other_ranks():
    machine = dataclasses.replace(FREE, nvlink=LinkConfig(1e9, 1, 1.0), network=LinkConfig(1e9, 1, 0.5))
    assert gather(machine, Group(8, 4), 0.0) == pytest.approx(6 * 1.0 + 1 * 0.5)
    assert all_reduce(machine, Group(8, 4), 0.0) == pytest.approx(13)


def test_every_rank_is_in_one_group_of_each_mesh_and_groups_lie_as_they_are_said_to():
    """Against a list of all ranks: dense (replicate, shard), experts (replicate, shard / ep, ep)."""
    machine = MachineConfig(gpus=8)
    for replicate, shard, ep in [(1, 8, 8), (2, 16, 4), (4, 32, 16), (2, 4, 2), (3, 64, 8)]:
        parallel = Layout(replicate, shard, ep)
        groups, ranks = meshes(machine, parallel), range(replicate * shard)
        members = {
            "shard": {r for r in ranks if r // shard == 0},
            "replicate": {r for r in ranks if r % shard == 0},
            "ep": {r for r in ranks if r // ep == 0},
            "expert_shard": {r for r in ranks if r // shard == 0 and r % ep == 0},
        }
        for name, its in members.items():
            inside = [r for r in its if r // machine.gpus == 0]
            assert groups[name] == Group(len(its), len(inside)), (name, parallel)
            assert groups[name].nodes == len({r // machine.gpus for r in its})
        assert parallel.ranks() == len(ranks)


def test_a_group_over_several_nodes_has_as_many_ranks_in_each():
    assert group(MachineConfig(gpus=8), 64) == Group(64, 8)
    assert group(MachineConfig(gpus=8), 16, stride=64) == Group(16, 1)


@pytest.mark.parametrize(
    ("parallel", "n_experts", "sentence"),
    [
        (ParallelConfig(1, 8, 3), 9, r"parallel\.ep=3 does not divide parallel\.shard=8"),
        (ParallelConfig(1, 16, 16), 24, r"parallel\.ep=16 does not divide model\.moe\.n_experts=24"),
        (ParallelConfig(1, 12, 1), 8, r"parallel\.shard=12 must divide machine\.gpus=8 of a node, or be a multiple"),
        (ParallelConfig(1, 8, 8), 0, r"parallel\.ep=8 shares experts out, and a dense model has none"),
    ],
)
def test_ranks_that_do_not_divide_are_refused(parallel, n_experts, sentence):
    with pytest.raises(BadInput, match=sentence):
        check_layout(layout_of(parallel), MachineConfig(gpus=8), n_experts)


def test_what_is_not_given_is_one_rank():
    assert layout_of(ParallelConfig(shard=8)) == (1, 8, 1)
    assert layout_of(ParallelConfig(replicate=4)) == (4, 1, 1)


def test_all_small_layouts_are_refused_or_divide():
    machine = MachineConfig(gpus=4)
    for shard in range(1, 17):
        for ep in range(1, 17):
            good = shard % ep == 0 and 8 % ep == 0 and all(max(n, 4) % min(n, 4) == 0 for n in (ep, shard))
            try:
                check_layout(layout_of(ParallelConfig(1, shard, ep)), machine, 8)
            except BadInput:
                assert not good, (shard, ep)
            else:
                assert good, (shard, ep)
