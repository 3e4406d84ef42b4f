"""JSON on the disk: lines are appended one by one, whole files replaced in one move, records read by their types.

JSON has no NaN and no infinity: a number that is not finite is written as null, at any depth.
"""

import dataclasses
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

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
    try:
        return kind(**values)
    except TypeError:
        missing = ", ".join(name for name in hints if name not in tree)
        raise BadInput(f"{where} is damaged: it has no {missing}.") from None


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`, or leave it as it was."""
    beside = temporary(path)
    try:
        with open(beside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written ({error.strerror or error}).") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    if path.exists():
        lines = [line for line in read_lines(path) if line["step"] <= step]
        write_atomically(path, "".join(to_text(line) + "\n" for line in lines))


class Lines:
    """Appends JSON lines; each is on its way to the disk before the next step."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, open(path, "a")  # noqa: SIM115 — closed by `close`

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Raises `BadInput` when the disk is full."""
        try:
            self.file.write(to_text(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written ({error.strerror or error}).") from error

    def close(self) -> None:
        """Close the file."""
        self.file.close()
