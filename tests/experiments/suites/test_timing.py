"""Timing in turns, what autograd keeps, facts, and refusals; a GPU's paths on a stand-in for one."""

import pytest
import torch

from experiments.suites import timing
from kernels import tuning
from moe.errors import BadInput
from tests import fake_cuda

pytestmark = fake_cuda.interpreted
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_contestants_take_turns_after_one_untimed_call_each(monkeypatch):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.times(functions, CPU, rounds=3, seconds=0.0)
    assert "".join(calls) == "ab" + 3 * "ab"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3}


def test_short_functions_are_called_more_often_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(timing, "_on_the_clock", lambda function: function())
    found = timing.times({"short": lambda: 1e-9, "long": lambda: 0.03}, CPU, rounds=2, seconds=0.2)
    assert len(found["short"]) == 2 * timing.MOST
    assert len(found["long"]) == 2 * 3  # 0.1 s a round


def test_the_median_is_what_counts(monkeypatch):
    seconds = iter([9.0, 1.0, 5.0, 2.0])  # the first call is not timed
    monkeypatch.setattr(timing, "_on_the_clock", lambda function: function())
    assert timing.medians({"a": lambda: next(seconds)}, CPU, rounds=3, seconds=0.0) == {"a": 2.0}


def test_on_a_gpu_events_are_read_after_waiting_and_the_cache_is_flushed(monkeypatch):
    with fake_cuda.install(monkeypatch):
        flushed = []
        zero = torch.Tensor.zero_
        monkeypatch.setattr(torch.Tensor, "zero_", lambda self: flushed.append(self.numel()) or zero(self))
        seconds = timing.calls(lambda: sum(range(1000)), 4, CUDA)
    assert len(seconds) == 4
    assert all(each > 0 for each in seconds)
    assert len(flushed) >= 4
    assert set(flushed) == {timing.FLUSHED}


def test_a_function_is_captured_after_warming_up_and_only_on_a_gpu(monkeypatch):
    calls = []
    function = lambda: calls.append(1) or len(calls)
    assert timing.captured(function, CPU) is None
    assert not calls
    with fake_cuda.install(monkeypatch, graphs=False):
        graph = timing.captured(function, CUDA)
    assert graph.result == len(calls) == 4
    graph.replay()


def test_roofs_are_measured_and_a_launch_only_on_a_gpu(monkeypatch):
    assert timing.ceilings(CPU, full=False).launch == 0
    with fake_cuda.install(monkeypatch):
        found = timing.ceilings(CUDA, full=False)
    assert min(found) > 0


def test_memory_is_counted_by_a_gpu_alone(monkeypatch):
    make = lambda: torch.ones(10)
    assert timing.peak_bytes(make, CPU) is None
    assert timing.held_bytes(make, CPU) is None
    with fake_cuda.install(monkeypatch):
        assert timing.peak_bytes(make, CUDA) == 5000 - 1000
        assert timing.held_bytes(make, CUDA) == 1000 - 1000 - 40


def test_saved_bytes_count_a_block_once_and_leave_weights_out():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 3, requires_grad=True)

    def forward():
        z = x @ weight  # keeps x and the weight
        return (z.relu() * z).sum()  # keeps z once, and relu's result, as float32

    assert timing.saved_bytes(forward, []) == 4 * (32 + 24 + 12 + 12)
    assert timing.saved_bytes(forward, [weight]) == 4 * (32 + 12 + 12)


def test_a_relative_error_is_of_norms_and_keeps_nan():
    expected = torch.tensor([3.0, 4.0])
    assert timing.relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert timing.relative_error(torch.zeros(2), expected) == 1
    assert timing.relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2
    assert not timing.relative_error(torch.tensor([3.0, torch.nan]), expected) <= 1
    assert timing.relative_error(torch.empty(0), torch.empty(0)) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [("gpu", "gpu is no device"), ("meta", "accepted are auto, cpu, cuda"), ("cuda", "0 CUDA devices")],
)
def test_a_device_that_is_not_here_is_refused(name, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BadInput, match=words):
        timing.find_device(name, "device")


def test_kernels_are_refused_where_they_cannot_run_or_would_not_mean_anything(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    timing.check_kernels("this", CPU, False, "that works")
    with pytest.raises(BadInput, match=r"this would take days .*smoke"):
        timing.check_kernels("this", CPU, True, "that works")
    with pytest.raises(BadInput, match="unset TRITON_INTERPRET"):
        timing.check_kernels("this", CUDA, True, "that works")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BadInput, match=r"this cannot run here: .* need a GPU .* that works"):
        timing.check_kernels("this", CPU, False, "that works")
    monkeypatch.setattr(tuning, "obstacle", lambda device: None)
    timing.check_kernels("this", CUDA, True, "that works")
