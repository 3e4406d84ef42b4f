"""Claims about the command of scaling laws, on a family of a second."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import pytest

from experiments import scaling as command
from experiments.study import pool
from moe.model import cost
from tests.experiments.stats.test_scaling import _records
from tests.experiments.study import small_studies
from tests.small_runs import settings


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """(words) -> what the command printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "Pool", small_studies.InThisProcess)

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["scaling", "page=laws.md", *words])
        command.main()
        return capsys.readouterr().out

    return main


def test_a_family_has_equal_flops_for_every_size_of_a_budget(corpus):
    base = settings(corpus, "", {"model.vocab_size": 257})
    cfg = command.ScalingConfig(widths=[16, 32, 64], budgets=[2e10, 4e10], experts=[2], seeds=[0])
    family = list(command.sizes(cfg, base))
    assert {run.model.d_model for _, run in family} == {16, 32, 64}
    assert {run.model.moe.n_experts for _, run in family} == {2, base.model.moe.n_experts}
    for name, run in family:
        budget = float(name.split("-", 2)[2])
        per_step = cost.flops(run.model, run.router).training * run.train.batch_size * run.model.context
        assert run.train.steps * per_step == pytest.approx(budget, rel=0.5 / run.train.steps + 1e-9)
        assert command.SHORTEST <= run.train.steps <= command.LONGEST


def test_what_is_missing_is_trained_kept_and_not_trained_again(run, monkeypatch, corpus, tmp_path):
    jobs = [small_studies.job(corpus, "softmax", seed, train__steps=2) for seed in (0, 1)]
    monkeypatch.setattr(command, "family", lambda cfg: jobs)
    assert "0 of 2 runs are recorded, 2 are missing" in run()
    rows = command.read_rows(tmp_path / "experiments" / "results" / "scaling.jsonl")
    assert [row.id for row in rows] == [job.id for job in jobs]
    assert all(row.loss > 0 and row.flops > 0 for row in rows)
    assert "2 of 2 runs are recorded, 0 are missing" in run()
    assert "Not fitted" in (tmp_path / "laws.md").read_text()  # two runs of one size tell nothing


def test_records_of_ones_own_are_fitted(run, tmp_path):
    lines = [json.dumps(dataclasses.asdict(record)) for record in _records("chinchilla")]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    assert "page: laws.md, of 40 runs" in run("records=mine.jsonl")
    assert re.search(r"\| chinchilla +\| +alpha \|", (tmp_path / "laws.md").read_text())
    assert (tmp_path / "mine.png").exists()


def test_lines_of_another_family_are_kept(tmp_path):
    lines = [command.Row(f"a{i}", 0, 1, 1, 1, 1.0, 1, 1.0, 3.0, id=f"id{i}") for i in range(3)]
    jobs = [SimpleNamespace(id="id2"), SimpleNamespace(id="id9")]
    new = command.Row("a9", 0, 1, 1, 1, 1.0, 1, 1.0, 3.0, id="id9")
    kept = command.keep(tmp_path / "rows.jsonl", lines, jobs, [new])
    assert [row.id for row in kept] == ["id2", "id9"]
    assert [row.id for row in command.read_rows(tmp_path / "rows.jsonl")] == ["id2", "id9", "id0", "id1"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("widths=[]",), "widths=[] must be a list"),
        (("widths=[33]",), "must be multiples of 16"),
        (("workers=0",), "workers=0 is out of range"),
        (("records=none.jsonl",), "has no runs to fit"),
        (("records=bad.jsonl",), "bad.jsonl"),
        (("records=few.jsonl",), "few.jsonl has runs that no form can be fitted to: the form chinchilla has 5"),
        (("records=zero.jsonl",), "active=0 of"),
        (("records=few.jsonl", "page=docs/scaling.md"), "would overwrite docs/scaling.md"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(run, tmp_path, capsys, words, sentence):
    (tmp_path / "bad.jsonl").write_text('{"arm": "a"}\n')
    lines = [dataclasses.asdict(record) for record in _records("chinchilla")]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, lines[:3])) + "\n")
    (tmp_path / "zero.jsonl").write_text("\n".join(json.dumps(line | {"active": 0}) for line in lines) + "\n")
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line
    assert not (tmp_path / "laws.md").exists()
