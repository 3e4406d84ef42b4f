"""Means and their intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy

CONFIDENCE = 0.95


RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean and its 95% interval; infinite bounds where there are too few values for one."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of independent values and Student's t interval for it."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half)


def block_bootstrap(values: Sequence[float] | np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of neighbouring, hence dependent, values and a bootstrap interval for it.

    Resamples blocks of √n consecutive values, the last followed by the first (circular block bootstrap, Politis and
    Romano 1992), and takes percentiles. With few blocks these are too narrow, by what separates the normal from
    Student's t with that many values; they are widened by it (Hesterberg, arXiv:1411.5279, expanded percentiles)."""
    n, mean = len(values), float(np.mean(values))
    block = max(1, round(math.sqrt(n)))
    n_blocks = math.ceil(n / block)
    if n_blocks < 2:
        return Interval(mean, -math.inf, math.inf)
    cumulative = np.cumsum(np.concatenate([[0.0], values, values[: block - 1]]))
    block_mean = (cumulative[block:] - cumulative[:-block]) / block  # (n,): of the block that starts at each value
    starts = np.random.default_rng(seed).integers(0, n, (resamples, n_blocks))
    deviation = block_mean[starts].mean(1) - mean
    tail = (1 + CONFIDENCE) / 2
    widen = scipy.stats.t.ppf(tail, n_blocks - 1) / scipy.stats.norm.ppf(tail) * math.sqrt(n_blocks / (n_blocks - 1))
    low, high = np.quantile(deviation, [1 - tail, tail]) * widen
    return Interval(mean, mean + float(low), mean + float(high))


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None if any value is missing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
