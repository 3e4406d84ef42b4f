"""A sweep: its jobs and where each writes, checked before the first; jobs that fail do not end the others."""

import contextlib
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hydra._internal.hydra import Hydra  # what hydra.main itself runs a sweep with
from hydra.core.hydra_config import HydraConfig

from experiments.refusals import CONF, first_line, plain
from moe.errors import BadInput, of_the_machine
from moe.run import terminal

LONGEST_NAME = 100  # characters of a folder's name that say what was swept

C = TypeVar("C")


class Job(NamedTuple):
    """A job of a sweep that has not run: the overrides of its own, as typed, all of its overrides, and its config."""

    swept: list[str]
    overrides: list[str]
    cfg: Any


class Sweep(NamedTuple):
    """The name of its folder below runs/, the settings that take several values, and how many jobs there are."""

    name: str
    keys: list[str]
    n_jobs: int


# (a job's config, the sweep's name, the job's) -> the config that writes to a place of its own, and that place
Place = Callable[[Any, str, str], tuple[Any, Path]]


def check_sweep(jobs: Sequence[Job], place: Place | None, before: Callable[[list[Job]], object] | None = None) -> Sweep:
    """Name a sweep by what it sweeps over and by its jobs. Raises `BadInput` for jobs of one place, for places that
    are taken already without resume=true, and for what `before` refuses of the jobs in their places."""
    keys = list(dict.fromkeys(word.partition("=")[0] for job in jobs for word in job.swept))
    experiment = next((word.partition("=")[2] for word in jobs[0].overrides if word.startswith("experiment=")), "sweep")
    names = [job_name(job.swept) for job in jobs]
    places = [str(place(job.cfg, "", name)[1]) if place else name for job, name in zip(jobs, names, strict=True)]
    code = hashlib.sha256("\n".join(sorted(places)).encode()).hexdigest()[:8]
    title = file_name("-".join([experiment, *(last_part(key) for key in keys)]))
    sweep = Sweep(f"{title}-{code}", keys, len(jobs))
    if place:
        placed_jobs = [place(job.cfg, sweep.name, name) for job, name in zip(jobs, names, strict=True)]
        jobs = [job._replace(cfg=cfg) for job, (cfg, _) in zip(jobs, placed_jobs, strict=True)]
        check_places(jobs, [path for _, path in placed_jobs])
    if before:
        before(list(jobs))
    return sweep


def check_each(jobs: Sequence[Job], check: Callable[[Any], object]) -> None:
    """`check` the config of every job. Raises its `BadInput`, which says of which job."""
    for job in jobs:
        try:
            check(job.cfg)
        except BadInput as bad:
            raise of_job(bad, job.swept) from None


def of_job(bad: BadInput, swept: Sequence[str]) -> BadInput:
    """What is refused of the job with these overrides of its own."""
    return BadInput(f"{str(bad).rstrip('.')} (in the sweep's job {plain(swept)}).") if swept else bad


def check_places(jobs: Sequence[Job], paths: Sequence[Path]) -> None:
    """Refuse two jobs that would write to one of `paths`, and a path that is taken already without resume=true."""
    taken: dict[str, str] = {}
    for i, (job, path) in enumerate(zip(jobs, paths, strict=True), 1):
        who, place = f"job {i} ({plain(job.swept)})", os.path.abspath(path)
        if place in taken:
            raise BadInput(
                f"{taken[place]} and {who} would both write to {path}: give each another, or leave it out and each "
                "gets its own."
            )
        if os.path.lexists(path) and not job.cfg.resume:
            raise BadInput(f"{path} exists, where {who} would write: add resume=true to go on, or choose another.")
        taken[place] = who


class Ending(NamedTuple):
    """How a job of a sweep ended."""

    number: int  # of the job, from 0
    result: Any = None
    failure: str = ""  # which job it was and what it failed of; "": it did not


@contextlib.contextmanager
def endings_of_jobs() -> Iterator[list[Ending]]:
    """How the jobs of a sweep inside ended, in order, in whatever process its launcher ran them: Hydra has what each
    returned from its launcher, and hands it on to nobody."""
    multirun = Hydra.multirun
    endings: list[Ending] = []

    def kept(*given: Any, **named: Any) -> Any:
        batches = multirun(*given, **named)
        values = [job.return_value for batch in batches or [] for job in batch]
        endings.extend(ending for ending in values if isinstance(ending, Ending))
        endings.sort(key=lambda ending: ending.number)
        return batches

    Hydra.multirun = kept  # type: ignore[method-assign]
    try:
        yield endings
    finally:
        Hydra.multirun = multirun  # type: ignore[method-assign]


def one_of_many(run: Callable[[], Any], sweep: Sweep) -> Ending:
    """The running job of a sweep: announced, and run."""
    hydra_config = HydraConfig.get()
    title = f"job {hydra_config.job.num + 1} of {sweep.n_jobs}"
    words = plain(swept_of(hydra_config.overrides.task, sweep.keys))
    terminal.say(": ".join([title, *([words] if words else [])]))
    try:
        return Ending(hydra_config.job.num, run())
    except Exception as error:
        refusal = error if isinstance(error, BadInput) else of_the_machine(error)
        if refusal is None:  # a mistake in the code: the next job may well run
            traceback.print_exc()
        why = str(refusal or f"{type(error).__name__}: {first_line(error)}.")
    sys.stdout.flush()
    print(f"error: {terminal.printable(why)}", file=sys.stderr, flush=True)
    return Ending(hydra_config.job.num, None, f"{title} ({words}): {why}" if words else f"{title}: {why}")


def placed(cfg: C, sweep: Sweep | None, place: Place | None) -> C:
    """The running job's config, with a place of its own if it is one of many."""
    if sweep is None or place is None:
        return cfg
    return place(cfg, sweep.name, job_name(swept_of(HydraConfig.get().overrides.task, sweep.keys)))[0]


def swept_of(overrides: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Of a job's overrides those of what is swept over."""
    return [word for word in overrides if word.partition("=")[0] in keys]


def last_part(key: str) -> str:
    """What a setting is called in a folder's name: `lr` for optim.lr, and `router` for router.name."""
    *groups, name = key.split(".")
    return groups[-1] if groups and name == "name" else name


def job_name(swept: Sequence[str]) -> str:
    """What a job is called in a folder's name, from the overrides of its own: a file of conf/ by its name, a router of
    one's own by its class, any other setting with its key."""
    parts = []
    for key, _, value in (plain([word]).partition("=") for word in swept):
        bare = key == "router.name" or (CONF / key).is_dir()
        parts.append(value.rpartition(":")[2] if bare else f"{last_part(key)}{value}")
    return file_name("-".join(parts) or "job")


def file_name(text: str) -> str:
    """`text` with _ for what a shell, Hydra's grammar or a file system would read, not too long."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text)[:LONGEST_NAME].strip("_.-")
