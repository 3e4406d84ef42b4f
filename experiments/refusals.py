"""What is wrong with a command line, in one sentence that names the key, the value, and what would be accepted: in
place of what argparse, Hydra and OmegaConf say.
"""

import argparse
import dataclasses
import difflib
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser  # what hydra.main itself reads the command line with
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from moe.config.parse import kind, nearest, settings
from moe.config.run import Config
from moe.errors import BadInput
from moe.run.command_line import quoted

CONF = Path(__file__).resolve().parent.parent / "conf"
IS_A_STUDY = (
    "this experiment is a study, with runs of its own: work through it with python -m experiments.sweep "
    "experiment=NAME run=runs/NAME."
)


def read_arguments() -> argparse.Namespace:
    """The options and overrides of the command line, in whatever order, by Hydra's own parser; which by itself reads
    none that stands behind an option behind another, so that they are put last. Raises `BadInput`."""
    parser = get_args_parser()

    def refuse_option(message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
            close = difflib.get_close_matches(unknown.split()[0], options, n=1, cutoff=0.75)
            if close:
                raise BadInput(f"{unknown} is no option; did you mean {close[0]}.")
            raise BadInput(f"{unknown} is no option: settings are given as key=value, and --help lists them.")
        raise BadInput(f"{message}.")

    parser.error = refuse_option  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args()
    sys.argv[1:] = [*(word for word in sys.argv[1:] if word not in arguments.overrides), *arguments.overrides]
    for name in ("config_path", "config_name", "config_dir", "experimental_rerun"):
        if getattr(arguments, name):
            raise BadInput(
                f"--{name.replace('_', '-')} cannot be given: a command has its own settings, those of conf/."
            )
    modes = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(arguments, name)]
    if len(modes) > 1:
        raise BadInput(f"{' and '.join(f'--{name}' for name in modes)} do not go together: choose one.")
    return arguments


def groups_of(schema: type, complete: bool) -> dict[str, list[str]]:
    """The groups of conf/ that a command has, with their files."""
    groups = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in CONF.iterdir() if path.is_dir()}
    has = {*typing.get_type_hints(schema), *(["experiment"] if complete and issubclass(schema, Config) else [])}
    return {name: files for name, files in groups.items() if name in has}


def read_word(schema: type, word: str) -> Override:
    """A word of the command line, as Hydra reads it. Raises `BadInput` for one that it cannot read."""
    try:
        return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([word])[0]
    except HydraException:
        key, equals, value = word.partition("=")
    if not equals:
        raise BadInput(f"cannot read {word}: a setting is given as key=value.")
    pairs = all(value.count(left) == value.count(right) for left, right in ("[]", "{}", "()"))
    even = all(value.count(quote) % 2 == 0 for quote in "'\"")
    why = "a character in it means something else here" if pairs and even else "its brackets or quotes are not in pairs"
    takes_text = settings(schema).get(key) is str
    advice = f"; to take it as it stands type {shlex.quote(f'{key}={quoted(value)}')}" if takes_text else ""
    raise BadInput(f"cannot read {word}: {why}{advice}.")


def singles(override: Override) -> list[str]:
    """The override as one line for each value that it sweeps over; as it is if it has one. Raises `BadInput`."""
    if not override.is_sweep_override():
        return [override.input_line or ""]
    try:
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except HydraException:
        raise BadInput(f"{override.input_line} cannot be swept over: name its values, like a,b,c.") from None


def check_override(schema: type, complete: bool, override: Override, lines: list[str], sweeps: bool) -> None:
    """Refuse an override by its form, its key, or a file that does not exist. Raises `BadInput`."""
    key, word, groups = override.key_or_group, override.input_line or "", groups_of(schema, complete)
    if override.is_hydra_override():
        return
    if override.is_sweep_override() and not sweeps:
        raise BadInput(
            f"{word} has several values: add --multirun to take each in turn, or write a list as {key}=[a,b]."
        )
    if key not in groups:
        check_key(schema, key)
    if not lines:
        raise BadInput(f"{word} matches nothing; accepted here: {', '.join(groups.get(key, ()))}.")
    if override.is_delete():
        raise BadInput(f"{word} takes a setting away, and every one is needed: leave it out to have its default.")
    if override.is_add() or (override.is_force_add() and key in groups):
        raise BadInput(f"{word} adds a setting, and all that there are have a value: write {word.lstrip('+')}.")
    if override.package is not None:
        raise BadInput(f"{word} gives a group another place, and each has its own: write {key}=NAME.")
    for choice in (line.partition("=")[2] for line in lines if key in groups):
        if "${" in choice:
            raise BadInput(f"{word} refers to a setting, and a file of conf/ is read before there is one: name it.")
        if choice not in groups[key]:
            raise BadInput(f"{key}={choice} does not exist; {nearest(choice, groups[key])}.")


