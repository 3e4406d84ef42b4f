"""Checkpoints: a training state written whole or not at all, and never believed unless its checksums agree.

A checkpoint is a folder that is written once and never changed:

    step-00000123/  model.safetensors  optimizer.safetensors  rng.safetensors  meta.json  manifest.json

`save` writes it as `step-00000123.tmp-<owner>`, syncs every file and the folder, and only then renames it, so a process
killed at any point leaves the earlier checkpoints as they were. The manifest, written last, holds the size and SHA-256
of every file, and its own SHA-256: without it, one flipped bit in a tensor file loads without a word. Tensors are
safetensors, everything else is JSON; nothing here unpickles. Whatever is wrong with a checkpoint is a `BadInput` that
names the file.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.config.run import Config, build
from moe.data.owner import remove_leftovers, temporary
from moe.errors import BadInput
from moe.run import shards, streamed
from moe.run.jsonl import finite, to_text
from moe.run.manifest import (
    FOLDER,
    MANIFEST,
    META,
    RNG,
    SHARDED,
    TENSORS,
    entry_of,
    format_of,
    parse_json,
    read_bytes,
    read_manifest,
    seal,
    sync,
    verified,
)
from moe.run.streamed import Tensors

_MARGIN = 2**20  # bytes asked for beyond the tensors: headers, manifest, file-system blocks


@dataclass
class Snapshot:
    """The state of a training run after `step` optimiser steps: all that a bitwise resume needs."""

    step: int
    model: Mapping[str, Tensor]  # `Tensors`: read while it is written, so that it may be larger than memory
    optimizer: dict[str, Tensor]  # flat names: "exp_avg/blocks.0.attn.q.weight"
    meta: dict[str, Any]  # plain JSON: config, schedule, loader state, Python's and NumPy's RNG, versions
    rng: dict[str, Tensor]  # torch RNG states, uint8: "cpu", "cuda:0", ...


def name_of(step: int) -> str:
    """The name of a step's checkpoint folder."""
    return f"step-{step:08d}"


def save(
    root: Path,
    snapshot: Snapshot,
    *,
    keep: int,
    score: float | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Path:
    """Write `snapshot` as a new folder in `root`, then delete superseded checkpoints. Returns the folder.

    `score` is the validation loss, lower is better; one that is not finite counts as none. Afterwards `root` holds the
    newest `keep` (>= 1) verified checkpoints, the best by score, and any damaged ones, which are neither counted nor
    deleted. A verified checkpoint of this step that exists already is kept and returned; a damaged one is moved aside
    to `step-….damaged-N` with one warning, and one that cannot be deleted is warned of too. Tensors may live on any
    device and need not be contiguous, but no two may share elements (tied weights are saved once).

    Raises `BadInput`, with the bytes needed and free, when the disk is full or cannot be written: the temporary folder
    is gone, and the sentence says which earlier checkpoint is good, once that was looked at. Raises `ValueError` for a
    `meta` that JSON would alter, but for numbers that are not finite: they are null."""
    assert keep >= 1, f"keep={keep} would delete the checkpoint just written"
    # All that is to be written, in memory, and the room it takes.
    final = root / name_of(snapshot.step)
    meta = encode_meta(snapshot.meta)
    tensors = {file: _storable(getattr(snapshot, part)) for part, file in TENSORS.items()}
    needed = sum(_nbytes(group) for group in tensors.values()) + len(meta)

    # Write under a temporary name, and rename only what is whole and durable.
    try:
        unfinished, damage = begin(final, needed)
        if unfinished is None:
            return final
        try:
            _write(unfinished, tensors, meta, snapshot.step, score)
            publish(unfinished, final, damage, warn)
        finally:  # also on KeyboardInterrupt; after the rename there is nothing left to remove
            shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise BadInput(cannot_be_written(final, f"{reason}", needed)) from error
    prune(root, final, keep, warn)
    return final


def begin(final: Path, needed: int) -> tuple[Path | None, str]:
    """A new folder to write the checkpoint `final` in, None where a good one is there already; and what is wrong with
    one that is not. Raises `OSError` where there is no room for so many bytes."""
    root, unfinished, damage = final.parent, temporary(final), ""
    if os.path.lexists(final):
        try:
            verify(final)
            return None, ""
        except BadInput as error:
            damage = str(error)
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root, ours=True)  # this process has no other save here
    if shutil.disk_usage(root).free < needed + _MARGIN:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.mkdir(unfinished)
    return unfinished, damage


