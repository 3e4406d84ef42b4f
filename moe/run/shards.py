"""Tensors in files by rank, by torch.distributed.checkpoint with safetensors: nothing is pickled on disk.

Every tensor has its whole shape and the name it has in one process; each rank writes the parts that are its
own to keep, and whoever reads, one process or any number of ranks, reads of every file what it needs.
"""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import BadInput

RANDOM = re.compile(r"cpu|cuda:\d+")  # states of generators, which are in a file of their own


def write(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Write into a folder what this rank keeps of tensors; every rank of `group` calls it, with the same names. Plain
    tensors are the same on every rank, and one writes them. Raises `OSError` on all ranks where one cannot write,
    saying which."""
    import torch.distributed.checkpoint as dcp  # here, because it takes long to import, and most never need it

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:
        rank, (why, _) = next(iter(error.failures.items()))
        number, reason = (why.errno, why.strerror) if isinstance(why, OSError) else (None, None)
        raise OSError(number or 0, f"{reason or _first_line(why)} at rank {rank}") from None


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model or an optimiser in a folder, in either format, by name. Raises `BadInput`
    for files that cannot be read."""
    return {name: tuple(about.size) for name, about in _described(folder).items()}


def read(folder: Path) -> dict[str, Tensor]:
    """All those tensors, whole, in memory. Raises `BadInput` for files that do not make whole tensors."""
    described = _described(folder)
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in described.items()}
    read_into(folder, tensors, alone=True)
    return tensors


def read_into(folder: Path, tensors: Mapping[str, Tensor], alone: bool = False) -> None:
    """Fill tensors, plain or shared out among ranks, by their names, from a folder in either format; every rank calls
    it, or one process `alone`. Raises `BadInput` for a name or a shape that is not there."""
    import torch.distributed.checkpoint as dcp  # here, as above

    described = _described(folder)
    for name, tensor in tensors.items():
        here = tuple(described[name].size) if name in described else None
        if here != tuple(tensor.shape):
            said = "is missing" if here is None else f"has shape {here}, and {tuple(tensor.shape)} is needed"
            raise BadInput(f"{folder}: the tensor {name} {said}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except (Exception, dcp.CheckpointException) as error:  # which is none of the former
        raise BadInput(f"{folder}: its tensors cannot be read ({_first_line(error)}).") from error


def _described(folder: Path) -> dict[str, Any]:
    """What DCP says of every tensor but those of random generators."""
    import torch.distributed.checkpoint as dcp  # here, as above

    try:
        described: Any = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a header made DCP stumble over
        raise BadInput(f"{folder}: its tensors cannot be read ({_first_line(error)}).") from error
    for name, about in described.items():
        if sum(math.prod(chunk.sizes) for chunk in about.chunks) != math.prod(about.size):
            raise BadInput(f"{folder}: the tensor {name} is not whole: a shard is missing.")
    return {name: about for name, about in described.items() if not RANDOM.fullmatch(name)}


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(("Traceback", "CheckpointExc"))]
    return (lines or [type(error).__name__])[0].strip().rstrip(".")
