"""Claims about a step's time on many GPUs: its parts, by hand."""

import dataclasses

import numpy as np
import pytest
import yaml

from experiments.cli import CONF
from experiments.stats.cluster import LinkConfig, MachineConfig
from experiments.stats.step_time import Ask, Layer, Work, rates, step, work_of
from experiments.stats.traffic import draw, exchange, row_bytes, traffic
from moe.config.model import ModelConfig, MoEConfig
from moe.config.parallel import Layout
from moe.config.parse import parse
from moe.model import cost

MOE = MoEConfig(n_experts=16, k=4, d_expert=64, n_shared=1, first_dense=1)
MODEL = ModelConfig("m", 512, 64, n_layers=3, d_model=128, n_heads=4, d_ff=256, moe=MOE)
MACHINE = MachineConfig(gpus=4)
LAYOUT = Layout(1, 8, 8)
ASK = Ask(tokens=256, overlap_shards=0.0, recompute=False)


def _moved(parallel=LAYOUT, n_tokens=256):
    ep = parallel.ep
    return [traffic(draw(n_tokens * ep, 16, 4), 16, ep, min(ep, MACHINE.gpus))]


def _step(ask=ASK, machine=MACHINE, parallel=LAYOUT, moved=None, sampled=256, model=MODEL):
    return step(work_of(model), machine, parallel, moved or _moved(parallel), sampled, ask)


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "model").glob("*.yaml"))])
def test_the_flops_of_the_parts_are_those_of_the_model(name):
    model = parse(ModelConfig, yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()))
    model = dataclasses.replace(model, context=min(model.context, 4096), vocab_size=model.vocab_size or 1000)
    work = work_of(model)
    forward = work.rest + sum(layer.dense + layer.row * (model.moe.k if model.moe else 0) for layer in work.layers)
    assert 3 * forward == pytest.approx(cost.flops(model).training, rel=1e-3)
    weights = work.rest_weights + sum(layer.dense_weights + layer.expert * layer.n_experts for layer in work.layers)
    assert weights == pytest.approx(cost.size(model).total, rel=1e-9)


def test_one_gpu_without_experts_is_flops_over_what_its_matmuls_reach_and_the_update():
    model = dataclasses.replace(MODEL, moe=None)
    taken = step(work_of(model), MACHINE, Layout(), [], 1, ASK)
    matmuls = cost.flops(model).training * 256 / (989e12 * 0.4)
    assert taken.dense == pytest.approx(matmuls)
    assert taken.update == pytest.approx(cost.size(model).total * 28 / 3.35e12)
    assert (taken.experts, taken.exchange, taken.shards, taken.hidden) == (0, 0, 0, 0)
    assert taken.seconds == pytest.approx(matmuls + taken.update)
    assert taken.tflops == pytest.approx(cost.flops(model).training * 256 / taken.seconds / 1e12)


def test_experts_take_as_long_as_those_of_the_most_loaded_rank():
    even = _moved()[0]
    uneven = even._replace(load_R=even.load_R * 0 + even.load_R.mean() * np.array([3] + [5 / 7] * 7))
    slow = dataclasses.replace(MACHINE, hbm=1e30)
    first, second = (_step(machine=slow, moved=[moved]) for moved in (even.evened(), uneven))
    assert second.experts == pytest.approx(3 * first.experts)
    assert (first.imbalance, second.imbalance) == (pytest.approx(1), pytest.approx(3))
    row = 2 * cost.mlp_size(MODEL, 64)
    assert first.experts == pytest.approx(3 * 2 * 256 * 4 * row / (989e12 * 0.4))


def test_few_rows_are_paced_by_reading_the_weights():
    slow = dataclasses.replace(MACHINE, hbm=1e3)
    held = 16 / 8 * cost.mlp_size(MODEL, 64) * 2
    assert _step(machine=slow).experts == pytest.approx(3 * 2 * held / 1e3)


