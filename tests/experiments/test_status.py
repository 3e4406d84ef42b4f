"""Claims about the command that says how far a study is."""

import dataclasses
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from experiments import status
from experiments.study.claims import claimed, record_failure
from experiments.study.manifest import Search, write_study
from moe.errors import BadInput
from tests.experiments.study.small_studies import job, study_of, work, write


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments) -> (exit status, stdout, stderr) of `experiments.status`."""

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["status.py", *arguments])
        GlobalHydra.instance().clear()
        code = 0
        try:
            status.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_every_job_has_a_row_that_says_how_far_it_is(command, tmp_path, corpus):
    jobs = [job(corpus, seed=seed) for seed in range(4)]
    folder = tmp_path / "study"
    write(folder, jobs[:1])
    work(folder)
    write(folder, jobs, retries=0)
    for _ in range(2):
        record_failure(tmp_path, jobs[1].id, BadInput("data.path=nowhere does not exist."))
    with claimed(tmp_path, jobs[2].id):
        code, out, err = command(f"run={folder}")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert [(row[0], row[1], row[2], row[3]) for row in rows[2:6]] == [
        ("softmax seed 0", jobs[0].id, "done", "4/4"),
        ("softmax seed 1", jobs[1].id, "failed (2x)", "0/4"),
        ("softmax seed 2", jobs[2].id, "running", "0/4"),
        ("softmax seed 3", jobs[3].id, "waiting", "0/4"),
    ]
    assert float(rows[2][5]) > 1
    assert out.splitlines()[6:] == [
        "softmax seed 1: data.path=nowhere does not exist.",
        f"{folder}: 1 done, 1 running, 1 failed, 1 waiting",
    ]


def test_of_a_search_it_says_what_is_best_so_far_and_what_was_refused(command, tmp_path, corpus):
    space = {"model.moe.k": "choice 2,7"}  # of four experts
    plan = study_of([job(corpus)], base="")
    plan = dataclasses.replace(plan, jobs=[], search=Search(space, 2, 0, [job(corpus).config]))
    write_study(tmp_path / "study", plan)
    code, out, err = command(f"run={tmp_path / 'study'}")
    assert (code, err) == (0, "")
    assert out.splitlines()[2:] == [f"{tmp_path / 'study'}: no job", "search: 0 of 2 trials done"]
    work(tmp_path / "study")
    code, out, err = command(f"run={tmp_path / 'study'}")
    assert (code, err) == (0, "")
    row, refused, states, best = out.splitlines()[2:]
    loss = row.strip("|").split("|")[-1].strip()
    assert ": model.moe.k=7 exceeds model.moe.n_experts=4: " in refused
    assert states.endswith(": 1 done")
    trial = row.split()[1]
    assert best == f"search: 1 of 2 trials done, 1 failed; the best so far is {trial}, val loss {loss}: model.moe.k=2"


def test_the_time_left_is_in_hours_minutes_and_seconds():
    assert [status.words_of(seconds) for seconds in (0.2, 160, 90061)] == ["0:00:00", "0:02:40", "1 day, 1:01:01"]


def test_a_folder_of_no_study_and_an_edited_plan_are_a_sentence(command, tmp_path, corpus):
    assert command() == (2, "", "error: run= is needed: the folder of a study, like run=runs/first-study.\n")
    code, out, err = command(f"run={tmp_path}")
    assert (code, out) == (2, "")
    assert err == f"error: run={tmp_path} is not a study's folder: it has no study.json.\n"
    write(tmp_path, [job(corpus)])
    path = tmp_path / "study.json"
    path.write_text(path.read_text().replace('"margin": 0.01', '"margin": 0.02'))
    code, out, err = command(f"run={tmp_path}")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path} was edited: it is not what its checksum was made of; restore it")
