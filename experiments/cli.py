"""From a command line to a typed config: Hydra composes `conf/<name>.yaml`, `moe.config` validates, mistakes
become one sentence.

A command is a function of its config:

    @cli.command("train", Config)
    def main(cfg: Config) -> None: ...
"""

import copy
import functools
import itertools
import re
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from experiments.pages import help_page
from experiments.refusals import (
    CONF,
    IS_A_STUDY,
    check_override,
    explain,
    first_line,
    groups_of,
    plain,
    read_arguments,
    read_word,
    singles,
)
from experiments.sweeps import Job, Place, check_sweep, endings_of_jobs, of_job, one_of_many, placed
from moe.config.parse import assign, lookup, parse, settings
from moe.config.run import Config, validate
from moe.errors import BadInput, of_the_machine
from moe.parallel import launch
from moe.run import terminal
from moe.run.command_line import quoted
from moe.run.folder import flat

REFUSED = 2  # exit status for bad input

C = TypeVar("C")
Under = Callable[[Any, list[str]], Any]  # (settings, words of the command line) -> over those of a run


def command(
    name: str,
    schema: type[C],
    verbatim: tuple[str, ...] = (),
    complete: bool = True,
    under: Under | None = None,
    place: Place | None = None,
    before: Callable[[list[Job]], object] | None = None,
    after: Callable[[list[Any], list[str]], object] | None = None,
) -> Callable[[Callable[[C], Any]], Callable[[], None]]:
    """Decorate `main(cfg)` into an entry point that reads `sys.argv`. `conf/<name>.yaml` starts from the defaults of
    `schema` (its first default is `schema_<name>`). Keys in `verbatim` take their value literally, whatever characters
    it has. `complete` False: the settings add to those of a run that `main` reads and validates with them; here only
    names and types are checked. `under`: (settings, words of the command line) -> the settings with those of a
    run that lie under the command line; what is validated are these.

    In a sweep (--multirun) every job gets what `place` makes of its config, and one that fails is named at the end,
    with exit status 2, after all others have run. `before` may refuse the jobs, each with its place; `after` is called
    with what `main` returned for each that finished, in order, and with the keys that take several values, if any
    did."""

    def decorate(main: Callable[[C], Any]) -> Callable[[], None]:
        @functools.wraps(main)
        @launch.parting()
        def entry() -> None:
            terminal.begin()
            given = sys.argv[1:]

            # What cannot be is refused before anything runs.
            register(name, schema)
            sys.argv[1:] = [literal(word, verbatim) for word in given]
            arguments = refuse(read_arguments)
            if arguments.help:
                about = sys.modules[main.__module__].__doc__ or ""
                refuse(show_help, about, name, schema, arguments.overrides, complete, arguments.multirun)
                return
            jobs = refuse(check_overrides, name, schema, arguments.overrides, arguments.multirun, complete, under)
            sweep = refuse(check_sweep, jobs, place, before) if arguments.multirun else None
            if sweep and not any(word.startswith("hydra.sweep.dir=") for word in given):
                sys.argv.append(f"hydra.sweep.dir='runs/{sweep.name}'")  # Hydra notes the command there

            # A job of many that fails does not end the others.
            def job(tree: DictConfig) -> Any:
                sys.argv[1:] = given
                overrides = HydraConfig.get().overrides.task
                run = lambda: main(placed(typed(tree, schema, complete, under, overrides), sweep, place))
                return refuse(run) if sweep is None else refuse(one_of_many, run, sweep)

            with endings_of_jobs() as endings:
                refuse(hydra.main(version_base=None, config_path=str(CONF), config_name=name)(job))
            results = [ending.result for ending in endings if not ending.failure]
            failures = [ending.failure for ending in endings if ending.failure]
            if after and sweep and results:
                refuse(after, results, sweep.keys if sweep.n_jobs > 1 else [])
            if sweep and (unknown := sweep.n_jobs - len(endings)):
                elsewhere = f"a launcher does not say how {unknown} of {sweep.n_jobs} jobs ended"
                print(f"note: {elsewhere}: see the runs' folders.", file=sys.stderr)
            if sweep and failures:
                sys.stdout.flush()
                print(f"error: {len(failures)} of {sweep.n_jobs} jobs failed:", file=sys.stderr)
                print(*(f"  {terminal.printable(failure)}" for failure in failures), sep="\n", file=sys.stderr)
                raise SystemExit(REFUSED)
            if not issubclass(schema, Config):  # there the output is all there is; a run has its files
                refuse(terminal.check)

        return entry

    return decorate


