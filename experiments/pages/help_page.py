"""What `--help` prints: a command's docstring, the files that a group is chosen from, and every setting with its value,
what it takes and what it means. A setting's meaning is the comment behind it in its dataclass, or above it.
"""

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from moe.config.parse import accepted, kind, settings
from moe.run.command_line import shown

WIDTH = 110  # characters of a line
FIELD = re.compile(r"    (\w+): .*?(?:  # (.*))?$")
COMMENT = re.compile(r"    # (?!---)(.*)$")


def render(docstring: str, groups: Mapping[str, list[str]], schema: type, values: Mapping[str, Any]) -> str:
    """The whole text; `values` holds what each setting is without another word, by dotted name."""
    files = [textwrap.fill(f"{name}={' | '.join(names)}", WIDTH, **_hanging(2)) for name, names in groups.items()]
    choices = ["Groups of settings, each from a file of conf/:\n", *files, ""] if files else []
    lines = [textwrap.fill(line, WIDTH, **_hanging(2)) for line in setting_lines(schema, values)]
    how = [
        "Give settings as key=value, like seed=1. With -m a key may have several values, like seed=0,1: each in turn.",
        "--cfg job prints the settings as YAML and runs nothing.",
    ]
    return "\n".join([docstring.strip(), "", *choices, "Settings, with their values here:\n", *lines, "", *how])


def setting_lines(schema: type, values: Mapping[str, Any]) -> list[str]:
    """A line per setting: name, value, what it takes, what it means."""
    limits, means = accepted(schema), meanings(schema)
    lines = []
    for name, hint in settings(schema).items():
        if any(dataclasses.is_dataclass(arm) for arm in (hint, *getattr(hint, "__args__", ()))):
            continue
        limit = limits.get(name)
        takes = kind(hint) if limit is None else str(limit) if isinstance(limit, tuple) else f"{kind(hint)}, {limit}"
        meaning = f": {means[name]}" if means[name] else ""
        value = shown(values[name]) if name in values else "{}" if typing.get_origin(hint) is dict else ""
        lines.append(f"{name}={value}  ({takes}){meaning}")
    return lines


def meanings(schema: type, path: str = "") -> dict[str, str]:
    """The comment of every setting by its dotted name, "" for one without."""
    said: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if dataclasses.is_dataclass(cls):
            said |= {f"{path}{name}": text for name, text in comments(inspect.getsource(cls)).items()}
    for name, hint in settings(schema).items():
        for arm in (hint, *getattr(hint, "__args__", ())):
            if "." not in name and dataclasses.is_dataclass(arm):
                said |= meanings(arm, f"{path}{name}.")  # type: ignore[arg-type]
    return said


def comments(source: str) -> dict[str, str]:
    """The comment of every field in a dataclass's source: behind it, going on below it, or right above it."""
    said: dict[str, str] = {}
    above: list[str] = []
    last = ""
    for line in source.splitlines():
        field, comment = FIELD.match(line), COMMENT.match(line)
        if comment:
            above.append(comment[1])
        elif field:
            name, behind = field[1], field[2] or ""
            if behind and above and last:  # the comment behind the field before went on
                said[last] = " ".join([said[last], *above])
                above = []
            said[name] = " ".join([*above, *([behind] if behind else [])])
            above, last = [], name if behind else ""
        else:
            if above and last and not line.strip():
                said[last] = " ".join([said[last], *above])
            above, last = [], ""
    return said


def _hanging(indent: int) -> dict[str, Any]:
    """How `textwrap` lays out an entry: what goes on below is further in."""
    return {
        "initial_indent": " " * indent,
        "subsequent_indent": " " * (indent + 4),
        "break_long_words": False,
        "break_on_hyphens": False,
    }
