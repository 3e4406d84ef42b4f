"""Claims about the suite that times run.c against this project's generator."""

import shutil

import pytest
import torch

from experiments.suites import cases, generation
from experiments.suites.cases import Rows, run
from moe.errors import BadInput
from tests.experiments.bench_command import command

CPU = torch.device("cpu")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler: cc is not on the path")
def test_every_contestant_says_the_same_tokens_and_has_a_ratio(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    command(monkeypatch, "suite=generation", "sizes=smoke", f"out={out}")
    (row,) = cases.read(out)
    assert row["status"] == "measured", row
    names = ["torch", *generation.PROGRAMS, *(() if row["absent"] else generation.LLAMA_CPP)]
    for figure in ("tokens_per_s", "processor_s", "faster", "cheaper"):
        assert list(row[figure]) == names
        assert all(value > 0 for value in row[figure].values())
    assert row["faster"]["torch"] == row["cheaper"]["torch"] == 1
    assert {"commit", "device", "versions", "command", "threads"} <= row.keys()
    assert "native int8" in capsys.readouterr().out


def test_seconds_are_of_the_tokens_between_few_and_many(monkeypatch):
    """A program that takes 5 seconds to start and 2 for each token."""
    now = [0.0]
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now[0])

    def say(n):
        now[0] += 5 + 2 * n
        return []

    assert generation.spent(say, generation.Asked((), 3, 13, 1)).clock == pytest.approx(2)


def test_other_tokens_are_not_timed_and_no_compiler_is_no_failure(monkeypatch, tmp_path):
    asked = generation.settings(CPU, False, 1)
    monkeypatch.setattr(generation, "llama_cpp", lambda model, place: ({}, "not installed"))
    monkeypatch.setattr(generation, "programs", lambda model, place: {name: (lambda n: [1] * n) for name in ("run.c",)})
    (row,) = run(generation.cases(asked), Rows(tmp_path / "wrong.jsonl", {}, resume=False), CPU)
    assert (row["status"], row["error"]) == ("wrong", "run.c says other tokens than torch")
    assert "run.c says other tokens" in " ".join(generation.cells(row))
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    (row,) = run(generation.cases(asked), Rows(tmp_path / "absent.jsonl", {}, resume=False), CPU)
    assert row["status"] == "absent"
    assert row["error"].startswith("there is no C compiler")


def test_a_gpu_is_refused():
    with pytest.raises(BadInput, match="device=cuda means nothing to suite=generation"):
        generation.settings(torch.device("cuda"), True, 5)
