"""Claims about the race of two ranks with two threads: every layout has its turn, and shares are shares."""

import time

import torch

from experiments.suites import ranks


def test_every_layout_of_two_ranks_has_a_row_beside_one_process():
    asked = ranks.settings(torch.device("cpu"), False, 1)
    rows = [case.key | case.measure() | {"status": "measured"} for case in ranks.cases(asked)]
    assert [row["contestant"] for row in rows] == list(ranks.CONTESTANTS)
    assert rows[0]["ratio"] == 1
    assert rows[0]["transfers"] == 0
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert all(0 < row["transfers"] <= 1 for row in rows[1:])
    assert ranks.cells(rows[0])[:2] == ("1", "one process, 2 threads")


def test_transfers_that_overlap_count_once(monkeypatch):
    monkeypatch.setattr(ranks, "TRANSFER", ("outer", "inner"))

    def step():
        with torch.profiler.record_function("outer"), torch.profiler.record_function("inner"):
            end = time.perf_counter() + 0.05
            while time.perf_counter() < end:
                torch.ones(3).sum()

    assert ranks.transfers(step) <= 1
