"""Claims about ways of routing on many GPUs, put side by side."""

import dataclasses

import numpy as np
import pytest

from experiments.stats.cluster import MachineConfig, check_layout
from experiments.stats.scale_out import Loads, compare, layout, moved_by, routes_of, sensitivity
from experiments.stats.step_time import Ask, work_of
from experiments.stats.traffic import draw, nodes_touched
from moe.config.model import ModelConfig, MoEConfig
from moe.config.parallel import Layout
from moe.errors import BadInput

MOE = MoEConfig(n_experts=64, k=8, d_expert=64)
MODEL = ModelConfig("m", 512, 64, n_layers=2, d_model=512, n_heads=4, d_ff=256, moe=MOE)
WORK = work_of(MODEL)
MACHINE = MachineConfig(gpus=8)
WIDE = Layout(1, 64, 64)  # 8 nodes
EVEN = Loads("even")


def _compare(all_loads, parallel=WIDE, capacity=0.0, sample=128):
    return {
        (line.routing, line.loads): line
        for line in compare(WORK, MACHINE, parallel, Ask(), 8, all_loads, capacity, sample)
    }


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16, 64, 512, 1024, 4096])
@pytest.mark.parametrize("n_experts", [8, 64, 128, 256])
def test_a_layout_uses_all_gpus_and_is_one_that_is_accepted(gpus, n_experts):
    parallel = layout(gpus, n_experts, MACHINE)
    check_layout(parallel, MACHINE, n_experts)
    assert parallel.ranks() == gpus
    assert parallel.ep == min(gpus, n_experts, 64)


def test_a_number_of_gpus_that_no_copy_divides_is_refused():
    with pytest.raises(BadInput, match=r"gpus=600 is not divisible by the 512"):
        layout(600, 64, MACHINE)


def test_node_limited_routing_sends_fewer_rows_and_is_faster_where_the_network_paces():
    lines = _compare([EVEN], sample=512)
    plain, limited = lines["top-k", "even"], lines["4 nodes", "even"]
    assert plain.nodes == pytest.approx(nodes_touched(64, 8, 8), rel=0.01)
    assert limited.nodes <= 4
    assert limited.exchange * limited.seconds < plain.exchange * plain.seconds
    assert limited.slower < 0 == plain.slower


def test_what_a_gpu_cannot_hold_is_said():
    small = dataclasses.replace(MACHINE, memory=1e6)
    assert _compare([EVEN])["top-k", "even"].fits
    assert not compare(WORK, small, WIDE, Ask(), 8, [EVEN], 0.0, 64)[0].fits


def test_there_is_nothing_to_limit_on_four_nodes_or_fewer():
    assert {routing for routing, _ in _compare([EVEN], Layout(1, 32, 32))} == {"top-k"}


def test_uneven_loads_cost_what_their_busiest_rank_does_and_a_capacity_takes_that_back():
    lines = _compare([EVEN, Loads("Zipf 1", 1.0)], capacity=1.0, sample=512)
    zipf, capped = lines["top-k", "Zipf 1"], lines["capacity 1", "Zipf 1"]
    assert zipf.imbalance > 2 > 1.1 > lines["top-k", "even"].imbalance
    assert zipf.slower > 0.05
    assert capped.dropped > 0.1
    assert capped.imbalance < zipf.imbalance
    assert capped.seconds < zipf.seconds


def test_a_recording_is_taken_layer_by_layer_and_is_not_limited_to_nodes():
    same = draw(64 * 100, 64, 8)
    one = np.tile(np.arange(8), (64 * 100, 1))  # all to the first rank's neighbours
    recorded = Loads("recorded", expert_TLK=np.stack([same, one], 1))
    lines = _compare([EVEN, recorded])
    assert {routing for routing, loads in lines if loads == "recorded"} == {"top-k"}
    layers = routes_of(recorded, 64 * 100, 64, 8)
    assert [routes.tolist() for routes in layers] == [same.tolist(), one.tolist()]
    worst = [moved_by(MACHINE, WIDE, routes, 64).load_R.max() for routes in layers]
    assert lines["top-k", "recorded"].imbalance == pytest.approx(sum(worst) / (2 * 800))


def test_a_recording_that_is_shorter_than_there_are_ranks_is_refused():
    with pytest.raises(BadInput, match=r"the trace has 63 tokens, and parallel\.ep=64 needs one each"):
        _compare([Loads("recorded", expert_TLK=np.zeros((63, 1, 8), int))])


def test_a_constant_that_is_not_used_does_not_matter_and_slower_links_never_help():
    alone, moved = Layout(1, 8, 8), [moved_by(MACHINE, Layout(1, 8, 8), draw(8 * 128, 64, 8), 64)]
    ask = dataclasses.replace(Ask(), overlap_experts=0.5, overlap_shards=0.5)
    effects = {effect.what: effect for effect in sensitivity(WORK, MACHINE, alone, ask, moved, 128)}
    assert effects["network: bandwidth or efficiency"][1:] == (0, 0)
    for effect in effects.values():
        assert effect.lower >= 0 >= effect.higher or effect.what == "launch of an all-to-all"
    assert effects["launch of an all-to-all"].lower < 0 < effects["launch of an all-to-all"].higher
    assert effects["NVLink: bandwidth or efficiency"].lower > 0
