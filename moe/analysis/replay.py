"""The experts that every token took in every training step, kept on disk and taken again: routing replay.

`log.experts=true` writes, for each MoE layer, routing/experts-<layer>.npy into the run's folder: (steps, B·S, K) whole
numbers, the tokens of a step in the loader's order, whatever micro-batches they were split into. With
`balance.force=recorded balance.recorded=<that run>` another run takes those experts at the same steps instead of its
own router's: what is left of a difference between the two is not the routing (2507.18071, 2510.11370), and two backends
can be timed under the same real load. The router still scores, weighs and learns.
"""

import io
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from moe.config.model import layer_moe, moe_layers
from moe.config.parse import to_dict
from moe.config.router import n_choices
from moe.config.run import FREE, Config
from moe.errors import BadInput
from moe.run.folder import flat, read_config
from moe.run.jsonl import is_in_place

NOT_RECORDED = -128  # what a step holds before it is written; no router gives it
# What decides a step's tokens: settings whose names begin like this.
SAME = ("seed", "tokenizer.", "data.", "model.context", "train.batch_size")


def path_of(folder: Path, layer: int) -> Path:
    """Where the choices of a layer (from 0, among all layers) are."""
    return folder / "routing" / f"experts-{layer}.npy"


def check_space(folder: Path, cfg: Config) -> None:
    """Raise `BadInput` unless the disk has room for what log.experts=true makes in the run's `folder`."""
    needed = 0
    for layer in moe_layers(cfg.model):
        moe = layer_moe(cfg.model, layer)
        k = n_choices(cfg.router, moe) or moe.k
        size = cfg.train.steps * cfg.train.batch_size * cfg.model.context * k * _dtype(cfg, layer).itemsize
        path = path_of(folder, layer)
        needed += max(0, size - (path.stat().st_size if path.exists() else 0))
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise BadInput(
            f"log.experts=true writes {needed:,} bytes in train.steps={cfg.train.steps} into {folder}, and {free:,} "
            "are free: lower train.steps, choose another run=..., or set log.experts=false."
        )


class Recording:
    """Writes a run's choices, step by step; a step that is taken again after resuming is written again."""

    def __init__(self, folder: Path, cfg: Config) -> None:
        self.folder, self.cfg, self.layers = folder, cfg, moe_layers(cfg.model)
        self.files: list[tuple[BinaryIO, np.dtype[Any], int]] = []  # open, with the dtype and where step 1 begins

    def write(self, step: int, expert_TK: Sequence[Tensor]) -> None:
        """The choices of a step (from 1), those of every MoE layer in order. Raises `BadInput` when they do not fit on
        the disk."""
        if any(layer_TK.dim() != 2 for layer_TK in expert_TK):  # a router of one's own
            raise BadInput(
                f"log.experts=true needs as many choices for every token, and router.name={self.cfg.router.name} gives "
                "ragged rows."
            )
        try:
            if not self.files:
                self.files = [self._open(*layer) for layer in zip(self.layers, expert_TK, strict=True)]
            self.check()
            for (file, dtype, start), layer_TK in zip(self.files, expert_TK, strict=True):
                file.seek(start + (step - 1) * layer_TK.numel() * dtype.itemsize)
                file.write(layer_TK.cpu().numpy().astype(dtype).tobytes())
                file.flush()
        except OSError as error:
            raise BadInput(f"{self.folder / 'routing'} cannot be written ({error.strerror or error}).") from error

    def check(self) -> None:
        """Raise `BadInput` if a file was deleted meanwhile: too large to be made again."""
        for (file, _, _), layer in zip(self.files, self.layers, strict=False):
            if not is_in_place(file, path_of(self.folder, layer)):
                raise BadInput(
                    f"{path_of(self.folder, layer)} was deleted or replaced while the run was writing it: the run "
                    "stops here. Start it anew, or go on with resume=true log.experts=false."
                )

    def _open(self, layer: int, expert_TK: Tensor) -> "tuple[BinaryIO, np.dtype[Any], int]":
        """The layer's file, made anew unless it is there; its steps take their space on the disk at once."""
        path, shape = path_of(self.folder, layer), (self.cfg.train.steps, *expert_TK.shape)
        dtype = _dtype(self.cfg, layer)
        header = io.BytesIO()
        about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, about)
        start, size = len(header.getvalue()), math.prod(shape) * dtype.itemsize
        if not (path.exists() and path.stat().st_size == start + size):
            with open(path, "wb") as file:
                file.write(header.getvalue())
                for _ in range(shape[0]):
                    file.write(np.full(shape[1:], NOT_RECORDED, dtype).tobytes())
        return open(path, "r+b"), dtype, start

    def close(self) -> None:
        """Close the files."""
        for file, _, _ in self.files:
            file.close()


