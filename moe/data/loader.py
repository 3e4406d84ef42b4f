"""Batches out of a prepared corpus: windows in a shuffled order, each batch a pure function of (seed, step).

Window i of a split is tokens [i*S, i*S + S + 1). With data.documents=whole it begins with a document instead, and what
counts are the documents that fit into it, each in one window. Sample n = step*B + b is window `order[n % windows]` of
epoch n // windows; the order is a permutation drawn from (seed, epoch). So a batch is the same for any number of
workers, and after any interruption.
"""

import atexit
import hashlib
import multiprocessing
import signal
import sys
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader

from moe.data.shards import Split
from moe.errors import BadInput

PATIENCE = 60.0  # seconds without a batch after which the workers are given up
NO_TARGET = -1  # a target that is not to be learnt
LOOK = 5.0  # seconds between looks at whether they have been
T = TypeVar("T")
_READ_AHEAD: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators that have workers


@dataclass
class Batch:
    """One step's input, and what it is to predict. The targets are the tokens one place further, or `NO_TARGET` where
    there is nothing to learn."""

    tokens_BS: torch.Tensor  # int64
    targets_BS: torch.Tensor  # int64
    domain_BS: torch.Tensor  # uint8 (int32 for more than 256), the domain id of each target


class Places(NamedTuple):
    """Where windows of S + 1 tokens start in a split, and which of its tokens count in each, [first, last): (W,)."""

    start_W: np.ndarray
    first_W: np.ndarray
    last_W: np.ndarray

    def take(self, index: np.ndarray) -> "Places":
        """Those of these windows."""
        return Places(*(column[index] for column in self))


def rows_of_rank(batch_size: int, rank: int, n_ranks: int, accumulate: int) -> list[int]:
    """The rows of a batch, from 0, that rank `rank` of `n_ranks` reads, where it is split into `accumulate`
    micro-batches: of each its part, the ranks' parts of one lying behind one another."""
    size = batch_size // (accumulate * n_ranks)  # rows of a rank in a micro-batch
    return [first + row for first in range(rank * size, batch_size, n_ranks * size) for row in range(size)]


def every_window(split: Split, context: int, whole: bool = False) -> Places:
    """All windows of a split, in its order. Raises `BadInput` for a split shorter than one window, and with `whole` for
    a document that is longer.

    whole: no document is cut. A window begins with one and has as many more as it has room for; the tokens behind the
    last of them are the next one's, which counts in the next window. So there is no padding: experts see text alone."""
    n_windows = _windows(split, context)
    if not whole:
        start_W = np.arange(n_windows) * context
        return Places(start_W, start_W, start_W + context + 1)
    length_D = split.lengths()
    if (too_long := length_D > context + 1).any():
        raise BadInput(
            f"{too_long.sum()} of the {len(length_D)} documents of the {split.name} split are longer than "
            f"model.context={context} (the longest has {length_D.max()} tokens): raise it to {length_D.max() - 1}, "
            "shorten them, or cut them with data.documents=separate."
        )
    stop_D = np.cumsum(length_D)
    firsts, lasts = [0], []
    for stop, before in zip(stop_D.tolist(), (stop_D - length_D).tolist(), strict=True):
        if stop - firsts[-1] > context + 1:
            lasts.append(before)
            firsts.append(before)
    first_W, last_W = np.array(firsts), np.array([*lasts, split.n_tokens])
    return Places(np.minimum(first_W, split.n_tokens - context - 1), first_W, last_W)


