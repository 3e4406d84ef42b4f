"""Claims about the machine a run is on."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from moe.config.train import TrainConfig
from moe.errors import BadInput
from moe.run import machine

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
MB = 10**6


def occupy(megabytes: int) -> None:
    """Touch this much memory, and let it go."""
    np.ones(megabytes * MB, dtype=np.uint8)


@pytest.mark.skipif(not machine._has_resettable_peak(), reason="this system has no peak that can be reset")
def test_a_small_run_after_a_big_one_has_its_own_peak():
    machine.reset_peak_memory(CPU)
    occupy(600)
    big = machine.peak_memory(CPU)
    machine.reset_peak_memory(CPU)
    occupy(100)
    small = machine.peak_memory(CPU)
    assert big > 600 * MB
    assert small < big - 300 * MB
    assert small >= psutil.Process().memory_info().rss - 100 * MB


def test_where_the_peak_cannot_be_reset_the_present_memory_is_reported(monkeypatch, tmp_path):
    """Never an earlier run's peak: a sandbox may forbid the reset, and other systems have none."""
    occupy(600)
    monkeypatch.setattr(machine, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    machine.reset_peak_memory(CPU)
    assert machine.peak_memory(CPU) == pytest.approx(psutil.Process().memory_info().rss, abs=50 * MB)


HOLES = """
import sys
import numpy as np
import psutil
from moe.run import machine

if sys.argv[1] == "returned":
    machine.return_freed_memory()
np.ones(20_000_000, np.uint8)  # freed: glibc now takes what is smaller from its heap
before = psutil.Process().memory_info().rss
blocks, pins = [], []
for _ in range(10):
    blocks.append(np.ones(10_000_000, np.uint8))
    pins.append(np.ones(100_000, np.uint8))
del blocks
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_what_is_freed_below_something_that_stays_goes_back_where_that_is_asked_for():
    grew = {
        name: int(subprocess.run([sys.executable, "-c", HOLES, name], capture_output=True, check=True).stdout)
        for name in ("kept", "returned")
    }
    assert grew["kept"] > 80 * MB
    assert grew["returned"] < 20 * MB


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert machine.choose_device("auto").type == kind
    assert machine.choose_device("cpu") == CPU


@pytest.mark.parametrize(("name", "here", "fits"), [("cuda", 0, False), ("cuda:1", 1, False), ("cuda:1", 2, True)])
def test_a_gpu_that_is_not_there_is_refused(name, here, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    if fits:
        assert machine.choose_device(name) == torch.device(name)
    else:
        with pytest.raises(BadInput, match=rf"^train\.device={name} is not here: {here} CUDA devices are visible"):
            machine.choose_device(name)


def test_a_transfer_brings_copies_of_every_shape_and_dtype_in_one():
    tensors = [torch.tensor([[1, 2**53]]), torch.tensor(0.1), torch.zeros(0), torch.tensor(True)]
    found = machine.to_host(tensors)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in tensors]
    assert {tensor.dtype for tensor in found} == {torch.float64}
    assert found[0].long().tolist() == [[1, 2**53]]
    assert found[1].item() == tensors[1].item()
    tensors[0].zero_()
    assert found[0].any()


def test_only_a_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    machine.synchronize(CPU)
    machine.synchronize(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]


def test_threads_are_set_and_reported():
    before = torch.get_num_threads()
    try:
        assert machine.set_threads(TrainConfig(threads=2)) == 2 == torch.get_num_threads()
        assert machine.set_threads(TrainConfig(threads=0)) == 2
    finally:
        torch.set_num_threads(before)


def test_the_processor_is_named_with_the_cores_this_process_may_use():
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
    name = machine.device_name(CPU)
    assert name.endswith(f", {cores} cores")
    assert len(name) > len(f", {cores} cores")


def test_versions_name_what_can_change_a_number():
    found = machine.versions()
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_the_checkout(monkeypatch, tmp_path):
    git = lambda *arguments: subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    git("init")
    (tmp_path / "machine.py").write_text("one")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert machine.git_state() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "machine.py").write_text("two")
    assert machine.git_state().dirty is True


def test_outside_a_checkout_neither_commit_nor_changes_are_known(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert machine.git_state() == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))  # nor without git
    assert machine.git_state() == (None, None)


def test_what_git_does_not_say_is_unknown_and_not_clean(monkeypatch, tmp_path):
    """A git that names the commit and fails to compare, as with a damaged index."""
    (tmp_path / "git").write_text('#!/bin/sh\n[ "$3" = rev-parse ] && echo abc || exit 128\n')
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.git_state() == ("abc", None)


def test_no_path_of_the_system_is_needed_to_name_the_processor(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert machine.device_name(CPU)


ALLOCATE_AND_FREE = """
import resource, torch
from moe.run import machine
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(2**24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
machine.keep_freed_memory()
faults()
print(first, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step():
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE_AND_FREE], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, after = map(int, done.stdout.split())
    assert before > 8 * 2**26 / 2**22  # eight buffers of 64 MiB came back page by page (or by huge pages of 2 MiB)
    assert after < before / 10
