"""How much sooner one model has the loss that another ends with: in steps, in FLOPs, in seconds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.stats.statistics import Interval, t_interval

AXES = ("steps", "flops", "seconds")


class Curve(NamedTuple):
    """A run's evaluations in order: where each was, and the validation loss there (nats per token)."""

    steps: list[float]
    seconds: list[float]  # of training
    loss: list[float]
    flops: list[float]  # of training, forward and backward


def first_reach(x: Sequence[float], loss: Sequence[float], target: float) -> float | None:
    """Where `loss` first is at most `target`, on straight lines between the points; None if it never is."""
    for i, value in enumerate(loss):
        if value <= target:
            if i == 0:
                return x[0]
            share = (loss[i - 1] - target) / (loss[i - 1] - value)
            return x[i - 1] + share * (x[i] - x[i - 1])
    return None


def speedup(moe: Curve, dense: Curve, axis: str) -> float | None:
    """What the dense run took in all, over what the MoE took to the dense run's final loss. Where it never got there,
    what the dense run took to the MoE's final loss, over what the MoE took in all: below 1. `axis`: one of `AXES`. None
    where a loss was reached before the first step."""
    x, other_x = getattr(moe, axis), getattr(dense, axis)
    reached = first_reach(x, moe.loss, dense.loss[-1])
    if reached is not None:
        return other_x[-1] / reached if reached > 0 else None
    behind = first_reach(other_x, dense.loss, moe.loss[-1])
    return behind / x[-1] if behind and x[-1] > 0 else None


def mean_speedup(ratios: Sequence[float | None]) -> Interval | None:
    """The geometric mean of a speedup over seeds, and Student's interval on its logarithm; without bounds for a single
    seed, None where one is not known."""
    known = [ratio for ratio in ratios if ratio]
    if not known or len(known) < len(ratios):
        return None
    interval = t_interval(np.log(known))
    if not math.isfinite(interval.low):
        return Interval(math.exp(interval.mean), 0.0, math.inf)
    with np.errstate(over="ignore"):
        return Interval(*(float(np.exp(bound)) for bound in interval))
