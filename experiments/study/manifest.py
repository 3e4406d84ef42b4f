"""The plan of a study, study.json in its folder: every job's arm, seed and whole settings, under a checksum.

A job's id is the hash of its settings, and its run lies beside the study's folder under that name: studies in one
folder share the runs that they have in common.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.config.parse import to_dict
from moe.config.run import Config, build, fingerprint, may_change
from moe.errors import BadInput
from moe.run import jsonl
from moe.run.folder import differences, read_config
from moe.run.summary import Summary, read_summary

FILE = "study.json"
SCHEMA = 1  # raised when a field goes or means another thing
DIGITS = 12  # of an id
SHOWN = 4  # differences of a kind that a refusal names


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    id: str  # the name of its run's folder
    arm: str
    seed: int
    overrides: list[str]  # what it has beside the study's settings, as typed
    config: dict[str, Any]  # every setting, but for the run's folder

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"{self.arm} seed {self.seed}"


@dataclass(frozen=True)
class Trial:
    """What a sampler answered when it was asked."""

    values: dict[str, Any]  # of the settings that are searched over
    refused: str = ""  # why no run can have them; "": each seed has a job, of the arm trial-<number>


@dataclass(frozen=True)
class Search:
    """Trials that are asked for one after another; the one way in which a plan grows."""

    space: dict[str, str]  # a line of words for every setting that is searched over
    n_trials: int  # that there are to be
    sampler_seed: int
    settings: list[dict[str, Any]]  # a run's, for every seed; the trials' values take the place of some
    asked: list[Trial] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """What is compared with what, decided before the first run begins."""

    name: str
    command: str  # what to type to go on with it
    commit: str | None  # of the code that planned it; None outside a checkout
    base: str  # the arm that the others are compared with
    margin: float  # nats per token within which two arms count as equivalent
    jobs: list[Job]  # arm by arm, seeds in order
    twins: dict[str, str] = field(default_factory=dict)  # the arm of the dense twin, by the arm of its MoE
    retries: int = 1  # how often a job that failed is tried again
    precision: str = ""  # what was decided for the jobs that left it open; "": there were none
    search: Search | None = None  # None: all jobs are known beforehand
    schema: int = SCHEMA

    @property
    def arms(self) -> list[str]:
        """The arms, in the order of the plan."""
        return list(dict.fromkeys(job.arm for job in self.jobs))

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Those of every job, and of a search what its trials start from."""
        return [job.config for job in self.jobs] + (self.search.settings if self.search else [])


def job_of(arm: str, words: list[str], cfg: Config) -> Job:
    """The record of a job, with the overrides `words` of its arm."""
    return Job(job_id(cfg), arm, cfg.seed, [*words, f"seed={cfg.seed}"], to_dict(cfg))


def job_id(cfg: Config) -> str:
    """Twelve hex digits of the settings that decide a run's result."""
    return fingerprint(cfg, digits=DIGITS)


def config_of(job: Job) -> Config:
    """The typed settings of a job."""
    return build(job.config)


def runs_of(folder: Path) -> Path:
    """Where the runs of the study in `folder` lie: beside it."""
    return folder.parent if folder.name not in ("", "..") else Path(os.path.abspath(folder)).parent


def run_of(folder: Path, job: Job) -> Path:
    """The run's folder of a job of the study in `folder`."""
    return runs_of(folder) / job.id


def finished(run: Path, cfg: Config) -> Summary | None:
    """The summary of a job's run, if it is finished. Raises `BadInput` for one that is damaged, or whose settings are
    not those of the plan, `cfg`."""
    if not (run / "summary.json").exists():
        return None
    summary = read_summary(run)
    for key, planned, had in planned_differences(cfg, read_config(run, trust=True)):
        raise BadInput(
            f"{run} is not the run that was planned: it has {key}={had}, and the plan {planned}; move it elsewhere, "
            "and it is trained again."
        )
    return summary


