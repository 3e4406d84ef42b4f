"""What a comparison says, in words: first the verdict, then what it rests on, the clock, and what was held equal."""

import math

import numpy as np

from experiments.stats import decide
from experiments.stats.speedup import mean_speedup
from experiments.stats.statistics import mean
from experiments.stats.verdict import (
    LABELS,
    LEAK,
    SPELT,
    Pair,
    judge_bits,
    judge_loss,
    loss_difference,
    reach,
    scientific,
    signed,
    sources,
    speedups,
    times,
    validation_curve,
)


def sentences(pairs: list[Pair], match: str, margin: float | None = None) -> list[str]:
    """The result in words: first that there is no verdict if the router leaks, then the verdict on the loss, over
    several seeds what it rests on, the clock, and what the twin has in common. `margin`: the difference declared to be
    none, in nats per token."""
    if len(pairs) > 1:
        verdict = [_verdict_sentence(pairs, margin), _seeds_sentence(pairs, margin)]
    else:
        verdict = [_no_verdict(pairs)]
    return [*_leak_sentence(pairs), *verdict, _clock_sentence(pairs), _match_sentence(pairs, match)]


def _verdict_sentence(pairs: list[Pair], margin: float | None) -> str:
    judged, bits = judge_loss(pairs, margin), judge_bits(pairs).interval
    mean, low, high = judged.interval
    after = f"after {pairs[0].moe.summary.steps:,} steps"
    loss = np.mean([pair.moe.summary.val.loss for pair in pairs])
    what = f"validation loss, {loss:.3f} nats per token on average,"
    in_bits = f"in bits per byte {signed(bits.mean)} ({signed(bits.low)} to {signed(bits.high)})"
    # Decided: by how much, without signs.
    if judged.word in (decide.BETTER, decide.WORSE):
        within = f", though within the margin of {margin:g}," if judged.equivalent else ""
        direction = "lower" if mean < 0 else "higher"
        least, most = sorted((abs(low), abs(high)))
        return (
            f"The MoE is {judged.word} than its dense twin{within} {after}: its {what} is {abs(mean):.3f} "
            f"{direction} (95% interval {least:.3f} to {most:.3f} over {len(pairs)} seeds), {in_bits}."
        )
    # Not, or equal for all that matters.
    said = f"The MoE and its dense twin are equivalent within {margin} nats per token {after}"
    if judged.word == decide.INCONCLUSIVE:
        said = f"Inconclusive {after}"
    return (
        f"{said}: the MoE's {what} differs from its dense twin's by {signed(mean)} (95% interval "
        f"{signed(low)} to {signed(high)} over {len(pairs)} seeds), {in_bits}."
    )


def _seeds_sentence(pairs: list[Pair], margin: float | None) -> str:
    """What the seeds could have shown, how many would decide, and what differs between them."""
    judged, covered = judge_loss(pairs, margin), sources(pairs)
    n = f"{len(pairs)} seeds"
    said = (
        f"The differences of {n} have a standard deviation of {judged.deviation:.3f}, with which {n} show a difference "
        f"of {judged.detectable:.3f} or more with 80% power."
    )
    if margin is not None and (judged.equivalent or judged.word == decide.INCONCLUSIVE):
        ruled = "A larger one is ruled out" if judged.equivalent else "A larger one is not ruled out"
        said += (
            f" The margin of {margin:g} nats per token was declared before training. {ruled} by two one-sided tests "
            f"(p = {judged.p_equivalent:.2g})."
        )
    if judged.word == decide.INCONCLUSIVE:
        many = judged.seeds_needed
        number = f"{many:,} seeds in all" if many else f"not even {decide.MOST_SEEDS:,} seeds"
        said += f" If this difference and deviation are the true ones, {number} would decide with 80% power."
    fixed = [name for name in ("initial weights", "data order") if name not in covered]
    tail = f", not of {fixed[0]}, the same for all" if len(fixed) == 1 else ""
    return f"{said} The interval is of the choice of {' and '.join(covered) or 'noise in training alone'}{tail}."


def _no_verdict(pairs: list[Pair]) -> str:
    """What a single seed says."""
    (pair,) = pairs
    summary, difference = pair.moe.summary, loss_difference(pairs)
    said = (
        f"One seed gives no verdict: after {summary.steps:,} steps the MoE's validation loss, {summary.val.loss:.3f} "
        f"nats per token, differs from its dense twin's by {signed(difference.mean)}"
    )
    in_bits = f"in bits per byte {signed(summary.val.bpb - pair.dense.summary.val.bpb)}"
    if not math.isfinite(difference.low):
        return f"{said}, {in_bits}; there is no interval from one window of validation text."
    return (
        f"{said} (95% interval {signed(difference.low)} to {signed(difference.high)} over {len(summary.val_windows)} "
        f"windows of validation text), {in_bits}. That interval is of how well the text tells these two models apart, "
        "not of what other seeds would give."
    )


def _leak_sentence(pairs: list[Pair]) -> list[str]:
    leak = max(pair.moe.leak or 0 for pair in pairs)
    if leak <= LEAK:
        return []
    return [
        f"No verdict: the router sees later tokens (changing them alone moves a logit by {scientific(leak)}): the "
        "MoE's validation loss is not comparable with that of a model that predicts."
    ]


def _clock_sentence(pairs: list[Pair]) -> str:
    """When the MoE had its twin's final loss, and the speedups that follow."""
    steps, seconds = (mean([reach(pair.moe, pair.dense, axis) for pair in pairs]) for axis in (0, 1))
    moe_steps, moe_seconds = _end(pairs, "moe")
    dense_steps, dense_seconds = _end(pairs, "dense")
    if steps is not None and seconds is not None:
        ahead = "and was ahead by the clock too" if seconds < dense_seconds else "but was behind by the clock"
        return (
            f"It reached the twin's final loss after {steps:,.0f} of {dense_steps:,.0f} steps, {ahead}: "
            f"{seconds:,.1f} s of training against {dense_seconds:,.1f} s.{_speedup_sentence(pairs)}"
        )
    missed = sum(reach(pair.moe, pair.dense, 0) is None for pair in pairs)
    which = "" if len(pairs) == 1 else f" in {missed} of {len(pairs)} seeds"
    text = f"It did not reach the twin's final loss{which} within its {moe_steps:,.0f} steps and {moe_seconds:.1f} s"
    twin_steps, twin_seconds = (mean([reach(pair.dense, pair.moe, axis) for pair in pairs]) for axis in (0, 1))
    if twin_steps is not None and twin_seconds is not None:
        text += f"; the twin reached the MoE's final loss after {twin_steps:,.0f} steps and {twin_seconds:.1f} s"
    return f"{text}.{_speedup_sentence(pairs)}"


def _speedup_sentence(pairs: list[Pair]) -> str:
    """The effective speedup in steps, FLOPs and seconds; nothing where a loss was there before the first step."""
    intervals = {axis: mean_speedup(ratios) for axis, ratios in speedups(pairs).items()}
    if None in intervals.values():
        return ""
    said = ", ".join(f"{times(interval)} in {SPELT[axis]}" for axis, interval in intervals.items())
    scope = f" (95% intervals over {len(pairs)} seeds)" if len(pairs) > 1 else ""
    return f" Effective speedup: {said}{scope}."


def _end(pairs: list[Pair], which: str) -> tuple[float, float]:
    """Steps and training seconds at the last evaluation, mean over seeds."""
    curves = [validation_curve(getattr(pair, which)) for pair in pairs]
    return float(np.mean([curve.steps[-1] for curve in curves])), float(
        np.mean([curve.seconds[-1] for curve in curves])
    )


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
