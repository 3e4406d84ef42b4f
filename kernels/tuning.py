"""Tile shapes of the matmul kernels, per GPU, element type and load: data in tuning.jsonl, looked up here.

    python -m experiments.bench suite=tune      # on a GPU: times candidates, writes rows in this file's form

Nothing is tuned while a model trains: the same shapes get the same tiles on every run.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("tuning.jsonl")
VERSIONS = ((3, 6), (3, 7))  # of Triton, that the kernels are tested with
USES = ("up", "down", "dh", "dx", "wgrad")
TYPES = ("16bit", "tf32", "fp32")
LOADS = ("few", "many")  # rows per expert: fewer than FEW on average (or sizes that need masks), or more
FEW = 64
# GPUs that take another's tiles: the same matrix instructions, and at least as much shared memory.
SAME = {"sm_87": "sm_80", "sm_89": "sm_86", "sm_103": "sm_100", "sm_120": "sm_86", "sm_121": "sm_86"}
SAME |= {"gfx90a": "gfx942", "gfx950": "gfx942"}
EXACT = ("gfx90a", "gfx950")  # GPUs for which Triton compiles no tf32 product
IN_FP8 = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx950")  # GPUs that multiply E4M3

_target: ContextVar[str | None] = ContextVar("target", default=None)


class Tile(NamedTuple):
    """How a kernel cuts its work. For `wgrad`, m and n are the gradient's rows and columns, k runs over routed rows."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int  # tiles of rows that share columns while these are in cache
    parts: int  # slices in which a finished tile is written: more need fewer registers
    num_warps: int
    num_stages: int  # tiles of k in flight
    tma: bool  # weights and contiguous rows through the tensor memory accelerator (Hopper and later)
    per_sm: int  # programs per multiprocessor that walk over all tiles; 0: one program per tile
    # What follows is tried by the tuner, and off until a GPU has proven it.
    flatten: bool = False  # one loop over tiles and their sums: the next tile is loaded while this one is written
    ragged: bool = False  # an expert's rows through the accelerator too: down's and dx's output, wgrad's in slots
    gluon: bool = False  # up and dh of swiglu by hopper.py instead: on sm_90, for 16 bits


@contextmanager
def target(name: str) -> Iterator[None]:
    """Look tiles up for this GPU, whatever the machine."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def architecture(device: torch.device) -> str:
    """The device's name in the table: sm_90, gfx942, ..., or interpreter for a CPU."""
    name = _own_name(device)
    return SAME.get(name, name)


def _own_name(device: torch.device) -> str:
    if name := _target.get():
        return name
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def precision(device: torch.device, tf32: bool) -> str:
    """How to multiply float32: "tf32" or "ieee" (exactly). tf32 is a permission, which gfx90a and gfx950 cannot use."""
    return "tf32" if tf32 and _own_name(device) not in EXACT else "ieee"


def multiplies_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of operands of 8 bits are formed from these, for results in `dtype`; else from wider ones."""
    return _own_name(device) in IN_FP8 and dtype != torch.float64


def for_stored(tile: Tile, stored: str, in_fp8: bool) -> Tile:
    """This tile for weights in a format of `kernels.quantized`: of mxfp4 a step takes what one scale is of. Sums of fp8
    have a scale every 128, and so two accumulators, which half of the widest tile's columns leave room for; operands
    that stay in it are half as large, so a step takes twice the summed width."""
    match stored:
        case "mxfp4":
            return tile._replace(block_k=min(tile.block_k, 32))
        case "fp8" if in_fp8:
            return tile._replace(
                block_n=min(tile.block_n, 128), block_k=min(2 * tile.block_k, 128), num_stages=min(tile.num_stages, 3)
            )
        case "fp8":
            return tile._replace(block_n=min(tile.block_n, 128))
    return tile


def tile(
    use: str, device: torch.device, dtype: torch.dtype, tf32: bool, n_rows: int, n_experts: int, even: bool = True
) -> Tile:
    """The tile for one use of a kernel. even: D and F need no masks; those that do take the smaller tiles of a light
    load, whose registers have room for them. Raises `ValueError` for a GPU that the table does not know."""
    rounded = dtype == torch.float32 and precision(device, tf32) == "tf32"
    kind = "16bit" if dtype.itemsize == 2 else "tf32" if rounded else "fp32"
    load = "few" if n_rows < FEW * n_experts or not even else "many"
    name = architecture(device)
    entry = table().get((name, kind, load, use))
    if entry is None:
        known = ", ".join(sorted({key[0] for key in table()} | set(SAME)))
        raise ValueError(f"dispatch=triton has no tiles for {name}; it has them for {known}. Use dispatch=torch.")
    return entry


def block_m(
    device: torch.device, dtype: torch.dtype, tf32: bool, n_rows: int, n_experts: int, even: bool = True
) -> int:
    """Rows of a tile of the schedule: the same for every use but wgrad."""
    return tile("up", device, dtype, tf32, n_rows, n_experts, even).block_m


def is_even(w_up_EFD: torch.Tensor) -> bool:
    """Whether an expert's sizes fill every tile of k, so that no product needs a mask."""
    return w_up_EFD.shape[1] % 128 == 0 and w_up_EFD.shape[2] % 64 == 0


@functools.cache
def table() -> dict[tuple[str, str, str, str], Tile]:
    """(architecture, type, load, use) -> tile."""
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
    return {(row["arch"], row["type"], row["load"], row["use"]): Tile(**row["tile"]) for row in rows}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; without a GPU, 1, so that the interpreter walks over tiles as a persistent kernel."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def programs(device: torch.device, tile: Tile) -> int:
    """How many programs to start at most."""
    return tile.per_sm * multiprocessors(device) if tile.per_sm else 2**31 - 1


def obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`, or None. Imports no Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) not in VERSIONS:
        tested = ", ".join(f"{major}.{minor}" for major, minor in VERSIONS)
        return f"Triton {version} is installed, and the kernels are tested with {tested}"
    if device.type != "cuda":
        interpreting = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")
        if device.type == "cpu" and interpreting:
            return None
        return f"its kernels need a GPU and the device is {device.type} (TRITON_INTERPRET=1 would interpret them)"
    name = architecture(device)
    known = sorted({key[0] for key in table()} - {"interpreter"})
    return None if name in known else f"the GPU is {name}, and the kernels are built for {', '.join(known)}"
