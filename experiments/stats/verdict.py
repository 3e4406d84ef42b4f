"""Which of two models is better, by how much, and how sure that is: numbers from finished runs.

Nothing here reads a file or trains; `sentences` has the words. A `Pair` is a Mixture-of-Experts run and its dense
twin's with the same seed, so every difference is paired: same initial weights where they have them in common, same
batches, same validation windows.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from experiments.stats.decide import Judgement, judge
from experiments.stats.speedup import AXES, Curve, first_reach, mean_speedup, speedup
from experiments.stats.statistics import Interval, block_bootstrap, mean, t_interval
from moe.errors import BadInput
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


def check_comparable(runs: Iterable[Run]) -> None:
    """Refuse runs whose losses are not of the same text, in the same tokens, on the same validation windows. Raises
    `BadInput`."""
    first: Run | None = None
    for run in runs:
        first = first or run
        for what, mine, others in (
            ("text", run.summary.dataset, first.summary.dataset),
            ("tokenizer", run.summary.tokenizer, first.summary.tokenizer),
            ("number of validation windows", len(run.summary.val_windows), len(first.summary.val_windows)),
            ("validation tokens of each domain", _domain_tokens(run), _domain_tokens(first)),
        ):
            if mine != others:
                raise BadInput(
                    f"{first.folder} and {run.folder} do not have the same {what} ({others} and {mine}): their losses "
                    "cannot be compared; train both with the same data, tokenizer and train.eval_tokens, in another "
                    "run=..."
                )


def _domain_tokens(run: Run) -> dict[str, int]:
    return {name: score.tokens for name, score in run.summary.val.domains.items()}


def text_of(run: Run) -> str:
    """What two runs have in common whose losses can be compared."""
    return f"{run.summary.dataset} {run.summary.tokenizer} {len(run.summary.val_windows)}"


def validation_curve(run: Run) -> Curve:
    """The validation loss at each evaluation, in order. One that was not finite is left out, but for the last."""
    end = run.summary
    points = [
        (float(line.step), line.seconds, line.val.loss)
        for line in run.metrics
        if line.val and line.step < end.steps and math.isfinite(line.val.loss)
    ]
    points.append((float(end.steps), end.seconds, end.val.loss))
    steps, seconds, loss = (list(column) for column in zip(*points, strict=True))
    per_step = end.tokens / end.steps * end.flops.training
    return Curve(steps, seconds, loss, [step * per_step for step in steps])


def loss_difference(pairs: list[Pair]) -> Interval:
    """Final validation loss of the MoE minus its twin's. Over seeds where there are several, else over validation
    windows."""
    if len(pairs) > 1:
        return t_interval([moe.summary.val.loss - dense.summary.val.loss for moe, dense in pairs])
    (moe, dense) = pairs[0]
    return block_bootstrap(np.subtract(moe.summary.val_windows, dense.summary.val_windows))


def judge_loss(pairs: list[Pair], margin: float | None = None) -> Judgement:
    """The verdict over seeds: of the validation loss, in nats per token, as the margin is."""
    return judge([moe.summary.val.loss - dense.summary.val.loss for moe, dense in pairs], margin)


def judge_bits(pairs: list[Pair]) -> Judgement:
    """The same in bits per byte."""
    return judge([moe.summary.val.bpb - dense.summary.val.bpb for moe, dense in pairs])


def speedups(pairs: list[Pair]) -> dict[str, list[float | None]]:
    """For each of `AXES`, how much sooner the MoE had its twin's final loss, a ratio per seed."""
    curves = [(validation_curve(moe), validation_curve(dense)) for moe, dense in pairs]
    return {axis: [speedup(moe, dense, axis) for moe, dense in curves] for axis in AXES}


def sources(pairs: list[Pair]) -> list[str]:
    """What is drawn anew for every pair, and so is covered by an interval over them."""
    summaries = [pair.moe.summary for pair in pairs]
    of = lambda summary, drawn_by: (
        summary.seed if drawn_by is None else drawn_by
    )  # results of earlier versions have one seed
    drawn = {
        "initial weights": {of(summary, summary.seed_init) for summary in summaries},
        "data order": {of(summary, summary.seed_data) for summary in summaries},
    }
    return [name for name, seeds in drawn.items() if len(seeds) > 1]


@dataclass(frozen=True)
class Row:
    """A line of the table: a value per seed for the MoE and for its twin, None where a loss was never reached.

    `relation` is how the two compare: their "difference", with `interval` where one is known, or their "ratio"; or
    "none", and then the largest value over the seeds stands for each; or "alone": the twin has nothing of the kind; or
    what the values say is of the two: a "speedup" with its interval, or a "spread" of their difference."""

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
    if len(pairs) > 1:
        of_seeds = judge_loss(pairs)
        rows.append(Row("Deviation of the difference of losses", 3, [of_seeds.deviation], [], "spread"))
        rows.append(Row(f"Smallest difference {len(pairs)} seeds show", 3, [of_seeds.detectable], [], "spread"))
    for domain in pairs[0].moe.summary.val.domains:
        rows += score(f"{domain}:", domain)

    # Then what it took, what routing did, and what was held equal.
    leaks = [pair.moe.leak for pair in pairs], [pair.dense.leak for pair in pairs]
    return [
        *rows,
        to_twin("Steps to the twin's final loss", 0, 0),
        to_twin("Seconds to the twin's final loss", 1, 1),
        *(
            Row(f"Effective speedup in {SPELT[axis]}", 2, ratios, [], "speedup", mean_speedup(ratios))
            for axis, ratios in speedups(pairs).items()
        ),
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


def judgement(pairs: list[Pair], margin: float | None = None) -> Judgement | None:
    """`judge_loss`, None where the MoE's loss is not one that can be compared."""
    leak = max(pair.moe.leak or 0.0 for pair in pairs)
    return judge_loss(pairs, margin) if leak <= LEAK else None


def reach(run: Run, other: Run, axis: int) -> float | None:
    """Steps (axis 0) or training seconds (axis 1) `run` took to the final validation loss of `other`."""
    curve = validation_curve(run)
    return first_reach(curve[axis], curve[2], other.summary.val.loss)


SPELT = {"steps": "steps", "flops": "FLOPs", "seconds": "seconds"}
HEADINGS = ("", "MoE", "dense twin", "MoE against twin")  # of the cells of a row


def cells(row: Row) -> tuple[str, str, str, str]:
    """What the table says of a row: label, MoE, twin, and their difference or ratio. Over several seeds a
    value is a mean ± half its 95% interval."""
    if row.relation == "alone":
        return row.label, _cell(row.moe, row.digits), "", ""
    if row.relation == "spread":
        return row.label, "", "", f"{row.moe[0]:.{row.digits}f}"
    if row.relation == "speedup":
        return row.label, "", "", times(row.interval)
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


def times(interval: Interval | None) -> str:
    """A ratio with its interval, as far as they are known."""
    if interval is None:
        return "–"
    bounds = (
        f" ({interval.low:.2f}× to {interval.high:.2f}×)" if interval.low > 0 and math.isfinite(interval.high) else ""
    )
    return f"{interval.mean:.2f}×{bounds}"


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
    # of the validation loss over seeds, in nats per token; None where a router sees later tokens
    judgement: Judgement | None = None
    bits: Judgement | None = None  # the same in bits per byte
    speedup: dict[str, Interval | None] = field(default_factory=dict)  # in steps, flops and seconds, over seeds
    sources: list[str] = field(default_factory=list)  # what differs from seed to seed
    text: str = ""  # what comparisons have in common whose losses can be compared