class Replay:
    """The choices of the run in `cfg.balance.recorded`.

    Raises `BadInput` for a folder without them, a run whose steps had other tokens, and choices that do not fit."""

    def __init__(self, cfg: Config) -> None:
        self.folder = Path(cfg.balance.recorded)
        recorded = tokens_of(read_config(self.folder, cfg.trust or cfg.router.name))
        for key, value in tokens_of(cfg).items():
            if recorded[key] != value:
                raise BadInput(
                    f"balance.recorded={self.folder} was trained with {key}={recorded[key]}, and here it is {value}: a "
                    "replay needs the same batches."
                )
        self.layers = moe_layers(cfg.model)
        self.files = [self._read(cfg, layer) for layer in self.layers]

    def _read(self, cfg: Config, layer: int) -> "np.memmap[Any, Any]":
        path, most = path_of(self.folder, layer), _n_experts(cfg, layer)
        if not path.is_file():
            raise BadInput(
                f"balance.recorded={self.folder} has no {path.relative_to(self.folder)}: train it with "
                "log.experts=true, and with the same MoE layers."
            )
        try:
            file = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadInput(f"{path} is damaged: {str(error).splitlines()[0]}.") from error
        n_tokens = cfg.train.batch_size * cfg.model.context
        if file.ndim != 3 or not np.issubdtype(file.dtype, np.signedinteger) or file.shape[1] != n_tokens:
            raise BadInput(f"{path} holds {file.dtype} of shape {file.shape}, and not (steps, {n_tokens}, K) integers.")
        wide = n_choices(cfg.router, layer_moe(cfg.model, layer))
        if wide not in (None, file.shape[2]):
            raise BadInput(
                f"{path} has {file.shape[2]} choices for every token, and router.name={cfg.router.name} makes {wide}: "
                "a replay needs as many."
            )
        n_steps = int((file[: cfg.train.steps, 0, 0] != NOT_RECORDED).sum())
        if n_steps < cfg.train.steps:
            raise BadInput(f"{path} has {n_steps} of the train.steps={cfg.train.steps}: a replay needs them all.")
        if file[: cfg.train.steps].max() >= most:
            raise BadInput(f"{path} names expert {file.max()}, and layer {layer} has {most} experts, from 0.")
        return file

    def step(self, step: int, device: torch.device) -> list[Tensor]:
        """The choices of a step (from 1), (B·S, K) int64 for every MoE layer in order."""
        return [torch.from_numpy(file[step - 1].astype(np.int64)).to(device) for file in self.files]


def tokens_of(cfg: Config) -> dict[str, Any]:
    """The settings that decide a step's tokens, by their full names."""
    return {key: value for key, value in flat(to_dict(cfg)).items() if key.startswith(SAME) and key not in FREE}


def _dtype(cfg: Config, layer: int) -> "np.dtype[Any]":
    return np.min_scalar_type(-max(_n_experts(cfg, layer), -NOT_RECORDED))


def _n_experts(cfg: Config, layer: int) -> int:
    moe = layer_moe(cfg.model, layer)
    return moe.n_experts + moe.n_cheap
