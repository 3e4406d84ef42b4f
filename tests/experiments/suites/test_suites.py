"""The suites of the benchmark that run kernels: routing, kernels, layer and tune, and training rows on a GPU; here in
Triton's interpreter."""

import json
import sys
import types

import pytest
import torch

from experiments import bench
from experiments.suites import cases, kernels, layer, peers, routing, shapes, timing, train_step
from experiments.suites.cases import LeftOut, Rows, Wrong, run
from tests import fake_cuda

pytestmark = fake_cuda.interpreted
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def command(monkeypatch, *overrides):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench", *overrides])
    bench.main()


def test_training_rows_of_a_gpu_are_made_two_models_at_a_time(monkeypatch, tmp_path):
    with fake_cuda.install(monkeypatch):
        settings = train_step.settings(CUDA, False, "", timing.ceilings(CUDA, full=False))
        settings.compiled, settings.backends, settings.peers = False, ("torch", "triton"), ()
        found = run(train_step.cases(settings), Rows(tmp_path / "r.jsonl", {}, resume=False), CUDA)
    names = ["switchyard MoE (torch)", "switchyard MoE (triton)", "switchyard dense twin"]
    assert [(row["model"], row["status"]) for row in found] == [(name, "measured") for name in names]
    assert found[0]["moe_speed_over_this"] == 1
    assert all(row["mfu"] > 0 and row["preset"] == "smoke" for row in found)
    assert train_step.table(found)[1][0][0] == "smoke: switchyard MoE (torch)"


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
    monkeypatch.setattr(routing.grouped, "_combine", lambda *given: torch.zeros(64, 8))
    settings = routing.settings(CPU, False, width=8, d_expert=8)
    found = run(routing.cases(settings), Rows(tmp_path / "r.jsonl", {}, resume=False), CPU)
    assert [row["status"] for row in found] == ["wrong", "wrong"]
    assert found[0]["error"] == "relative error of torch's sums is 1"
    assert "wrong" in routing.cells(found[0])


@pytest.mark.parametrize("suite", ["kernels", "layer", "tune"])
def test_suites_for_a_gpu_are_refused_without_one_naming_what_works(suite, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, f"suite={suite}")
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    for word in (f"suite={suite} cannot run here", "suite=routing and suite=train_step", "sizes=smoke", "interpreter"):
        assert word in error


def test_suites_for_a_gpu_are_refused_in_the_interpreter_at_full_size(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "suite=kernels")
    assert "would take days" in capsys.readouterr().err


def test_what_a_layers_benchmark_does_not_know_is_refused(monkeypatch, capsys):
    for override, words in (
        ("peers=[megatron]", "peers has 'megatron'; accepted are triton"),
        ("loads=[even]", "loads"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, "suite=layer", override)
        assert words in capsys.readouterr().err


def test_kernels_are_timed_and_kept_when_resumed(monkeypatch, tmp_path, capsys):
    out = tmp_path / "kernels.jsonl"
    command(monkeypatch, "suite=kernels", "sizes=smoke", f"out={out}")
    before = out.read_text()
    found = cases.read(out)
    assert [row["op"] for row in found] == list(kernels.OPS)
    for row in found:
        assert row["status"] == "measured"
        assert row["us"] is None  # no graph without a GPU
        assert row["over_floor"] == pytest.approx(row["eager_us"] / row["floor_us"])
        assert row["torch_over_ours"] == pytest.approx(row["torch_eager_us"] / row["eager_us"])
        assert row["floor_us"] == pytest.approx(1e6 * row["bytes"] / row["ceilings"]["copy"])
        assert not row["targets"]
    assert "| gate_backward" in capsys.readouterr().out
    command(monkeypatch, "suite=kernels", "sizes=smoke", "resume=true", f"out={out}")
    assert out.read_text() == before


def test_kernels_on_a_gpu_are_replayed_and_held_to_their_targets(monkeypatch, tmp_path):
    with fake_cuda.install(monkeypatch):
        settings = kernels.settings(CUDA, False)
        settings.ops = ("gate_plan", "combine", "gate_backward")
        found = run(kernels.cases(settings), Rows(tmp_path / "r.jsonl", {}, resume=False), CUDA)
    together, combine, backward = found
    assert together["us"] > 0
    assert together["torch_us"] > 0
    assert together["torch_over_ours"] == pytest.approx(together["torch_us"] / together["us"])
    assert [each["what"] for each in together["targets"]] == ["gate and plan, µs"]
    assert [each["bound"] for each in combine["targets"]] == [1.15]
    assert backward["torch_us"] is None  # autograd's backward is not captured: eager against eager
    assert backward["torch_over_ours"] == pytest.approx(backward["torch_eager_us"] / backward["eager_us"])


def test_kernels_go_through_each_combine_once_and_begin_with_what_is_promised():
    settings = kernels.Settings(CUDA, timing.Ceilings(1, 1, 0))
    keys = [case.key for case in kernels.cases(settings)]
    assert len({json.dumps(key) for key in keys}) == len(keys)
    assert (keys[0]["op"], keys[0]["T"], keys[0]["E"], keys[0]["K"]) == ("gate_plan", 16384, 64, 8)
    combines = [(key["T"], key["D"], key["K"]) for key in keys if key["op"] == "combine"]
    assert len(set(combines)) == len(combines) == 5 * 3 * len({k for _, k in kernels.CHOICES})
    assert {key["T"] for key in keys} == {1024, 4096, 16384, 32768, 65536}
    assert {key["E"] for key in keys} >= {8, 512}
    assert {key["K"] for key in keys} >= {1, 16}


def test_a_combine_that_does_not_fit_is_left_out():
    with pytest.raises(LeftOut, match="takes 32 GiB; 24 are allowed"):
        kernels.combine_pair(shapes.Shape(2**17, 4096, 0, 16, 16), True, CPU, torch.bfloat16)


def test_what_differs_from_torch_is_wrong():
    with pytest.raises(Wrong, match=r"relative error of it is 0\.5; 1e-05 is rounding"):
        kernels.close("it", torch.ones(4) / 2, torch.ones(4))
    order, slot, token, offset = kernels.plan_by_hand(torch.tensor([[1, 0], [1, 2]]), 3)
    assert (order.tolist(), token.tolist(), offset.tolist()) == ([1, 0, 2, 3], [0, 0, 1, 1], [0, 1, 3, 4])
    got = types.SimpleNamespace(row_N=order, slot_N=slot, token_N=token, offset_E1=offset)
    kernels.same_plan(got, (order, slot, token, offset))
    with pytest.raises(Wrong, match="the plan's slot differs from torch's at 4 places"):
        kernels.same_plan(got, (order, slot.flip(0), token, offset))


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


def test_tiles_are_tuned_beside_the_rows(monkeypatch, tmp_path, capsys):
    command(monkeypatch, "suite=tune", "sizes=smoke", "budget=0.001", f"out={tmp_path / 'tune.jsonl'}")
    found = cases.read(tmp_path / "tune.jsonl")
    assert [row["status"] for row in found].count("left out") >= 9
    assert (tmp_path / "tuning-interpreter.jsonl").exists()
    assert "for want of time" in capsys.readouterr().out
