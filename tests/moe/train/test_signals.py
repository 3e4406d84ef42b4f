"""Claims about SIGINT, SIGTERM and SIGHUP: whatever a run did, it saves, says how to go on, and nothing is lost."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

import experiments.train
from moe.run import checkpoint
from moe.run.jsonl import read_lines
from moe.train.signals import SIGNALS, catch_signals
from tests.small_runs import STEPS, fate, noisy, settings, start, train

# Phase -> the step that is saved: a step and a save are finished, an evaluation is given up and made up for later.
PHASES = {"first evaluation": 0, "step": 5, "evaluation": 4, "save": 3, "last evaluation": STEPS}


@pytest.fixture
def started(corpus, tmp_path) -> Iterator[Callable[[str], tuple[Any, Any]]]:
    """(phase) -> (process, pipe) of a run in a folder whose name has a space, which has reached the phase and waits."""
    processes = []

    def begin(phase: str) -> tuple[Any, Any]:
        process, pipe = start(settings(corpus, tmp_path / "my run"), phase, tmp_path / "log")
        processes.append(process)
        return process, pipe

    yield begin
    for process in processes:
        process.kill()
        process.join()


def paste(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as a shell would, but in this process."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "experiments.train"]
    monkeypatch.setattr(sys, "argv", words[2:])
    monkeypatch.setattr(experiments.train, "train", train)
    GlobalHydra.instance().clear()
    experiments.train.main()


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *((phase, signal.SIGTERM) for phase in PHASES),
        ("step", signal.SIGINT),
        ("evaluation", signal.SIGINT),
        ("step", signal.SIGHUP),
    ],
)
def test_a_signal_saves_and_the_printed_command_leads_to_the_uninterrupted_result(
    phase, number, started, whole, tmp_path, monkeypatch
):
    process, pipe = started(phase)
    os.kill(process.pid, number)
    pipe.send("go on")
    process.join()
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 128 + number, log

    run = tmp_path / "my run"
    saved = checkpoint.latest(run / "checkpoints", pytest.fail)
    assert saved.name == f"step-{PHASES[phase]:08d}"
    assert not (run / "summary.json").exists()
    if "evaluation" in phase:
        assert "val" not in read_lines(run / "metrics.jsonl")[-1], "the evaluation was finished first"
    last = log.splitlines()[-1]
    assert last.startswith(f"Stopped after step {PHASES[phase]} of {STEPS}, saved in {run}.")

    noisy(monkeypatch)
    paste(re.search(r"Go on with: (.*)", last)[1], monkeypatch)
    assert fate(run) == fate(whole)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(STEPS + 1))
    ours, theirs = (checkpoint._good(folder / "checkpoints") for folder in (run, whole))
    common = {path.name for path in ours} & {path.name for path in theirs}
    assert f"step-{STEPS:08d}" in common
    assert {p.name: score for p, score in ours.items() if p.name in common} == {
        p.name: score for p, score in theirs.items() if p.name in common
    }, "a checkpoint whose evaluation was cut short has no score"


def test_a_second_signal_acts_as_it_always_did():
    before = signal.getsignal(signal.SIGINT)
    with catch_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_hangup_that_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with catch_signals() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert stop.number == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before
