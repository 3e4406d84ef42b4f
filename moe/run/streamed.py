"""Tensors of safetensors files that are read and written one at a time, so that a model larger than memory passes.

    file    8 bytes: n, little-endian | n bytes of JSON: name -> dtype, shape, where its bytes are | the bytes

Files are read, not mapped: a map of a file that is cut short kills the process, and its size counts as memory that the
process may write.
"""

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.errors import BadInput

LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_BYTES |= {"F8_E4M3": 1, "F8_E8M0": 1}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool}
# Numbers that mean something with their scales alone, and scales: `read` reads them, a file of them is not `opened`.
SCALED = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor's bytes are."""

    path: Path
    start: int
    dtype: str  # as the file names it; one that is in neither `DTYPES` nor `SCALED` cannot be read
    shape: tuple[int, ...]


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for and kept by nobody here.

    meta: their shapes and dtypes, as tensors without memory."""

    def __init__(self, meta: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.meta, self._read = dict(meta), read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self.meta

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    @property
    def nbytes(self) -> int:
        """What all of them take."""
        return sum(tensor.nbytes for tensor in self.meta.values())

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all of them."""
        return functools.reduce(torch.promote_types, [tensor.dtype for tensor in self.meta.values()])

    def to(self, dtype: torch.dtype) -> "Tensors":
        """The same in another dtype. Reading one that is not finite then raises `BadInput` with its name."""

        def read(name: str) -> Tensor:
            tensor = self[name].to(dtype)
            if not tensor.isfinite().all():
                raise BadInput(f"the weight {name} is not finite in {str(dtype).removeprefix('torch.')}.")
            return tensor

        return Tensors({name: tensor.to(dtype) for name, tensor in self.meta.items()}, read)


def in_memory(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors that are there already, as `Tensors`."""
    return Tensors({name: tensor.to("meta") for name, tensor in tensors.items()}, tensors.__getitem__)


def opened(path: Path) -> Tensors:
    """The tensors of a safetensors file. Raises `BadInput` for a file that is not whole or has another kind."""
    placed, meta = places(path), {}
    for name, place in placed.items():
        if place.dtype not in DTYPES:
            raise BadInput(f"{path}: tensor {name} is {place.dtype}; accepted are {', '.join(DTYPES)}.")
        meta[name] = torch.empty(place.shape, dtype=DTYPES[place.dtype], device="meta")
    return Tensors(meta, lambda name: read(name, placed[name]))


def places(path: Path) -> dict[str, Place]:
    """Where the tensors of a safetensors file are; none is read. Raises `BadInput` for a file that is not whole."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            n_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= n_bytes <= min(size - 8, LONGEST_HEADER):
                raise BadInput(f"{path} is not a whole safetensors file (its header is not all there).")
            tree = json.loads(file.read(n_bytes))
        return _places(path, tree, 8 + n_bytes, size)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} is not a whole safetensors file (its header is damaged: {error!r}).") from error


def _places(path: Path, tree: dict[str, Any], start: int, size: int) -> dict[str, Place]:
    """`places` of a parsed header; the bytes begin at `start` and must fill the file, as the format says."""
    tree.pop("__metadata__", None)
    placed, end = {}, 0
    for name, entry in sorted(tree.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, stop), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"shape {shape}")
        whole = stop - begin == math.prod(shape) * _BYTES[dtype] if dtype in _BYTES else stop >= begin
        if begin != end or not whole:
            raise ValueError(f"{name} has offsets {begin}, {stop}")
        placed[name], end = Place(path, start + begin, dtype, shape), stop
    if start + end != size:
        raise BadInput(f"{path} is not a whole safetensors file ({size:,} bytes, and its header says {start + end:,}).")
    return placed


def read(name: str, place: Place) -> Tensor:
    """The tensor, in its own dtype. Raises `BadInput` where the file ends before it does."""
    path, start, dtype, shape = place
    data = bytearray(math.prod(shape) * _BYTES[dtype])
    try:
        with open(path, "rb") as file:
            file.seek(start)
            n_read = file.readinto(data)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror or error}).") from error
    if n_read < len(data):
        raise BadInput(f"{path} ends in the middle of the tensor {name}.")
    kind = (DTYPES | SCALED)[dtype]
    return torch.frombuffer(data, dtype=kind).view(shape) if data else torch.empty(shape, dtype=kind)


def write(path: Path, meta: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file of tensors that come one after the other, in the order of `meta`, which has their shapes
    and dtypes. Raises OSError when it cannot be written."""
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, like in meta.items():
        entry = {"dtype": _NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [end, end + like.nbytes]}
        tree[name], end = entry, end + like.nbytes
    header = json.dumps(tree, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        coming = iter(tensors)
        for name, like in meta.items():  # none is held here while the next is made
            file.write(_bytes_of(next(coming), name, like))


def _bytes_of(tensor: Tensor, name: str, like: Tensor) -> memoryview:
    assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), f"{name}: {tensor.shape}, {tensor.dtype}"
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def check_room(folder: Path, n_bytes: int) -> None:
    """Refuse to begin to write what the disk has no room for. Raises `BadInput` with the bytes needed and free."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        raise BadInput(f"{folder} cannot be written: it needs {n_bytes:,} bytes and {free:,} are free.")
