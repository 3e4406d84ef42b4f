"""Claims about experiments/stats/arms.py, held against statsmodels and against simulated studies of known truth."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from experiments.stats.arms import critical_t, holm, judge_arms, max_t, rank_intervals, ranks
from experiments.stats.decide import judge
from experiments.stats.statistics import t_interval
from moe.errors import BadInput


@pytest.mark.parametrize("n_arms", [1, 2, 7, 28])
def test_holms_correction_is_that_of_statsmodels(n_arms):
    p_values = np.random.default_rng(n_arms).uniform(0, 1, (3, n_arms)) ** 3
    p_values[0, -1] = p_values[0, 0]  # a tie
    for row, adjusted in zip(p_values, holm(p_values), strict=True):
        assert adjusted == pytest.approx(multipletests(row, method="holm")[1])
        assert holm(list(row)) == pytest.approx(adjusted)


def test_the_interval_of_a_single_arm_is_students():
    differences = np.random.default_rng(0).normal(size=5)
    assert max_t(differences) == [pytest.approx(t_interval(differences))]


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_of_several_arms_hold_together_and_single_ones_do_not(n):
    """Of arms that share a baseline, whose true differences are all 0."""
    scores_RAn = np.random.default_rng(n).normal(size=(2000, 9, n))
    differences_RAn = scores_RAn[:, 1:] - scores_RAn[:, :1]
    half_RA = differences_RAn.std(-1, ddof=1) / np.sqrt(n)
    miss_RA = np.abs(differences_RAn.mean(-1)) / half_RA
    together = (miss_RA <= critical_t(8, n)).all(-1).mean()
    assert 0.93 <= together <= 0.97
    assert (miss_RA <= stats.t.ppf(0.975, n - 1)).all(-1).mean() < 0.85
    for difference_An in differences_RAn[:20]:
        held = all(low <= 0 <= high for _, low, high in max_t(difference_An))
        t_A = np.abs(difference_An.mean(-1)) / difference_An.std(-1, ddof=1) * np.sqrt(n)
        assert held == (t_A <= critical_t(8, n)).all()


def test_a_deviation_shared_by_all_arms_would_call_a_noisy_one_different():
    """The reason for a deviation of each: beside seven quiet arms an eighth is ten times as noisy, and none differs."""
    n, noise_A = 5, np.array([1.0] * 8 + [10.0])
    scores_RAn = np.random.default_rng(0).normal(size=(2000, 9, n)) * noise_A[:, None]
    differences_RAn = scores_RAn[:, 1:] - scores_RAn[:, :1]
    mean_RA, deviation_RA = np.abs(differences_RAn.mean(-1)), differences_RAn.std(-1, ddof=1)
    own = (mean_RA <= critical_t(8, n) * deviation_RA / np.sqrt(n)).all(-1).mean()
    shared_R = np.sqrt((deviation_RA**2).mean(-1))
    shared = (mean_RA <= critical_t(8, 8 * (n - 1) + 1) * shared_R[:, None] / np.sqrt(n)).all(-1).mean()
    assert own >= 0.94
    assert shared < 0.85


def test_a_rank_counts_the_models_that_are_significantly_better_and_worse():
    """Against every pair's interval, one by one."""
    rng = np.random.default_rng(1)
    scores_An = np.array([0.0, 0.0, 1.0, 1.0, 5.0])[:, None] + rng.normal(0, 0.05, (5, 6)) + rng.normal(0, 3, 6)
    found = rank_intervals(scores_An)
    for arm in range(5):
        pairs = [scores_An[arm] - scores_An[other] for other in range(5) if other != arm]
        low, high = zip(
            *(stats.ttest_1samp(pair, 0).confidence_interval(0.95 ** (1 / 10)) for pair in pairs), strict=True
        )
        assert found[arm] == (1 + sum(bound > 0 for bound in low), 5 - sum(bound < 0 for bound in high))
    assert found == [(1, 2), (1, 2), (3, 4), (3, 4), (5, 5)]  # whatever the seeds have in common


@pytest.mark.parametrize("n", [3, 10])
def test_rank_intervals_hold_every_true_rank_in_95_percent_of_studies(n):
    true_A = np.array([0.0, 1.0, 2.0, 10.0])
    scores_RAn = true_A[:, None] + np.random.default_rng(n).normal(size=(2000, 4, n))
    low_RA, high_RA = ranks(scores_RAn)
    rank_A = np.arange(1, 5)
    held = ((low_RA <= rank_A) & (rank_A <= high_RA)).all(-1).mean()
    assert held >= 0.93
    bare_RA = scores_RAn.mean(-1).argsort(-1).argsort(-1) + 1
    assert (bare_RA == rank_A).all(-1).mean() < held - 0.02  # the reason for intervals in place of a bare order


def test_equal_models_may_have_any_rank_and_one_alone_has_the_first():
    assert rank_intervals(np.random.default_rng(1).normal(size=(4, 3))) == [(1, 4)] * 4
    assert rank_intervals(np.zeros((2, 3))) == [(1, 2)] * 2
    assert rank_intervals(np.ones((1, 3))) == [(1, 1)]


@pytest.mark.parametrize("function", [max_t, rank_intervals])
def test_one_seed_gives_neither_intervals_nor_ranks(function):
    with pytest.raises(BadInput, match=r"one seed gives no (interval|rank); name two or more"):
        function(np.ones((3, 1)))


def test_one_arm_is_judged_as_if_it_were_alone():
    differences = [-0.1, 0.05, -0.02, -0.06]
    (found,) = judge_arms([differences], margin=0.02)
    alone = judge(differences, 0.02)
    assert (found.word, found.seeds_needed) == (alone.word, alone.seeds_needed)
    assert found.interval == pytest.approx(alone.interval)
    assert (found.p, found.p_equivalent, found.detectable) == pytest.approx(
        (alone.p, alone.p_equivalent, alone.detectable)
    )
    assert judge_arms([]) == []


def test_words_of_several_arms_follow_from_statsmodels_corrected_p_values():
    rng = np.random.default_rng(4)
    differences = [rng.normal(mean, 0.01, n) for mean, n in ((-0.05, 5), (0.0, 5), (0.02, 4), (0.03, 5), (0.001, 9))]
    margin = 0.015
    found = judge_arms(differences, margin)
    p = multipletests([stats.ttest_1samp(values, 0).pvalue for values in differences], method="holm")[1]
    one_sided = [
        max(
            stats.ttest_1samp(values, -margin, alternative="greater").pvalue,
            stats.ttest_1samp(values, margin, alternative="less").pvalue,
        )
        for values in differences
    ]
    p_equivalent = multipletests(one_sided, method="holm")[1]
    assert [judgement.p for judgement in found] == pytest.approx(p)
    assert [judgement.p_equivalent for judgement in found] == pytest.approx(p_equivalent)
    for judgement, p_value, near in zip(found, p, p_equivalent, strict=True):
        decided = "better" if judgement.mean < 0 else "worse"
        undecided = "equivalent" if near < 0.05 else "inconclusive"
        assert judgement.word == (decided if p_value < 0.05 else undecided)
    assert {judgement.word for judgement in found} >= {"better", "worse", "equivalent"}
    # More comparisons, larger effects that can be shown and more seeds that would decide.
    alone = judge(differences[1])
    assert found[1].detectable > alone.detectable
    assert found[1].low < alone.low
