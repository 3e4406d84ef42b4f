"""Claims about experiments/stats/statistics.py."""

import math

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import ttest_rel

from experiments.stats.statistics import block_bootstrap, t_interval


def test_the_interval_over_seeds_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    for n in (2, 3, 10):
        moe, dense = rng.normal(3, 0.1, n), rng.normal(3.1, 0.1, n)
        expected = ttest_rel(moe, dense).confidence_interval(0.95)
        assert t_interval(moe - dense) == pytest.approx((np.mean(moe - dense), expected.low, expected.high))


def test_the_bootstrap_equals_a_loop_over_every_resample():
    values = np.random.default_rng(0).normal(size=9).tolist()  # blocks of 3, 3 of them: 9^3 equally likely resamples
    blocks = [[values[(start + i) % 9] for i in range(3)] for start in range(9)]
    means = [np.mean(a + b + c) for a in blocks for b in blocks for c in blocks]
    mean = np.mean(values)
    widen = 4.302653 / 1.959964 * math.sqrt(3 / 2)  # t with 2 degrees of freedom over the normal
    low, high = (mean + widen * (bound - mean) for bound in np.quantile(means, [0.025, 0.975]))
    assert block_bootstrap(values, resamples=200_000) == pytest.approx((mean, low, high), abs=0.02)


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_the_bootstrap_covers_the_mean_of_dependent_windows(memory):
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        values = lfilter([1.0], [1.0, -memory], rng.normal(size=356))[100:]
        _, low, high = block_bootstrap(values, resamples=400, seed=trial)
        hits += low <= 0 <= high
    assert 0.91 <= hits / 300 <= 0.985


def test_resampling_single_windows_would_not_cover():
    """The reason for blocks: without them the same interval of dependent windows is far too narrow."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        values = lfilter([1.0], [1.0, -0.5], rng.normal(size=356))[100:]
        means = rng.choice(values, (400, 256)).mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        hits += low <= 0 <= high
    assert hits / 300 < 0.85


def test_the_bootstrap_gives_the_same_interval_every_time():
    values = np.random.default_rng(0).normal(size=64)
    assert block_bootstrap(values) == block_bootstrap(values)


def test_one_value_gives_no_interval():
    for interval in (t_interval([0.1]), block_bootstrap([0.1])):
        assert interval == (pytest.approx(0.1), -math.inf, math.inf)
