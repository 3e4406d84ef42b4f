"""The experts that every token took in every training step, kept on disk and taken again: routing replay.

`log.experts=true` writes, for each MoE layer, routing/experts-<layer>.npy into the run's folder: (steps, B·S, K) whole
numbers, the tokens of a step in the loader's order, whatever micro-batches they were split into. A step's part of a
file is a block, and once a step's blocks are written, routing/checksums.jsonl gets a line with the checksum of each. A
block without its line was not finished, and is written again on resuming; one that is not as its line says is never
taken.

With `balance.force=recorded balance.recorded=<that run>` another run takes those experts at the same steps instead of
its own router's: what is left of a difference between the two is not the routing (2507.18071, 2510.11370), and two
backends can be timed under the same real load. The router still scores, weighs and learns.
"""

import hashlib
import io
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from moe.run import jsonl
from moe.run.folder import flat, read_config

NOT_RECORDED = -128  # what a step holds before it is written; no router gives it
# What decides a step's tokens: settings whose names begin like this.
SAME = ("tokenizer.", "data.", "model.context", "train.batch_size")
NOT_SAME = (*FREE, "data.documents")  # but for these


def path_of(folder: Path, layer: int) -> Path:
    """Where the choices of a layer (from 0, among all layers) are."""
    return folder / "routing" / f"experts-{layer}.npy"


def checksums_of(folder: Path) -> Path:
    """Where the checksums of every step's blocks are."""
    return folder / "routing" / "checksums.jsonl"


def checksum(layer: int, step: int, block_TK: np.ndarray) -> str:
    """Of a step's block of a layer: 16 hex digits of its place, its dtype, its shape and every byte."""
    about = f"{layer} {step} {block_TK.dtype.str} {block_TK.shape} "
    return hashlib.blake2b(about.encode() + block_TK.tobytes(), digest_size=8).hexdigest()


def read_checksums(folder: Path) -> dict[int, dict[int, str]]:
    """The checksum of each layer's block, by step; none where there is no file. Raises `BadInput` for a damaged one."""
    path, by_step = checksums_of(folder), {}
    for number, line in enumerate(jsonl.read_lines(path), 1):
        match line:
            case {"step": int(step), "blocks": dict(blocks)} if all(layer.isdecimal() for layer in blocks):
                by_step[step] = {int(layer): str(digest) for layer, digest in blocks.items()}
            case _:
                raise BadInput(
                    f"{path}, line {number} is damaged: it has not the step and the checksums of its blocks."
                )
    return by_step


