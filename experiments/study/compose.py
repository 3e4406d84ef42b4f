"""From an experiment's file and a command line to the plan of a study.

Hydra composes once per arm, a second each; seeds are set in what it composed. What a sweep is over is taken from
`hydra.sweeper.params` of the file and from the command line, which counts where both name a key; arms that have a name
of their own stand in the file as `study.arms`.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from omegaconf import DictConfig

from experiments import cli
from experiments.refusals import CONF, check_override, plain, read_word, singles
from experiments.study.manifest import Job, Search, Study, job_id, job_of
from experiments.study.search import import_optuna
from experiments.study.space import lines_of, read_space, with_values
from experiments.sweeps import job_name
from moe.config.balance import BalanceConfig
from moe.config.parse import ANY, Between, OneOf, accepted, lookup, nearest, to_dict
from moe.config.router import RouterConfig
from moe.config.run import Config
from moe.errors import BadInput
from moe.model import cost

COMMAND = "sweep"
TRIAL = "every trial"  # in place of an arm's name, in what is refused of a search


@dataclass
class StudyConfig:
    """What is compared, and what was declared before the first run."""

    # arms by name, each with its overrides on the study's settings: {mine: "router=hash optim.lr=1e-3"}; empty: those
    # that the sweep gives
    arms: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)  # of every arm; empty: those of the sweep, or `seed` alone
    base: str = ""  # the arm that the others are compared with; "": the first
    margin: Annotated[float, Between(0, ANY)] = 0.01  # nats per token within which two arms count as equivalent
    # a dense twin for every MoE, which has this in common with it; "": none
    twin: Annotated[str, OneOf("", "active_params", "flops", "total_params")] = ""
    retries: Annotated[int, Between(0, 100)] = 1  # how often a job that failed is tried again
    # in place of arms, what a sampler looks for the best of: {optim.lr: "log 1e-3 3e-2", model.moe.k: "choice 1,2"};
    # also "float 0 0.2" and "int 1 8"
    search: dict[str, Any] = field(default_factory=dict)
    trials: Annotated[int, Between(0, 100_000)] = 0  # of the search
    sampler_seed: Annotated[int, Between(0, 2**31 - 1)] = 0  # of the search: what it draws at random


@dataclass
class SlurmConfig:
    """How workers become jobs of a cluster."""

    # slurm: `workers` are tasks of a job array | local: processes, the same way, to try it out | "": none of it
    executor: Annotated[str, OneOf("", "slurm", "local")] = ""
    partition: str = ""  # "": the cluster's own default
    time: Annotated[int, Between(1, 10_000_000)] = 240  # minutes that a worker has
    gpus: Annotated[int, Between(0, 1024)] = 0  # of a worker
    cpus: Annotated[int, Between(1, 4096)] = 1  # of a worker
    array_parallelism: Annotated[int, Between(1, 100_000)] = 256  # workers at a time


@dataclass
class SweepConfig(Config):
    """The settings that the runs of a study have in common, and the study itself."""

    workers: Annotated[int, Between(1, 1024)] = 1  # processes that work through the study at a time
    again: bool = False  # forget the failures so far, and try those jobs again
    study: StudyConfig = field(default_factory=StudyConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


OF_THE_STUDY = ("workers", "again", "study", "slurm", "run", "resume", "trust", "hydra")  # no settings of one run


class Arm(NamedTuple):
    """A name, and the overrides that it stands for."""

    name: str
    words: list[str]


class Composed(NamedTuple):
    """What Hydra made of an arm: settings that still refer to each other, and the overrides it had."""

    arm: Arm
    tree: DictConfig


class Planned(NamedTuple):
    """The settings of the command, and those of every job."""

    cfg: SweepConfig
    name: str
    jobs: list[tuple[Arm, Config]]
    base: str


@contextlib.contextmanager
def beside_hydra() -> Iterator[None]:
    """Compose while Hydra runs a command, whose own state is there again afterwards."""
    running = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        Singleton.set_state(running)


def compose_jobs(words: list[str]) -> Planned:
    """What a command line asks for. Raises `BadInput`."""
    cli.register(COMMAND, SweepConfig)
    with beside_hydra(), hydra.initialize_config_dir(str(CONF), version_base=None):
        # What the command line alone says, and the file it names.
        options = read_options(words, "")
        seed_lines = options.pop("seed", [])
        fixed = {key: lines[0] for key, lines in options.items() if len(lines) == 1}
        cfg = cli.typed(cli.compose(COMMAND, SweepConfig, list(fixed.values())), SweepConfig, complete=False)
        for key, limit in accepted(SweepConfig).items():
            if key.partition(".")[0] in OF_THE_STUDY:
                limit.check(key, lookup(cfg, key))
        experiment = fixed.get("experiment", "").partition("=")[2]
        params = HydraConfig.get().sweeper.params or {}
        where = f"hydra.sweeper.params of conf/experiment/{experiment}.yaml: "
        given = {*options, *(["seed"] if seed_lines else [])}
        of_file = read_options([f"{key}={value}" for key, value in params.items() if key not in given], where)
        seeds = seeds_of(cfg, of_file.pop("seed", []), seed_lines)
        fixed |= {key: lines[0] for key, lines in of_file.items() if len(lines) == 1}

        # Seeds are no arms; whatever else has several values is.
        swept = {key: lines for key, lines in (of_file | options).items() if len(lines) > 1}
        check_search(cfg.study, swept, fixed)
        arms = [Arm(TRIAL, [])] if cfg.study.search else arms_of(cfg.study, swept, fixed, experiment or "run")
        if len(arms) * max(1, len(seeds)) == 1 and not (cfg.study.twin or cfg.study.search):
            raise BadInput(
                "nothing is swept: name several values (router=softmax,hash seed=0,1,2), or study.arms in the "
                "experiment's file; one run alone is experiments.train."
            )
        jobs = [
            (arm, single(tree, arm, seed))
            for arm, tree in [compose_arm(arm, fixed) for arm in arms]
            for seed in (seeds or [cfg.seed])
        ]
    return Planned(cfg, experiment, jobs, base_of(cfg.study, [arm.name for arm in arms]))


def check_search(study: StudyConfig, swept: dict[str, list[str]], fixed: dict[str, str]) -> None:
    """Refuse a search that cannot be, or that goes with something else. Raises `BadInput`."""
    # Whether there is one, and alone.
    if not study.search:
        if study.trials:
            raise BadInput(f"study.trials={study.trials} is of a search, and study.search names no setting.")
        return
    if not study.trials:
        raise BadInput("study.trials=0 is no search: name how many trials study.search is to have, like 20.")
    others = {"study.arms": study.arms, "study.twin": study.twin, "study.base": study.base}
    for name in [*(name for name, value in others.items() if value), *swept]:
        raise BadInput(f"study.search and {name} do not go together: a search makes its own arms, so leave out one.")

    # What it is over.
    import_optuna()
    lines = lines_of(study.search)
    space = read_space(lines)
    for key in space:
        if key in fixed:
            raise BadInput(f"study.search.{key}={lines[key]} is over what {fixed[key]} sets too: leave out one.")
    n_points = math.prod(dimension.size for dimension in space.values())
    if n_points < study.trials:
        raise BadInput(f"study.trials={study.trials} are more than the {n_points:.0f} that study.search has.")


def base_of(study: StudyConfig, names: list[str]) -> str:
    """The arm that the others are compared with: the first that is called so, or, where more is swept over, the first
    of the arm of that name. Raises `BadInput` where there is none."""
    if not study.base:
        return "" if study.search else names[0]
    of_its_name = [name for name in names if study.base in study.arms and name.startswith(f"{study.base}-")]
    if study.base in names or of_its_name:
        return study.base if study.base in names else of_its_name[0]
    raise BadInput(f"study.base={study.base} is no arm of this study; {nearest(study.base, names)}.")


def read_options(words: list[str], where: str) -> dict[str, list[str]]:
    """The overrides by key, each as a line per value; the last of a key counts. Raises `BadInput`, with `where` they
    stand."""
    options: dict[str, list[str]] = {}
    try:
        for override in [read_word(SweepConfig, word) for word in words]:
            key, lines = override.get_key_element(), singles(override)
            check_override(SweepConfig, True, override, lines, True)
            if len(lines) > 1 and key.partition(".")[0] in (*OF_THE_STUDY, "experiment"):
                raise BadInput(f"{override.input_line} cannot be swept over: it is of the study, not of a run.")
            if len(set(lines)) < len(lines):
                raise BadInput(f"{override.input_line} names a value twice: each must be there once.")
            options[key] = lines
    except BadInput as bad:
        raise BadInput(f"{where}{bad}") from None
    return options


def seeds_of(cfg: SweepConfig, of_file: list[str], of_command_line: list[str]) -> list[int]:
    """The seeds of every arm: those of the command line, of the sweep in the file, or of study.seeds. Raises
    `BadInput`."""
    seeds, lines = cfg.study.seeds, of_command_line or of_file
    if of_file and seeds:
        raise BadInput(f"seed is swept over, and study.seeds={seeds} are given too: leave one of them out.")
    try:
        seeds = [int(line.partition("=")[2]) for line in lines] or seeds
    except ValueError:
        raise BadInput(f"seed={','.join(line.partition('=')[2] for line in lines)} must be whole numbers.") from None
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"study.seeds={seeds} names a seed twice: each must be there once.")
    return seeds


def arms_of(study: StudyConfig, swept: dict[str, list[str]], fixed: dict[str, str], alone: str) -> list[Arm]:
    """The named arms, each with every combination of what is swept over; without named ones the combinations, and
    without those the one arm called `alone`. Raises `BadInput` for an arm that sets what the command line, or the
    sweep, sets too."""
    named = [Arm(name, words_of(name, value)) for name, value in study.arms.items()] or [Arm("", [])]
    arms = []
    for arm in named:
        for key in cli.keys_of(arm.words):
            if key in swept or key in fixed:
                raise BadInput(f"study.arms.{arm.name} sets {key}, which {fixed.get(key, 'the sweep')} sets too.")
        for combination in itertools.product(*swept.values()):
            name = "-".join([*([arm.name] if arm.name else []), *([job_name(combination)] if combination else [])])
            arms.append(Arm(name or alone, [*arm.words, *combination]))
    if len({arm.name for arm in arms}) < len(arms):  # two classes of one name, say
        arms = [Arm(plain(arm.words), arm.words) for arm in arms]
    return arms


def words_of(name: str, value: Any) -> list[str]:
    """The overrides of a named arm: of a text its words. Raises `BadInput` for any that is none of a run."""
    if not isinstance(value, str | list | type(None)):
        raise BadInput(f"study.arms.{name}={value!r} must be overrides, like 'router=hash optim.lr=1e-3', or a list.")
    try:
        words = [str(word) for word in value] if isinstance(value, list) else shlex.split(value or "")
    except ValueError as error:
        raise BadInput(f"study.arms.{name}={value!r} cannot be read: {error}.") from None
    for word in words:
        try:
            override = read_word(SweepConfig, word)
            lines = singles(override)
            check_override(SweepConfig, True, override, lines, True)
            key = override.get_key_element()
            if len(lines) > 1:
                raise BadInput(f"{word} has several values, and an arm has one: give each an arm of its own.")
            if key.partition(".")[0] in (*OF_THE_STUDY, "experiment", "seed"):
                raise BadInput(f"{word} is of the study, and the same in every arm: leave it out here.")
        except BadInput as bad:
            raise BadInput(f"study.arms.{name}: {bad}") from None
    return words


def compose_arm(arm: Arm, fixed: dict[str, str]) -> Composed:
    """Hydra's composition of an arm. Raises `BadInput`, with the arm it is said of."""
    words = fixed | dict(zip(cli.keys_of(arm.words), arm.words, strict=True))
    try:
        return Composed(arm, cli.compose(COMMAND, SweepConfig, list(words.values())))
    except BadInput as bad:
        raise BadInput(f"{str(bad).rstrip('.')} (in the arm {arm.name}).") from None


