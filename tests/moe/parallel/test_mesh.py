"""Claims about where ranks stand."""

from moe.config.parallel import Layout
from moe.parallel.collectives import rank
from moe.parallel.mesh import build_meshes
from tests.ranks import run_ranks


def _places(layout):
    meshes = build_meshes(layout, "cpu")
    return tuple(meshes.dense.get_coordinate()), tuple(meshes.experts.get_coordinate()), meshes.expert_rank(), rank()


def test_a_rank_has_its_place_on_both_meshes_and_neighbours_share_out_experts():
    places = run_ranks(4, _places, Layout(1, 4, 2))
    assert [dense for dense, *_ in places] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [experts for _, experts, *_ in places] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert [expert_rank for *_, expert_rank, _ in places] == [0, 1, 0, 1]


def test_copies_are_furthest_apart():
    places = run_ranks(4, _places, Layout(2, 2, 2))
    assert [dense for dense, *_ in places] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [experts for _, experts, *_ in places] == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
