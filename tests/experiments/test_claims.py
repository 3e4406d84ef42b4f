"""Claims about the command that puts published claims to the test, on a study of a second."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from experiments import claims as command
from experiments.study import pool
from experiments.study.compose import compose_jobs, plan, text_of
from experiments.study.manifest import run_of
from moe.analysis.specialisation import information
from moe.run.summary import read_summary
from tests.experiments.study import small_studies

SEEDS = (0, 1)


@pytest.fixture
def run(monkeypatch, tmp_path, corpus, capsys):
    """(words) -> what the command printed, of a study of two arms."""
    jobs = [
        small_studies.job(
            corpus, arm, seed, checkpoint__every=int(arm == "softmax"), checkpoint__keep=20, train__steps=10
        )
        for arm in ("softmax", "sigmoid")
        for seed in SEEDS
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "jobs_of", lambda cfg: jobs)
    monkeypatch.setattr(pool, "Pool", small_studies.InThisProcess)
    monkeypatch.setattr(small_studies.InThisProcess, "given", [])

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["claims", "results=results", "page=claims.md", *words])
        command.main()
        return capsys.readouterr().out

    main.jobs = jobs
    return main


def test_what_is_missing_is_trained_kept_and_never_trained_again(run, tmp_path):
    assert "0 of 4 runs are recorded, 4 are missing" in run()
    rows = command.read_rows(tmp_path / "results" / "claims.jsonl")
    assert [(row.arm, row.seed, row.id) for row in rows] == [(job.arm, job.seed, job.id) for job in run.jobs]
    for row, job in zip(rows, run.jobs, strict=True):
        summary = read_summary(run_of(tmp_path / "runs" / "claims", job))
        assert (row.loss, row.active, row.tokens) == (summary.val.loss, summary.params.active, summary.tokens)
        assert row.specialisation == pytest.approx(
            sum(information(torch.tensor(layer)) for layer in summary.load.counts) / len(summary.load.counts)
        )
        assert row.leak == 0
    assert "4 of 4 runs are recorded, 0 are missing" in run()
    assert small_studies.InThisProcess.given == [4]
    (tmp_path / "results" / "claims.jsonl").write_text(
        "\n".join((tmp_path / "results" / "claims.jsonl").read_text().splitlines()[1:]) + "\n"
    )
    assert "3 of 4 runs are recorded, 1 are missing" in run()
    assert small_studies.InThisProcess.given == [4, 1]
    assert command.read_rows(tmp_path / "results" / "claims.jsonl") == rows


def test_the_jobs_of_a_tier_are_those_of_its_study(monkeypatch, tmp_path, capsys):
    """Composed while Hydra runs the command itself."""
    tokenizer = types.SimpleNamespace(vocab_size=300)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "EXPERIMENTS", {"cpu": "first-study", "gpu": "claims-gpu"})
    monkeypatch.setattr(command, "prepare", lambda *arguments: types.SimpleNamespace(tokenizer=tokenizer))
    planned = []
    monkeypatch.setattr(pool, "train_missing", lambda folder, name, words, missing, *rest: planned.extend(missing) or 0)
    monkeypatch.setattr(command, "recorded", lambda cfg, missing: [])
    monkeypatch.setattr(sys, "argv", ["claims", "results=results", "page=claims.md"])
    command.main()
    assert {job.config["model"]["vocab_size"] for job in planned} == {300}
    assert len({job.id for job in planned}) == len(planned) > 3
    assert f"0 of {len(planned)} runs are recorded" in capsys.readouterr().out


def test_the_page_alone_trains_nothing(run, tmp_path):
    assert "of 0 runs" in run("train=false")
    assert small_studies.InThisProcess.given == []
    assert "Not run" in (tmp_path / "claims.md").read_text()


def test_settled_choices_are_those_that_an_early_checkpoint_makes_too(run, tmp_path):
    run()
    settled = {row.arm: row.settled for row in command.read_rows(tmp_path / "results" / "claims.jsonl")}
    assert settled["sigmoid"] is None  # it kept no early checkpoint
    assert 0 < settled["softmax"] <= 1


def test_of_two_lines_of_one_run_the_last_counts(run, tmp_path):
    run()
    path = tmp_path / "results" / "claims.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, *others, json.dumps(json.loads(first) | {"loss": 9.0})]) + "\n")
    rows = command.read_rows(path)
    assert [row.loss == 9.0 for row in rows] == [True, *[False] * len(others)]


def test_a_line_that_is_none_is_refused_by_its_number(run, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "claims.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(SystemExit, match="2"):
        run("train=false")
    assert "line 1" in capsys.readouterr().err


def test_a_tier_that_there_is_none_of_is_refused(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("tier=tpu")
    assert "tier=tpu" in capsys.readouterr().err


def test_every_recorded_run_is_found_again_by_its_settings():
    """Settings that came since are no part of a name at their defaults: nothing recorded would be trained again."""
    asked = compose_jobs(["experiment=claims"])
    sizes = {text_of(cfg): cfg.tokenizer.vocab_size for _, cfg in asked.jobs}
    ids = {job.id for job in plan(asked, sizes, "", "", None).jobs}
    rows = command.read_rows(Path(command.__file__).parents[1] / "experiments" / "results" / "claims.jsonl")
    assert len(rows) > 60
    assert {row.id for row in rows} <= ids