def planned_differences(plan: Config, run: Config) -> Iterator[tuple[str, Any, Any]]:
    """(key, planned value, the run's) of every setting that decides a result and differs, but for those that a run
    itself resolves."""
    resolved = {"dispatch": "auto", "optim.warmup": -1, "model.vocab_size": 0}
    for key, planned, had in differences(plan, run):
        source = key == "source" and Path(str(had)).is_relative_to(str(planned) or "/nowhere")
        if not (may_change(key, run) or source or (key in resolved and resolved[key] == planned)):
            yield key, planned, had


def write_study(folder: Path, study: Study) -> None:
    """Write study.json, whole or not at all. Raises `BadInput` where it cannot be written."""
    tree = jsonl.finite(dataclasses.asdict(study))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"run={folder} cannot be created ({error.strerror or error}).") from error
    jsonl.write_json(folder / FILE, tree | {"checksum": _checksum(tree)})


def read_study(folder: Path) -> Study:
    """The plan of the study in `folder`. Raises `BadInput` for a folder that has none, and for one that is damaged, was
    edited, or is of a newer version."""
    path = folder / FILE
    again = "restore it, or delete it and repeat the study's command, which finds the runs again"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        studies = sorted(str(inside.parent) for inside in folder.glob(f"*/{FILE}"))
        hint = f"; there are {', '.join(studies)}" if studies else ""
        raise BadInput(f"run={folder} is not a study's folder: it has no {FILE}{hint}.") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {str(error).splitlines()[0]}; {again}.") from None
    if not isinstance(tree, dict):
        raise BadInput(f"{path} is damaged: it holds no settings; {again}.")
    if isinstance(schema := tree.get("schema"), int) and schema > SCHEMA:
        raise BadInput(f"{path} was written by a newer version (schema {schema}; this one reads {SCHEMA}): update it.")
    if tree.pop("checksum", None) != _checksum(tree):
        raise BadInput(f"{path} was edited: it is not what its checksum was made of; {again}.")
    return jsonl.record(Study, tree, str(path))


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def check_same_plan(old: Study, new: Study, folder: Path) -> None:
    """Refuse to go on with another plan than the one in `folder`. Raises `BadInput`, which says what differs."""
    before, after = ({(job.arm, job.seed): job for job in jobs_compared(study)} for study in (old, new))
    said = []

    # Jobs that only one of them has.
    for words, jobs, others in (("more", after, before), ("less", before, after)):
        if titles := [job.title for key, job in jobs.items() if key not in others]:
            said.append(f"{len(titles)} job{'s' * (len(titles) > 1)} {words} ({_some(titles)})")

    # Settings of the jobs that both have, each named once.
    changes: dict[str, list[str]] = {}
    for key, job in after.items():
        if key in before and before[key].id != job.id:
            for name, was, now in differences(config_of(before[key]), config_of(job)):
                changes.setdefault(f"{name}={now} where it was {was}", []).append(job.title)
    said += [f"{change} (in {_some(titles)})" for change, titles in list(changes.items())[:SHOWN]]
    if len(changes) > SHOWN:
        said.append(f"{len(changes) - SHOWN} more settings")

    # What was declared before the first run.
    for name in ("base", "margin", "twins"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now and not (name == "twins" and said):
            said.append(f"study.{name}={now} where it was {was}")
    if old.search and new.search:
        for of_search, setting in (("space", "search"), ("sampler_seed", "sampler_seed")):
            had, has = getattr(old.search, of_search), getattr(new.search, of_search)
            said += [f"study.{setting}={has} where it was {had}"] if had != has else []
    if said:
        common = len({job.id for job in old.jobs} & {job.id for job in new.jobs})
        raise BadInput(
            f"run={folder} has another plan than this command makes: {', '.join(said)}; go on with its own by "
            f"run={folder} alone, or choose another folder beside it, where the {common} runs in common are shared."
        )


def jobs_compared(study: Study) -> list[Job]:
    """What of a plan must stay: its jobs, or of a search, which gets more of them, what all its trials start from."""
    if study.search is None:
        return study.jobs
    return [job_of("every trial", [], build(tree)) for tree in study.search.settings]


def _some(titles: list[str]) -> str:
    more = f" and {len(titles) - SHOWN} more" if len(titles) > SHOWN else ""
    return ", ".join(titles[:SHOWN]) + more
