"""Checkpoints that many ranks write together, with the guarantees of checkpoint.py: whole or not at all, every file
under a checksum. And saving aside, while training goes on.

A folder is as one process writes it, but that tensors are in a file for every rank (shards.py). Every rank hashes its
own file; rank 0 does the rest, and writes the manifest last. Where one rank fails, all of them raise the same sentence.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from moe.errors import BadInput
from moe.parallel import launch
from moe.parallel.collectives import n_ranks, rank
from moe.parallel.gradients import copies, local
from moe.run import checkpoint, shards
from moe.run.checkpoint import Snapshot
from moe.run.manifest import RNG, entry_of


def save(
    root: Path,
    snapshot: Snapshot,
    *,
    keep: int,
    score: float | None = None,
    warn: Callable[[str], None] = warnings.warn,
    group: Any = None,
) -> Path:
    """`checkpoint.save` by all ranks, who call it together; tensors are DTensors, or the same on every rank. `group`:
    of gloo, for what ranks say meanwhile. Raises `BadInput` as that does, on all ranks alike."""
    if n_ranks() == 1:
        return checkpoint.save(root, snapshot, keep=keep, score=score, warn=warn)
    assert keep >= 1, f"keep={keep} would delete the checkpoint just written"
    final, tensors = root / checkpoint.name_of(snapshot.step), {**snapshot.model, **snapshot.optimizer}
    meta = checkpoint.encode_meta(snapshot.meta)
    # What several ranks keep alike is written once.
    ours = sum(local(tensor).nbytes / copies(tensor) for tensor in tensors.values())
    needed = round(sum(launch.shared(ours, group))) + len(meta) + sum(state.nbytes for state in snapshot.rng.values())

    def on_first(work: Callable[[], Any]) -> Outcome:
        return launch.first_then_tell(lambda: told(work), group)

    def refuse(outcomes: list[Outcome]) -> None:
        problems = [outcome.problem for outcome in outcomes if outcome.problem]
        if problems:
            say = lambda: checkpoint.cannot_be_written(final, problems[0], needed)
            raise BadInput(launch.first_then_tell(say, group))

    # Rank 0 makes the folder, if this step has no good checkpoint yet.
    begun = on_first(lambda: checkpoint.begin(final, needed))
    refuse([begun])
    unfinished, damage = begun.value
    if unfinished is None:
        return final

    # Every rank writes and hashes its file; then rank 0 all else.
    def end() -> None:
        save_file(snapshot.rng, unfinished / RNG)
        entries = {RNG: entry_of(unfinished / RNG)} | {k: v for of_rank in written for k, v in of_rank.value.items()}
        checkpoint.finish(unfinished, meta, entries, snapshot.step, score)
        checkpoint.publish(unfinished, final, damage, warn)

    try:
        written = launch.shared(told(lambda: _write(unfinished, tensors, group)), group)
        refuse(written)
        refuse([on_first(end)])
    finally:
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
    pruned = on_first(lambda: checkpoint.prune(root, final, keep, warn))
    if pruned.problem:
        raise BadInput(f"{root}: older checkpoints cannot be deleted ({pruned.problem}).")
    return final


class Outcome(NamedTuple):
    """What a rank made of a part of the work: a value, or what was wrong."""

    value: Any = None
    problem: str = ""


def told(work: Callable[[], Any]) -> Outcome:
    """Do it, and tell what came of it instead of raising: the other ranks wait to hear of it."""
    try:
        return Outcome(work())
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        return Outcome(problem=reason if " at rank " in reason else f"{reason} at rank {rank()}")


def _write(folder: Path, tensors: Mapping[str, Tensor], group: Any) -> dict[str, dict[str, Any]]:
    """This rank's file, durable, and its entry in the manifest."""
    shards.write(folder, tensors, group)
    ours = [name for name in os.listdir(folder) if name.startswith(f"shard-{rank() + 1:05d}-")]
    return {name: entry_of(folder / name) for name in ours}


class Saver:
    """Saves aside: a copy is made in memory, and a thread writes it while training goes on, one at a time. Ranks talk
    in it by a group of their own. Use as a context manager, which waits for what is being written."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[Path] | None = None
        self.group = launch.new_group()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self.pool.shutdown(wait=error is None, cancel_futures=True)

    def save(self, root: Path, snapshot: Snapshot, **settings: Any) -> None:
        """`sharded.save`, later. Raises what the one before raised."""
        self.wait()
        staged = replace(snapshot, model=_staged(snapshot.model), optimizer=_staged(snapshot.optimizer))
        self.pending = self.pool.submit(save, root, staged, group=self.group, **settings)

    def wait(self) -> None:
        """Until nothing is being written. Raises `BadInput` where that failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def _staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
