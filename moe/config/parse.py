"""A nested dict into dataclasses, and back; what a field accepts stands beside it, as `Between` or `OneOf`.

Every mistake is a `BadInput`: one sentence that names the key, the value and what would be accepted.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from moe.errors import BadInput

MANY = 2**31 - 1
ANY = math.inf  # an upper bound that is none; the value itself must be finite

T = TypeVar("T")


@dataclass(frozen=True)
class Between:
    """Inclusive bounds of a number."""

    low: float
    high: float

    def check(self, key: str, value: Any) -> None:
        """Raises `BadInput` for a value outside, or one that is not finite."""
        if not (self.low <= value <= self.high and math.isfinite(value)):
            number = "a finite number of " if self.high >= MANY else ""
            raise BadInput(f"{key}={value} is out of range: accepted is {number}{self}.")

    def __str__(self) -> str:
        return f"at least {self.low:g}" if self.high >= MANY else f"between {self.low:g} and {self.high:g}"


class OneOf(tuple[str, ...]):
    """The words that a setting takes: `OneOf("a", "b")`."""

    def __new__(cls, *words: str) -> "OneOf":
        return super().__new__(cls, words)

    def check(self, key: str, value: Any) -> None:
        """Raises `BadInput` for any other word, with the nearest."""
        if value not in self:
            close = difflib.get_close_matches(str(value), self, n=1, cutoff=0.5)
            tail = f"; did you mean {close[0]}" if close else ""
            raise BadInput(f"{key}={value} is not one of {self}{tail}.")

    def __str__(self) -> str:
        return ", ".join(self)


def parse(cls: type[T], tree: Any, path: str = "") -> T:
    """Fill dataclass `cls` from a dict, refusing unknown keys and wrong types. `path` names the place in messages."""
    if not isinstance(tree, dict):
        raise BadInput(f"{path[:-1] or 'the configuration'}={tree!r} must be a group of settings, not a single value.")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise BadInput(f"{path}{key} is not a setting; {nearest(str(key), list(hints), path)}.")
    values = {key: _convert(hints[key], value, f"{path}{key}") for key, value in tree.items()}
    return cls(**values)


def nearest(key: str, valid: list[str], path: str = "") -> str:
    """The tail of a message about a misspelt `key`: the nearest valid one, else all of them."""
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"did you mean {path}{close[0]}" if close else f"accepted here: {', '.join(sorted(valid)) or 'none'}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    # Optional groups: what they are when they are there.
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    # Groups, mappings and lists: every item in turn.
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else parse(hint, value, f"{path}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is dict:
        _, item_hint = typing.get_args(hint)
        if not isinstance(value, dict):
            raise BadInput(f"{path}={value!r} must be {kind(hint)}.")
        return {str(key): _convert(item_hint, item, f"{path}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if typing.get_origin(hint) is list:
        (item_hint,) = typing.get_args(hint)
        if not isinstance(value, list | tuple):
            raise BadInput(f"{path}={value!r} must be {kind(hint)}.")
        return [_convert(item_hint, item, f"{path}[{i}]") for i, item in enumerate(value)]
    # Single values: a whole number is a float too, but a bool is never a number.
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    raise BadInput(f"{path}={value!r} must be {kind(hint)}.")


def kind(hint: Any) -> str:
    """What a setting of this type takes, in words."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return f"{kind(next(arm for arm in arguments if arm is not type(None)))}, or null"
    if dataclasses.is_dataclass(hint):
        return "a group of settings"
    if typing.get_origin(hint) is dict:
        return "a group of names and values, like {a: 1}"
    if typing.get_origin(hint) is list:
        items, example = {int: ("whole numbers", "[1,2]"), float: ("numbers", "[0.1,0.2]")}.get(
            arguments[0], ("words", "[a,b]")
        )
        return f"a list of {items}, like {example}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, "anything")


def settings(cls: type, path: str = "") -> dict[str, Any]:
    """The type of every setting of a dataclass by its dotted name, and of every group before those in it."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        hints[f"{path}{name}"] = hint
        for arm in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(arm):
                hints |= settings(arm, f"{path}{name}.")  # type: ignore[arg-type]
    return hints


def accepted(cls: type, path: str = "") -> dict[str, Between | OneOf]:
    """What every setting of a dataclass accepts, by its dotted name; settings that take anything are left out."""
    limits: dict[str, Between | OneOf] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        for arm in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(arm):
                limits |= accepted(arm, f"{path}{name}.")  # type: ignore[arg-type]
        if typing.get_origin(hint) is Annotated:
            limits[f"{path}{name}"] = typing.get_args(hint)[1]
    return limits


def check_values(cfg: Any) -> None:
    """Hold every value to what its field accepts; groups that are None have none. Raises `BadInput`."""
    for path, limit in accepted(type(cfg)).items():
        value = lookup(cfg, path)
        if value is not None:
            limit.check(path, value)


def lookup(cfg: Any, path: str) -> Any:
    """The value at a dotted path, or None where a group on the way is None."""
    for part in path.split("."):
        if cfg is None:
            return None
        cfg = cfg.get(part) if isinstance(cfg, dict) else getattr(cfg, part)
    return cfg


def assign(group: Any, name: str, value: Any) -> None:
    """Set a setting of a group, which may be one of names and values of one's own."""
    if isinstance(group, dict):
        group[name] = value
    else:
        setattr(group, name, value)


def to_dict(cfg: Any) -> dict[str, Any]:
    """A plain nested dict: what `build` takes back."""
    return dataclasses.asdict(cfg)
