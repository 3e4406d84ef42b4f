"""What a study found: every arm's numbers over seeds, judged against the base, from the runs that are finished.

Nothing here trains, and nothing is left out in silence: what is not finished, or cannot be read, is named.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from experiments.stats import decide
from experiments.stats.arms import judge_arms, rank_intervals
from experiments.stats.decide import Judgement, judge
from experiments.stats.speedup import AXES, Curve, mean_speedup, speedup
from experiments.stats.statistics import Interval
from experiments.stats.verdict import Run, check_comparable, signed, text_of, validation_curve
from experiments.study.manifest import Job, Study, config_of, run_of
from experiments.study.search import refusals
from experiments.study.states import State
from moe.config.run import FREE, Config, is_among
from moe.errors import BadInput
from moe.run.folder import differences
from moe.run.summary import read_metrics

SEEDS = ("seed", "seed_init", "seed_data")  # no difference between arms
DECIDED = (decide.BETTER, decide.WORSE, decide.EQUIVALENT)
NAMED = 6  # arms, or runs, that a sentence names; tables and lists have all


@dataclass(frozen=True)
class Arm:
    """The finished runs of an arm, in order of their seeds."""

    name: str
    seeds: list[int]
    runs: list[Run]
    curves: list[Curve]
    settings: list[tuple[str, Any, Any]]  # (key, the base's, the arm's) where they differ
    judgement: Judgement | None = None  # of the differences to the base, seed by seed; None of the base, or without any
    bits: Judgement | None = None  # the same of bits per byte
    ranks: tuple[int, int] | None = None  # among all arms, 1 the best; None where arms have no two seeds in common
    speedups: dict[str, Interval | None] | None = None  # over the base, by `AXES`
    beside_twin: Judgement | None = None  # of the differences to its dense twin; None where that, or it, is the base


@dataclass(frozen=True)
class Outcome:
    """What a study found so far."""

    study: Study
    arms: list[Arm]  # that have a finished run, the base first
    missing: list[str]  # what is not in it and why, a sentence each

    @property
    def base(self) -> Arm | None:
        """The arm that the others are compared with; None as long as it has no finished run."""
        return next((arm for arm in self.arms if arm.name == self.study.base), None)

    @property
    def reference(self) -> str:
        """The arm that settings are told against: the base, or of a search, which has none, the first trial."""
        return reference_of(self.study)


def outcome(folder: Path, study: Study, states: Sequence[State]) -> Outcome:
    """What the finished runs of the study in `folder` say."""
    # What there is, and what there is not.
    runs: dict[str, dict[int, Run]] = {}
    missing = []
    first: dict[str, Job] = {}
    for job, state in zip(study.jobs, states, strict=True):
        first.setdefault(job.arm, job)
        if state.summary is None:
            missing.append(f"{job.title} is {state.word}{f': {state.error}' if state.error else ''}")
            continue
        try:
            metrics = read_metrics(run_of(folder, job))
        except BadInput as bad:
            missing.append(f"{job.title} is left out: {bad}")
            continue
        if not math.isfinite(state.summary.val.loss):
            missing.append(f"{job.title} is left out: its validation loss is not finite")
            continue
        runs.setdefault(job.arm, {})[job.seed] = Run(str(run_of(folder, job)), state.summary, metrics)
    missing += [f"{reason.partition(':')[0]} is left out:{reason.partition(':')[2]}" for reason in refusals(study)]
    missing += set_apart(runs, reference_of(study))

    # Every arm for itself, then all together.
    arms = []
    for name in sorted(runs, key=lambda name: name != study.base):
        base = config_of(first[reference_of(study)])
        ordered = dict(sorted(runs[name].items()))
        settings = what_differs(base, config_of(first[name]))
        arms.append(
            Arm(name, list(ordered), list(ordered.values()), [*map(validation_curve, ordered.values())], settings)
        )
    return Outcome(study, ranked(against_twins(against_base(arms, study), study)), missing)


def set_apart(runs: dict[str, dict[int, Run]], reference: str) -> list[str]:
    """Take out of `runs`, by arm and seed, those whose losses cannot be compared with most of the reference's or, where
    that has none, with most of all. Returns a sentence for each."""
    of_reference = list(runs.get(reference, {}).values()) or [
        run for by_seed in runs.values() for run in by_seed.values()
    ]
    texts = [text_of(run) for run in of_reference]
    apart = []
    for name in list(runs):
        for seed, run in list(runs[name].items()):
            try:
                check_comparable([of_reference[texts.index(mode(texts))], run])
            except BadInput as bad:
                apart.append(f"{name} seed {seed} is left out: {bad}")
                del runs[name][seed]
        if not runs[name]:
            del runs[name]
    return apart


def reference_of(study: Study) -> str:
    """The base, or the first arm of a study without one."""
    return study.base or next(iter(study.arms), "")


def what_differs(base: Config, cfg: Config) -> list[tuple[str, Any, Any]]:
    """(key, the base's value, the arm's) of the settings that may change a result; a dense model's experts are one."""
    kept: list[tuple[str, Any, Any]] = []
    for key, theirs, mine in differences(base, cfg):
        if key in SEEDS or is_among(key, FREE):
            continue
        line: tuple[str, Any, Any] = (key, theirs, mine)
        if key.startswith("model.moe.") and None in (base.model.moe, cfg.model.moe):
            before, after = ("null" if settings.model.moe is None else "experts" for settings in (base, cfg))
            line = ("model.moe", before, after)
        if line not in kept:
            kept.append(line)
    return kept


