"""Search: trials of a study that a sampler (TPE, of Optuna) asks for one after another, told what came of those before.

The plan is the only truth: whoever asks, under its lock, tells a new sampler all that the runs' folders say, and its
random numbers come from the trial's number. So with one worker a trial is the same whatever was killed before it; with
several, it depends on which trials were done when it was asked for.
"""

import dataclasses
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study.claims import failures, turn
from experiments.study.manifest import (
    Search,
    Study,
    Trial,
    config_of,
    finished,
    job_of,
    read_study,
    run_of,
    runs_of,
    write_study,
)
from experiments.study.space import Dimension, Range, read_space, unseen, with_values
from moe.config.run import build
from moe.errors import BadInput
from moe.run.command_line import override

REPEATS = 8  # times that a sampler is asked again when it proposes what was tried already


@dataclass(frozen=True)
class Outcome:
    """What came of a trial."""

    word: str  # done | failed | open
    loss: float = math.nan  # mean validation loss over its seeds, of one that is done


def import_optuna() -> Any:
    """The package. Raises `BadInput` where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise BadInput(
            "study.search needs the package optuna, which is not installed: pip install 'moe-switchyard[optuna]'."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def arm_of(number: int) -> str:
    """What the arm of a trial is called."""
    return f"trial-{number}"


def is_wanting(study: Study) -> bool:
    """Whether there are trials to ask for."""
    return study.search is not None and len(study.search.asked) < study.search.n_trials


def ask(folder: Path, study: Study) -> Study:
    """The study in `folder` with one trial more than `study` has, written down; or as it stands there, if another
    worker has asked meanwhile. Raises `BadInput`."""
    with turn(runs_of(folder), "plan"):
        latest = read_study(folder)
        assert latest.search is not None
        assert study.search is not None
        if len(latest.search.asked) > len(study.search.asked) or not is_wanting(latest):
            return latest
        latest = grown(latest, suggest(folder, latest, latest.search))
        write_study(folder, latest)
    return latest


def grown(study: Study, values: dict[str, Any]) -> Study:
    """The study with a trial more: a run for every seed, or the reason why none can have these values."""
    search, jobs, refused = study.search, [], ""
    assert search is not None
    words = [override(key, value) for key, value in values.items()]
    try:
        for tree in search.settings:
            jobs.append(job_of(arm_of(len(search.asked)), words, build(with_values(tree, values))))
    except BadInput as bad:
        jobs, refused = [], str(bad)
    search = dataclasses.replace(search, asked=[*search.asked, Trial(values, refused)])
    return dataclasses.replace(study, jobs=[*study.jobs, *jobs], search=search)


def suggest(folder: Path, study: Study, search: Search) -> dict[str, Any]:
    """The settings of the next trial, by a sampler that was told of all before it."""
    optuna, space = import_optuna(), read_space(search.space)
    distributions = {key: distribution(optuna, dimension) for key, dimension in space.items()}

    # All that is known so far; what is still open counts as no better than the rest, so that no two are alike.
    told = []
    for number, trial in enumerate(search.asked):
        outcome = outcome_of(folder, study, number)
        states = optuna.trial.TrialState
        state = {"done": states.COMPLETE, "failed": states.FAIL, "open": states.RUNNING}[outcome.word]
        value = outcome.loss if outcome.word == "done" else None
        told.append(
            optuna.trial.create_trial(state=state, value=value, params=trial.values, distributions=distributions)
        )

    # A proposal by the random numbers of this trial; one that was tried already is none.
    seen = [trial.values for trial in search.asked]
    for repeat in range(REPEATS):
        seed = int(np.random.SeedSequence([search.sampler_seed, len(told), repeat]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some versions call constant_liar experimental
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        session = optuna.create_study(sampler=sampler)
        session.add_trials(told)
        values = session.ask(distributions).params
        if values not in seen:
            return values
    return unseen(space, seen, seed)


def distribution(optuna: Any, dimension: Dimension) -> Any:
    """A dimension in Optuna's terms."""
    if not isinstance(dimension, Range):
        return optuna.distributions.CategoricalDistribution(dimension.values)
    kind = optuna.distributions.IntDistribution if dimension.whole else optuna.distributions.FloatDistribution
    return kind(dimension.low, dimension.high, log=dimension.log)


def outcome_of(folder: Path, study: Study, number: int) -> Outcome:
    """What came of a trial, by the folders of its runs."""
    assert study.search is not None
    if study.search.asked[number].refused:
        return Outcome("failed")
    losses, word = [], "done"
    for job in study.jobs:
        if job.arm != arm_of(number):
            continue
        try:
            summary = finished(run_of(folder, job), config_of(job))
        except BadInput:
            summary = None
        if summary:
            losses.append(summary.val.loss)
        elif len(failures(runs_of(folder), job.id)) > study.retries:
            return Outcome("failed")
        else:
            word = "open"
    loss = float(np.mean(losses)) if losses else math.nan
    if word == "done" and not math.isfinite(loss):
        return Outcome("failed")
    return Outcome(word, loss if word == "done" else math.nan)


def best(folder: Path, study: Study) -> str:
    """How far a search is and what is best so far, in a sentence; "" for a study that is none."""
    if study.search is None:
        return ""
    outcomes = [outcome_of(folder, study, number) for number in range(len(study.search.asked))]
    losses = {number: outcome.loss for number, outcome in enumerate(outcomes) if outcome.word == "done"}
    n_failed = sum(outcome.word == "failed" for outcome in outcomes)
    said = f"search: {len(losses)} of {study.search.n_trials} trials done"
    said += f", {n_failed} failed" if n_failed else ""
    if not losses:
        return said
    number = min(losses, key=losses.__getitem__)
    values = " ".join(f"{key}={shown(value)}" for key, value in study.search.asked[number].values.items())
    n_seeds = len(study.search.settings)
    seeds = f" on average over {n_seeds} seeds" if n_seeds > 1 else ""
    return f"{said}; the best so far is {arm_of(number)}, val loss {losses[number]:.4f}{seeds}: {values}"


def shown(value: Any) -> str:
    """A value for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def refusals(study: Study) -> list[str]:
    """A line for each trial that no run can have the settings of."""
    asked = study.search.asked if study.search else []
    return [f"{arm_of(number)}: {trial.refused}" for number, trial in enumerate(asked) if trial.refused]
