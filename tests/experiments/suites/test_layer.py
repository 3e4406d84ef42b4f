"""A whole layer timed against its peers, under even and uneven loads; here in Triton's interpreter."""

from pathlib import Path

import pytest
import torch

from experiments.suites import cases, layer, peers, shapes, timing
from experiments.suites import layer as layer_suite
from experiments.suites.cases import Absent, Rows, run
from tests import fake_cuda
from tests.experiments.bench_command import command

pytestmark = fake_cuda.interpreted
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_layer_is_timed_against_peers(monkeypatch, tmp_path, capsys):
    out = tmp_path / "layer.jsonl"
    given = ("suite=layer", "sizes=smoke", "peers=[triton,grouped_mm,liger]", "loads=[zipf]")
    command(monkeypatch, *given, f"out={out}")
    absent, ours, theirs = cases.read(out)
    assert (absent["contestant"], absent["status"]) == ("liger", "absent")
    assert (ours["contestant"], theirs["contestant"]) == ("triton", "grouped_mm")
    for row in (ours, theirs):
        assert row["backward_s"] == pytest.approx(row["both_s"] - row["forward_s"])
        assert row["forward_tf"] == pytest.approx(6 * 8 * 2 * 16 * 16 / row["forward_s"] / 1e12)
        assert row["forward_of_bmm"] == pytest.approx(row["forward_tf"] / row["bmm_forward_tf"])
        assert row["forward_of_peak"] == pytest.approx(1e12 * row["forward_tf"] / row["ceilings"]["matmul"])
        assert row["errors"].keys() == {"y", "dx", "dweight"}
    assert ours["saved_bytes_per_token"] <= shapes.saved_bytes(shapes.SMOKE["smoke"])
    assert theirs["saved_bytes_per_token"] > 2 * ours["saved_bytes_per_token"]
    assert theirs["ours_over_this"] == pytest.approx(theirs["both_s"] / theirs["our_both_s"])
    assert "liger_kernel not installed" in capsys.readouterr().out


def test_a_layer_on_a_gpu_has_its_memory_and_a_replay_that_is_checked(monkeypatch, tmp_path):
    with fake_cuda.install(monkeypatch):
        settings = layer.settings(CUDA, False, loads=("uniform",), names=(peers.OURS,))
        (row,) = run(layer.cases(settings), Rows(tmp_path / "r.jsonl", {}, resume=False), CUDA)
        monkeypatch.setattr(timing, "captured", lambda function, device: timing.Captured(lambda: None, function()))
        (stale,) = run(layer.cases(settings), Rows(tmp_path / "s.jsonl", {}, resume=False), CUDA)
    assert row["peak_bytes"] == 4000
    assert row["graph_forward_s"] > 0
    assert (stale["status"], stale["error"]) == ("wrong", "a replay of the captured forward differs from the call")


def test_targets_of_a_layer_are_its_own_or_its_peers():
    row = {
        "saved_bytes_per_token": 37000.0, "forward_of_bmm": 0.81, "backward_of_bmm": 0.69, "forward_tf": 500.0,
        "backward_tf": 410.0, "ours_over_this": 1.3,
    }  # fmt: skip
    shape = shapes.SHAPES["olmoe"]
    met = {each["what"]: each["met"] for each in layer.targets("olmoe", "triton", shape, row)}
    assert met == {
        "saved bytes per token": True, "forward of bmm": True, "promise forward TF/s": True,
        "moonshot forward TF/s": False, "backward of bmm": False, "promise backward TF/s": False,
        "moonshot backward TF/s": False,
    }  # fmt: skip
    assert [each["met"] for each in layer.targets("olmoe", "liger", shape, row)] == [True]
    assert [each["met"] for each in layer.targets("olmoe", "megablocks", shape, row)] == [False]
    assert layer.targets("olmoe", "torch", shape, row) == []
    assert layer.targets("smoke", "triton", shape, row) == []


def test_a_backward_too_short_for_the_clock_has_no_speed():
    median = {"forward": 2.0, "both": 2.0, "bmm forward": 1.0, "bmm backward": 1.0}
    found = layer.rates(shapes.SMOKE["smoke"], median, timing.Ceilings(1, 1, 0))
    assert found["backward_tf"] != found["backward_tf"]


def test_loads_are_distinct_experts_and_as_uneven_as_their_name():
    shape = shapes.Shape(2000, 1, 1, 16, 3)
    share = {}
    for load in ("uniform", "zipf"):
        torch.manual_seed(0)
        expert = layer_suite.choices(shape, load, CPU)
        assert all(len(set(each)) == 3 for each in expert.tolist())
        share[load] = expert.flatten().bincount(minlength=16) / expert.numel()
    assert share["uniform"].max() < 0.08
    assert share["zipf"][0] > 0.2
    assert share["zipf"][0] > 5 * share["zipf"][15]


def test_recorded_loads_are_the_last_ones_of_a_run_spread_over_more_or_fewer_experts(tmp_path):
    path = tmp_path / "counts.jsonl"
    path.write_text('{"step": 1, "counts": [[9, 9]]}\n{"step": 2, "counts": [[9, 9], [0, 30, 10]]}\n')
    torch.testing.assert_close(layer_suite.recorded(path, 3), torch.tensor([30.0, 10.0, 0.0]) + 1e-3)
    assert len(layer_suite.recorded(path, 8)) == 8
    assert (layer_suite.recorded(path, 8).diff() <= 0).all()
    for text in ("", "no json", '{"counts": []}'):
        path.write_text(text)
        with pytest.raises(Absent, match=r"counts\.jsonl has no recorded counts"):
            layer_suite.recorded(path, 3)
    with pytest.raises(Absent):
        layer_suite.recorded(Path("nowhere"), 3)
