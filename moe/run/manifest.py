"""A checkpoint's manifest: what files its folder has, the size and SHA-256 of each, and its own SHA-256.

It is written last. Without it, one flipped bit in a tensor file loads without a word. Whatever is wrong is a `BadInput`
that names the file.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.errors import BadInput

WHOLE, SHARDED = 1, 2  # formats of the folder: tensors in one file by kind, or in one by rank; a reader refuses others
META = "meta.json"
MANIFEST = "manifest.json"
RNG = "rng.safetensors"
TENSORS = {"model": "model.safetensors", "optimizer": "optimizer.safetensors", "rng": RNG}
FILES = {*TENSORS.values(), META}
SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")  # as torch.distributed.checkpoint names them

FOLDER = re.compile(r"step-(\d{8,})")


def verified(path: Path) -> dict[str, Any]:
    """The manifest of folder `path`, once everything in the folder agrees with it."""
    manifest = read_manifest(path)
    named = FOLDER.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise BadInput(f"{path / MANIFEST}: it is of step {manifest['step']}, which is not this folder's.")
    with _readable(path):
        unexpected = set(os.listdir(path)) - set(manifest["files"]) - {MANIFEST}
    if unexpected:
        raise BadInput(
            f"{path / min(unexpected)}: unexpected in a checkpoint, which holds only what its manifest lists."
        )
    for file, expected in manifest["files"].items():
        size = _regular(path / file).st_size
        if size != expected["size"]:
            raise BadInput(f"{path / file}: {size:,} bytes, but the manifest says {expected['size']:,}.")
        with _readable(path / file):
            digest = sha256(path / file)
        if digest != expected["sha256"]:
            raise BadInput(f"{path / file}: altered since it was written (its SHA-256 is not the manifest's).")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of folder `path`, alone: well-formed, unaltered and of this format."""
    if not path.is_dir():
        raise BadInput(f"{path}: not a checkpoint folder.")
    file = path / MANIFEST
    raw = read_bytes(file)
    body = parse_json(file, raw)
    digest = body.pop("sha256", None)
    match body:
        case {"format": int(), "step": int(), "score": float() | int() | None, "files": dict(files)} if (
            isinstance(digest, str) and len(body) == 4 and _fit(files) and all(map(_is_entry, files.values()))
        ):
            pass
        case _:
            raise BadInput(f"{file}: not a manifest; one gives format, step, score, and size and SHA-256 of each file.")
    if raw != seal(body):
        raise BadInput(f"{file}: altered since it was written (it does not match its own SHA-256).")
    if body["format"] != format_of(body["files"]):
        raise BadInput(f"{file}: format {body['format']}; this version reads formats {WHOLE} and {SHARDED}.")
    return body


def format_of(files: Iterable[str]) -> int:
    """The format of a folder with these files."""
    return WHOLE if set(files) == FILES else SHARDED


def _fit(files: Iterable[str]) -> bool:
    """Whether a folder of either format can have these files."""
    rest = set(files) - {META, RNG}
    return set(files) == FILES or ({META, RNG} < set(files) and all(SHARD.fullmatch(name) for name in rest))


def _is_entry(entry: Any) -> bool:
    match entry:
        case {"sha256": str(), "size": int()}:
            return len(entry) == 2
    return False


def _regular(file: Path) -> os.stat_result:
    """lstat of `file`; raises `BadInput` unless it is a regular file (a link could lead anywhere, a pipe blocks)."""
    with _readable(file):
        status = os.lstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{file}: not a regular file, as every file of a checkpoint must be.")
    return status


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}).") from error


def read_bytes(file: Path) -> bytes:
    """The bytes of a regular file. Raises `BadInput` naming it."""
    _regular(file)
    with _readable(file):
        return file.read_bytes()


def parse_json(file: Path, raw: bytes) -> dict[str, Any]:
    """The JSON object that a file's bytes are. Raises `BadInput` naming it."""
    try:
        tree = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(tree, dict):
        raise BadInput(f"{file}: must hold a JSON object.")
    return tree


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def seal(body: dict[str, Any]) -> bytes:
    """The manifest's bytes: `body` with its own SHA-256. One body has one spelling, so any altered byte shows."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(file: Path) -> dict[str, Any]:
    """The entry of a file, once it is durable."""
    entry = {"sha256": sha256(file), "size": os.stat(file).st_size}
    sync(file)
    return entry
