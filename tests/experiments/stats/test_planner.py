"""Claims about a run's plan: its arithmetic, by hand."""

import dataclasses

import numpy as np
import pytest

from experiments.stats import planner
from moe.config.model import ModelConfig, MoEConfig
from moe.config.run import Config
from moe.config.train import OptimConfig, TrainConfig
from moe.model import cost


def _config(**train):
    moe = MoEConfig(n_experts=8, k=2, d_expert=32)
    model = ModelConfig("small", 128, 64, n_layers=2, d_model=64, n_heads=2, d_ff=64, moe=moe)
    return Config(model=model, train=TrainConfig(**{"batch_size": 8, "precision": "fp32"} | train))


def test_time_and_money_are_flops_over_the_rate_of_all_devices():
    cfg = _config()
    result = planner.plan(cfg, planner.Ask(tokens=1e9, devices=4, rate=1e12, price=3.0))
    flops = cost.flops(cfg.model).training * 1e9
    assert result.total_flops == flops
    assert result.seconds == pytest.approx(flops / 4e12)
    assert result.money == pytest.approx(3 * 4 * flops / 4e12 / 3600)
    assert result.steps == pytest.approx(1e9 / (8 * 64))


def test_nobody_is_told_a_time_without_a_rate_or_a_fit_without_a_memory():
    result = planner.plan(_config(), planner.Ask(tokens=1e6))
    assert (result.seconds, result.money, result.fits, result.devices_needed) == (None, None, None, None)


def test_devices_share_the_state_and_each_holds_its_activations():
    cfg = _config()
    alone = planner.plan(cfg, planner.Ask(tokens=1e6)).memory
    state = 16 * cost.size(cfg.model).total
    room = alone.activations + state / 2.5
    result = planner.plan(cfg, planner.Ask(tokens=1e6, devices=3, memory=room))
    assert (result.devices_needed, result.fits, result.advice) == (3, True, [])
    assert result.held == pytest.approx(state / 3 + alone.activations)
    assert not planner.plan(cfg, planner.Ask(tokens=1e6, devices=2, memory=room)).fits


def test_a_plan_is_of_the_optimiser_and_of_the_mean_that_are_asked_for():
    cfg = _config()
    muon, mean = (dataclasses.replace(cfg, optim=OptimConfig(**its)) for its in ({"name": "muon"}, {"average": 0.1}))
    adamw, muon, mean = (planner.plan(its, planner.Ask(tokens=1e6)) for its in (cfg, muon, mean))
    total = cost.size(cfg.model).total
    assert adamw.memory.optimizer == 8 * total
    assert 4 * total < muon.memory.optimizer < 6 * total
    assert mean.state - adamw.state == 4 * total


def test_a_device_alone_holds_a_steps_peak_and_no_more():
    """Its bf16 copies, gradients and activations are never all there at once: of a large model and one sequence the
    state that devices would share is more than that."""
    cfg = _config(precision="bf16", batch_size=1, checkpoint_activations=True)
    moe = dataclasses.replace(cfg.model.moe, d_expert=2048)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
    whole = planner.plan(cfg, planner.Ask(tokens=1e6))
    peak = whole.memory.peak
    assert peak < whole.state
    fits = planner.plan(cfg, planner.Ask(tokens=1e6, memory=peak))
    assert (fits.fits, fits.devices_needed, fits.held) == (True, 1, peak)
    tight = planner.plan(cfg, planner.Ask(tokens=1e6, memory=peak - 1))
    assert tight.fits is False
    assert tight.devices_needed != 1


def test_a_mask_of_documents_is_planned_for():
    cfg = _config()
    separate = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, documents="separate"))
    packed, masked = (planner.plan(each_cfg, planner.Ask(tokens=1e6)).memory.peak for each_cfg in (cfg, separate))
    assert masked > packed


def test_what_does_not_fit_is_told_what_to_lower_and_what_that_leaves():
    cfg = _config()
    memory = planner.plan(cfg, planner.Ask(tokens=1e6)).memory
    result = planner.plan(cfg, planner.Ask(tokens=1e6, devices=2, memory=memory.activations / 2))
    assert result.fits is False
    assert [word for word in ("checkpoint_activations=true", "accumulate=8") if word in " ".join(result.advice)] == [
        "checkpoint_activations=true", "accumulate=8",
    ]  # fmt: skip


def test_rates_are_found_again_from_steps_that_follow_them():
    rates = planner.Rates(flop=2e-11, byte=1e-10, operation=5e-6)
    work_N3 = np.random.default_rng(0).uniform([1e8, 1e7, 500], [1e11, 1e9, 5000], (12, 3))
    seconds_N = list(work_N3 @ np.array(rates))
    assert planner.fit_rates(work_N3.tolist(), seconds_N) == pytest.approx(rates)
    assert planner.left_out(work_N3.tolist(), seconds_N) == pytest.approx(seconds_N)


def test_no_rate_is_negative():
    rates = planner.fit_rates(
        [[1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [3.0, 1.0, 1.0], [4.0, 1.0, 1.0]], [4.0, 3.0, 2.0, 1.0]
    )
    assert min(rates) >= 0


@pytest.mark.parametrize(("seconds", "words"), [(90, "90.0 seconds"), (7200, "2.0 hours"), (86400 * 3, "3.0 days")])
def test_a_duration_is_in_the_unit_that_a_person_would_say(seconds, words):
    assert planner.duration(seconds) == words


def test_copies_share_nothing_and_a_batch_on_each_device_makes_fewer_steps():
    cfg = _config()
    shared, copied = (planner.plan(cfg, planner.Ask(1e6, 8, copies, batches=8)) for copies in (1, 4))
    state = 16 * cost.size(cfg.model).total
    assert copied.held - shared.held == pytest.approx(state * (1 / 2 - 1 / 8))
    assert shared.steps == pytest.approx(1e6 / (8 * 64 * 8))