def against_base(arms: list[Arm], study: Study) -> list[Arm]:
    """The arms with their judgements: corrected for how many have two seeds or more in common with the base."""
    base = next((arm for arm in arms if arm.name == study.base), None)
    if base is None:
        return arms
    margin = study.margin or None
    common = {arm.name: [seed for seed in arm.seeds if seed in base.seeds] for arm in arms if arm is not base}
    several = [name for name, seeds in common.items() if len(seeds) > 1]
    of = {arm.name: arm for arm in arms}
    loss, bits = (
        {name: _differences(of[name], base, seeds, number) for name, seeds in common.items()}
        for number in ("val.loss", "val.bpb")
    )
    corrected = dict(zip(several, judge_arms([loss[name] for name in several], margin), strict=True))
    in_bits = dict(zip(several, judge_arms([bits[name] for name in several]), strict=True))
    judged = []
    for arm in arms:
        if arm is base or not common[arm.name]:
            judged.append(arm)
            continue
        pairs = [(_at(arm, seed), _at(base, seed)) for seed in common[arm.name]]
        ratios = {axis: mean_speedup([speedup(mine, other, axis) for mine, other in pairs]) for axis in AXES}
        verdict = corrected.get(arm.name) or judge(loss[arm.name], margin)
        of_bits = in_bits.get(arm.name) or judge(bits[arm.name])
        judged.append(replace(arm, judgement=verdict, bits=of_bits, speedups=ratios))
    return judged


def against_twins(arms: list[Arm], study: Study) -> list[Arm]:
    """The arms with their judgements against their dense twins, but where one of the two is the base: corrected for how
    many have two seeds or more in common with theirs."""
    of = {arm.name: arm for arm in arms}
    loss = {}
    for arm in arms:
        twin = of.get(study.twins.get(arm.name, ""))
        if (
            twin
            and study.base not in (arm.name, twin.name)
            and (seeds := [seed for seed in arm.seeds if seed in twin.seeds])
        ):
            loss[arm.name] = _differences(arm, twin, seeds, "val.loss")
    margin = study.margin or None
    several = [name for name, differences in loss.items() if len(differences) > 1]
    judged = {name: judge(differences, margin) for name, differences in loss.items()}
    judged |= zip(several, judge_arms([loss[name] for name in several], margin), strict=True)
    return [replace(arm, beside_twin=judged.get(arm.name)) for arm in arms]


def ranked(arms: list[Arm]) -> list[Arm]:
    """The arms with the ranks that they may have, by the seeds that all have in common."""
    common = sorted(set.intersection(*(set(arm.seeds) for arm in arms))) if arms else []
    if len(common) < 2 or len(arms) < 2:
        return arms
    scores = [[arm.runs[arm.seeds.index(seed)].summary.val.loss for seed in common] for arm in arms]
    return [replace(arm, ranks=ranks) for arm, ranks in zip(arms, rank_intervals(np.array(scores)), strict=True)]


