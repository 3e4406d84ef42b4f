"""What a search is over, `study.search`: a line of words per setting.

log LOW HIGH    a number between two, whose logarithm is spread evenly
float LOW HIGH  a number, spread evenly
int LOW HIGH    a whole number
choice A,B,C    one of these
"""

import copy
import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe.config.parse import accepted, kind, nearest, settings
from moe.config.run import FREE, RESUMABLE, Config
from moe.errors import BadInput
from moe.run.folder import flat

# What every trial has in common: where a run lies, what does not decide its result, and what its loss is a loss of.
SHARED = (
    *FREE, *RESUMABLE, "seed", "source", "source_state", "dispatch", "data", "tokenizer", "model.name",
    "model.vocab_size", "model.context", "train.precision", "train.eval_tokens", "distill",
)  # fmt: skip
FORMS = ("log", "float", "int", "choice")


@dataclass(frozen=True)
class Range:
    """A number between two, both included."""

    low: float  # whole, like `high`, for a setting that takes whole numbers
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int)

    @property
    def size(self) -> float:
        """How many values there are."""
        return self.high - self.low + 1 if self.whole else math.inf

    def at(self, i: int) -> Any:
        """The `i`-th value of a whole one."""
        return int(self.low) + i


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: list[Any]

    @property
    def size(self) -> float:
        """How many values there are."""
        return len(self.values)

    def at(self, i: int) -> Any:
        """The `i`-th value."""
        return self.values[i]


Dimension = Range | Choice


def lines_of(search: dict[str, Any]) -> dict[str, str]:
    """`study.search` by dotted settings, whether they were nested or not. Raises `BadInput`."""
    lines = flat(search)
    for key, line in lines.items():
        if not isinstance(line, str) or line.split()[:1] not in [[form] for form in FORMS]:
            forms = "'log 1e-3 3e-2', 'float 0 0.2', 'int 1 8' or 'choice 4,8,16'"
            raise BadInput(f"study.search.{key}={line} must be words like {forms}.")
    return lines


def read_space(lines: dict[str, str]) -> dict[str, Dimension]:
    """The dimensions of a search by their settings. Raises `BadInput` for a setting that there is not, for one that
    every trial has in common, and for values it cannot have."""
    return {key: read_dimension(key, line) for key, line in lines.items()}


def read_dimension(key: str, line: str) -> Dimension:
    """A dimension from its line. Raises `BadInput`."""
    form, *words = re.split(r"[\s,]+", line.strip())
    said, hint = f"study.search.{key}={line}", type_of(key)
    if any(key == name or key.startswith(f"{name}.") for name in SHARED):
        raise BadInput(f"{said} is over what every trial has in common: leave {key} out of the search.")

    # One of some values.
    if form == "choice":
        values = [value_of(said, hint, word) for word in words]
        if len(values) < 2 or len({repr(value) for value in values}) < len(values):
            raise BadInput(f"{said} must name two values or more, each once.")
        check(said, key, values)
        return Choice(values)

    # Numbers between two.
    if hint not in (int, float) or (form == "float" and hint is int) or (form == "int" and hint is float):
        takes = {int: "whole numbers: int or log", float: "numbers: float or log"}.get(hint, "no numbers: choice")
        raise BadInput(f"{said} does not fit: {key} takes {takes}.")
    if len(words) != 2:
        raise BadInput(f"{said} must have two numbers, like {form} {'1 8' if hint is int else '0.1 0.5'}.")
    low, high = (value_of(said, hint, word) for word in words)
    if not low < high:
        raise BadInput(f"{said} is an empty range: the first number must be below the second.")
    if form == "log" and low <= 0:
        raise BadInput(f"{said} has no logarithm: both numbers must be above 0.")
    check(said, key, [low, high])
    return Range(low, high, form == "log")


def type_of(key: str) -> Any:
    """The type of the setting `key`. Raises `BadInput` for one that there is not, or that is a group or a list."""
    types_by_key = settings(Config)
    group = key
    while group and group not in types_by_key:
        group = group.rpartition(".")[0]
    hint = types_by_key.get(group)
    if group != key and typing.get_origin(hint) is dict:  # a name of one's own
        hint = typing.get_args(hint)[1]
    elif group != key:
        raise BadInput(f"study.search: {key} is not a setting; {nearest(key, [*types_by_key])}.")
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) in (list, dict):
        raise BadInput(f"study.search: {key} is {kind(hint)}, and a search is over single values.")
    return hint


def value_of(said: str, hint: Any, word: str) -> Any:
    """A word as a value of this type. Raises `BadInput`, of what `said` names."""
    known: dict[Any, list[Callable[[str], Any]]] = {int: [int], float: [float], bool: [_truth], str: [str]}
    readers = known.get(hint, [int, float, _truth, str])
    for read in readers:
        try:
            return read(word)
        except (ValueError, KeyError):
            continue
    raise BadInput(f"{said}: {word} must be {kind(hint)}.")


def _truth(word: str) -> bool:
    return {"true": True, "false": False}[word]


def check(said: str, key: str, values: list[Any]) -> None:
    """Refuse values that the setting never takes. Raises `BadInput`, of what `said` names."""
    limit = accepted(Config).get(key)
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{said}: {value} must be finite.")
        if limit is not None:
            try:
                limit.check(key, value)
            except BadInput as bad:
                raise BadInput(f"{said}: {bad}") from None


def with_values(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The settings `tree` with others by their dotted keys. Raises `BadInput` for one whose group is null."""
    tree = copy.deepcopy(tree)
    for key, value in values.items():
        *groups, name = key.split(".")
        group = tree
        for part in groups:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise BadInput(f"study.search.{key} means nothing here: {part} is {group or 'null'} in these settings.")
        group[name] = value
    return tree


def unseen(space: dict[str, Dimension], seen: list[dict[str, Any]], start: int) -> dict[str, Any]:
    """The first point of a finite space, from the `start`-th on and round, that was not seen."""
    n_points = int(math.prod(dimension.size for dimension in space.values()))
    for i in range(start, start + n_points):
        rest, point = i % n_points, {}
        for key, dimension in space.items():
            rest, at = divmod(rest, int(dimension.size))
            point[key] = dimension.at(at)
        if point not in seen:
            return point
    raise BadInput(f"the search has no point left of the {n_points} it had.")
