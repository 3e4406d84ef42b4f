"""Which of two models is better, by how much, and how sure that is: numbers from finished runs, and words for them.

Nothing here reads a file or trains. A `Pair` is a Mixture-of-Experts run and its dense twin's with the same seed, so
every difference is paired: same initial weights where they have them in common, same batches, same validation windows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from experiments.stats.statistics import Interval, block_bootstrap, mean, t_interval
from moe.run.summary import MetricsLine, Summary

LEAK = 1e-9  # logits that move by more than this when later tokens change: no rounding of sums
ROUTING = ("max_vio", "effective_experts", "skipped")  # of `moe.analysis.metrics.layer_metrics`
LABELS = {"active_params": "active parameters", "total_params": "total parameters", "flops": "forward FLOPs per token"}


class Run(NamedTuple):
    """A finished run: its folder, what it says of itself, and `causal_leak` of the trained model, None where nobody
    measured it."""

    folder: str
    summary: Summary
    metrics: list[MetricsLine]
    leak: float | None = None


class Pair(NamedTuple):
    """The two runs of one seed."""

    moe: Run
    dense: Run


def validation_curve(run: Run) -> tuple[list[float], list[float], list[float]]:
    """Steps, training seconds, and validation loss (nats per token) at each evaluation, in order. One that was not
    finite is left out, but for the last."""
    end = run.summary
    points = [
        (float(line.step), line.seconds, line.val.loss)
        for line in run.metrics
        if line.val and line.step < end.steps and math.isfinite(line.val.loss)
    ]
    points.append((float(end.steps), end.seconds, end.val.loss))
    return (
        [float(step) for step, _, _ in points],
        [seconds for _, seconds, _ in points],
        [loss for _, _, loss in points],
    )


def first_reach(x: Sequence[float], loss: Sequence[float], target: float) -> float | None:
    """Where `loss` first is at most `target`, on straight lines between the points; None if it never is."""
    for i, value in enumerate(loss):
        if value <= target:
            if i == 0:
                return x[0]
            share = (loss[i - 1] - target) / (loss[i - 1] - value)
            return x[i - 1] + share * (x[i] - x[i - 1])
    return None


def loss_difference(pairs: list[Pair]) -> Interval:
    """Final validation loss of the MoE minus its twin's. Over seeds where there are several, else over validation
    windows. Raises ValueError if the two were not evaluated on the same windows."""
    for moe, dense in pairs:
        windows = len(moe.summary.val_windows), len(dense.summary.val_windows)
        if windows[0] != windows[1]:
            raise ValueError(f"{moe.folder} has {windows[0]} validation windows and {dense.folder} {windows[1]}")
    if len(pairs) > 1:
        return t_interval([moe.summary.val.loss - dense.summary.val.loss for moe, dense in pairs])
    (moe, dense) = pairs[0]
    return block_bootstrap(np.subtract(moe.summary.val_windows, dense.summary.val_windows))


@dataclass(frozen=True)
class Row:
    """A line of the table: a value per seed for the MoE and for its twin, None where a loss was never reached.

    `relation` is how the two compare: their "difference", with `interval` where one is known, or their "ratio"; or
    "none", and then the largest value over the seeds stands for each; or "alone": the twin has nothing of the kind."""

    label: str
    digits: int  # after the point
    moe: list[float | None]
    dense: list[float | None]
    relation: str = "ratio"
    interval: Interval | None = None


def table(pairs: list[Pair]) -> list[Row]:
    """Everything the comparison measured, a row per quantity."""

    def row(label: str, value: Callable[[Summary], float], digits: int = 0, relation: str = "ratio") -> Row:
        moe, dense = [value(pair.moe.summary) for pair in pairs], [value(pair.dense.summary) for pair in pairs]
        several = relation == "difference" and len(pairs) > 1
        return Row(label, digits, [*moe], [*dense], relation, t_interval(np.subtract(moe, dense)) if several else None)

    def score(label: str, domain: str = "") -> list[Row]:
        of = lambda summary: summary.val.domains[domain] if domain else summary.val
        return [
            row(f"{label} loss (nats per token)", lambda summary: of(summary).loss, 3, "difference"),
            row(f"{label} bits per byte", lambda summary: of(summary).bpb, 3, "difference"),
        ]

    def to_twin(label: str, digits: int, axis: int) -> Row:
        ends: list[float | None] = [validation_curve(pair.dense)[axis][-1] for pair in pairs]
        return Row(label, digits, [reach(pair.moe, pair.dense, axis) for pair in pairs], ends)

    def alone(label: str, name: str, digits: int, factor: float = 1.0) -> list[Row]:
        values = [getattr(measured(pair.moe), name) for pair in pairs]
        known = [factor * value for value in values if value is not None]
        return [Row(label, digits, [*known], [], "alone")] if len(known) == len(values) else []

    # Losses first: the one that the verdict is about with the interval that the verdict has, then each domain's.
    rows = score("Validation")
    rows[0] = replace(rows[0], interval=loss_difference(pairs))
    for domain in pairs[0].moe.summary.val.domains:
        rows += score(f"{domain}:", domain)

    # Then what it took, what routing did, and what was held equal.
    leaks = [pair.moe.leak for pair in pairs], [pair.dense.leak for pair in pairs]
    return [
        *rows,
        to_twin("Steps to the twin's final loss", 0, 0),
        to_twin("Seconds to the twin's final loss", 1, 1),
        *([] if None in leaks[0] + leaks[1] else [Row("Causal leak (logits)", 0, leaks[0], leaks[1], "none")]),
        *alone("MaxVio of the expert load (0 is even)", "max_vio", 2),
        *alone("Effective experts", "effective_experts", 2),
        *alone("Tokens without an expert (%)", "skipped", 1, 100),
        *alone("Rows dropped in training (%)", "dropped", 1, 100),
        row("Training throughput (tokens/s)", lambda summary: summary.tokens_per_s),
        row("Active parameters", lambda summary: summary.params.active),
        row("Total parameters", lambda summary: summary.params.total),
        row("Forward FLOPs per token", lambda summary: summary.flops.forward),
        row("Peak memory (MiB)", lambda summary: summary.peak_memory_bytes / 2**20),
    ]


def reach(run: Run, other: Run, axis: int) -> float | None:
    """Steps (axis 0) or training seconds (axis 1) `run` took to the final validation loss of `other`."""
    curve = validation_curve(run)
    return first_reach(curve[axis], curve[2], other.summary.val.loss)


HEADINGS = ("", "MoE", "dense twin", "MoE against twin")  # of the cells of a row


def cells(row: Row) -> tuple[str, str, str, str]:
    """What the table says of a row: label, MoE, twin, and their difference or ratio. Over several seeds a
    value is a mean ± half its 95% interval."""
    if row.relation == "alone":
        return row.label, _cell(row.moe, row.digits), "", ""
    if row.relation == "none":
        largest = [max(value for value in side if value is not None) for side in (row.moe, row.dense)]
        return row.label, scientific(largest[0]), scientific(largest[1]), ""
    moe, dense = mean(row.moe), mean(row.dense)
    if moe is None or dense is None:
        relation = "–"
    elif row.relation == "ratio":
        relation = f"{moe / dense:.2f}×" if dense else "–"
    else:
        relation = signed(moe - dense)
        if row.interval and math.isfinite(row.interval.low):
            relation += f" ({signed(row.interval.low)} to {signed(row.interval.high)})"
    return row.label, _cell(row.moe, row.digits), _cell(row.dense, row.digits), relation


def _cell(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return (
            "not reached" if len(values) == 1 else f"not reached in {len(values) - len(known)} of {len(values)} seeds"
        )
    text = f"{np.mean(known):,.{digits}f}"
    if max(known) == min(known):
        return text
    interval = t_interval(known)
    return f"{text} ± {interval.high - interval.mean:,.{digits}f}"


def signed(value: float) -> str:
    """Three digits after the point and a sign, a true minus one."""
    return f"{value:+.3f}".replace("-", "−")


def scientific(value: float) -> str:
    """Two digits and a power of ten; 0 is 0."""
    return f"{value:.1e}" if value else "0"


@dataclass(frozen=True)
class Measured:
    """What tells a run from others like it. None is what it does not have: a dense model's routing, a leak that nobody
    measured."""

    loss: float  # of the whole validation text, nats per token
    max_vio: float | None  # this and the next two: of the whole validation text, the mean of its MoE layers
    effective_experts: float | None
    skipped: float | None  # share of the tokens
    dropped: float | None  # share of the rows, over all of training: capacity limits nothing in evaluation
    tokens_per_s: float
    leak: float | None
    active: int | None = None  # parameters; None in results of earlier versions, and the next too
    total: int | None = None


def measured(run: Run) -> Measured:
    """The same of a finished run."""
    layers = run.summary.load.routing if run.summary.load else []
    dropped = [layer.dropped for line in run.metrics for layer in line.layers or []]
    return Measured(
        loss=run.summary.val.loss,
        **{name: float(np.mean([getattr(layer, name) for layer in layers])) if layers else None for name in ROUTING},
        dropped=float(np.mean(dropped)) if dropped else None,
        tokens_per_s=run.summary.tokens_per_s,
        leak=run.leak,
        active=run.summary.params.active,
        total=run.summary.params.total,
    )


@dataclass(frozen=True)
class SeedResult:
    """The two runs of one seed, in short."""

    seed: int
    moe: Measured
    dense: Measured


@dataclass(frozen=True)
class Comparison:
    """What compare.json holds: the verdict in words, the numbers below it, and how to get them again."""

    sentences: list[str]
    table: list[list[str]]  # `cells` of every row
    numbers: list[dict[str, Any]]  # every `Row`; an interval without a bound has null there
    folder: str
    runs: dict[str, list[str]]  # "moe" and "dense": the runs' folders, a run per seed
    command: str
    commit: str | None
    dirty: bool | None
    config: dict[str, Any]
    # What results of earlier versions do not have.
    leak: float = 0.0  # the largest of the MoEs'
    by_seed: list[SeedResult] = field(default_factory=list)
    twin: str = ""  # a fingerprint: comparisons with the same have the same dense twins
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def sentences(pairs: list[Pair], match: str) -> list[str]:
    """The result in words: first the loss with its uncertainty, then a leak if there is one, then the clock, then what
    was held equal."""
    return [_loss_sentence(pairs), *_leak_sentence(pairs), _clock_sentence(pairs), _match_sentence(pairs, match)]


def _leak_sentence(pairs: list[Pair]) -> list[str]:
    leak = max(pair.moe.leak or 0 for pair in pairs)
    if leak <= LEAK:
        return []
    return [
        f"The router sees later tokens (changing them alone moves a logit by {scientific(leak)}): the MoE's validation "
        "loss is not comparable with that of a model that predicts."
    ]


def _loss_sentence(pairs: list[Pair]) -> str:
    difference = loss_difference(pairs)
    summary = pairs[0].moe.summary
    loss = np.mean([pair.moe.summary.val.loss for pair in pairs])
    # What the interval covers.
    if len(pairs) > 1:
        scope, average = f"over {len(pairs)} seeds", " on average"
    else:
        scope = f"over {len(summary.val_windows)} windows of validation text; it does not cover the choice of seed"
        average = ""
    after = f"after {summary.steps:,} steps"
    what = f"{loss:.3f} nats per token{average}"

    # No interval, one with 0 in it, or a difference.
    if not math.isfinite(difference.low):
        return (
            f"There is too little validation text to tell the MoE and its dense twin apart {after}: the MoE's loss, "
            f"{what}, differs from the twin's by {signed(difference.mean)}, with no interval from one window."
        )
    if difference.low <= 0 <= difference.high:
        return (
            f"The MoE and its dense twin cannot be told apart {after}: the MoE's validation loss, {what}, differs from "
            f"the twin's by {signed(difference.mean)} (95% interval {signed(difference.low)} to "
            f"{signed(difference.high)} {scope})."
        )
    word = "lower" if difference.mean < 0 else "higher"
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return (
        f"The MoE's validation loss, {what}, is {abs(difference.mean):.3f} {word} than its dense twin's {after} "
        f"(95% interval {low:.3f} to {high:.3f} {scope})."
    )


def _clock_sentence(pairs: list[Pair]) -> str:
    steps, seconds = (mean([reach(pair.moe, pair.dense, axis) for pair in pairs]) for axis in (0, 1))
    moe_steps, moe_seconds = _end(pairs, "moe")
    dense_steps, dense_seconds = _end(pairs, "dense")
    if steps is not None and seconds is not None:
        by_steps = f" (effective speedup {dense_steps / steps:.2f}×)" if steps else ""
        by_clock = f" ({dense_seconds / seconds:.2f}×)" if seconds else ""
        ahead = "and was ahead by the clock too" if seconds < dense_seconds else "but was behind by the clock"
        return (
            f"It reached the twin's final loss after {steps:,.0f} of {dense_steps:,.0f} steps{by_steps}, {ahead}: "
            f"{seconds:,.1f} s of training against {dense_seconds:,.1f} s{by_clock}."
        )
    missed = sum(reach(pair.moe, pair.dense, 0) is None for pair in pairs)
    which = "" if len(pairs) == 1 else f" in {missed} of {len(pairs)} seeds"
    text = f"It did not reach the twin's final loss{which} within its {moe_steps:,.0f} steps and {moe_seconds:.1f} s"
    twin_steps, twin_seconds = (mean([reach(pair.dense, pair.moe, axis) for pair in pairs]) for axis in (0, 1))
    if twin_steps is None or twin_seconds is None:
        return f"{text}."
    return f"{text}; the twin reached the MoE's final loss after {twin_steps:,.0f} steps and {twin_seconds:.1f} s."


def _end(pairs: list[Pair], which: str) -> tuple[float, float]:
    """Steps and training seconds at the last evaluation, mean over seeds."""
    steps, seconds, _ = zip(*(validation_curve(getattr(pair, which)) for pair in pairs), strict=True)
    return float(np.mean([run_steps[-1] for run_steps in steps])), float(np.mean([run_s[-1] for run_s in seconds]))


def _match_sentence(pairs: list[Pair], match: str) -> str:
    moe, dense = pairs[0].moe.summary, pairs[0].dense.summary
    ratio = lambda value: f"{value(moe) / value(dense):.2f}×"
    active, total = ratio(lambda run: run.params.active), ratio(lambda run: run.params.total)
    flops, speed = ratio(lambda run: run.flops.forward), ratio(lambda run: run.tokens_per_s)
    return (
        f"The twin matches the MoE's {LABELS[match]}: the MoE has {active} its active and "
        f"{total} its total parameters, costs {flops} its FLOPs per token, "
        f"and trained on {speed} as many tokens per second."
    )