def test_a_layer_moves_rows_there_and_back_and_their_gradients_too():
    moved = _moved()
    there, back = (exchange(MACHINE, moved[0], row_bytes(128, kind)) for kind in ("fp8", "bf16"))
    fp8 = dataclasses.replace(ASK, rows="fp8")
    assert _step(fp8, moved=moved).exchange == pytest.approx(2 * (there + back + 2 * back))
    again = dataclasses.replace(fp8, recompute=True)
    assert _step(again, moved=moved).exchange == pytest.approx(2 * (2 * (there + back) + 2 * back))
    assert _step(dataclasses.replace(fp8, micro=3), moved=moved).exchange == pytest.approx(6 * (there + 3 * back))


def test_layers_of_a_recording_take_turns():
    light, heavy = _moved()[0], _moved()[0].times(3.0)
    both = _step(moved=[light, heavy]).exchange
    assert both == pytest.approx((_step(moved=[light]).exchange + _step(moved=[heavy]).exchange) / 2)


def test_traffic_of_a_sample_stands_for_all_tokens():
    half = _moved(n_tokens=128)[0]
    assert _step(moved=[half], sampled=128) == _step(moved=[half.times(2.0)], sampled=256)


def test_shards_are_gathered_twice_and_reduced_once_and_copies_once_a_step():
    """Without latency, all in one node: bytes received over what NVLink reaches."""
    machine = MachineConfig(gpus=64, nvlink=LinkConfig(1e9, 1.0, 0.0))
    parallel = Layout(2, 8, 4)
    work = work_of(MODEL)
    dense = work.rest_weights + sum(layer.dense_weights for layer in work.layers)
    held = sum(layer.expert * layer.n_experts for layer in work.layers) / 4
    once = dense * 7 / 8 + held * 1 / 2
    total = dense + held * 4
    expected = 3 * once * (2 * 2 + 4) / 1e9 + 2 * total / 8 * 4 / 2 / 1e9
    ask = dataclasses.replace(ASK, micro=3)
    assert _step(ask, machine, parallel).shards == pytest.approx(expected)


def test_what_is_hidden_is_the_fraction_asked_for_and_no_more_than_matmuls_last():
    ask = dataclasses.replace(ASK, overlap_experts=0.02, overlap_shards=0.05, tokens=2**20)
    taken = _step(ask)
    assert taken.hidden == pytest.approx(0.02 * taken.exchange + 0.05 * taken.shards)
    assert taken.seconds == pytest.approx(
        taken.dense + taken.experts + taken.exchange + taken.shards + taken.update - taken.hidden
    )
    slow = dataclasses.replace(MACHINE, network=LinkConfig(1e3))
    bounded = _step(dataclasses.replace(ask, overlap_experts=1.0, overlap_shards=1.0), slow)
    assert bounded.hidden == pytest.approx(bounded.dense + bounded.experts)


def test_recomputing_adds_a_forward_pass_and_no_model_flops():
    plain, again = (_step(dataclasses.replace(ASK, recompute=recompute)) for recompute in (False, True))
    assert again.dense == pytest.approx(plain.dense * 4 / 3)
    assert again.tflops * again.seconds == pytest.approx(plain.tflops * plain.seconds)
    assert again.memory < plain.memory


def test_a_forward_pass_is_shorter_than_a_third_of_a_step():
    taken = _step()
    assert 0 < taken.forward < taken.seconds / 2


def test_more_shards_hold_less_each():
    small, large = (_step(parallel=Layout(1, shard, 8)).memory for shard in (8, 64))
    total = cost.size(MODEL).total
    assert small - large == pytest.approx(total * 16 * (1 / 8 - 1 / 64))


def test_fp8_has_a_peak_and_efficiencies_of_its_own():
    machine = MachineConfig(dense_fp8=0.5, experts_fp8=0.25)
    assert rates(machine, "fp8") == pytest.approx((1979e12 * 0.5, 1979e12 * 0.25))
    assert rates(machine, "bf16") == pytest.approx((989e12 * 0.4, 989e12 * 0.4))


def test_a_layer_without_experts_moves_nothing():
    work = Work([Layer(1.0, 0.0, 1.0, 0.0, 0)], 8, 0.0, 0.0, 3.0, 16, 0.0)
    assert step(work, MACHINE, Layout(), [], 1, ASK).exchange == 0
