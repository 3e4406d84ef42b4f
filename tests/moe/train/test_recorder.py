"""Claims about what a step leaves besides checkpoints."""

import dataclasses

import pytest
import torch

from moe.config.run import Config
from moe.run.jsonl import read_lines
from moe.run.lock import Lock
from moe.run.summary import LayerMetrics, MetricsLine, read_metrics
from moe.train.recorder import Recorder
from moe.train.step import LayerTotals
from tests.small_runs import settings

LAYER = LayerMetrics(0, 0.0, 1.0, 4.0, 0, 0.0, 0.0)


def totals(*count: int) -> LayerTotals:
    count_E, zero = torch.tensor(count), torch.tensor(0)
    return LayerTotals(count_E, count_E, zero, zero, sum(count), {}, [torch.zeros(4, 2, dtype=torch.int64)])


def line(step: int) -> MetricsLine:
    return MetricsLine(step, step / 2, loss=3.0, lm_loss=3.0, tokens_per_s=2.0, lr=0.1, layers=[LAYER])


def recorded(cfg: Config, folder, steps: int) -> None:
    with Lock(folder) as lock, Recorder(cfg, lock, 0) as recorder:
        recorder.record(MetricsLine(0, 0.0))
        for step in range(1, steps + 1):
            recorder.record(line(step), [totals(step, 0, 0, 1), totals(0, step, 1, 0)])


def test_every_step_has_a_line_and_every_few_steps_the_counts(corpus, tmp_path):
    recorded(settings(corpus, tmp_path, {"log.every": 2}), tmp_path, 5)
    assert read_metrics(tmp_path) == [MetricsLine(0, 0.0), *map(line, range(1, 6))]
    counts = read_lines(tmp_path / "routing" / "counts.jsonl")
    assert counts == [{"step": step, "counts": [[step, 0, 0, 1], [0, step, 1, 0]]} for step in (2, 4)]


@pytest.mark.parametrize("experts", [False, True])
def test_the_experts_of_every_token_are_kept_where_they_are_asked_for(experts, corpus, tmp_path):
    recorded(settings(corpus, tmp_path, {"log.experts": experts}), tmp_path, 2)
    assert (tmp_path / "routing" / "experts-0.npy").exists() == experts


def test_probability_mass_stands_beside_the_counts_where_routers_have_any(corpus, tmp_path):
    cfg = settings(corpus, tmp_path, {"log.every": 1})
    with Lock(tmp_path) as lock, Recorder(cfg, lock, 0) as recorder:
        layers = [totals(1, 0, 0, 1), totals(0, 1, 1, 0)]
        for layer in layers:
            layer.seen = {"prob": torch.tensor([1.0, 3.0, 0.0, 4.0])}
        recorder.record(line(1), layers)
        recorder.record(line(2), [layers[0], totals(1, 0, 0, 1)])
    first, second = read_lines(tmp_path / "routing" / "counts.jsonl")
    assert first["prob"] == [[0.125, 0.375, 0.0, 0.5]] * 2
    assert "prob" not in second


def test_an_alarm_is_said_and_stands_in_its_line_and_a_resumed_run_does_not_repeat_it(corpus, tmp_path, capsys):
    sick = lambda step: dataclasses.replace(line(step), layers=[dataclasses.replace(LAYER, dead=2 * (step > 200))])
    cfg = settings(corpus, tmp_path)
    with Lock(tmp_path) as lock, Recorder(cfg, lock, 0) as recorder:
        for step in range(1, 301):
            recorder.record(sick(step))
    with Lock(tmp_path) as lock, Recorder(cfg, lock, 300) as recorder:
        for step in range(301, 311):
            recorder.record(sick(step))
    alarmed = [written for written in read_metrics(tmp_path) if written.alarms]
    assert [[alarm.kind for alarm in written.alarms] for written in alarmed] == [["dead experts"]]
    assert capsys.readouterr().out.count(f"alarm: {alarmed[0].alarms[0].sentence()}") == 1
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    with Lock(quiet) as lock, Recorder(settings(corpus, quiet, {"log.doctor": False}), lock, 0) as recorder:
        for step in range(1, 301):
            recorder.record(sick(step))
    assert not any(written.alarms for written in read_metrics(quiet))


def test_a_long_name_is_cut_before_its_bar(corpus, tmp_path):
    folder = tmp_path / ("a-run-with-a-name-that-is-long" * 2)
    folder.mkdir()
    with Lock(folder) as lock, Recorder(settings(corpus, folder), lock, 0) as recorder:
        assert recorder.watch.name == f"{folder.name[:23]}…"