def register(name: str, schema: type) -> None:
    """Tell Hydra what the settings of `conf/<name>.yaml` are: those of `schema`, and no others, but for the names and
    values of one's own in a group that takes them, like router.options."""
    node = OmegaConf.structured(schema)
    for key, hint in settings(schema).items():
        if typing.get_origin(hint) is dict and isinstance(group := OmegaConf.select(node, key), DictConfig):
            OmegaConf.set_struct(group, False)
    ConfigStore.instance().store(name=f"schema_{name}", node=node)


def typed(
    tree: DictConfig,
    schema: type[C],
    complete: bool = True,
    under: Under | None = None,
    overrides: Sequence[str] = (),
) -> C:
    """The dataclass of a composed tree, over the settings that lie `under` its `overrides`, validated if it is
    `complete`. Raises `BadInput`."""
    try:
        container: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        given = flat(OmegaConf.to_container(tree, resolve=False))  # type: ignore[arg-type]
        raise BadInput(explain(error, schema, given)) from None
    settings = parse(schema, container)
    if under:
        settings = under(settings, list(overrides))
    if complete and isinstance(settings, Config):
        validate(settings)
    return settings


def refuse(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call, and return what it returns; a `BadInput`, or what the machine refuses, becomes its sentence on stderr and
    exit status 2."""
    try:
        return function(*arguments)
    except Exception as error:
        refusal = error if isinstance(error, BadInput) else launch.of_the_ranks(error) or of_the_machine(error)
        if refusal is None:
            raise
        sys.stdout.flush()
        if launch.is_first_to_tell():
            print(f"error: {terminal.printable(str(refusal))}", file=sys.stderr)
        raise SystemExit(REFUSED) from None
    except KeyboardInterrupt:  # before there is anything to save: training and generating answer it themselves
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def literal(argument: str, verbatim: tuple[str, ...]) -> str:
    """`key=value` with the value quoted for Hydra's grammar, where `key` is in `verbatim`; anything else as it is."""
    key, equals, value = argument.partition("=")
    if not equals or key not in verbatim:
        return argument
    return f"{key}={quoted(value)}"


def check_overrides(
    name: str,
    schema: type,
    overrides: list[str],
    sweeps: bool,
    complete: bool = True,
    under: Under | None = None,
) -> list[Job]:
    """Refuse what Hydra would refuse, in one sentence with the nearest valid key or choice. `sweeps`: whether an
    override may have several values; then the settings of every job are checked, so that none is refused after others
    have run for hours, and the jobs returned. Raises `BadInput`."""
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        parsed = [read_word(schema, word) for word in overrides]
        options = {override.get_key_element(): singles(override) for override in parsed}  # the last of a key counts
        for override in parsed:
            check_override(schema, complete, override, options[override.get_key_element()], sweeps)
        jobs = list(itertools.product(*options.values()))
        if not sweeps:
            compose(name, schema, list(jobs[0]))
            return []
        several = [len(lines) > 1 or len(jobs) == 1 for lines in options.values()]
        return [read_job(name, schema, complete, under, list(job), several, i) for i, job in enumerate(jobs)]


def show_help(
    docstring: str, name: str, schema: type, overrides: list[str], complete: bool, sweeps: bool = False
) -> None:
    """Print what a command can be told, with the values that the overrides leave; of a sweep those that all of its jobs
    have. Raises `BadInput`."""
    if sweeps:
        with hydra.initialize_config_dir(str(CONF), version_base=None):
            parsed = [read_word(schema, word) for word in overrides]
            for override in parsed:
                check_override(schema, complete, override, singles(override), sweeps)
        overrides = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    check_overrides(name, schema, overrides, False, complete)
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        tree: Any = OmegaConf.to_container(compose(name, schema, overrides), resolve=False)
    print(help_page.render(docstring, groups_of(schema, complete), schema, flat(tree)))
    terminal.check()


def read_job(
    name: str, schema: type, complete: bool, under: Under | None, lines: list[str], several: list[bool], number: int
) -> Job:
    """Compose and check job `number` (from 0) of a sweep; `several`: of which of its overrides other jobs have other
    values. Raises `BadInput`, which says of which job."""
    swept = [line for line, varies in zip(lines, several, strict=True) if varies and not is_hydras(line)]
    task = [line for line in lines if not is_hydras(line)]
    try:
        return Job(swept, task, typed(compose(name, schema, lines, number), schema, complete, under, task))
    except BadInput as bad:
        raise of_job(bad, swept) from None


def is_hydras(line: str) -> bool:
    """Whether an override is of a setting of Hydra's own."""
    return re.match(r"[+~]*hydra[./]", line) is not None


def compose(name: str, schema: type, overrides: list[str], number: int = 0) -> DictConfig:
    """Hydra's composition of overrides that have one value each, as job `number` (from 0) of a sweep gets it, whose
    settings may name it (`${hydra:job.num}`). Raises `BadInput` where there is none."""
    try:
        tree = hydra.compose(name, overrides=overrides, return_hydra_config=True)
        if tree.hydra.sweeper.params and "study" not in typing.get_type_hints(schema):
            raise BadInput(IS_A_STUDY)
        with read_write(tree), open_dict(tree):
            tree.hydra.job.num, tree.hydra.job.id, tree.hydra.job.name = number, str(number), name
            HydraConfig.instance().set_config(tree)
            settings = copy.deepcopy(tree)
            del settings["hydra"]
        return settings
    except (HydraException, OmegaConfBaseException) as error:
        given = {key.lstrip("+"): value for key, _, value in (plain([word]).partition("=") for word in overrides)}
        raise BadInput(explain(error, schema, given)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a file of conf/"
        raise BadInput(f"{where} is no YAML: {error.problem}.") from None
    except OSError as error:  # Hydra's, for a file that holds something else
        files = ", ".join(word for word in overrides if (CONF / word.partition("=")[0]).is_dir())
        raise BadInput(f"a file of conf/ holds no settings ({files}): {first_line(error)}.") from None
    except (AssertionError, AttributeError):  # OmegaConf's, for settings of a group that is null
        if any(key.startswith("machine.") for key in keys_of(overrides)):
            raise BadInput(
                "machine is null here, and its settings cannot be given one by one: choose machine=NAME."
            ) from None
        group = "model.latent" if any(key.startswith("model.latent") for key in keys_of(overrides)) else "model.moe"
        raise BadInput(
            f"{group} is null here, and its settings cannot be given one by one: leave them out, choose a model that "
            f"has them, or give {group} in a file of conf/experiment."
        ) from None


def keys_given() -> list[str]:
    """The settings and groups that the command line of the running command gives, by their keys."""
    return keys_of(HydraConfig.get().overrides.task)


def gives(group: str) -> bool:
    """Whether the command line of the running command gives a group, or one of its settings."""
    return any(key == group or key.startswith(f"{group}.") for key in keys_given())


def keys_of(overrides: Sequence[str]) -> list[str]:
    """The settings and groups that a command line's words give, by their keys."""
    return [override.lstrip("+~").partition("=")[0] for override in overrides]


def keys_of_files(overrides: Sequence[str]) -> list[str]:
    """The settings and groups that the files of conf/ give that a command line chooses: those of a group's file, of an
    experiment, and what a router comes with."""
    keys: list[str] = []
    for group, _, name in (override.lstrip("+").partition("=") for override in overrides):
        file = CONF / group / f"{name}.yaml"
        if not name or not file.is_file():
            continue
        text = file.read_text()
        tree = yaml.safe_load(text) or {}
        if not text.startswith("# @package _global_"):
            keys += [f"{group}.{key}" for key in flat(tree)]
            continue
        chosen = [word for default in tree.pop("defaults", []) if isinstance(default, dict) for word in default.items()]
        words = [f"{key.removeprefix('override ').lstrip('/')}={value}" for key, value in chosen]
        keys += [*keys_of(words), *keys_of_files(words), *flat(tree)]
    return keys


def overlay(base: Config, cfg: Config, keys: list[str]) -> Config:
    """`base` with the settings and groups that `keys` name taken from `cfg`. Raises `BadInput` for a setting of a group
    that is null in `base`."""
    merged = copy.deepcopy(base)
    for key in keys:
        path, _, name = key.rpartition(".")
        group = lookup(merged, path) if path else merged
        if group is None:
            raise BadInput(f"{key}={lookup(cfg, key)} means nothing here: {path} is null in the settings it adds to.")
        if isinstance(group, dict) or hasattr(group, name):  # not hydra's own
            assign(group, name, lookup(cfg, key))
    return merged
