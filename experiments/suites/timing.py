"""Time, memory and ceilings of a device, and which device a benchmark can run on.

Contestants take turns, so that a slow spell falls on all of them. A GPU's times come from events, with the cache
flushed before each call, and the median is what counts. Nothing is subtracted.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import tuning
from moe.errors import BadInput

FLUSHED = 256 * 2**20  # bytes written to empty a GPU's cache: several times any GPU's
MOST = 50  # calls of one contestant in one round, at most

Function = Callable[[], Any]


class Ceilings(NamedTuple):
    """What the device reaches in this run: the roofs that times are compared with."""

    copy: float  # bytes per second, read plus written, of a copy on the device
    matmul: float  # FLOP per second of a square matmul
    launch: float  # seconds that replaying a graph of one tiny kernel takes; 0 without a GPU


class Captured(NamedTuple):
    """A call as a CUDA graph: how to run it again, and where its result is."""

    replay: Function
    result: Any


def find_device(name: str, key: str) -> torch.device:
    """The device that `key`=`name` means; auto is the first GPU, else the CPU. Raises `BadInput` for one that is not
    here."""
    try:
        device = torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
    except RuntimeError:
        raise BadInput(f"{key}={name} is no device; accepted are auto, cpu, cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"{key}={name} is not supported; accepted are auto, cpu, cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"{key}={name} is not here: {torch.cuda.device_count()} CUDA devices are visible; use {key}=cpu."
        )
    return device


def check_kernels(what: str, device: torch.device, full: bool, instead: str) -> None:
    """Whether `what` can run Triton kernels on `device`: a GPU, or Triton's interpreter at tiny sizes. Raises
    `BadInput` naming what works `instead`."""
    interpreting = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")
    if device.type == "cuda" and interpreting:
        raise BadInput(f"{what} would time Triton's interpreter, not the GPU: unset TRITON_INTERPRET.")
    if device.type == "cpu" and interpreting and full:
        raise BadInput(f"{what} would take days in Triton's interpreter at full size: choose the size smoke.")
    if obstacle := tuning.obstacle(device):
        raise BadInput(f"{what} cannot run here: {obstacle}. {instead}")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(
    functions: Mapping[str, Function], device: torch.device, rounds: int = 5, seconds: float = 0.2
) -> dict[str, list[float]]:
    """Seconds of every call of each function, which take turns for `rounds` rounds; about `seconds` of calls each, and
    one per round at least. Each is called untimed first: compilation is not what is measured."""
    repeats = dict.fromkeys(functions, 1)
    for name, function in functions.items():
        function()
        if seconds:
            repeats[name] = max(1, min(MOST, round(seconds / rounds / max(1e-9, calls(function, 1, device)[0]))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name] += calls(function, repeats[name], device)
    return samples


def medians(
    functions: Mapping[str, Function], device: torch.device, rounds: int = 5, seconds: float = 0.2
) -> dict[str, float]:
    """The median of `times`."""
    samples = times(functions, device, rounds, seconds)
    return {name: statistics.median(samples[name]) for name in samples}


def calls(function: Function, n: int, device: torch.device) -> list[float]:
    """Seconds of each of `n` calls. On a GPU the cache is flushed before each, and the host waits for the last only."""
    if device.type != "cuda":
        return [_on_the_clock(function) for _ in range(n)]
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _on_the_clock(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def captured(function: Function, device: torch.device) -> Captured | None:
    """The function's kernels as a CUDA graph, which launches them without gaps; None without a GPU.

    Its tensors keep their places: a replay reads what the captured call read and writes `result` anew. Raises what the
    capture raises when the function waits for the device or is otherwise not capturable."""
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return Captured(graph.replay, result)


def ceilings(device: torch.device, full: bool = True) -> Ceilings:
    """Measure the roofs, on random data, the matmul in bfloat16; full: at sizes that fill a GPU, else small ones that
    exercise the code."""
    n_bytes, n = (2**30, 8192) if full else (2**16, 64)
    source = torch.randint(256, (n_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    number = torch.ones(1, device=device)
    tiny = captured(lambda: number.add_(1), device)
    functions: dict[str, Function] = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    if tiny:
        functions["launch"] = tiny.replay
    median = medians(functions, device)
    return Ceilings(2 * n_bytes / median["copy"], 2 * n**3 / median["matmul"], median.get("launch", 0.0))


def peak_bytes(function: Function, device: torch.device) -> int | None:
    """Bytes that a call needs at its peak beyond what was there before; None without a GPU, which alone counts them."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def saved_bytes(function: Function, leaving_out: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for backward when `function` runs, each memory block once and the blocks of the tensors
    `leaving_out` (weights) not at all. What a function hides from autograd is not seen: compare `held_bytes`."""
    blocks: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        blocks[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    for tensor in leaving_out:
        blocks.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(blocks.values())


def held_bytes(function: Callable[[], Tensor], device: torch.device) -> int | None:
    """Bytes that a call leaves allocated beside its result while the result lives; None without a GPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    synchronize(device)
    return torch.cuda.memory_allocated(device) - before - result.untyped_storage().nbytes()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64 (the norm of got where expected is zero); NaN stays NaN."""
    if not expected.numel():
        return 0.0
    norm = expected.double().norm()
    error = (got.double() - expected.double()).norm()
    return (error / norm if norm > 0 else error).item()