def publish(unfinished: Path, final: Path, damage: str, warn: Callable[[str], None]) -> None:
    """Give a folder that is whole and durable the checkpoint's name; a damaged one of that name is moved aside."""
    if damage:
        step = int(final.name.removeprefix("step-"))
        warn(f"{damage} It is moved to {_move_aside(final)}, and step {step} is saved anew.")
    os.rename(unfinished, final)
    sync(final.parent)
    sync(final.parent.parent)


def cannot_be_written(final: Path, reason: str, needed: int) -> str:
    """What to say of a checkpoint that is not there: the room it takes, and which one is good."""
    return (
        f"{final}: the checkpoint of step {int(final.name.removeprefix('step-'))} cannot be written ({reason}): it "
        f"needs {needed + _MARGIN:,} bytes and {_free(final.parent)} are free; {last_good(final.parent)}."
    )


def add_score(path: Path, score: float, *, keep: int, warn: Callable[[str], None] = warnings.warn) -> None:
    """Give the checkpoint in folder `path`, saved before its validation was finished, the score of it, and delete what
    `save` would have deleted; one that has a score keeps it. Raises `BadInput` for a damaged one, and when the disk
    cannot be written: the checkpoint is as it was."""
    manifest = verified(path)
    if manifest["score"] is None and math.isfinite(score):
        beside = temporary(
            path.with_name(f"{path.name}.manifest")
        )  # not in the folder, which would hold a file too many
        try:
            beside.write_bytes(seal(manifest | {"score": score}))
            sync(beside)
            os.replace(beside, path / MANIFEST)
            sync(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise BadInput(f"{path / MANIFEST} cannot be written ({error.strerror or error}).") from error
        prune(path.parent, path, keep, warn)


def load(path: Path) -> Snapshot:
    """The snapshot in folder `path`, verified first; tensors on the CPU in memory of their own.

    Raises `BadInput` naming the file and what is wrong with it."""
    manifest = verified(path)
    meta = parse_json(path / META, read_bytes(path / META))
    if manifest["format"] == SHARDED:
        tensors = shards.read(path)
        model = {name: value for name, value in tensors.items() if "/" not in name}
        optimizer = {name: value for name, value in tensors.items() if "/" in name}
        return Snapshot(manifest["step"], model, optimizer, meta, _read_tensors(path / RNG))
    parts = {part: _read_tensors(path / file) for part, file in TENSORS.items()}
    return Snapshot(step=manifest["step"], meta=meta, **parts)


def latest(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest verified checkpoint in `root`, or None where there is no checkpoint at all.

    Damaged ones that are newer are passed over with one call of `warn` that names the bad files. Raises `BadInput` when
    there are checkpoints and none is good."""
    damages = []
    for path in _checkpoints(root):
        try:
            verify(path)
        except BadInput as error:
            damages.append(str(error))
            continue
        if damages:
            warn(f"{' '.join(damages)} Falling back to {path}.")
        return path
    if damages:
        raise BadInput(f"{root}: no checkpoint here is good, the newest least of all: {damages[0]}")
    return None


def last_good(root: Path) -> str:
    """What to say of the checkpoints in `root`, each looked at down to its bytes: which is the last good one."""
    try:
        good = latest(root, lambda _: None)
    except BadInput:
        return "no checkpoint is good"
    return f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"


def newest_meta(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in `root` whose meta is as its manifest says, and that meta; None where there is none. No
    tensor is read, so that it costs nothing to ask."""
    for path in _checkpoints(root):
        with contextlib.suppress(BadInput):
            return path, meta_of(path)
    return None


def meta_of(path: Path) -> dict[str, Any]:
    """The meta of the checkpoint in folder `path`; no tensor is read. Raises `BadInput` for a damaged one."""
    manifest, raw = read_manifest(path), read_bytes(path / META)
    if hashlib.sha256(raw).hexdigest() != manifest["files"][META]["sha256"]:
        raise BadInput(f"{path / META}: altered since it was written (its SHA-256 is not the manifest's).")
    return parse_json(path / META, raw)


def is_sharded(path: Path) -> bool:
    """Whether several ranks wrote the checkpoint in folder `path`. Raises `BadInput` for a damaged manifest."""
    return bool(read_manifest(path)["format"] == SHARDED)


def step_of(path: Path) -> int:
    """The step of the checkpoint in folder `path`. Raises `BadInput` for a damaged manifest."""
    return int(read_manifest(path)["step"])


def rest_of(path: Path) -> dict[str, Any]:
    """What a snapshot has besides tensors of the model and the optimiser: `meta` and `rng`. Raises as `load`."""
    return {"meta": meta_of(path), "rng": _read_tensors(path / RNG)}


def config_of(path: Path, meta: dict[str, Any]) -> Config:
    """The settings that the meta of the checkpoint in folder `path` holds. Raises `BadInput` naming the file."""
    try:
        return build(meta.get("config"))  # type: ignore[arg-type]
    except BadInput as error:
        raise BadInput(f"{path / META}: config: {error}") from None


def best(root: Path) -> Path | None:
    """The verified checkpoint with the lowest score (of equals the newest), or None where none has a score."""
    return _best(_good(root))


def verify(path: Path) -> None:
    """Check folder `path` against its manifest: exactly the files it should hold, each of the size and SHA-256 written.

    Raises `BadInput` naming the first bad file and what is wrong with it."""
    verified(path)


# Writing


def encode_meta(meta: dict[str, Any]) -> bytes:
    """The bytes of a meta.json. Raises ValueError for what JSON would alter."""
    text = to_text(meta, indent=1)
    if json.loads(text) != finite(meta):
        raise ValueError("meta has tuples or keys that are not strings: JSON would not give it back as it was")
    return text.encode()


def _storable(group: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(group, Tensors):
        return group
    return {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}


def _nbytes(group: Mapping[str, Tensor]) -> int:
    return group.nbytes if isinstance(group, Tensors) else sum(tensor.nbytes for tensor in group.values())


def _write(folder: Path, tensors: dict[str, Mapping[str, Tensor]], meta: bytes, step: int, score: float | None) -> None:
    """Fill `folder` and make it durable; the manifest comes last."""
    for file, group in tensors.items():
        if isinstance(group, Tensors):
            streamed.write(folder / file, group.meta, group.values())
        else:
            save_file(dict(group), folder / file)
    finish(folder, meta, {file: entry_of(folder / file) for file in tensors}, step, score)


def finish(folder: Path, meta: bytes, entries: dict[str, Any], step: int, score: float | None) -> None:
    """Write into a folder whose tensor files have these entries what is left: meta, and the manifest last."""
    (folder / META).write_bytes(meta)
    mode = stat.S_IMODE(os.stat(folder / META).st_mode)
    for file in entries:
        os.chmod(folder / file, mode)  # safetensors makes files that only their owner may read
    files = dict(sorted((entries | {META: entry_of(folder / META)}).items()))
    ranked = score if score is not None and math.isfinite(score) else None
    body = {"format": format_of(files), "step": step, "score": ranked, "files": files}
    (folder / MANIFEST).write_bytes(seal(body))
    sync(folder / MANIFEST)
    sync(folder)


def _move_aside(folder: Path) -> Path:
    n = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.damaged-{n}")):
        n += 1
    os.rename(folder, aside)
    return aside


def _free(root: Path) -> str:
    try:
        return f"{shutil.disk_usage(root).free:,}"
    except OSError:
        return "an unknown number"


# Reading


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Clones, because safetensors returns views of a memory map: a file cut short later would kill the process."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file}: not a valid safetensors file ({error}).") from error


# Choosing and deleting


def _checkpoints(root: Path) -> list[Path]:
    """Folders named like a checkpoint, newest first, good or not."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadInput(f"{root}: cannot be read ({error.strerror}); it must be a folder of checkpoints.") from error
    steps = {name: int(parts[1]) for name in names if (parts := FOLDER.fullmatch(name))}
    return [root / name for name in sorted(steps, key=lambda name: -steps[name])]


def _good(root: Path, trusted: Path | None = None) -> dict[Path, float | None]:
    """The score of every verified checkpoint, newest first. `trusted` is not hashed again: it was just written."""
    good = {}
    for path in _checkpoints(root):
        try:
            manifest = read_manifest(path) if path == trusted else verified(path)
        except BadInput:
            continue
        good[path] = manifest["score"]
    return good


def _best(good: dict[Path, float | None]) -> Path | None:
    scores = {path: score for path, score in good.items() if score is not None}
    return min(scores, key=lambda path: scores[path], default=None)


def prune(root: Path, new: Path, keep: int, warn: Callable[[str], None]) -> None:
    """Delete the verified checkpoints that are not among the newest `keep`, the best, or `new`.

    Each is renamed to a temporary name first, so that one half deleted is never taken for a checkpoint."""
    good = _good(root, trusted=new)
    kept = {new, *list(good)[:keep], _best(good)}
    for path in good:
        if path not in kept:
            try:
                os.rename(path, temporary(path))
                shutil.rmtree(temporary(path))
            except OSError as error:
                warn(f"{path}: this superseded checkpoint cannot be deleted ({error.strerror}).")
