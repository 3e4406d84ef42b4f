"""Gate, plan and combine, timed against the sequence by hand."""

import pytest
import torch

from experiments.suites import cases, routing
from experiments.suites.cases import Rows, run
from tests import fake_cuda
from tests.experiments.bench_command import command

pytestmark = fake_cuda.interpreted
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_routing_times_every_backend_against_the_sequence_by_hand(monkeypatch, tmp_path, capsys):
    out = tmp_path / "routing.jsonl"
    command(monkeypatch, "suite=routing", "sizes=smoke", "width=8", "d_expert=8", f"out={out}")
    found = cases.read(out)
    assert [(row["T"], row["E"], row["K"], row["D"], row["F"]) for row in found] == [(64, 4, 1, 8, 8), (64, 4, 2, 8, 8)]
    for row in found:
        assert list(row["total_s"]) == ["by hand", "reference", "torch", "triton"]
        for name, parts in row["seconds_of"].items():
            assert row["total_s"][name] == pytest.approx(sum(parts[part] for part in ("gate", "plan", "combine")))
            assert row["by_hand_over_this"][name] == pytest.approx(row["total_s"]["by hand"] / row["total_s"][name])
        assert row["routing_of_layer"] == pytest.approx(row["total_s"]["torch"] / row["layer_s"])
        assert {"commit", "dirty", "code", "device", "driver", "versions", "command", "threads"} <= row.keys()
    assert "| 64 |  4 |  2 |" in capsys.readouterr().out


def test_routing_without_a_gpu_leaves_the_kernels_out_and_says_why(monkeypatch, tmp_path):
    settings = routing.settings(CPU, True, width=8, d_expert=8)
    assert (settings.tokens, settings.experts, settings.choices) == ((1024, 4096, 16384), (8, 64, 256), (1, 2, 8))
    settings.tokens, settings.experts, settings.choices, settings.seconds = (32,), (4,), (2, 8), 0.0
    monkeypatch.delenv("TRITON_INTERPRET")
    (row,) = run(routing.cases(settings), Rows(tmp_path / "r.jsonl", {}, resume=False), CPU)  # no K beyond E
    assert "triton" not in row["total_s"]
    assert "need a GPU" in row["absent"]["triton"]


def test_routing_that_sums_wrongly_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(routing.grouped, "combine", lambda *given: torch.zeros(64, 8))
    settings = routing.settings(CPU, False, width=8, d_expert=8)
    found = run(routing.cases(settings), Rows(tmp_path / "r.jsonl", {}, resume=False), CPU)
    assert [row["status"] for row in found] == ["wrong", "wrong"]
    assert found[0]["error"] == "relative error of torch's sums is 1"
    assert "wrong" in routing.cells(found[0])
