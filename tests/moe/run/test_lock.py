"""Claims about the lock of a run's folder: one process trains it, and whoever lost it writes nothing more."""

import dataclasses
import json
import os
import queue
import shutil
import threading
from pathlib import Path

import pytest

import moe.train.loop
from moe.data import owner
from moe.errors import BadInput
from moe.run import lock
from moe.run.jsonl import read_lines
from moe.run.lock import Lock, holding
from moe.run.summary import read_summary
from tests.small_runs import fate, files, noisy, settings, start, train, train_until


def held_by(folder: Path, other: owner.Owner, number: int = 1, age: float = 0.0) -> Path:
    """A lock as another process leaves it, last touched `age` seconds ago."""
    path = folder / f"lock-{number}"
    path.write_text(json.dumps(dataclasses.asdict(other) | {"host": "a-machine", "since": "noon"}))
    now = lock._now(folder)
    os.utime(path, (now - age, now - age))
    return path


ELSEWHERE = owner.Owner("0123abcd", 17, 1)


def test_a_second_process_is_refused_and_told_who_trains(tmp_path):
    with Lock(tmp_path):
        assert holding(tmp_path).startswith(f"process {os.getpid()} on ")
        with pytest.raises(BadInput, match=rf"is being trained by process {os.getpid()} on .* since"), Lock(tmp_path):
            pass
    assert holding(tmp_path) == ""
    with Lock(tmp_path):
        pass


def test_the_lock_of_a_dead_process_is_taken_at_once_and_one_elsewhere_when_it_is_silent(tmp_path):
    held_by(tmp_path, dataclasses.replace(owner.this_process(), start=1))  # the number was given again
    with Lock(tmp_path) as taken:
        assert taken.number == 2
        assert [path.name for path in tmp_path.iterdir()] == ["lock-2"]
    held_by(tmp_path, ELSEWHERE, number=3, age=lock.STALE - 30)
    with pytest.raises(BadInput, match="by process 17 on a-machine since noon"), Lock(tmp_path):
        pass
    held_by(tmp_path, ELSEWHERE, number=3, age=lock.STALE + 30)
    with Lock(tmp_path) as taken:
        assert taken.number == 4


def test_a_lock_that_cannot_be_read_holds_until_it_is_old(tmp_path):
    (tmp_path / "lock-1").touch()
    with pytest.raises(BadInput, match="a process whose lock cannot be read"), Lock(tmp_path):
        pass
    os.utime(tmp_path / "lock-1", (0, 0))
    with Lock(tmp_path):
        pass


def test_of_many_that_reach_for_a_stale_lock_one_gets_it(tmp_path):
    held_by(tmp_path, dataclasses.replace(owner.this_process(), start=1))
    ready, done, outcome = threading.Barrier(8), threading.Event(), queue.Queue()

    def reach() -> None:
        ready.wait()
        try:
            with Lock(tmp_path) as taken:
                outcome.put(taken.number)
                done.wait()
        except BadInput:
            outcome.put(None)

    threads = [threading.Thread(target=reach) for _ in range(8)]
    for thread in threads:
        thread.start()
    numbers = [outcome.get() for _ in threads]
    done.set()
    for thread in threads:
        thread.join()
    assert len([number for number in numbers if number]) == 1


def test_a_holder_touches_its_lock_so_that_others_see_it_live(tmp_path, monkeypatch):
    touched = queue.Queue()
    monkeypatch.setattr(lock, "BEAT", 0.001)
    monkeypatch.setattr(lock.os, "utime", touched.put)
    with Lock(tmp_path):
        assert touched.get(timeout=60) == tmp_path / "lock-1"


def test_a_finished_run_keeps_no_lock(tmp_path):
    with Lock(tmp_path):
        (tmp_path / "summary.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_run_in_training_is_refused_to_others_and_free_once_its_process_is_dead(corpus, whole, tmp_path, monkeypatch):
    cfg = settings(corpus, tmp_path / "run")
    process, _ = start(cfg, "step", tmp_path / "log")
    before = files(tmp_path / "run")
    for cfg.resume in (False, True):
        with pytest.raises(BadInput, match=f"is being trained by process {process.pid} on "):
            train(cfg)
    after = files(tmp_path / "run")
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }
    process.kill()
    process.join()
    noisy(monkeypatch)
    train(cfg)
    assert fate(tmp_path / "run") == fate(whole)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda run: held_by(run, ELSEWHERE, number=2), "was taken over by process 17 on a-machine"),
        (lambda run: (run / "lock-1").unlink(), "the file lock-1 was deleted"),
    ],
    ids=["taken over", "deleted"],
)
def test_a_process_that_lost_its_lock_writes_nothing_more(loss, message, corpus, tmp_path, monkeypatch):
    cfg, run = settings(corpus, tmp_path / "run"), tmp_path / "run"
    take_step = moe.train.loop.take_step

    def take(state, *arguments):
        if state.step + 1 == 5:
            loss(run)
        return take_step(state, *arguments)

    monkeypatch.setattr(moe.train.loop, "take_step", take)
    with pytest.raises(BadInput, match=message):
        train(cfg)
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == 4
    assert not (run / "summary.json").exists()


def test_who_waited_while_another_process_finished_the_run_only_reads_it(corpus, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    summary = (tmp_path / "run" / "summary.json").rename(tmp_path / "summary.json")
    enter = Lock.__enter__

    def finished_meanwhile(self):
        shutil.copy(summary, tmp_path / "run")
        return enter(self)

    monkeypatch.setattr(Lock, "__enter__", finished_meanwhile)
    monkeypatch.setattr(moe.train.loop, "restore", lambda *arguments: pytest.fail("it is trained again"))
    cfg = settings(corpus, tmp_path / "run", {"resume": True})
    assert train(cfg) == read_summary(whole)
    assert fate(tmp_path / "run") == fate(whole)


def test_a_folder_deleted_while_it_is_trained_ends_the_run_with_a_sentence(corpus, tmp_path, monkeypatch):
    take_step = moe.train.loop.take_step

    def take(state, *arguments):
        if state.step + 1 == 5:
            shutil.rmtree(tmp_path / "run")
        return take_step(state, *arguments)

    monkeypatch.setattr(moe.train.loop, "take_step", take)
    with pytest.raises(BadInput, match="was deleted while it was training"):
        train(settings(corpus, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_killed_run_is_gone_on_with_by_the_same_process(corpus, tmp_path):
    cfg = settings(corpus, tmp_path / "run")
    train_until(cfg, 5)
    cfg.resume = True
    train(cfg)
    assert not list((tmp_path / "run").glob("lock-*"))
