"""The machine a run is on: device, memory, and what to write down so that a number leads back to its run."""

import ctypes
import gc
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import psutil
import torch
from torch import Tensor

from moe.config.run import Config
from moe.config.train import TrainConfig
from moe.errors import BadInput

CLEAR_REFS = Path("/proc/self/clear_refs")


def choose_device(name: str) -> torch.device:
    """The device of train.device; auto is the first GPU, else the CPU. Raises `BadInput` for a GPU that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"train.device={name} is not here: {torch.cuda.device_count()} CUDA devices are visible; use cpu."
        )
    return device


def set_threads(cfg: TrainConfig) -> int:
    """Apply train.threads; returns how many threads torch uses."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of returning it: a step frees and asks again for the same buffers, and every
    page that comes back from the system costs a fault. No effect where the C library has no `mallopt`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: no mapping of its own for a buffer below 1 GiB


def return_freed_memory() -> None:
    """Have glibc return every freed buffer above 1 MiB to the system at once: where one large thing after another is
    loaded, holes that a freed one leaves are a little too small for the next. No effect without `mallopt`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: a mapping of its own for each, and no threshold that grows


def device_name(device: torch.device) -> str:
    """What a person calls it: the GPU's name, or the processor's and how many cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak: freed memory goes back to the system first, so that an earlier model's is not counted."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim:
            trim(0)
        if _has_resettable_peak():
            CLEAR_REFS.write_text("5")  # resets VmHWM


def _has_resettable_peak() -> bool:
    """Whether the system keeps a peak of the resident set that this process may reset: Linux, unless in a sandbox."""
    try:
        with open(CLEAR_REFS, "w"):
            return True
    except OSError:
        return False


def peak_memory(device: torch.device) -> int:
    """Bytes: a GPU's peak allocation, or the peak resident set of this process, since the last reset. Where the system
    has no peak that can be reset (not Linux, or a sandbox), the present resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _has_resettable_peak():
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return psutil.Process().memory_info().rss


def synchronize(device: torch.device) -> None:
    """Wait until everything that the device was asked for is done, so that a clock says what it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Float64 copies, of the same shapes, in the host's memory, by one transfer: for all of them the host waits for the
    device once. Exact for whole numbers up to 2^53."""
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def versions() -> dict[str, str]:
    """The versions that can change a number."""
    version_of = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    if torch.version.cuda:
        version_of["cuda"] = torch.version.cuda
    return version_of


class GitState(NamedTuple):
    """Which code this is: the commit, and whether tracked files differ from it. None is what git does not say, as
    outside a checkout."""

    commit: str | None
    dirty: bool | None


def git_state() -> GitState:
    """The state of the checkout that this file is in."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return GitState(git("rev-parse", "HEAD"), None if changes is None else bool(changes))


def autocast(cfg: Config) -> AbstractContextManager[Any]:
    """bf16 autocast, or nothing for fp32."""
    kind = cfg.train.device.split(":")[0]
    return torch.autocast(kind, torch.bfloat16) if cfg.train.precision == "bf16" else nullcontext()
