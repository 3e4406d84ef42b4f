"""A GPU that is none: what `experiments` does on one runs on CPU tensors and in Triton's interpreter.

Factories and moves to "cuda" give CPU tensors; events, streams, graphs and memory counts are stand-ins that keep to the
order in which the real ones must be called.
"""

import contextlib
import gc
import time
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from triton.runtime import driver

from experiments.suites import timing
from kernels import tuning

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU only")


def _moved(value):
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


class OnTheCpu(TorchFunctionMode):
    """Whatever asks for a CUDA device gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: _moved(value) for name, value in (kwargs or {}).items()}
        return function(*map(_moved, args), **kwargs)


class Event:
    """Knows when it was recorded; may be read only after a synchronisation."""

    synchronized = 0.0

    def __init__(self, enable_timing=False):
        assert enable_timing
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        assert self.at <= end.at <= Event.synchronized
        return 1e3 * (end.at - self.at)


class Stream:
    """One that others wait for."""

    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Graph:
    """One that launches nothing."""

    def replay(self):
        pass


def synchronize(device=None):
    """Everything recorded until now may be read."""
    Event.synchronized = time.perf_counter()


def captured(function, device):
    """A replay runs the function again and writes into the first result's tensors."""
    result = function()

    def replay():
        for old, new in zip(tree_leaves(result), tree_leaves(function()), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)

    return timing.Captured(replay, result)


PROPERTIES = types.SimpleNamespace(major=9, minor=0, multi_processor_count=3)


def install(monkeypatch, graphs=True):
    """Patch torch.cuda for a test; -> a context in which "cuda" is usable. graphs: with `captured` from this file."""
    monkeypatch.setattr(timing, "check_kernels", lambda *given: None)  # it would refuse to interpret on a GPU
    monkeypatch.setattr(timing, "FLUSHED", 1024)
    monkeypatch.setattr(gc, "collect", lambda: None)  # after every row it frees a GPU's memory; here it takes its time
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda device=None: PROPERTIES,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": synchronize,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "mem_get_info": lambda device=None: (2**20, 2**21),
        "memory_allocated": lambda device=None: 1000,
        "max_memory_allocated": lambda device=None: 5000,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    utils = types.SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": 232448})
    monkeypatch.setattr(driver, "_active", types.SimpleNamespace(utils=utils))
    monkeypatch.setattr(tuning, "architecture", lambda device: "interpreter")  # its tiles suit what runs here
    monkeypatch.setattr(tuning, "obstacle", lambda device: None)
    if graphs:
        monkeypatch.setattr(timing, "captured", captured)
    return OnTheCpu()
