"""Claims about the mean of the weights over the last steps. The oracle of the mean is torch's AveragedModel."""

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

import moe.train.loop
from moe.config.train import OptimConfig
from moe.run.checkpoint import latest
from moe.run.load import load_run
from moe.train.average import Average, is_averaged
from tests.small_runs import STEPS, fate, settings, train, train_until


def test_the_mean_is_torchs_and_the_model_becomes_it(make_model):
    model, average = make_model(dtype=torch.float32), Average()
    oracle = AveragedModel(model)
    for seed in range(5):
        model.initialize(seed)
        average.add(model)
        oracle.update_parameters(model)
    average.give(model)
    assert (average.count, average.weights) == (0, {})
    for p, expected in zip(model.parameters(), oracle.module.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)


def test_frozen_weights_and_buffers_are_none_of_it(make_model):
    model, average = make_model(dtype=torch.float32), Average()
    model.embed.weight.requires_grad_(False)
    average.add(model)
    assert average.weights.keys() == dict(model.named_parameters()).keys() - {"embed.weight"}


@pytest.mark.parametrize(("share", "steps", "n"), [(0.1, 300, 30), (0.0, 300, 0), (1.0, 7, 7), (0.001, 10, 1)])
def test_the_last_share_of_the_steps_is_averaged(share, steps, n):
    cfg = OptimConfig(average=share)
    assert [step for step in range(1, steps + 1) if is_averaged(cfg, step, steps)] == list(
        range(steps - n + 1, steps + 1)
    )


def weights_of_steps(cfg):
    """The weights after every step of a run that keeps no mean."""
    take_step, weights = moe.train.loop.take_step, []

    def take(state, *arguments):
        told = take_step(state, *arguments)
        weights.append({name: p.detach().clone() for name, p in state.model.named_parameters()})
        return told

    with mock.patch.object(moe.train.loop, "take_step", take):
        train(cfg)
    return weights


def test_a_finished_run_is_the_mean_of_its_last_weights_validated_and_saved(corpus, tmp_path):
    weights = weights_of_steps(settings(corpus, tmp_path / "plain"))
    summary = train(settings(corpus, tmp_path / "mean", {"optim.average": 3 / STEPS}))
    model, _, _ = load_run(tmp_path / "mean", "last")
    for name, p in model.named_parameters():
        last = torch.stack([of_step[name] for of_step in weights[-3:]])
        torch.testing.assert_close(p.detach(), last.mean(0), rtol=1e-5, atol=1e-7)
    plain, mean = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("plain", "mean"))
    plain, mean = ([json.loads(line) for line in lines] for lines in (plain, mean))
    assert [line.get("loss") for line in mean] == [line.get("loss") for line in plain]
    assert mean[-1]["val"] != plain[-1]["val"]
    assert [line.get("val") for line in mean[:-1]] == [line.get("val") for line in plain[:-1]]
    assert mean[-1]["val"]["loss"] == summary.val.loss
    path = latest(tmp_path / "mean" / "checkpoints", print)
    assert not [name for name in load_file(path / "optimizer.safetensors") if name.startswith("average/")]


@pytest.mark.parametrize("end", [STEPS // 2 + 2, STEPS])
def test_a_run_killed_while_it_averages_resumes_bitwise(end, corpus, tmp_path):
    changes = {"optim.average": 0.7, "optim.name": "muon", "checkpoint.every": 1}
    train(settings(corpus, tmp_path / "whole", changes))
    train_until(settings(corpus, tmp_path / "run", changes), end)
    path = latest(tmp_path / "run" / "checkpoints", print)
    assert [name for name in load_file(path / "optimizer.safetensors") if name.startswith("average/")]
    train(settings(corpus, tmp_path / "run", changes | {"resume": True}))
    assert fate(tmp_path / "run") == fate(tmp_path / "whole")
