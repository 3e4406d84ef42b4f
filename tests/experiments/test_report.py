"""Claims about the command that reports a study."""

import json
import re
import sys

import pytest

from experiments import report as command
from experiments.study.manifest import FILE, read_study, run_of
from tests.experiments.study import small_studies
from tests.experiments.study.test_search import planned


def _report(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["report", *words])
    command.main()
    return capsys.readouterr().out


def _refused(monkeypatch, capsys, *words):
    with pytest.raises(SystemExit, match="2"):
        _report(monkeypatch, capsys, *words)
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_study_half_done_is_reported_and_then_whole(corpus, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    jobs = [small_studies.job(corpus, arm, seed) for arm in ("softmax", "sigmoid") for seed in (0, 1)]
    small_studies.write(folder, jobs[:1])
    small_studies.work(folder)
    (folder / FILE).unlink()
    small_studies.write(folder, jobs)
    out = _report(monkeypatch, capsys, f"run={folder}")
    assert out.startswith("Only softmax has finished runs")
    assert "3 of 4 runs are not in it: softmax seed 1 is waiting; sigmoid seed 0 is waiting" in out
    small_studies.work(folder)
    out = _report(monkeypatch, capsys, f"run={folder}")
    assert "over 2 seeds" in out.splitlines()[0]
    assert f"page: {folder / 'index.html'}" in out


def test_damaged_runs_are_named_and_left_out_and_the_rest_is_reported(corpus, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    jobs = [small_studies.job(corpus, arm, seed) for arm in ("softmax", "sigmoid") for seed in (0, 1)]
    small_studies.write(folder, jobs)
    small_studies.work(folder)
    (run_of(folder, jobs[0]) / "summary.json").write_text('{"name": ')
    metrics = run_of(folder, jobs[3]) / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("\n", "\n{\n", 1))  # half a line, in the middle
    out = _report(monkeypatch, capsys, f"run={folder}")
    assert "2 of 4 runs are not in it: softmax seed 0 is failed: " in out
    assert "summary.json is damaged" in out
    assert "sigmoid seed 1 is left out: " in out
    assert "metrics.jsonl, line 2 is damaged" in out
    page = (folder / "index.html").read_text()
    assert page.count("<li>") == 2
    assert re.findall(r'<td><a href="\.\./(\w+)">\d</a></td>', page) == [jobs[1].id, jobs[2].id]
    assert "<li>softmax seed 0 is failed: " in page
    assert "- sigmoid seed 1 is left out: " in (folder / "table.md").read_text()


def test_one_seed_of_each_arm_has_a_page_without_a_verdict(corpus, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    small_studies.write(folder, [small_studies.job(corpus, arm) for arm in ("softmax", "sigmoid")])
    small_studies.work(folder)
    out = _report(monkeypatch, capsys, f"run={folder}")
    assert out.splitlines()[0].endswith("nats in one seed, which gives no verdict.")
    page = (folder / "index.html").read_text()
    assert "<td>no verdict: one seed</td>" in page
    assert "±" not in page
    assert "<polygon" not in page  # no band over one seed


def test_a_search_is_reported_with_its_lowest_trial_and_no_verdict(corpus, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    folder = tmp_path / "study"
    planned(folder, corpus, 2, seeds=(0, 1), space={"model.moe.k": "choice 2,7"})  # of four experts
    assert "has no finished run to report" in _refused(monkeypatch, capsys, f"run={folder}")
    small_studies.work(folder)
    (arm,) = {job.arm for job in read_study(folder).jobs}
    first, last = _report(monkeypatch, capsys, f"run={folder}").splitlines()[:2]
    assert first.startswith(f"Of 1 finished trials {arm} has the lowest validation loss, ")
    assert "nats per token (model.moe.k=2): " in first
    assert last.startswith(f"1 of 3 runs are not in it: trial-{'01'.replace(arm[-1], '')} is left out: ")
    assert "model.moe.k=7 exceeds model.moe.n_experts=4" in last
    page = (folder / "index.html").read_text()
    assert "verdict</th>" not in page
    assert re.findall(r'href="(\.\./\w+)"', page)


def test_what_cannot_be_reported_is_refused_in_a_sentence(corpus, tmp_path, monkeypatch, capsys):
    assert "run= is needed" in _refused(monkeypatch, capsys)
    assert "is not a study's folder" in _refused(monkeypatch, capsys, f"run={tmp_path}")
    folder = tmp_path / "study"
    small_studies.write(folder, [small_studies.job(corpus, "softmax", 5)])
    assert "has no finished run to report" in _refused(monkeypatch, capsys, f"run={folder}")
    tree = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(tree | {"margin": 9.0}))
    assert "was edited" in _refused(monkeypatch, capsys, f"run={folder}")
