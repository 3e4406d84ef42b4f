"""Kernels timed against their floors; here in Triton's interpreter."""

import json
import types

import pytest
import torch

from experiments.suites import cases, kernels, shapes, timing
from experiments.suites.cases import LeftOut, Rows, Wrong, run
from tests import fake_cuda
from tests.experiments.bench_command import command

pytestmark = fake_cuda.interpreted
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