def check_key(schema: type, key: str) -> None:
    """Refuse a dotted key that `schema` does not have, naming the nearest one it has."""
    hint: Any = schema
    path = ""
    if not key:
        raise BadInput("a value without a setting cannot be given: write key=value.")
    for part in key.split("."):
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
        if typing.get_origin(hint) is dict and part:  # names of one's own
            hint, path = typing.get_args(hint)[1], f"{path}{part}."
            continue
        if hint is Any and path:
            return
        valid = list(typing.get_type_hints(hint)) if dataclasses.is_dataclass(hint) else []
        if part not in valid:
            raise BadInput(f"{path}{part} is not a setting; {nearest_setting(schema, part, valid, path)}.")
        hint, path = typing.get_type_hints(hint)[part], f"{path}{part}."


def nearest_setting(schema: type, part: str, valid: list[str], path: str) -> str:
    """The tail of a message about a misspelt key: the one of its group that is meant beyond doubt, else settings that
    are called so in another group, else the nearest."""
    by_name: dict[str, list[str]] = {}
    for name in settings(schema):
        by_name.setdefault(name.rpartition(".")[2], []).append(name)
    near = difflib.get_close_matches(part, valid, n=1, cutoff=0.8)
    if near or part not in by_name:
        close = near or difflib.get_close_matches(part, [*valid, *([] if path else by_name)], n=1, cutoff=0.6)
        if not close or close[0] in valid:
            return nearest(part, valid, path)
        part = close[0]
    return f"did you mean {' or '.join(by_name[part])}"


def explain(error: BaseException, schema: type, given: Mapping[str, Any]) -> str:
    """One sentence for what Hydra or OmegaConf says: key, value, and what would be accepted. `given`: values by key."""
    text = f"{error}\n{error.__cause__ or ''}"
    if missing := re.search(r"Could not find '(.+)/(.+)'", text):
        group, name = missing.groups()
        files = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        return f"a file of conf/ asks for {group}={name}, which does not exist; {nearest(name, files)}."
    if missing := re.search(r"In '(.+)': Could not override '(.+)'\. No match", text):
        return f"conf/{missing[1]}.yaml overrides {missing[2]}, and there is no such group of files in conf/."
    at = re.search(r"full_key: (\S+)", text)
    key = re.sub(r"\[\d+\]", "", at[1]) if at else ""
    if not key:
        return f"{first_line(error)}."
    if key not in settings(schema):  # OmegaConf forgets the groups of names and values that it is in
        key = next((whole for whole in given if whole.endswith(f".{key}")), key)

    # What it is said of, with its value as far as that is known.
    if key.partition(".")[0] == "study" not in settings(schema):
        return IS_A_STUDY
    if key.startswith("hydra."):
        return f"{key} is no setting of Hydra's, or not one with that value."
    if key not in settings(schema):
        try:
            check_key(schema, key)
        except BadInput as bad:
            return str(bad)
    said = re.search(r"[Vv]alue '(.*)' of type|[Vv]alue '(.*)' is not", text)
    value = given.get(key, said[1] or said[2] if said else None)
    place = key if value is None else f"{key}={value}"

    # What it refers to, or its type.
    if "nterpolation" in text or "GrammarParseError" in text or "${" in str(value):
        return f"{place} cannot be resolved: {unresolved(text)}."
    return f"{place} must be {kind(type_of(schema, key))}."


def type_of(schema: type, key: str) -> Any:
    """The type of a setting, also of one in a group of names and values; None where that is open."""
    group = settings(schema).get(key.rpartition(".")[0])
    return settings(schema).get(key, typing.get_args(group)[1] if typing.get_origin(group) is dict else None)


def unresolved(text: str) -> str:
    """Why an interpolation has no value, from OmegaConf's message."""
    reasons = {
        r"Interpolation key '(.+)' not found": "there is no setting {}",
        r"Environment variable '(.+)' not found": "the environment variable {} is not set",
        r"Unsupported interpolation type (\S+)": "nothing is called {} that could be asked",
        r"Recursive interpolation": "it refers to itself",
        r"(Value .+ of type \S+) could not": "what it refers to is of another type",
        r"expecting|viable": "its ${{...}} is not whole",
    }
    for pattern, reason in reasons.items():
        if match := re.search(pattern, text):
            return reason.format(*match.groups())
    return text.strip().splitlines()[0].rstrip(".")


def first_line(error: BaseException) -> str:
    """An exception's message up to its first line break, without the full stop."""
    return str(error).strip().split(os.linesep)[0].rstrip(".")


def plain(words: Sequence[str]) -> str:
    """Overrides for people: without the backslashes that Hydra puts before what its grammar reads."""
    return " ".join(re.sub(r"\\(.)", r"\1", word) for word in words)