def single(tree: DictConfig, arm: Arm, seed: int) -> Config:
    """The validated settings of one run. Raises `BadInput`, with the arm it is said of."""
    tree = copy.deepcopy(tree)
    tree.seed = seed
    try:
        cfg = cli.typed(tree, SweepConfig)
    except BadInput as bad:
        raise BadInput(f"{str(bad).rstrip('.')} (in the arm {arm.name}).") from None
    shared = {setting.name: getattr(cfg, setting.name) for setting in dataclasses.fields(Config)}
    return Config(**shared | {"run": "", "resume": False, "trust": False})


def plan(asked: Planned, vocab_size: dict[str, int], precision: str, command: str, commit: str | None) -> Study:
    """The study's plan: what was left open is decided for all jobs alike. `vocab_size`: by `text_of` a job;
    `precision`: of those that have it measured. Raises `BadInput` for two arms that are one, and for a twin that
    cannot be had."""
    # Every run as it will be trained.
    resolved = []
    for arm, cfg in asked.jobs:
        model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or vocab_size[text_of(cfg)])
        chosen = precision if cfg.train.precision == "auto" else cfg.train.precision
        train = dataclasses.replace(cfg.train, precision=chosen)
        resolved.append((arm, dataclasses.replace(cfg, model=model, train=train)))

    # Of a search only what its trials start from.
    study = asked.cfg.study
    if study.search:
        trees = [to_dict(cfg) for _, cfg in resolved]
        with_values(trees[0], dict.fromkeys(lines := lines_of(study.search)))
        search = Search(lines, study.trials, study.sampler_seed, trees)
        name = asked.name or COMMAND
        return Study(name, command, commit, "", study.margin, [], {}, study.retries, precision, search)

    # Arms, then their twins, of which several may have the same.
    jobs = [job_of(arm.name, arm.words, cfg) for arm, cfg in resolved]
    first: dict[str, Job] = {}
    for job in jobs:
        other = first.setdefault(job.id, job)
        if other is not job:
            raise BadInput(f"the arms {other.arm} and {job.arm} are the same run: each must differ in a setting.")
    twins = twins_of(resolved, study.twin) if study.twin else {}
    named = {arm.name: name for name, arms in called(twins).items() for arm in arms}
    for arm, cfg in resolved:
        if arm.name in named:
            twin = job_of(named[arm.name], [f"study.twin={study.twin}"], twin_of(cfg, study.twin))
            if twin.id not in first:
                jobs.append(first.setdefault(twin.id, twin))
    return Study(
        asked.name or COMMAND, command, commit, asked.base, study.margin, jobs, named, study.retries, precision
    )


