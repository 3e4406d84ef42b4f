"""Batches out of a prepared corpus: windows in a shuffled order, each batch a pure function of (seed, step).

Window i of a split is tokens [i*S, i*S + S + 1). Sample n = step*B + b is window `order[n % windows]` of epoch
n // windows; the order is a permutation drawn from (seed, epoch). So a batch is the same for any number of workers, and
after any interruption.
"""

import hashlib
import signal
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from moe.data.shards import Split
from moe.errors import BadInput


@dataclass
class Batch:
    """One step's input, and what it is to predict. The targets are the tokens one place further."""

    tokens_BS: torch.Tensor  # int64
    targets_BS: torch.Tensor  # int64
    domain_BS: torch.Tensor  # uint8 (int32 for more than 256), the domain id of each target


class Loader:
    """Batches of B windows of S tokens in a shuffled order, each a pure function of (seed, step)."""

    def __init__(self, split: Split, batch_size: int, context: int, seed: int, workers: int = 0) -> None:
        """B = `batch_size`, S = `context`; `workers` processes read ahead and change nothing else.

        Raises `BadInput` for a split shorter than one window."""
        self.split, self.batch_size, self.context, self.seed, self.workers = split, batch_size, context, seed, workers
        self.n_windows = _windows(split, context)
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, from 0."""
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        windows = [self._order(n // self.n_windows)[n % self.n_windows] for n in samples]
        tokens, domain = self.split.read(np.array(windows) * self.context, self.context)
        inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(domain))

    def iterate(self, from_step: int) -> Generator[Batch, None, None]:
        """Batches of `from_step`, `from_step` + 1, ... without end. Closing the iterator ends the workers."""
        batches: DataLoader[Batch] = DataLoader(
            range(from_step, sys.maxsize),  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=self.batch,  # type: ignore[arg-type]  # a sample is a step
            num_workers=self.workers,
            worker_init_fn=_ignore_interruption,
            generator=torch.Generator(),  # else it draws from the global one, and a resumed run would differ
        )
        yield from batches

    def state(self, step: int) -> dict[str, Any]:
        """Where the loader stands before `step`, for a checkpoint: plain JSON values."""
        epoch, position = divmod(step * self.batch_size, self.n_windows)
        return {
            "dataset": self.split.dataset,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "context": self.context,
            "order": hashlib.sha256(self._order(epoch).tobytes()).hexdigest(),
            "step": step,
            "epoch": epoch,
            "position": position,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise `BadInput`, naming what changed, unless this loader continues exactly where `state` was taken."""
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise BadInput(f"the checkpoint's loader state has step={step!r}, which is not a number of steps.")
        names = {
            "dataset": f"the hash of the prepared corpus ({self.split.name} split)",
            "seed": "seed",
            "batch_size": "train.batch_size",
            "context": "model.context",
            "order": "the order of windows (drawn by another version of numpy)",
            "epoch": "the epoch",
            "position": "the position in the epoch",
        }
        for key, value in self.state(step).items():
            if state.get(key) != value:
                raise BadInput(
                    f"{names[key]} changed since the checkpoint: it was {state.get(key)!r} and is now {value!r}; go on "
                    "with the data and settings of the checkpoint, or start a new run."
                )

    def _order(self, epoch: int) -> np.ndarray:
        """(windows,) int64, a permutation."""
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a batch may straddle two epochs
                del self._orders[min(self._orders)]
            key = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
            self._orders[epoch] = np.random.Generator(np.random.Philox(key)).permutation(self.n_windows)
        return self._orders[epoch]


def validation_starts(split: Split, context: int, n_tokens: int) -> np.ndarray:
    """(n,) starts of non-overlapping windows of S target tokens, spread evenly over the split: `n_tokens` // S of them,
    at least one, or all windows if there are no more. Raises `BadInput` for a split shorter than one window."""
    windows = _windows(split, context)
    count = min(windows, max(1, n_tokens // context))
    return np.arange(count) * windows // count * context


def _windows(split: Split, context: int) -> int:
    windows = split.n_windows(context)
    if not windows:
        share = ", data.val_fraction" if split.name == "val" else ""
        raise BadInput(
            f"the {split.name} split has {split.n_tokens} tokens, fewer than the {context + 1} of one sequence: "
            f"lower model.context={context}, or add text (data.max_mb, data.path{share})."
        )
    return windows


def _ignore_interruption(worker: int) -> None:
    """Signals to the whole process group are for the main process to answer: it needs its batches until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
