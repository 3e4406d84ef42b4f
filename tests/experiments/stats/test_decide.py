"""Claims about experiments/stats/decide.py, held against statsmodels and against simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from experiments.stats.decide import (
    detectable_ratio,
    judge,
    paired_tests,
    power,
    power_of_equivalence,
    seeds_needed,
    words,
)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
def test_the_smallest_effect_is_what_statsmodels_finds_with_80_percent_power(n):
    expected = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
    assert detectable_ratio(n) == pytest.approx(expected, rel=1e-4)
    differences = np.random.default_rng(n).normal(0, 0.02, n)
    result = judge(differences)
    assert result.deviation == pytest.approx(np.std(differences, ddof=1))
    assert result.detectable == pytest.approx(expected * result.deviation, rel=1e-4)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_equivalence_is_statsmodels_two_one_sided_tests(n):
    rng = np.random.default_rng(n)
    for margin in (0.005, 0.02, 0.3):
        moe, dense = rng.normal(3, 0.01, n), rng.normal(3.002, 0.01, n)
        expected, *_ = ttost_paired(moe, dense, -margin, margin)
        result = judge(moe - dense, margin)
        assert result.p_equivalent == pytest.approx(expected, rel=1e-9)
        assert result.equivalent == (expected < 0.05)
        # The same in other words: the 90% interval lies within the margin.
        low, high = stats.ttest_rel(moe, dense).confidence_interval(0.9)
        assert result.equivalent == (-margin < low and high < margin)


def test_p_and_interval_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    moe, dense = rng.normal(3, 0.1, 5), rng.normal(3.1, 0.1, 5)
    expected = stats.ttest_rel(moe, dense)
    result = judge(moe - dense)
    assert result.p == pytest.approx(expected.pvalue)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert judge(moe - dense, confidence=0.8).low == pytest.approx(expected.confidence_interval(0.8).low)


@pytest.mark.parametrize(
    ("differences", "margin", "said"),
    [
        ([-0.07, -0.08, -0.09], None, "better"),
        ([0.07, 0.08, 0.09], 0.01, "worse"),
        ([-0.004, -0.005, -0.006], 0.01, "better, though within the margin"),
        ([-0.001, 0.0, 0.001], 0.01, "equivalent"),
        ([-0.001, 0.0, 0.001], None, "inconclusive"),
        ([-0.1, 0.0, 0.1], 0.01, "inconclusive"),
        ([-0.5], None, "single"),
        ([-0.5], 0.01, "single"),
    ],
)
def test_the_word_follows_from_the_interval_and_the_margin(differences, margin, said):
    result = judge(differences, margin)
    assert result.said() == said
    if result.word in ("better", "worse"):
        assert not result.low <= 0 <= result.high
    assert (result.low is None) == (result.deviation is None) == (result.detectable is None) == (said == "single")


@pytest.mark.parametrize(
    ("differences", "margin", "word"), [([0.0] * 3, 0.01, "equivalent"), ([-0.25] * 3, 0.01, "better")]
)
def test_seeds_that_agree_to_the_last_bit_are_judged_too(differences, margin, word):
    result = judge(differences, margin)
    assert (result.word, result.deviation, result.seeds_needed) == (word, 0.0, None)
    assert judge([0.0, 0.0]).word == "inconclusive"


def test_the_seeds_that_would_decide_are_the_fewest_with_the_power_of_statsmodels():
    expected = TTestPower().solve_power(effect_size=0.4, alpha=0.05, power=0.8)
    assert seeds_needed(-0.004, 0.01) == math.ceil(expected)
    result = judge([-0.1, 0.05, -0.02, -0.06])
    assert result.word == "inconclusive"
    ratio = abs(result.mean) / result.deviation
    assert power(ratio, result.seeds_needed) >= 0.8 > power(ratio, result.seeds_needed - 1)


def test_a_margin_can_need_fewer_seeds_than_a_difference():
    assert seeds_needed(0.0, 0.01) is None  # no number of seeds shows a difference that is none
    few = seeds_needed(0.0, 0.01, margin=0.01)
    assert power_of_equivalence(0.0, 0.01, 0.01, few) >= 0.8 > power_of_equivalence(0.0, 0.01, 0.01, few - 1)
    assert seeds_needed(0.001, 0.01, margin=0.01) < seeds_needed(0.001, 0.01, margin=None)
    assert seeds_needed(0.02, 0.01, margin=0.01) == seeds_needed(0.02, 0.01)  # beyond the margin it cannot be within


@pytest.mark.parametrize(("mean", "n"), [(0.0, 10), (0.004, 12), (-0.004, 30)])
def test_as_many_simulated_studies_find_equivalence_as_its_power_says(mean, n):
    studies = np.random.default_rng(n).normal(mean, 0.01, (4000, n))
    tests = paired_tests(studies, margin=0.01)
    hits = int((tests.p_equivalent < 0.05).sum())
    low, high = stats.binom.interval(0.999, 4000, power_of_equivalence(mean, 0.01, 0.01, n))
    assert low - 40 <= hits <= high + 40  # Phillips' approximation is good to a percent


@pytest.mark.parametrize("n", [3, 8])
def test_as_many_simulated_studies_find_the_smallest_effect_as_it_says(n):
    studies = np.random.default_rng(n).normal(-detectable_ratio(n), 1, (4000, n))
    tests = paired_tests(studies)
    found = words(tests.mean, tests.p, tests.p_equivalent)
    low, high = stats.binom.interval(0.999, 4000, 0.8)
    assert low <= (found == "better").sum() <= high


@pytest.mark.parametrize(
    ("differences", "margin"),
    [([], None), ([0.1, math.nan], None), ([0.1, 0.2], 0.0), ([0.1, 0.2], -0.01), ([0.1], math.inf)],
)
def test_what_cannot_be_judged_is_refused(differences, margin):
    with pytest.raises(ValueError, match=r"differences=|margin="):
        judge(differences, margin)
