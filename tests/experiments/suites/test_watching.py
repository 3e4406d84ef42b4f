"""Claims about the suite that says what a doctor costs."""

import json

import torch

from experiments.suites import watching
from tests.experiments.bench_command import command


def test_a_row_has_the_step_and_what_watching_adds(monkeypatch, tmp_path, capsys):
    command(monkeypatch, "suite=watching", "sizes=smoke", f"out={tmp_path / 'rows.jsonl'}")
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["status"] == "measured"
    assert row["step_seconds"] > 0
    assert row["low"] <= row["overhead"] <= row["high"]
    assert "watched" in capsys.readouterr().out


def test_both_ways_take_the_same_steps_and_only_one_is_watched(monkeypatch):
    seen = []
    take_step = watching.take_step

    def step(state, batch, cfg, root):
        line, gradients = take_step(state, batch, cfg, root)
        seen.append((cfg.log.doctor, line.layers[0].entropy is not None, line.layers[0].weakest is not None))
        return line, gradients

    monkeypatch.setattr(watching, "take_step", step)
    watching.measured(watching.SMOKE[0], watching.settings(torch.device("cpu"), False, 1))
    assert len(seen) == 4 * (10 + watching.WARM)
    watched = [line for line in seen if line[0]]
    assert watched.count((True, True, True)) == 2, "once in every group of ten"
    assert watched.count((True, False, False)) == 2 * (10 + watching.WARM) - 2
    assert {line for line in seen if not line[0]} == {(False, False, False)}
