"""Claims about the simulated studies, and by them about the verdicts: shares within what chance leaves of 95%."""

import numpy as np
import pytest
from scipy import stats

from experiments.stats import decide, simulation
from experiments.stats.simulation import EFFECTS, MARGIN, NOISES

STUDIES = 2000
LINES = simulation.simulate(STUDIES)


def _shares(what, noises=("normal", "heavy tails")):
    return {
        (line.noise, line.effect, line.seeds): line.share
        for line in LINES
        if line.what == what and line.noise in noises
    }


def test_intervals_hold_the_truth_in_95_percent_of_studies_give_or_take_two():
    shares = _shares("covered")
    assert len(shares) == 2 * len(EFFECTS) * 3
    for kind, share in shares.items():
        assert abs(share - 0.95) <= 0.02, kind


@pytest.mark.parametrize("what", ["wrong words", "any wrong word"])
def test_words_are_wrong_in_no_more_than_five_percent(what):
    most = stats.binom.ppf(0.9999, STUDIES, 0.05) / STUDIES  # of 18 shares, none by chance
    for kind, share in _shares(what).items():
        assert share <= most, kind


@pytest.mark.parametrize("what", ["all covered", "all ranks covered"])
def test_intervals_of_many_hold_together_in_95_percent_at_least(what):
    least = stats.binom.ppf(0.0001, STUDIES, 0.95) / STUDIES
    for kind, share in _shares(what).items():
        assert share >= least, kind


def test_a_large_effect_is_never_called_the_wrong_way():
    assert all(line.share == 0 for line in LINES if line.effect == "large" and "wrong" in line.what)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_has_mean_0_and_deviation_1(noise):
    drawn = simulation.draw(np.random.default_rng(0), noise, (400_000,))
    assert drawn.mean() == pytest.approx(0, abs=0.01)
    assert drawn.std() == pytest.approx(1, abs=0.03)


def test_a_word_is_wrong_where_the_truth_is_another():
    words = np.array([decide.BETTER, decide.WORSE, decide.EQUIVALENT, decide.INCONCLUSIVE])
    assert simulation.is_wrong(words, 0.0).tolist() == [True, True, False, False]
    assert simulation.is_wrong(words, -0.5).tolist() == [False, True, False, False]
    assert simulation.is_wrong(words, MARGIN).tolist() == [True, False, True, False]
    assert simulation.is_wrong(words, 3.0).tolist() == [True, False, True, False]


def test_the_first_comparison_is_judged_as_a_real_one_is():
    """`decide.judge` of each study by itself gives the same shares."""
    noise_RAn = simulation.draw(np.random.default_rng(3), "normal", (60, 4, 5))
    shares = dict(simulation._of_effect(noise_RAn, MARGIN))
    judged = [decide.judge(study[0] + MARGIN, MARGIN) for study in noise_RAn]
    assert shares["covered"].tolist() == [judgement.low <= MARGIN <= judgement.high for judgement in judged]
    wrong = [judgement.word in (decide.BETTER, decide.EQUIVALENT) for judgement in judged]
    assert shares["wrong words"].tolist() == wrong
