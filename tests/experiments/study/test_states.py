"""Claims about how far a job is said to be, whatever its files hold."""

import builtins
import dataclasses
import errno
import io
import math
import os
import time

import pytest

from experiments.study.claims import claim_of, claimed, record_failure
from experiments.study.manifest import config_of, run_of
from experiments.study.states import State, counted, last_line, seconds_left, state_of, states_of
from moe.errors import BadInput
from moe.run.lock import Lock
from moe.run.summary import MetricsLine, read_summary
from tests.experiments.study.small_studies import job, work, write
from tests.small_runs import train_until


@pytest.fixture
def study(tmp_path, corpus):
    """(folder, its one job, the job's run)."""
    planned = job(corpus, train__steps=6)
    write(tmp_path / "study", [planned], retries=0)
    return tmp_path / "study", planned, run_of(tmp_path / "study", planned)


def begin(study, step=5):
    """Train until the run is killed at the beginning of `step`."""
    _, planned, run = study
    train_until(dataclasses.replace(config_of(planned), run=str(run)), step)
    with Lock(run):  # of the dead process, which this one is not
        pass


def test_a_job_waits_until_it_is_begun_and_is_interrupted_until_it_is_done(study):
    folder, planned, run = study
    assert state_of(folder, planned) == State("waiting", 0, 6)
    begin(study)
    state = state_of(folder, planned)
    assert (state.word, state.step, state.of, state.error) == ("interrupted", 4, 6, "")
    work(folder)
    state = state_of(folder, planned)
    assert (state.word, state.step, state.seconds_left, state.tries) == ("done", 6, 0.0, 0)
    assert state.summary == read_summary(run)


def test_a_job_runs_as_long_as_a_process_that_lives_is_at_it(study):
    folder, planned, run = study
    with claimed(folder.parent, planned.id):
        state = state_of(folder, planned)
        assert (state.word, state.step) == ("running", 0)
        assert state.holder.startswith(f"process {os.getpid()} on ")
    assert state_of(folder, planned).word == "waiting"
    begin(study)
    with Lock(run):  # the training command, which claims nothing
        state = state_of(folder, planned)
        assert (state.word, state.step) == ("running", 4)
        line = last_line(run)
        assert state.seconds_left == pytest.approx(2 * line.seconds / 4)


def test_a_failed_job_shows_the_last_line_of_its_error_until_it_is_done(study):
    folder, planned, _ = study
    record_failure(folder.parent, planned.id, ValueError("first"))
    record_failure(folder.parent, planned.id, ValueError("second"))
    state = state_of(folder, planned)
    assert (state.word, state.error, state.tries) == ("failed", "ValueError: second", 2)
    with claimed(folder.parent, planned.id):
        assert (state_of(folder, planned).word, state_of(folder, planned).error) == ("running", "")


def test_a_half_written_metrics_line_is_not_counted(study):
    folder, planned, run = study
    begin(study)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "sec')
    assert (state_of(folder, planned).word, state_of(folder, planned).step) == ("interrupted", 4)


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.yaml"])
def test_a_damaged_file_is_said_and_ends_nothing(name, study):
    folder, planned, run = study
    work(folder)
    if name == "metrics.jsonl":
        (run / "summary.json").unlink()
    (run / name).write_text('{"step": [\n{}\n')
    state = state_of(folder, planned)
    assert state.word == ("interrupted" if name == "metrics.jsonl" else "failed")
    assert name in state.error
    assert state.error.endswith(".")
    assert "\n" not in state.error


def test_the_run_of_other_settings_is_no_run_of_this_job(study, corpus):
    folder, planned, run = study
    other = dataclasses.replace(config_of(planned), run=str(run), seed=5)
    train_until(other, 3)
    (run / "summary.json").write_text((run / "config.yaml").read_text())
    assert state_of(folder, planned).word == "failed"


def test_the_time_left_is_steps_at_the_pace_so_far_whatever_a_clock_did():
    assert seconds_left(MetricsLine(25, 10.0), 100) == pytest.approx(30.0)
    assert seconds_left(MetricsLine(100, 10.0), 100) == 0
    for line in (None, MetricsLine(0, 0.0), MetricsLine(5, 0.0), MetricsLine(5, -3.0), MetricsLine(5, math.nan)):
        assert seconds_left(line, 100) is None


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_makes_no_living_process_dead(jump, study, monkeypatch):
    folder, planned, _ = study
    with claimed(folder.parent, planned.id):
        lock = next(claim_of(folder.parent, planned.id).glob("lock-*"))
        os.utime(lock, (time.time() + jump, time.time() + jump))
        assert state_of(folder, planned).word == "running"


def test_where_nothing_can_be_written_all_of_it_can_be_said(study, monkeypatch):
    """Every attempt to write is refused as a file system refuses it that is mounted to be read."""
    folder, planned, _ = study
    begin(study)
    real = builtins.open

    def refuse(path, mode="r", *rest, **named):
        if str(path).startswith(str(folder.parent)) and set("wax+") & set(mode):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, mode, *rest, **named)

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with claimed(folder.parent, planned.id), monkeypatch.context() as patch:
        for module in (builtins, io):
            patch.setattr(module, "open", refuse)
        for name in ("mkdir", "unlink", "rename", "replace", "utime"):
            patch.setattr(os, name, refused)
        with pytest.raises(OSError, match="Read-only"):
            (folder / "new").write_text("x")
        assert state_of(folder, planned).word == "running"


def test_states_are_counted_in_words(study, corpus):
    folder, planned, _ = study
    write(folder, [planned, job(corpus, seed=1), job(corpus, seed=2)])
    record_failure(folder.parent, planned.id, BadInput("x"))
    with claimed(folder.parent, job(corpus, seed=1).id):
        states = states_of(folder, write(folder, [planned, job(corpus, seed=1), job(corpus, seed=2)]))
    assert counted(states) == "1 running, 1 failed, 1 waiting"
    assert counted([]) == "no job"