def sentences(result: Outcome) -> list[str]:
    """The study in words: first what came out against the base, then arm by arm, then what it rests on, and what is not
    in it."""
    base, others, study = result.base, [arm for arm in result.arms if arm.judgement], result.study
    if not study.base:
        said = [of_a_search(result)]
    elif base is None:
        said = [f"No run of the base, {study.base}, is finished: there is no verdict yet."]
    elif not others:
        said = [f"Only {base.name} has finished runs: there is nothing to compare it with yet."]
    else:
        # Of many only those that came out somehow; the table has the others.
        told = [arm for arm in others if len(others) <= NAMED or (arm.judgement and arm.judgement.word in DECIDED)]
        each_arm = [arm_sentence(arm.name, arm.judgement, base.name) for arm in told if arm.judgement]
        in_detail = [" ".join(each_arm)] if each_arm else []
        said = each_arm if len(others) == 1 else [in_short(others, base.name), *in_detail]
        if len(others) > 1:
            said.append(
                f"Words are corrected for {len(others)} comparisons (Holm), and their 95% intervals hold together "
                "(max-t)."
            )
        beside = [arm_sentence(a.name, a.beside_twin, "its dense twin") for a in result.arms if a.beside_twin]
        said += [" ".join(beside)] if beside else []
        if study.margin:
            said.append(
                f"The margin of {study.margin:g} nats per token was declared before training: an arm is equivalent "
                "where two one-sided tests put its difference within it."
            )
    if result.missing:
        named = [reason.rstrip(".") for reason in result.missing[:NAMED]]
        named += [f"and {len(result.missing) - NAMED} more"] if len(result.missing) > NAMED else []
        said.append(
            f"{len(result.missing)} of {len(study.jobs) + len(refusals(study))} runs are not in it: {'; '.join(named)}."
        )
    return said


def of_a_search(result: Outcome) -> str:
    """What a search has found: the lowest loss, and why that is no verdict."""
    mean_loss = lambda arm: float(np.mean([run.summary.val.loss for run in arm.runs]))
    n_seeds = max(len(arm.runs) for arm in result.arms)
    whole = [
        arm for arm in result.arms if len(arm.runs) == n_seeds
    ]  # a mean over fewer seeds is not to be chosen for it
    lowest = min(whole, key=mean_loss)
    job = next(job for job in result.study.jobs if job.arm == lowest.name)
    words = " ".join(word for word in job.overrides if word.partition("=")[0] not in SEEDS)
    return (
        f"Of {len(whole)} finished trials {lowest.name} has the lowest validation loss, {mean_loss(lowest):.3f} "
        f"nats per token ({words}): the lowest of many is so by chance too, and other seeds would decide."
    )


def in_short(arms: list[Arm], base: str) -> str:
    """How many arms came out how, by name where they are few."""
    groups: dict[str, list[str]] = {word: [] for word in (*DECIDED, decide.INCONCLUSIVE, decide.SINGLE)}
    for arm in arms:
        groups[arm.judgement.word if arm.judgement else decide.SINGLE].append(arm.name)
    parts = []
    for word, names in groups.items():
        who = ", ".join(names) if len(names) <= NAMED else f"{len(names)} of {len(arms)} arms"
        said = "without a verdict, of one seed" if word == decide.SINGLE else word
        parts += [f"{who} {'are' if len(names) > 1 else 'is'} {said}"] if names else []
    return f"Against {base}, {'; '.join(parts)}."


def arm_sentence(name: str, judged: Judgement, base: str) -> str:
    """An arm against the base, or against its twin, in a sentence."""
    if judged.word == decide.SINGLE:
        return f"{name} differs from {base} by {signed(judged.mean)} nats in one seed, which gives no verdict."
    interval = f"{signed(judged.low or 0.0)} to {signed(judged.high or 0.0)}"
    said = f"{signed(judged.mean)} nats, 95% interval {interval} over {judged.n} seeds"
    match judged.word:
        case decide.BETTER | decide.WORSE:
            though = ", though within the margin" if judged.equivalent else ""
            return f"{name} is {judged.word} than {base} ({said}){though}."
        case decide.EQUIVALENT:
            return f"{name} and {base} are equivalent ({said})."
    more = f"about {judged.seeds_needed} seeds" if judged.seeds_needed else f"more than {decide.MOST_SEEDS:,} seeds"
    more = f"{more} would decide" if judged.deviation else "all seeds alike"
    return f"{name} against {base} is inconclusive ({said}; {more})."


def _differences(arm: Arm, base: Arm, seeds: list[int], number: str) -> list[float]:
    mine, other = (
        {s: attrgetter(number)(run.summary) for s, run in zip(a.seeds, a.runs, strict=True)} for a in (arm, base)
    )
    return [mine[seed] - other[seed] for seed in seeds]


def _at(arm: Arm, seed: int) -> Curve:
    return arm.curves[arm.seeds.index(seed)]
