"""Claims about a worker: it does what is left to do, once, and no failure ends it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from experiments.study import worker
from experiments.study.claims import claim_of, claimed, failures
from experiments.study.manifest import run_of
from moe.errors import BadInput
from moe.run import jsonl
from moe.run.lock import Lock
from tests.experiments.study.small_studies import fates, job, quick, work, write
from tests.small_runs import Killed, fate, train, train_until


def told(events):
    return [(event.what, event.job) for event in events]


def test_a_worker_does_every_job_once_and_a_second_finds_nothing_to_do(tmp_path, corpus):
    jobs = [job(corpus, arm, seed) for arm in ("softmax", "sigmoid") for seed in (0, 1)]
    study = write(tmp_path / "study", jobs)
    events = work(tmp_path / "study")
    assert told(events) == [(what, each.id) for each in jobs for what in ("begun", "done")]
    losses = {event.job: event.loss for event in events if event.what == "done"}
    assert len(set(losses.values())) == len(jobs)
    before = fates(tmp_path / "study", study)
    assert work(tmp_path / "study") == []
    assert fates(tmp_path / "study", study) == before


def test_a_run_is_what_the_training_command_makes_of_the_same_settings(tmp_path, corpus):
    planned = job(corpus, seed=3)
    study = write(tmp_path / "study", [planned])
    work(tmp_path / "study")
    train(dataclasses.replace(worker.config_of(planned), run=str(tmp_path / "alone")))
    assert fates(tmp_path / "study", study)[planned.id] == fate(tmp_path / "alone")


def test_an_interrupted_run_is_gone_on_with_to_the_same_end(tmp_path, corpus):
    planned = job(corpus)
    for name in ("whole", "killed"):
        write(tmp_path / name / "study", [planned])
    work(tmp_path / "whole" / "study")
    run = run_of(tmp_path / "killed" / "study", planned)
    train_until(dataclasses.replace(worker.config_of(planned), run=str(run)), 4)
    work(tmp_path / "killed" / "study")
    assert "step 1/4" not in (claim_of(tmp_path / "killed", planned.id) / "log.txt").read_text()
    assert fate(run) == fate(run_of(tmp_path / "whole" / "study", planned))


def test_two_studies_side_by_side_share_the_job_they_have_in_common(tmp_path, corpus):
    shared = job(corpus)
    one = write(tmp_path / "one", [shared, job(corpus, seed=1)])
    other = write(tmp_path / "other", [job(corpus, "sigmoid"), shared])
    work(tmp_path / "one")
    before = fates(tmp_path / "one", one)
    assert told(work(tmp_path / "other")) == [("begun", other.jobs[0].id), ("done", other.jobs[0].id)]
    assert fates(tmp_path / "one", one) == before


def test_a_job_that_fails_is_tried_again_as_often_as_asked_and_ends_nothing(tmp_path, corpus):
    bad = job(corpus, data__path=str(tmp_path / "nowhere"))
    good = job(corpus, seed=1)
    write(tmp_path / "study", [bad, good], retries=2)
    events = work(tmp_path / "study")
    assert [what for what, which in told(events) if which == good.id] == ["begun", "done"]
    assert [event.tries for event in events if event.what == "failed"] == [1, 2, 3]
    assert all(failure.tries == n for n, failure in enumerate(failures(tmp_path, bad.id), 1))
    assert "nowhere" in failures(tmp_path, bad.id)[0].last
    assert work(tmp_path / "study") == []


def test_a_mistake_in_the_code_is_recorded_with_its_traceback(tmp_path, corpus, monkeypatch):
    planned = job(corpus)
    write(tmp_path / "study", [planned], retries=0)

    def broken(cfg, say):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(worker, "train", broken)
    (_, failed) = work(tmp_path / "study")
    assert (failed.what, failed.error) == ("failed", "ZeroDivisionError: division by zero")
    assert "in broken" in failures(tmp_path, planned.id)[0].traceback


def test_a_job_in_other_hands_is_left_alone(tmp_path, corpus, monkeypatch):
    jobs = [job(corpus), job(corpus, seed=1)]
    write(tmp_path / "study", jobs)
    with claimed(tmp_path, jobs[0].id):
        assert told(work(tmp_path / "study", patient=False)) == [("begun", jobs[1].id), ("done", jobs[1].id)]
    assert told(work(tmp_path / "study", patient=False)) == [("begun", jobs[0].id), ("done", jobs[0].id)]


def test_a_run_that_the_training_command_is_at_is_left_alone(tmp_path, corpus):
    planned = job(corpus)
    write(tmp_path / "study", [planned], retries=0)
    run = run_of(tmp_path / "study", planned)
    train_until(dataclasses.replace(worker.config_of(planned), run=str(run)), 3)
    with Lock(run):
        assert work(tmp_path / "study", patient=False) == []
    assert failures(tmp_path, planned.id) == []
    assert told(work(tmp_path / "study")) == [("begun", planned.id), ("done", planned.id)]


def test_a_patient_worker_waits_for_what_others_are_at(tmp_path, corpus, monkeypatch):
    """And takes over what they leave."""
    planned = job(corpus)
    write(tmp_path / "study", [planned])
    holder = claimed(tmp_path, planned.id)
    holder.__enter__()
    events = []
    with quick():
        monkeypatch.setattr("time.sleep", lambda seconds: holder.__exit__(None, None, None))
        worker.work(tmp_path / "study", events.append)
    assert told(events) == [("begun", planned.id), ("done", planned.id)]


def test_a_killed_workers_claim_is_overtaken(tmp_path, corpus, monkeypatch):
    """By another process: the lock of a process that lives is not."""
    planned = job(corpus)
    write(tmp_path / "study", [planned])
    pid = os.fork()
    if pid == 0:
        worker.claimed(tmp_path, planned.id).__enter__()
        os._exit(9)
    os.waitpid(pid, 0)
    assert list(claim_of(tmp_path, planned.id).glob("lock-*"))
    assert told(work(tmp_path / "study", patient=False)) == [("begun", planned.id), ("done", planned.id)]


def test_a_kill_leaves_no_failure(tmp_path, corpus, monkeypatch):
    planned = job(corpus)
    write(tmp_path / "study", [planned])

    def killed(cfg, say):
        raise Killed

    monkeypatch.setattr(worker, "train", killed)
    with pytest.raises(Killed):
        work(tmp_path / "study")
    assert failures(tmp_path, planned.id) == []


def test_what_a_run_says_goes_to_its_log(tmp_path, corpus, capfd):
    planned = job(corpus)
    write(tmp_path / "study", [planned])
    work(tmp_path / "study")
    log = (claim_of(tmp_path, planned.id) / "log.txt").read_text()
    assert f"run: {tmp_path / planned.id} is finished" in log
    assert "step 4/4" in log
    assert capfd.readouterr().out == ""


def test_a_full_disk_is_a_sentence_of_the_job_and_the_others_are_still_trained(tmp_path, corpus, monkeypatch):
    full, good = job(corpus), job(corpus, seed=1)
    write(tmp_path / "study", [full, good], retries=0)
    write_line = jsonl.Lines.write

    def fill(lines, line):
        if full.id in str(lines.path):
            raise BadInput(f"{lines.path} cannot be written (No space left on device).")
        write_line(lines, line)

    monkeypatch.setattr(jsonl.Lines, "write", fill)
    _, failed, *others = work(tmp_path / "study")
    assert failed.error.startswith(
        f"{tmp_path / full.id / 'metrics.jsonl'} cannot be written (No space left on device)"
    )
    assert told(others) == [("begun", good.id), ("done", good.id)]


def test_a_disk_that_takes_not_even_the_failure_ends_the_worker_in_a_sentence(tmp_path, corpus, monkeypatch):
    """Else it would try the same again for ever."""
    planned = job(corpus)
    write(tmp_path / "study", [planned], retries=0)

    def full(path, text):
        raise BadInput(f"{path} cannot be written (No space left on device).")

    monkeypatch.setattr(jsonl, "write_atomically", full)
    with pytest.raises(BadInput, match=r"failure-1\.json cannot be written \(No space left on device\)"):
        work(tmp_path / "study")
    monkeypatch.undo()
    assert told(work(tmp_path / "study")) == [("begun", planned.id), ("done", planned.id)]


def test_a_run_folder_of_another_version_is_a_failure_that_says_so(tmp_path, corpus):
    planned, good = job(corpus), job(corpus, seed=1)
    write(tmp_path / "study", [planned, good], retries=0)
    run = run_of(tmp_path / "study", planned)
    run.mkdir()
    (run / "config.yaml").write_text("model: {width: 32}\n")
    _, failed, *others = work(tmp_path / "study")
    assert failed.error.startswith(f"{run / 'config.yaml'}: model.width is not a setting")
    assert told(others) == [("begun", good.id), ("done", good.id)]


def start(folder, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.study.worker", str(folder), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_worker_whose_starter_is_gone_saves_and_ends(tmp_path, corpus):
    planned = job(corpus, train__steps=100_000)
    write(tmp_path / "study", [planned])
    process = start(tmp_path / "study", "--tied")
    assert json.loads(process.stdout.readline())["what"] == "begun"
    process.stdin.close()
    assert process.wait(60) in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert failures(tmp_path, planned.id) == []


def test_a_worker_of_no_study_refuses_in_a_sentence(tmp_path, capsys):
    assert worker.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: run={tmp_path} is not a study's folder: it has no study.json.\n")
