"""Claims about the rows of an all-to-all: counted one by one, and in closed form."""

import itertools
from math import comb, log

import numpy as np
import pytest

from experiments.stats.cluster import LinkConfig, MachineConfig
from experiments.stats.traffic import (
    busiest,
    draw,
    dropped,
    exchange,
    home_of,
    kept_groups,
    nodes_touched,
    row_bytes,
    traffic,
)


def _counted(expert_TK, n_experts, ranks, inside, two_level):
    """Every row sent over every link, one at a time."""
    sent, received, given, taken, load = ([0] * ranks for _ in range(5))
    node = lambda rank: rank // inside
    for t, experts in enumerate(expert_TK):
        home = t * ranks // len(expert_TK)
        places = [e // (n_experts // ranks) for e in experts if e >= 0]
        for rank in places:
            load[rank] += 1
        if not two_level:
            for rank in places:
                if node(rank) != node(home):
                    sent[home] += 1
                    received[rank] += 1
                elif rank != home:
                    given[home] += 1
                    taken[rank] += 1
            continue
        for there in {node(rank) for rank in places}:
            relay = there * inside + home % inside
            if there != node(home):
                sent[home] += 1
                received[relay] += 1
            for rank in {rank for rank in places if node(rank) == there} - {relay}:
                given[relay] += 1
                taken[rank] += 1
    return sent, received, given, taken, load


@pytest.mark.parametrize("two_level", [True, False])
@pytest.mark.parametrize(("ranks", "inside"), [(8, 4), (8, 2), (4, 4), (6, 2), (8, 1)])
def test_rows_are_those_that_a_loop_over_tokens_sends(ranks, inside, two_level):
    generator = np.random.default_rng(ranks * inside)
    for _ in range(20):
        expert_TK = np.stack([generator.permutation(24)[:3] for _ in range(ranks * 7)])
        expert_TK[generator.random(expert_TK.shape) < 0.2] = -1
        moved = traffic(expert_TK, 24, ranks, inside, two_level)
        counted = _counted(expert_TK, 24, ranks, inside, two_level)
        for name, its, theirs in zip(moved._fields[:5], moved[:5], counted, strict=True):
            assert its.tolist() == theirs, name


def test_a_row_goes_to_a_node_once_however_many_experts_it_has_there():
    """Token 0 of rank 0 has experts on all four ranks of the other node: one row between nodes, three inside."""
    expert_TK = np.full((8, 4), -1)
    expert_TK[0] = [4, 5, 6, 7]
    moved = traffic(expert_TK, 8, 8, 4)
    assert moved.sent_R.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert moved.received_R.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert moved.given_R.tolist() == [0, 0, 0, 0, 3, 0, 0, 0]
    assert traffic(expert_TK, 8, 8, 4, two_level=False).sent_R.sum() == 4


def test_a_token_of_8_experts_is_on_so_many_nodes_on_average():
    """Of very many experts: M (1 − (1 − 1/M)^8); of 256 a little more, as no expert is drawn twice."""
    for nodes, many, of_256 in ((4, 3.60, 3.61), (8, 5.25, 5.29), (16, 6.45, 6.52)):
        assert nodes_touched(2**20, 8, nodes) == pytest.approx(many, abs=0.005)
        assert nodes * (1 - (1 - 1 / nodes) ** 8) == pytest.approx(many, abs=0.005)
        assert nodes_touched(256, 8, nodes) == pytest.approx(of_256, abs=0.005)


def test_nodes_touched_are_the_mean_over_all_sets_of_experts():
    for n_experts, k, nodes in ((8, 3, 4), (12, 4, 3), (6, 1, 2)):
        sets = list(itertools.combinations(range(n_experts), k))
        counts = [len({e // (n_experts // nodes) for e in experts}) for experts in sets]
        assert len(sets) == comb(n_experts, k)
        assert nodes_touched(n_experts, k, nodes) == pytest.approx(np.mean(counts))


def test_routes_that_are_drawn_evenly_touch_as_many_nodes_as_the_formula_says():
    moved = traffic(draw(64 * 500, 256, 8), 256, 64, 8)
    assert moved.logical / 500 == pytest.approx(nodes_touched(256, 8, 8), rel=0.01)
    assert moved.load_R.sum() == 64 * 500 * 8


def test_routes_are_limited_to_nodes():
    expert_TK = draw(5000, 64, 8, groups=8, k_groups=4)
    nodes = np.array([len({*experts // 8}) for experts in expert_TK])
    assert nodes.max() == 4
    assert np.array([len({*experts // 8}) for experts in draw(5000, 64, 8)]).max() > 6
    assert all(len({*experts}) == 8 for experts in expert_TK)


def test_groups_are_kept_by_the_sums_of_their_best_scores():
    score_TE = np.array([[5.0, 0, 0, 3, 3, 0, 1, 1]])
    assert kept_groups(score_TE, 4, 1, 1).tolist() == [[True, True] + [False] * 6]
    assert kept_groups(score_TE, 4, 2, 2)[0].nonzero()[0].tolist() in ([0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 3, 4, 5])


def test_one_expert_per_token_follows_zipfs_law():
    counts = np.sort(np.bincount(draw(200_000, 16, 1, zipf=1.0).ravel(), minlength=16))[::-1]
    law = 1 / np.arange(1, 17)
    assert np.abs(counts / counts.sum() - law / law.sum()).max() < 0.005
    slope = np.polyfit(np.log(np.arange(1, 17)), np.log(counts), 1)[0]
    assert slope == pytest.approx(-1, abs=0.05)
    assert log(counts[0] / counts[1]) == pytest.approx(log(2), abs=0.05)


def test_a_capacity_keeps_the_first_rows_of_an_expert():
    expert_TK = np.array([[0, 1], [0, 2], [0, 1], [0, 3]])
    assert dropped(expert_TK, 4, 1.0).tolist() == [[0, 1], [0, 2], [-1, 1], [-1, 3]]
    assert dropped(expert_TK, 4, 2.0).tolist() == expert_TK.tolist()
    assert dropped(np.array([[-1, 0], [0, -1]]), 4, 1.0).tolist() == [[-1, 0], [-1, -1]]


def test_no_expert_has_more_rows_than_its_capacity_and_rows_below_it_stay():
    expert_TK = draw(3000, 32, 4, zipf=1.0)
    kept = dropped(expert_TK, 32, 1.25)
    room = int(np.ceil(1.25 * 3000 * 4 / 32))
    before, after = (np.bincount(routes[routes >= 0], minlength=32) for routes in (expert_TK, kept))
    assert after.tolist() == np.minimum(before, room).tolist()


def test_an_exchange_is_paced_by_the_busiest_link():
    machine = MachineConfig(
        launch=1.0, nvlink=LinkConfig(100.0, 0.5, 0.0), network=LinkConfig(10.0, 0.5, 0.0)
    )  # rows of 10 bytes: 5 a second over NVLink, half a second each over the network
    expert_TK = np.full((8, 4), -1)
    expert_TK[0] = [4, 5, 6, 7]
    moved = traffic(expert_TK, 8, 8, 4)
    assert busiest(moved) == (1, 3)
    assert exchange(machine, moved, 10.0) == pytest.approx(1 + max(10 / 5, 30 / 50))
    assert exchange(machine, traffic(expert_TK[:, :1] * 0, 8, 1, 1), 10.0) == 0


def test_a_row_has_the_bytes_that_deepep_counts():
    assert row_bytes(7168, "fp8") == 7168 + 224
    assert row_bytes(7168, "bf16") == 14336
    assert 128 * 8 * row_bytes(7168, "fp8") / 77e-6 / 1e9 == pytest.approx(98, abs=0.5)
    assert 128 * 8 * row_bytes(7168, "fp8") / 194e-6 / 1e9 == pytest.approx(39, abs=0.5)


def test_tokens_are_dealt_in_order_and_evenly():
    assert home_of(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
