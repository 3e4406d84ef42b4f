"""Claims about the plan of a study: what a job is called, what is refused, and what a refusal says."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from experiments.study.manifest import (
    FILE,
    check_same_plan,
    config_of,
    finished,
    job_id,
    planned_differences,
    read_study,
    run_of,
    runs_of,
    write_study,
)
from moe.config.run import Config, build
from moe.errors import BadInput
from tests.experiments.study.small_studies import job, study_of, work, write


def test_a_plan_comes_back_as_it_was_written(tmp_path, corpus):
    jobs = [job(corpus, arm, seed) for arm in ("softmax", "sigmoid") for seed in (0, 1)]
    study = write(tmp_path / "study", jobs, twins={"softmax": "sigmoid"}, retries=3, commit="abc", precision="fp32")
    assert read_study(tmp_path / "study") == study
    assert study.arms == ["softmax", "sigmoid"]
    assert config_of(study.jobs[1]).seed == 1


def test_an_id_is_twelve_hex_digits_of_what_decides_the_result_and_of_nothing_else():
    cfg = Config()
    assert re.fullmatch("[0-9a-f]{12}", job_id(cfg))
    elsewhere = build({"run": "there", "resume": True, "log": {"every": 3}, "data": {"cache": "c", "workers": 1}})
    assert job_id(elsewhere) == job_id(cfg)
    for tree in (
        {"seed": 1},
        {"optim": {"lr": 0.1}},
        {"router": {"name": "sigmoid"}},
        {"train": {"precision": "fp32"}},
    ):
        assert job_id(build(tree)) != job_id(cfg)


@pytest.mark.parametrize(
    ("folder", "runs"), [("runs/study", "runs"), ("study", "."), ("/a/b", "/a"), (".", ".."), ("runs/..", "..")]
)
def test_runs_lie_beside_the_study(folder, runs, tmp_path, monkeypatch):
    (tmp_path / "inside" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "inside")
    assert os.path.abspath(runs_of(Path(folder))) == os.path.abspath(runs)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda tree: tree | {"margin": 0.5}, "was edited: it is not what its checksum was made of"),
        (lambda tree: {**tree, "jobs": tree["jobs"][:-1]}, "was edited"),
        (lambda tree: {key: value for key, value in tree.items() if key != "checksum"}, "was edited"),
        (lambda tree: tree | {"schema": 7}, r"was written by a newer version \(schema 7; this one reads 1\)"),
        (lambda tree: [tree], "is damaged: it holds no settings"),
    ],
)
def test_an_edited_plan_is_refused_in_a_sentence(edit, why, tmp_path, corpus):
    write(tmp_path, [job(corpus), job(corpus, seed=1)])
    tree = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(edit(tree)))
    with pytest.raises(BadInput, match=why) as refused:
        read_study(tmp_path)
    assert str(tmp_path / FILE) in str(refused.value)


def test_a_plan_cut_short_and_a_folder_without_one_are_told_apart(tmp_path, corpus):
    write(tmp_path / "runs" / "mine", [job(corpus)])
    with pytest.raises(
        BadInput, match=f"runs is not a study's folder: it has no study.json; there are {tmp_path}/runs/mine"
    ):
        read_study(tmp_path / "runs")
    path = tmp_path / "runs" / "mine" / FILE
    path.write_text(path.read_text()[:-40])
    with pytest.raises(BadInput, match=r"study\.json is damaged: .*; restore it, or delete it and repeat"):
        read_study(tmp_path / "runs" / "mine")


def test_a_plan_that_cannot_be_written_leaves_the_one_that_is_there(tmp_path, corpus, monkeypatch):
    study = write(tmp_path, [job(corpus)])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BadInput, match=r"study\.json cannot be written \(No space left on device\)"):
        write_study(tmp_path, dataclasses.replace(study, margin=1.0))
    assert read_study(tmp_path) == study
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_another_plan_is_refused_with_what_differs(corpus):
    old = study_of([job(corpus, "softmax", seed) for seed in (0, 1)] + [job(corpus, "sigmoid")])
    check_same_plan(old, dataclasses.replace(old, retries=9, command="other", commit="later"), Path("runs/s"))
    changed = [job(corpus, "softmax", seed, optim__lr=0.5) for seed in (0, 1, 2)]
    with pytest.raises(BadInput) as refused:
        check_same_plan(old, study_of(changed, margin=0.5), Path("runs/s"))
    assert str(refused.value) == (
        "run=runs/s has another plan than this command makes: 1 job more (softmax seed 2), 1 job less (sigmoid seed "
        "0), optim.lr=0.5 where it was 0.002 (in softmax seed 0, softmax seed 1), study.margin=0.5 where it was 0.01; "
        "go on with its own by run=runs/s alone, or choose another folder beside it, where the 0 runs in common are "
        "shared."
    )


def test_more_seeds_are_another_study_that_shares_the_runs(corpus):
    old, new = (study_of([job(corpus, seed=seed) for seed in range(n)]) for n in (2, 3))
    with pytest.raises(BadInput, match=r"1 job more \(softmax seed 2\); .* the 2 runs in common are shared"):
        check_same_plan(old, new, Path("runs/s"))


def test_a_finished_run_counts_only_with_the_settings_of_the_plan(tmp_path, corpus):
    planned = job(corpus)
    write(tmp_path / "study", [planned])
    run = run_of(tmp_path / "study", planned)
    assert finished(run, config_of(planned)) is None
    work(tmp_path / "study")
    assert finished(run, config_of(planned)).steps == 4
    other = dataclasses.replace(config_of(planned), seed=3)
    with pytest.raises(BadInput, match=r"is not the run that was planned: it has seed=0, and the plan 3; move it"):
        finished(run, other)
    (run / "summary.json").write_text("{")
    with pytest.raises(BadInput, match=r"summary\.json is damaged"):
        finished(run, config_of(planned))


def test_what_a_run_resolves_by_itself_is_no_difference():
    plan, run = Config(), Config(dispatch="torch", run="there")
    run.optim.warmup, run.model.vocab_size, run.train.device = 5, 300, "cpu"
    assert list(planned_differences(plan, run)) == []
    run.optim.lr, plan.dispatch = 0.5, "reference"
    assert [key for key, _, _ in planned_differences(plan, run)] == ["dispatch", "optim.lr"]
