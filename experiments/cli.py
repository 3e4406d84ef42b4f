"""From a command line to a typed config: Hydra composes `conf/<name>.yaml`, `moe.config` validates, mistakes become one
sentence.

A command is a function of its config:

    @cli.command("train", Config)
    def main(cfg: Config) -> None: ...
"""

import dataclasses
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config import BadInput, Config, build, nearest, parse

CONF = Path(__file__).resolve().parent.parent / "conf"
REFUSED = 2  # exit status for bad input

C = TypeVar("C")


def command(
    name: str, schema: type[C], verbatim: tuple[str, ...] = ()
) -> Callable[[Callable[[C], None]], Callable[[], None]]:
    """Decorate `main(cfg)` into an entry point that reads `sys.argv`. `conf/<name>.yaml` starts from `schema`'s defaults
    (its first default is `schema_<name>`). Keys in `verbatim` take their value literally, whatever characters it has."""

    def decorate(main: Callable[[C], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def entry() -> None:
            ConfigStore.instance().store(name=f"schema_{name}", node=schema)
            sys.argv[1:] = [literal(each, verbatim) for each in sys.argv[1:]]
            refuse(check_overrides, name, schema, [each for each in sys.argv[1:] if not each.startswith("-")])
            hydra.main(version_base=None, config_path=str(CONF), config_name=name)(job)()

        def job(tree: DictConfig) -> None:
            refuse(lambda: main(typed(tree, schema)))

        return entry

    return decorate


def typed(tree: DictConfig, schema: type[C]) -> C:
    """The validated dataclass of a composed tree."""
    plain: Any = OmegaConf.to_container(tree, resolve=True)
    return build(plain, schema) if issubclass(schema, Config) else parse(schema, plain)


def refuse(function: Callable[..., Any], *arguments: Any) -> None:
    """Call; a `BadInput` becomes its sentence on stderr and exit status 2."""
    try:
        function(*arguments)
    except BadInput as bad:
        sys.stdout.flush()
        print(f"error: {bad}", file=sys.stderr)
        raise SystemExit(REFUSED) from None


def literal(argument: str, verbatim: tuple[str, ...]) -> str:
    """`key=value` with the value quoted for Hydra's grammar, where `key` is in `verbatim`; anything else as it is."""
    key, equals, value = argument.partition("=")
    if not equals or key not in verbatim:
        return argument
    # A backslash is special before an interpolation (OmegaConf), and in quotes before a quote or the end (Hydra).
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    value = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + (r"\'" if found[2] else ""), value)
    return f"{key}='{value}'"


def check_overrides(name: str, schema: type, overrides: list[str]) -> None:
    """Refuse what Hydra would refuse, in one sentence with the nearest valid key or choice. Raises `BadInput`."""
    groups = {path.name: sorted(each.stem for each in path.glob("*.yaml")) for path in CONF.iterdir() if path.is_dir()}
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise BadInput(f"cannot read the command line: {first_line(error)}") from None
    single = []
    for override in parsed:
        key = override.key_or_group
        if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
            single.append(override.input_line or "")
            continue
        if key in groups:
            choices = values(override)
            for choice in choices:
                if isinstance(choice, str) and choice not in groups[key] and choice != "null":
                    raise BadInput(f"{key}={choice} does not exist; {nearest(choice, groups[key])}.")
        else:
            check_key(schema, key)
        single.append(first_choice(override))
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=None):
            hydra.compose(name, overrides=single)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        where = getattr(cause, "full_key", None)
        raise BadInput(f"{where}: {first_line(cause)}." if where else f"{first_line(error)}.") from None


def values(override: Override) -> list[Any]:
    """The values an override sweeps over, or its one value."""
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


def first_choice(override: Override) -> str:
    """The override as a single one: a sweep's first value."""
    line = override.input_line or ""
    if not override.is_sweep_override():
        return line
    return f"{line.split('=', 1)[0]}={next(iter(override.sweep_string_iterator()))}"


def check_key(schema: type, key: str) -> None:
    """Refuse a dotted key that `schema` does not have, naming the nearest one it has."""
    hint: Any = schema
    path = ""
    for part in key.split("."):
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
        valid = list(typing.get_type_hints(hint)) if dataclasses.is_dataclass(hint) else []
        if part not in valid:
            raise BadInput(f"{path}{part} is not a setting; {nearest(part, valid, path)}.")
        hint, path = typing.get_type_hints(hint)[part], f"{path}{part}."


def first_line(error: BaseException) -> str:
    """An exception's message up to its first line break, without the full stop."""
    return str(error).strip().split(os.linesep)[0].rstrip(".")
