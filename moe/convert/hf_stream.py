"""A transformers folder's model, of which one part at a time has memory: for folders that are larger than it.

    folder = Parts(Path("OLMoE-1B-7B"))
    with folder.held(folder.model.blocks[3]):
        ...  # this block computes; all others have shapes alone

What a part holds when it is held is what `hf_weights.load` would have given it, bit by bit. Files are read, not mapped:
what was read of them does not stay in the process.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.convert.hf_config import read_folder
from moe.convert.hf_weights import DTYPES, check_tied, copy_into, headers, views_of, weight_files
from moe.errors import BadInput
from moe.model.rope import rotary
from moe.model.transformer import Transformer


class Place(NamedTuple):
    """Where a tensor's bytes are."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Parts:
    """The model in a folder, in float32, on the CPU. `model` has its shapes and no weights until they are held.

    Raises `BadInput` as `hf_weights.load` does: everything is checked against the files' headers at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.family, cfg, router = read_folder(folder)
        files = weight_files(folder)
        self.shapes, _ = headers(files)
        with torch.device("meta"):
            self.model = Transformer(cfg, router).eval()
        try:
            views_of(self.shapes, self.model, self.family)
        except BadInput as error:
            raise BadInput(f"{folder}: {error}") from error
        if cfg.position == "rope":
            self.model.cos_Sd, self.model.sin_Sd = rotary(cfg)
        self.places = {name: place for path in files for name, place in _places(path) if name in self.shapes}

    @contextmanager
    @torch.no_grad()
    def held(self, *parts: nn.Module) -> Iterator[None]:
        """Inside, these parts of `model` have their weights. Raises `BadInput` for a file that was cut short since."""
        for part in parts:
            part.to_empty(device="cpu")
        try:
            views = views_of(self.shapes, self.model, self.family)
            for name in views:
                if views[name][0].device.type == "cpu":
                    copy_into(self.read(name), views[name])
            if self.model.embed.weight.device.type == "cpu":
                check_tied(views, self.model)
            del views
            yield
        finally:
            for part in parts:
                part.to("meta")

    def read(self, name: str) -> Tensor:
        """A tensor of the folder, in its own dtype. Raises `BadInput` where the file ends before it does."""
        path, start, dtype, shape = self.places[name]
        data = bytearray(math.prod(shape) * dtype.itemsize)
        try:
            with open(path, "rb") as file:
                file.seek(start)
                n_read = file.readinto(data)
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror or error}).") from error
        if n_read < len(data):
            raise BadInput(f"{path} ends in the middle of the tensor {name}.")
        return torch.frombuffer(data, dtype=dtype).view(shape)


def _places(path: Path) -> Iterator[tuple[str, Place]]:
    """Where a file's tensors are. Its header is 8 bytes of length and JSON, which `headers` has checked."""
    with open(path, "rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        tree: dict[str, Any] = json.loads(file.read(n_bytes))
    tree.pop("__metadata__", None)
    for name, entry in tree.items():
        if entry["dtype"] in DTYPES:  # the others are constants that the model has itself
            start = 8 + n_bytes + entry["data_offsets"][0]
            yield name, Place(path, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