def read_windows(split: Split, windows: Places, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (n, S + 1), targets (n, S) and their domains (n, S), as in `Batch`."""
    tokens, domain = split.read(windows.start_W, context)
    targets, learnt = tokens[:, 1:], split.learnt(windows.start_W, context)
    place = windows.start_W[:, None] + np.arange(1, context + 1)
    counts = (windows.first_W[:, None] <= place) & (place < windows.last_W[:, None])
    counts = counts if learnt is None else counts & learnt
    return tokens, targets if counts.all() else np.where(counts, targets, NO_TARGET), domain


class Loader:
    """Batches of B windows of S tokens in a shuffled order, each a pure function of (seed, step)."""

    def __init__(
        self, split: Split, batch_size: int, context: int, seed: int, workers: int = 0, whole: bool = False
    ) -> None:
        """B = `batch_size`, S = `context`; `workers` processes read ahead and change nothing else; `whole` as in
        `every_window`, which says what is refused. What is given is the whole batch, or of it the rows `share` says."""
        self.split, self.batch_size, self.context, self.seed, self.workers = split, batch_size, context, seed, workers
        self.all = every_window(split, context, whole)
        self.n_windows = len(self.all.start_W)
        self._orders: dict[int, np.ndarray] = {}
        self.batch_rows: Sequence[int] = range(batch_size)

    def share(self, rank: int, n_ranks: int, accumulate: int) -> None:
        """Read from here on a rank's rows of every batch, as `rows_of_rank` says which."""
        self.batch_rows = rows_of_rank(self.batch_size, rank, n_ranks, accumulate)

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, from 0."""
        return _batch(*self.windows(step))

    def windows(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """That batch, as from `read_windows`."""
        samples = (step * self.batch_size + row for row in self.batch_rows)
        windows = [self._order(n // self.n_windows)[n % self.n_windows] for n in samples]
        return read_windows(self.split, self.all.take(np.array(windows)), self.context)

    def iterate(self, from_step: int) -> Generator[Batch, None, None]:
        """Batches of `from_step`, `from_step` + 1, ... without end. Closing the iterator ends the workers. Raises
        `BadInput` where they cannot be started or give no batch for `PATIENCE` seconds."""
        # Workers hand over arrays: tensors would need shared memory and open files, which a machine may be short of.
        batches: DataLoader[tuple[np.ndarray, np.ndarray, np.ndarray]] = DataLoader(
            range(from_step, sys.maxsize),  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=self.windows,  # type: ignore[arg-type]  # a sample is a step
            num_workers=self.workers,
            timeout=LOOK if self.workers else 0,
            worker_init_fn=_ignore_interruption,
            generator=torch.Generator(),  # else it draws from the global one, and a resumed run would differ
        )
        others = set(multiprocessing.active_children())
        try:
            iterator = iter(batches)
        except OSError as error:
            raise BadInput(
                f"data.workers={self.workers} cannot be started ({error.strerror or error}): they need shared memory "
                "(/dev/shm), open files (ulimit -n) and processes (ulimit -u); data.workers=0 reads without them."
            ) from error
        if self.workers:
            _READ_AHEAD.add(iterator)
        workers = [child.pid for child in set(multiprocessing.active_children()) - others if child.pid]
        while True:
            yield _batch(*(_handed_over(iterator, workers) if workers else next(iterator)))

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

    def check_state(self, state: dict[str, Any] | None) -> None:
        """Raise `BadInput`, naming what changed, unless this loader continues exactly where `state` was taken; None is
        the state of weights that were imported."""
        if state is None:
            raise BadInput(
                "the checkpoint has weights alone, imported from elsewhere: take these (source_state=weights)."
            )
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


def validation_windows(split: Split, context: int, n_tokens: int, whole: bool = False) -> Places:
    """Windows of S target tokens, spread evenly over the split: `n_tokens` // S of them, at least one, or all windows
    if there are no more. Raises `BadInput` as `every_window`."""
    windows = every_window(split, context, whole)
    n_windows = len(windows.start_W)
    count = min(n_windows, max(1, n_tokens // context))
    return windows.take(np.arange(count) * n_windows // count)


def _windows(split: Split, context: int) -> int:
    windows = split.n_windows(context)
    if not windows:
        share = ", data.val_fraction" if split.name == "val" else ""
        raise BadInput(
            f"the {split.name} split has {split.n_tokens} tokens, fewer than the {context + 1} of one sequence: "
            f"lower model.context={context}, or add text (data.max_mb, data.path{share})."
        )
    return windows


def _batch(tokens: np.ndarray, targets: np.ndarray, domain: np.ndarray) -> Batch:
    inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(targets)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(domain))


def _handed_over(iterator: Iterator[T], workers: Sequence[int]) -> T:
    """The next of what `workers`, processes by number, hand over. Raises `BadInput` when none comes for `PATIENCE`
    seconds."""
    states: list[str] = []

    def look() -> None:
        """Note what the workers do, and let go on who was stopped: in the middle of handing over, this process would
        wait for it, and afterwards it could not end."""
        processes = [psutil.Process(worker) for worker in workers if psutil.pid_exists(worker)]
        now = [f"process {process.pid} is {process.status()}" for process in processes]
        states.extend(now)  # before any goes on and hands over a batch
        for process in processes:
            process.resume()

    watch = threading.Timer(PATIENCE, look)
    watch.start()
    try:
        while True:
            try:
                item = next(iterator)
            except BadInput as error:  # raised in a worker, with its traceback for a message
                raise BadInput(str(error).strip().splitlines()[-1].partition("BadInput: ")[2] or str(error)) from None
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                item = None
            if states and (item is None or any("stopped" in state for state in states)):
                raise BadInput(
                    f"no batch came from the loader's workers for {PATIENCE:g} s ({', '.join(states)}): see what they "
                    "wait for, a slow disk or somebody who stopped them, and go on with resume=true; data.workers=0 "
                    "reads without them."
                )
            if item is not None:
                return item
    finally:
        watch.cancel()


def _ignore_interruption(worker: int) -> None:
    """Signals to the whole process group are for the main process to answer: it needs its batches until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """End the workers of iterators that are still held, say by a traceback: multiprocessing would ask with SIGTERM,
    which they ignore, and wait for them for ever."""
    for iterator in list(_READ_AHEAD):
        iterator.__del__()
