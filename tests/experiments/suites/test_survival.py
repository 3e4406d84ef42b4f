"""Claims about two ranks under torchrun: whatever ends one of them, the run comes to the same end."""

import re

import pytest
import torch

from experiments.suites import survival

TOLD = {
    "SIGKILL": r"torchrun: local rank 1 ended with -9|rank 1 \(process \d+ on .*\) is gone, or stopped: .*",
    "SIGTERM to one": r"Stopped after step \d+ of 12, saved in \./run\. Go on with: .* run=\./run resume=true",
    "disk full": r"\./run/checkpoints/step-00000009: .* written \(No space left on device at rank 1\): it needs .*",
}


LEFT = ("SIGTERM to one", "disk full")  # half a minute each


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[pytest.mark.nightly] if fault in LEFT else []) for fault in TOLD]
)
def test_the_run_comes_to_the_end_of_one_that_nothing_happened_to_and_a_person_is_told(fault):
    row = survival.measured(fault)
    assert row["ended"]
    assert row["same"], row
    assert row["steps"] == survival.STEPS
    assert re.fullmatch(TOLD[fault], row["told"]), row["told"]


@pytest.mark.nightly
def test_a_run_that_does_not_come_to_its_end_is_wrong(monkeypatch):
    monkeypatch.setattr(survival, "SETTINGS", (*survival.SETTINGS, "train.batch_size=3"))
    with pytest.raises(survival.Wrong, match=r"train\.batch_size=3 in train\.accumulate=1 micro-batches cannot be sh"):
        survival.measured("none")


def test_the_table_says_what_is_wrong_and_nothing_of_this_machine():
    told = "rank 1 (process 12 on a-host) is gone, or stopped: see what happened there, and go on from ..."
    row = {
        "fault": "SIGSTOP",
        "status": "measured",
        "told": told,
        "ended": True,
        "same": False,
        "error": 3e-7,
        "to_go_on": 4.06,
    }
    assert survival.cells(row) == (
        "SIGSTOP", "step 7, rank 1", "rank 1 (process … on …) is gone, or stopped", "yes", "to 3e-07", "4.1",
    )  # fmt: skip


def test_every_fault_has_a_row():
    asked = survival.settings(torch.device("cpu"), True, 1)
    assert [case.key["fault"] for case in survival.cases(asked)] == list(survival.FAULTS)