@dataclass
class Blocks:
    """A layer's open file, (steps, B·S, K). Read, not mapped: a map of a file that is cut short ends the process."""

    path: Path
    layer: int
    file: BinaryIO
    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    start: int  # of the first block, in bytes

    @classmethod
    def open(cls, folder: Path, layer: int, mode: str) -> "Blocks":
        """Raises `BadInput` for a file that is not there, or no whole array of blocks."""
        path = path_of(folder, layer)
        try:
            # Read past a buffer, which would not show what was altered meanwhile.
            file: BinaryIO = open(path, mode, -1 if "+" in mode else 0)  # type: ignore[assignment]  # noqa: SIM115
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror or error}).") from error
        try:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
            if dtype.hasobject or len(shape) != 3:
                raise ValueError(f"it holds {dtype} of shape {shape}")
            if size != start + math.prod(shape) * dtype.itemsize:
                raise ValueError(f"it has {size:,} bytes, and not {start + math.prod(shape) * dtype.itemsize:,}")
        except (ValueError, OSError, EOFError) as error:
            file.close()
            raise BadInput(f"{path} is damaged: {str(error).splitlines()[0]}.") from error
        return cls(path, layer, file, dtype, shape, start)

    @classmethod
    def create(cls, folder: Path, layer: int, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> "Blocks":
        """A file in which nothing is recorded; its blocks take their space on the disk at once."""
        header = io.BytesIO()
        about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, about)
        with open(path_of(folder, layer), "wb") as file:
            file.write(header.getvalue())
            for _ in range(shape[0]):
                file.write(np.full(shape[1:], NOT_RECORDED, dtype).tobytes())
        return cls.open(folder, layer, "r+b")

    def read(self, step: int) -> np.ndarray:
        """The block of a step (from 1), (B·S, K). Raises `BadInput` where the file ends before."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.file.seek(self.start + (step - 1) * size)
        raw = self.file.read(size)
        if len(raw) < size:
            raise BadInput(f"{self.path} is damaged: it ends in the block of step {step}.")
        return np.frombuffer(raw, self.dtype).reshape(self.shape[1:])

    def verified(self, step: int, digest: str | None) -> np.ndarray:
        """`read`, if the block is what `digest` is the checksum of. Raises `BadInput` naming the file and the step."""
        block_TK = self.read(step)
        if checksum(self.layer, step, block_TK) != digest:
            path = checksums_of(self.path.parents[1])
            raise BadInput(
                f"{self.path} is damaged: its experts of step {step} are not those that {path} has the checksum of."
            )
        return block_TK

    def write(self, step: int, block_TK: np.ndarray) -> None:
        """Replace the block of a step (from 1)."""
        self.file.seek(self.start + (step - 1) * math.prod(self.shape[1:]) * self.dtype.itemsize)
        self.file.write(block_TK.tobytes())
        self.file.flush()


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

    def __init__(self, folder: Path, cfg: Config, step: int, say: Callable[[str], None]) -> None:
        """Of the run that has taken `step` steps. What is recorded of those is verified, and what is missing said.
        Raises `BadInput` for damage, as it cannot be made again."""
        self.folder, self.cfg, self.step, self.layers = folder, cfg, step, moe_layers(cfg.model)
        self.files: list[Blocks] = []
        self.kept: dict[int, dict[int, str]] = {}  # the checksums of what is recorded, by step and layer
        self.checksums: jsonl.Lines | None = None
        if not cfg.log.experts or not self.layers:
            return
        self.kept = {number: digests for number, digests in read_checksums(folder).items() if number <= step}
        try:
            self._verify(say)
        except BadInput as damage:
            raise BadInput(
                f"{str(damage).rstrip('.')}, and what the run recorded until step {step} cannot be made again: restore "
                "routing/, or go on with resume=true log.experts=false."
            ) from damage
        self.checksums = jsonl.Lines(checksums_of(folder))

    def _verify(self, say: Callable[[str], None]) -> None:
        """The blocks of the steps that were taken, against their checksums."""
        there = [layer for layer in self.layers if path_of(self.folder, layer).exists()]
        if not self.kept and not (self.step and there):
            return  # nothing is recorded yet, or nothing of what is there counts
        for layer in self.layers if self.kept else there:
            blocks = Blocks.open(self.folder, layer, "rb")
            with blocks.file:
                if blocks.shape[0] != self.cfg.train.steps or blocks.dtype != _dtype(self.cfg, layer):
                    raise BadInput(f"{blocks.path} is damaged: it holds {blocks.dtype} of shape {blocks.shape}.")
                for step, digests in self.kept.items():
                    blocks.verified(step, digests.get(layer))
                if not self.kept and any((blocks.read(i) != NOT_RECORDED).any() for i in range(1, self.step + 1)):
                    raise BadInput(f"{blocks.path} has no checksums in {checksums_of(self.folder)}.")
        lost = [step for step in range(1, self.step + 1) if step not in self.kept]
        if self.kept and lost:
            say(
                f"warning: {checksums_of(self.folder)} lacks {len(lost)} of the {self.step} steps that were taken, the "
                f"first of them {lost[0]}: their experts are not recorded."
            )

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
            digests = {}
            for blocks, layer_TK in zip(self.files, expert_TK, strict=True):
                block_TK = layer_TK.cpu().numpy().astype(blocks.dtype)
                blocks.write(step, block_TK)
                digests[str(blocks.layer)] = checksum(blocks.layer, step, block_TK)
        except OSError as error:
            raise BadInput(f"{self.folder / 'routing'} cannot be written ({error.strerror or error}).") from error
        assert self.checksums is not None, "log.experts is off"
        self.checksums.write({"step": step, "blocks": digests})

    def check(self) -> None:
        """Raise `BadInput` if a file was deleted meanwhile: too large to be made again."""
        for blocks in self.files:
            if not jsonl.is_in_place(blocks.file, blocks.path):
                raise BadInput(
                    f"{blocks.path} was deleted or replaced while the run was writing it: the run "
                    "stops here. Start it anew, or go on with resume=true log.experts=false."
                )
        if self.checksums:
            self.checksums.keep()

    def _open(self, layer: int, expert_TK: Tensor) -> Blocks:
        """The layer's file, made anew unless something is recorded in it. Of steps that are to be taken, which a killed
        process may have begun to write, nothing stays."""
        dtype, shape = _dtype(self.cfg, layer), (self.cfg.train.steps, *expert_TK.shape)
        if not self.kept:
            return Blocks.create(self.folder, layer, dtype, shape)
        blocks = Blocks.open(self.folder, layer, "r+b")
        if blocks.shape != shape:
            raise BadInput(f"{blocks.path} is of shape {blocks.shape}, and what this run records {shape}.")
        blank_TK = np.full(shape[1:], NOT_RECORDED, dtype)
        for step in range(self.step + 1, shape[0] + 1):
            if (blocks.read(step) != blank_TK).any():
                blocks.write(step, blank_TK)
        return blocks

    def close(self) -> None:
        """Close the files."""
        for blocks in self.files:
            blocks.file.close()
        if self.checksums:
            self.checksums.close()


class Replay:
    """The choices of the run in `cfg.balance.recorded`.

    Raises `BadInput` for a folder without them, a run whose steps had other tokens, choices that do not fit, and any
    that are not as they were written."""

    def __init__(self, cfg: Config) -> None:
        self.folder, self.cfg = Path(cfg.balance.recorded), cfg
        recorded = tokens_of(read_config(self.folder, cfg.trust or cfg.router.name))
        for key, value in tokens_of(cfg).items():
            if recorded[key] != value:
                raise BadInput(
                    f"balance.recorded={self.folder} was trained with {key}={recorded[key]}, and here it is {value}: a "
                    "replay needs the same batches."
                )
        self.files = [self._open(layer) for layer in moe_layers(cfg.model)]
        self.checksums = self._checksums()
        for step in range(1, cfg.train.steps + 1):  # before anything is trained on what comes after it
            self._read(step)

    def _open(self, layer: int) -> Blocks:
        cfg, path = self.cfg, path_of(self.folder, layer)
        if not path.is_file():
            raise BadInput(
                f"balance.recorded={self.folder} has no {path.relative_to(self.folder)}: train it with "
                "log.experts=true, and with the same MoE layers."
            )
        blocks, n_tokens = Blocks.open(self.folder, layer, "rb"), cfg.train.batch_size * cfg.model.context
        if not np.issubdtype(blocks.dtype, np.signedinteger) or blocks.shape[1] != n_tokens:
            raise BadInput(
                f"{path} holds {blocks.dtype} of shape {blocks.shape}, and not (steps, {n_tokens}, K) integers."
            )
        wide = n_choices(cfg.router, layer_moe(cfg.model, layer))
        if wide not in (None, blocks.shape[2]):
            raise BadInput(
                f"{path} has {blocks.shape[2]} choices for every token, and router.name={cfg.router.name} makes "
                f"{wide}: a replay needs as many."
            )
        return blocks

    def _checksums(self) -> dict[int, dict[int, str]]:
        """Those of every step that is to be taken."""
        path, needed = checksums_of(self.folder), self.cfg.train.steps
        if not path.is_file():
            raise BadInput(
                f"balance.recorded={self.folder} has no {path.relative_to(self.folder)}, so that damage to what it "
                "recorded cannot be seen (older versions wrote none): record the run anew with log.experts=true."
            )
        by_step = read_checksums(self.folder)
        n_steps = min(
            min((blocks.shape[0] for blocks in self.files), default=0), len(by_step.keys() & range(1, needed + 1))
        )
        if n_steps < needed:
            raise BadInput(f"{path} has {n_steps} of the train.steps={needed}: a replay needs them all.")
        return by_step

    def _read(self, step: int) -> list[np.ndarray]:
        blocks_TK = []
        for blocks in self.files:
            block_TK, most = (
                blocks.verified(step, self.checksums[step].get(blocks.layer)),
                _n_experts(self.cfg, blocks.layer),
            )
            if block_TK.max(initial=0) >= most:
                raise BadInput(
                    f"{blocks.path} names expert {block_TK.max()}, and layer {blocks.layer} has {most} experts, from 0."
                )
            blocks_TK.append(block_TK)
        return blocks_TK

    def step(self, step: int, device: torch.device) -> list[Tensor]:
        """The choices of a step (from 1), (B·S, K) int64 for every MoE layer in order. Raises `BadInput` for a block
        that was altered meanwhile."""
        return [torch.from_numpy(block_TK.astype(np.int64)).to(device) for block_TK in self._read(step)]


def tokens_of(cfg: Config) -> dict[str, Any]:
    """The settings that decide a step's tokens, by their full names; `seed` is that of the batches."""
    named = {key: value for key, value in flat(to_dict(cfg)).items() if key.startswith(SAME) and key not in NOT_SAME}
    return {"seed": cfg.data_seed()} | named


def _dtype(cfg: Config, layer: int) -> "np.dtype[Any]":
    return np.min_scalar_type(-max(_n_experts(cfg, layer), -NOT_RECORDED))


def _n_experts(cfg: Config, layer: int) -> int:
    moe = layer_moe(cfg.model, layer)
    return moe.n_experts + moe.n_cheap