def text_of(cfg: Config) -> str:
    """What decides which prepared text a job reads."""
    return repr((cfg.data, cfg.tokenizer))


def twin_of(cfg: Config, match: str) -> Config:
    """The dense twin of an MoE's run, without a router or any of the settings of one."""
    model = cost.dense_twin(cfg.model, match, cfg.router, cfg.balance)
    return dataclasses.replace(cfg, model=model, router=RouterConfig(), balance=BalanceConfig())


def twins_of(resolved: list[tuple[Arm, Config]], match: str) -> dict[str, list[Arm]]:
    """The MoE arms by the id of their twin. Raises `BadInput` where one has none, and where no arm is an MoE."""
    by_twin: dict[str, list[Arm]] = {}
    seen = set()
    for arm, cfg in resolved:
        if cfg.model.moe is not None and arm.name not in seen:
            seen.add(arm.name)
            try:
                twin = job_id(dataclasses.replace(twin_of(cfg, match), seed=0))
            except BadInput as bad:
                raise BadInput(f"{str(bad).rstrip('.')} (in the arm {arm.name}).") from None
            by_twin.setdefault(twin, []).append(arm)
    if not by_twin:
        raise BadInput(f"study.twin={match} needs an arm that is a Mixture-of-Experts model, and all are dense.")
    return by_twin


def called(twins: dict[str, list[Arm]]) -> dict[str, list[Arm]]:
    """The same by a name: a twin that all have in common needs no more of it."""
    if len(twins) == 1:
        return {"dense twin": next(iter(twins.values()))}
    return {f"dense twin of {', '.join(arm.name for arm in arms)}": arms for arms in twins.values()}
