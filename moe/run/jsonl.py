"""JSON on the disk: lines are appended one by one, whole files replaced in one move, records read by their types.

JSON has no NaN and no infinity: a number that is not finite is written as null, at any depth.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from moe.data.owner import temporary
from moe.errors import BadInput

T = TypeVar("T")


def to_text(tree: Any, indent: int | None = None) -> str:
    """A tree of dicts, lists and values as JSON that any reader takes."""
    return json.dumps(finite(tree), indent=indent, allow_nan=False)


def finite(tree: Any) -> Any:
    """`tree` with None for every number that is not finite."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        return finite(tree._asdict())
    return type(tree)(finite(value) for value in tree) if isinstance(tree, list | tuple) else tree


def write_json(path: Path, tree: Any) -> None:
    """Replace `path` by `tree` as JSON, or leave it as it was."""
    write_atomically(path, to_text(tree, indent=1) + "\n")


def record(kind: type[T], tree: Any, where: str) -> T:
    """`tree`, as read from JSON, as a dataclass, a NamedTuple, or whatever else `kind` says, at any depth. null is NaN
    where a number has to be. What `kind` has no field for is left out: a later version may have written it. Raises
    `BadInput` for what is missing or of another kind, with `where` it is."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return tree
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if tree is None else record(inner, tree, where)  # type: ignore[return-value]
    if kind is float and (tree is None or isinstance(tree, int | float)) and not isinstance(tree, bool):
        return math.nan if tree is None else float(tree)  # type: ignore[return-value]
    if origin is list and isinstance(tree, list):
        return [record(arguments[0], value, f"{where}[{i}]") for i, value in enumerate(tree)]  # type: ignore[return-value]
    if origin is dict and isinstance(tree, dict):
        return {key: record(arguments[1], value, f"{where}: {key}") for key, value in tree.items()}  # type: ignore[return-value]
    if isinstance(tree, dict) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_field_defaults")):
        return _fields(kind, tree, where)
    if origin is None and isinstance(tree, kind) and (kind is bool or not isinstance(tree, bool)):
        return tree
    raise BadInput(f"{where} is damaged: {str(tree)[:40]!r} is not {getattr(kind, '__name__', kind)}.")


def _fields(kind: type[T], tree: dict[str, Any], where: str) -> T:
    """A dataclass or NamedTuple from a dict."""
    hints = typing.get_type_hints(kind)
    values = {name: record(hint, tree[name], f"{where}: {name}") for name, hint in hints.items() if name in tree}
    # A line leaves out what is None.
    parameters = inspect.signature(kind).parameters.values()
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    for name in required:
        if types.NoneType in typing.get_args(hints[name]):
            values.setdefault(name, None)
    if missing := ", ".join(name for name in required if name not in values):
        raise BadInput(f"{where} is damaged: it has no {missing}.")
    return kind(**values)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`, or leave it as it was."""
    beside = temporary(path)
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # of a file system that cannot be written
            beside.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written ({error.strerror or error}).") from error


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a file of these lines, whole or not at all, and the folders that it is in. Raises `BadInput` where that
    cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(to_text(line) + "\n" for line in lines))
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror or error}).") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; a last line cut short by a crash is left out. Raises `BadInput` for any other line
    that is no JSON object, naming the file and the line's number."""
    return [line for line, _ in _read(path)]


def read_records(kind: type[T], path: Path) -> list[T]:
    """The same as records of this kind; none where there is no file. Raises `BadInput` for a line that is none too."""
    return [record(kind, tree, f"{path}, line {number}") for number, tree in enumerate(read_lines(path), 1)]


def _read(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """The lines of `read_lines`, each with its bytes; of none where there is no file."""
    try:
        *whole, cut = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror or error}).") from error
    lines = []
    for number, raw in enumerate([*whole, cut] if cut else whole, 1):
        try:
            lines.append((_object(raw, path, number), raw))
        except BadInput:
            if number <= len(whole):
                raise
    return lines


def _object(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    """A line. Raises `BadInput` for one that is no JSON object."""
    try:
        line = json.loads(raw)
        if not isinstance(line, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError):
        raise BadInput(
            f"{path}, line {number} is damaged: {raw[:40].decode(errors='replace')!r} is no JSON object; restore "
            "the file, or delete that line if what it said may be lost."
        ) from None
    return line


class Growing:
    """A .jsonl file that another process appends to: every whole line is read once, so that a long file is cheap to
    follow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place: tuple[int, int] | None = None  # which file it was
        self.n_bytes = self.n_lines = 0  # read so far

    def is_another(self) -> bool:
        """Whether the file is not the one that was read: it has come, gone, or been written anew by a resumed run. Then
        `new` gives its lines from the first."""
        try:
            about = self.path.stat()
            place, size = (about.st_dev, about.st_ino), about.st_size
        except OSError:
            place, size = None, 0
        if place == self.place and size >= self.n_bytes:
            return False
        self.place, self.n_bytes, self.n_lines = place, 0, 0
        return True

    def new(self) -> Iterator[dict[str, Any]]:
        """The whole lines that came since; none where the file is another. Raises `BadInput` for a damaged one."""
        if self.place is None:
            return
        try:
            with open(self.path, "rb") as file:
                about = os.fstat(file.fileno())
                if (about.st_dev, about.st_ino) != self.place:
                    return
                file.seek(self.n_bytes)
                for raw in file:
                    if not raw.endswith(b"\n"):
                        return
                    self.n_lines += 1
                    self.n_bytes += len(raw)
                    yield _object(raw, self.path, self.n_lines)
        except FileNotFoundError:
            return
        except OSError as error:
            raise BadInput(f"{self.path} cannot be read ({error.strerror or error}).") from error


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again, and a last one cut short. Raises `BadInput` for
    any other that is damaged, and leaves the file as it is."""
    if not path.exists():
        return
    kept = b""
    for number, (line, raw) in enumerate(_read(path), 1):
        if not isinstance(line.get("step"), int):
            raise BadInput(f"{path}, line {number} is damaged: it has no step.")
        kept += raw + b"\n" if line["step"] <= step else b""
    if kept != path.read_bytes():
        write_atomically(path, kept.decode())


def is_in_place(file: IO[Any], path: Path) -> bool:
    """Whether `path` still names the open `file`, and was not deleted or replaced meanwhile."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


class Lines:
    """Appends JSON lines; each is on its way to the disk before the next step. A file that is deleted meanwhile is made
    again, with all that was in it."""

    def __init__(self, path: Path) -> None:
        """Open the file, made anew unless it is there. Raises `BadInput` where it cannot be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 — closed by `close`
        except OSError as error:
            raise BadInput(f"{path} cannot be written ({error.strerror or error}).") from error

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Raises `BadInput` when the disk is full, and when another file has taken its place."""
        self.keep()
        try:
            self.file.write(to_text(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written ({error.strerror or error}).") from error

    def keep(self) -> None:
        """Make the file again if it was deleted: it can be read as long as it is open. Raises `BadInput` as `write`."""
        if is_in_place(self.file, self.path):
            return
        if self.path.exists():
            raise BadInput(
                f"{self.path} was replaced by another file while the run was writing it: the run stops here; put the "
                "file in order and go on from the last checkpoint with resume=true."
            )
        try:
            self.file.seek(0)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, self.file.read())
            self.file.close()
            self.file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written ({error.strerror or error}).") from error

    def close(self) -> None:
        """Close the file. What could not be written was refused by `write`, and is not refused again."""
        with contextlib.suppress(OSError):
            self.file.close()
