"""Rows are written as they are made, kept across runs of the same code, and honest about what was not measured."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.suites import cases
from experiments.suites.cases import Absent, Case, DeviceLost, LeftOut, Rows, Wrong, run
from moe.errors import BadInput

CPU = torch.device("cpu")
COMMON = {"device": "a CPU", "commit": "c1", "code": "k1"}
ROOT = Path(__file__).parents[3]


def _case(name, function=lambda: {"us": 1.0}):
    return Case({"suite": "s", "op": name}, function)


def _raising(error):
    def measure():
        raise error

    return measure


def _read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_carries_its_key_its_status_its_seconds_and_the_facts(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    (row,) = run([_case("a")], Rows(path, COMMON, resume=False), CPU)
    assert _read(path) == [row]
    assert row == COMMON | {"suite": "s", "op": "a", "status": "measured", "us": 1.0, "seconds": row["seconds"]}


def test_a_row_is_on_the_disk_before_the_next_is_measured(tmp_path):
    path = tmp_path / "rows.jsonl"
    seen = []
    run([_case("a"), _case("b", lambda: seen.append(len(_read(path))) or {})], Rows(path, COMMON, resume=False), CPU)
    assert seen == [1]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (Wrong("off by 2"), "wrong", "off by 2"),
        (Absent("liger not installed"), "absent", "liger not installed"),
        (LeftOut("takes 9 GiB"), "left out", "takes 9 GiB"),
        (ValueError("bad\n  tile"), "failed", "ValueError: bad tile"),
        (torch.OutOfMemoryError(), "failed", "OutOfMemoryError: no message"),
    ],
)
def test_what_was_not_measured_says_why_and_the_rest_goes_on(error, status, words, tmp_path):
    found = run([_case("a", _raising(error)), _case("b")], Rows(tmp_path / "r.jsonl", COMMON, resume=False), CPU)
    assert [row["status"] for row in found] == [status, "measured"]
    assert found[0]["error"] == words


def test_a_case_may_call_its_own_values_wrong_and_keep_them(tmp_path):
    (row,) = run(
        [_case("a", lambda: {"status": "wrong", "error": "x", "errors": {"y": 0.5}})],
        Rows(tmp_path / "r.jsonl", COMMON, resume=False), CPU,
    )  # fmt: skip
    assert (row["status"], row["errors"]) == ("wrong", {"y": 0.5})


def test_measured_rows_of_the_same_code_are_kept_and_all_others_made_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    run([_case("a"), _case("b", _raising(ValueError()))], Rows(path, COMMON, resume=False), CPU)
    made = []
    count = lambda name: _case(name, lambda: made.append(name) or {})
    found = run([count("a"), count("b"), count("c")], Rows(path, COMMON, resume=True), CPU)
    assert made == ["b", "c"]
    assert [row["status"] for row in found] == 3 * ["measured"]
    assert found[0]["us"] == 1.0
    for change in ({"commit": "c2"}, {"code": "k2"}, {"device": "a GPU"}):
        made.clear()
        run([count("a")], Rows(path, COMMON | change, resume=True), CPU)
        assert made == ["a"]
    made.clear()
    run([count("a")], Rows(path, COMMON | {"dirty": True}, resume=True), CPU)  # another file of the tree was touched
    assert not made


def test_without_resume_old_rows_go_once_there_is_a_new_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    run([_case("a")], Rows(path, COMMON, resume=False), CPU)
    again = Rows(path, COMMON, resume=False)
    assert len(_read(path)) == 1
    run([_case("b")], again, CPU)
    assert [row["op"] for row in _read(path)] == ["b"]


def test_after_the_budget_no_row_is_started_and_the_rest_is_listed(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(cases, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = run([_case(name) for name in "abc"], Rows(tmp_path / "r.jsonl", COMMON, resume=False), CPU, budget=25)
    assert [row["status"] for row in found] == ["measured", "left out", "left out"]
    assert found[1]["error"] == "the 25 s for this were used up"


def test_a_number_that_is_not_finite_is_null(tmp_path):
    values = {"us": float("nan"), "errors": {"y": float("inf")}, "list": [1.0, float("nan")]}
    (row,) = run([_case("a", lambda: values)], Rows(tmp_path / "r.jsonl", COMMON, resume=False), CPU)
    assert (row["us"], row["errors"], row["list"]) == (None, {"y": None}, [1.0, None])


def test_a_line_cut_short_is_dropped_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    run([_case("a")], Rows(path, COMMON, resume=False), CPU)
    path.write_text(path.read_text() + '{"suite": "s", "op"')
    run([_case("a"), _case("b")], Rows(path, COMMON, resume=True), CPU)
    assert [row["op"] for row in _read(path)] == ["a", "b"]


KILLED = """
import sys, time, torch
from pathlib import Path
from experiments.suites.cases import Case, Rows, run
rows = Rows(Path(sys.argv[1]), {"device": "a CPU", "commit": "c1", "code": "k1"}, resume=True)
slow = lambda: print("here", flush=True) or time.sleep(60) or {}
cases = [Case({"suite": "s", "op": "a"}, lambda: {"us": 1.0}), Case({"suite": "s", "op": "b"}, slow)]
run(cases, rows, torch.device("cpu"))
"""


def test_a_kill_costs_the_row_in_the_making_which_is_noted_and_after_two_left_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [row["op"] for row in _read(path)] == ["a"]
    again = Rows(path, COMMON, resume=True)
    (died,) = [row for row in _read(path) if row["op"] == "b"]
    assert (died["status"], died["died"]) == ("failed", True)
    assert again.kept({"suite": "s", "op": "b"}) is None  # once may be an accident
    path.with_suffix(".running").write_text(json.dumps({"suite": "s", "op": "b"}))
    assert Rows(path, COMMON, resume=True).kept({"suite": "s", "op": "b"})["error"] == died["error"]


def test_an_interrupt_ends_the_run_and_is_no_death(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run([_case("a"), _case("b", _raising(KeyboardInterrupt()))], Rows(path, COMMON, resume=False), CPU)
    assert [row["op"] for row in _read(path)] == ["a"]
    assert not path.with_suffix(".running").exists()


def test_a_device_that_does_not_recover_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cases.timing, "synchronize", _raising_for_any(RuntimeError("illegal memory access")))
    path = tmp_path / "rows.jsonl"
    with pytest.raises(DeviceLost, match="s a: RuntimeError: illegal"):
        run([_case("a", _raising(RuntimeError("illegal"))), _case("b")], Rows(path, COMMON, resume=False), CPU)
    (row,) = _read(path)
    assert row["died"]
    assert row["lost"]


def _raising_for_any(error):
    def function(*given):
        raise error

    return function


def test_errors_name_no_folder_of_the_machine():
    text = cases.sentence(RuntimeError("cannot open /nowhere/at/all/lib.so: see counts=RUN/routing/a or 3/4"))
    assert text == "RuntimeError: cannot open lib.so: see counts=RUN/routing/a or 3/4"


def test_keys_are_shown_in_a_line():
    assert cases.describe({"suite": "s", "T": 3, "tile": {"m": 64, "tma": True}}) == "s T=3 64/1"


def test_a_full_disk_leaves_the_old_rows_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    run([_case("a")], Rows(path, COMMON, resume=False), CPU)
    rows = Rows(path, COMMON, resume=True)
    monkeypatch.setattr(os, "replace", _raising_for_any(OSError(28, "No space left on device")))
    with pytest.raises(BadInput, match=r"rows\.jsonl cannot be written \(No space left on device\)\.$"):
        rows.add({"suite": "s", "op": "b", "status": "measured"})
    assert list(tmp_path.iterdir()) == [path]
    assert [row["op"] for row in _read(path)] == ["a"]


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        Rows(tmp_path / "file" / "rows.jsonl", COMMON, resume=False)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(BadInput, match="cannot be written"):
        run([_case("a")], Rows(tmp_path / "folder.jsonl", COMMON, resume=False), CPU)
