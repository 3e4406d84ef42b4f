"""Claims about claims: one process at a job, dead ones overtaken, failures kept."""

import json
import os
import subprocess
import sys

import pytest

from experiments.study.claims import (
    claim_of,
    claimed,
    failures,
    forget_failures,
    make_claims,
    record_failure,
    turn,
)
from moe.errors import BadInput

HOLD = """
import os, sys
from pathlib import Path
from experiments.study.claims import claimed
with claimed(Path(sys.argv[1]), "job") as ours:
    print(ours, flush=True)
    sys.stdin.readline()
    os._exit(9)  # as a kill: nothing is given back
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the claim on `job`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def test_a_claim_is_one_processs_and_a_dead_ones_is_overtaken(other, tmp_path):
    with claimed(tmp_path, "job") as ours:
        assert not ours
    with claimed(tmp_path, "another job") as ours:
        assert ours
    other.kill()
    other.wait()
    with claimed(tmp_path, "job") as ours:
        assert ours


def test_a_claim_is_given_back_at_the_end_and_after_an_error(tmp_path):
    def fail():
        with claimed(tmp_path, "job") as ours:
            assert ours
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()


def test_who_waits_for_a_turn_gets_it_when_it_is_free(other, tmp_path, monkeypatch):
    waits = []

    def pause(seconds):
        waits.append(seconds)
        other.communicate("\n")

    monkeypatch.setattr("time.sleep", pause)
    said = []
    with turn(tmp_path, "job", said.append):
        assert len(waits) == 1
    assert [line.startswith(f"job: waiting for process {other.pid} on ") for line in said] == [True]


def test_a_claim_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / ".claims").write_text("in the way")
    with pytest.raises(BadInput, match=r"\.claims/job cannot be created"), claimed(tmp_path, "job"):
        pass


def test_failures_are_kept_in_order_with_what_a_person_needs(tmp_path):
    make_claims(tmp_path, "job")
    for n in range(11):
        error = ValueError(f"number {n}\nmore") if n else BadInput("seed=x must be a whole number.")
        with pytest.raises(ValueError) as raised:
            raise error
        assert record_failure(tmp_path, "job", raised.value).tries == n + 1
    first, *_, last = failures(tmp_path, "job")
    assert (first.sentence, first.last, first.tries) == (
        "seed=x must be a whole number.", "seed=x must be a whole number.", 1,
    )  # fmt: skip
    assert (last.sentence, last.last, last.tries) == ("ValueError: number 10\nmore", "more", 11)
    assert "Traceback" in last.traceback
    assert last.when
    assert failures(tmp_path, "another") == []


def test_what_the_machine_refused_is_a_sentence(tmp_path):
    failure = record_failure(tmp_path, "job", OSError(28, "No space left on device", "metrics.jsonl"))
    assert failure.last == "metrics.jsonl: No space left on device: free some space, or choose another place."


def test_a_damaged_failure_still_counts(tmp_path):
    (make_claims(tmp_path, "job") / "failure-1.json").write_text("{")
    (failure,) = failures(tmp_path, "job")
    assert "failure-1.json is damaged" in failure.last


def test_forgotten_failures_count_no_more_and_are_kept(tmp_path):
    record_failure(tmp_path, "job", ValueError("x"))
    forget_failures(tmp_path, "job")
    assert failures(tmp_path, "job") == []
    kept = claim_of(tmp_path, "job") / "failed-before" / "failure-1.json"
    assert json.loads(kept.read_text())["sentence"] == "ValueError: x"


def test_a_failure_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match=r"failure-1\.json cannot be written \(No space left on device\)"):
        record_failure(tmp_path, "job", ValueError("x"))
