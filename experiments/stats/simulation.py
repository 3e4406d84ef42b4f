"""Whether verdicts hold: studies of known truth, simulated by the thousand and judged like real ones.

A study draws n paired differences round a true one, with noise of deviation 1: normal, with heavy tails (Student's t
of 4 degrees of freedom), or skewed (gamma of shape 4, whose skewness is 1). Word, interval and rank come from the
functions that judge real runs.

Letters: A comparisons or models · n seeds · R studies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from experiments.stats import arms, decide
from experiments.stats.statistics import CONFIDENCE

NOISES = ("normal", "heavy tails", "skewed")
MARGIN = 1.0  # in deviations of the noise
# True differences, in the same: none; what a margin just lets pass; plain for five seeds.
EFFECTS = {"none": 0.0, "at the margin": MARGIN, "large": 3.0}
MANY = 10  # comparisons, or models, of a study of many
CHECKED = {  # what a line says: the share of studies in which this holds
    "covered": "the 95% interval holds the true difference",
    "wrong words": "the word is one that the truth is not",
    "all covered": f"all intervals of {MANY} comparisons hold the true difference",
    "any wrong word": f"any of {MANY} words is one that the truth is not",
    "all ranks covered": f"all ranks of {MANY} models lie within their intervals",
}


@dataclass(frozen=True)
class Line:
    """A share of simulated studies."""

    noise: str
    effect: str
    seeds: int
    what: str  # of `CHECKED`
    share: float
    studies: int


def simulate(studies: int, seeds: Sequence[int] = (3, 5, 10), seed: int = 0) -> list[Line]:
    """Every share for all noises, effects and numbers of seeds."""
    generator = np.random.default_rng(seed)
    lines = []
    for noise in NOISES:
        for n in seeds:
            for effect, truth in EFFECTS.items():
                for what, held_R in _of_effect(draw(generator, noise, (studies, MANY, n)), truth):
                    lines.append(Line(noise, effect, n, what, float(held_R.mean()), studies))
            held_R = _of_ranks(draw(generator, noise, (studies, MANY, n)))
            lines.append(Line(noise, "a few better", n, "all ranks covered", float(held_R.mean()), studies))
    return lines


def draw(generator: np.random.Generator, noise: str, shape: tuple[int, ...]) -> np.ndarray:
    """Independent noise of mean 0 and deviation 1."""
    match noise:
        case "normal":
            return generator.standard_normal(shape)
        case "heavy tails":
            return generator.standard_t(4, shape) / np.sqrt(2.0)
        case "skewed":
            return generator.gamma(4.0, 0.5, shape) - 2.0
    raise ValueError(f"noise={noise!r} is not one of {', '.join(NOISES)}")


def _of_effect(noise_RAn: np.ndarray, truth: float) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """(name, (R,) bool) of one comparison alone, the first, and of all A together."""
    n_studies, n_arms, n = noise_RAn.shape
    differences_RAn = noise_RAn + truth
    tests = decide.paired_tests(differences_RAn.reshape(-1, n), MARGIN)
    mean_RA, deviation_RA, p_RA, p_equivalent_RA = (column.reshape(n_studies, n_arms) for column in tests)

    # Alone.
    off_RA = np.abs(mean_RA - truth) * np.sqrt(n) / deviation_RA
    yield "covered", np.asarray(off_RA[:, 0] <= scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    yield "wrong words", is_wrong(decide.words(mean_RA, p_RA, p_equivalent_RA)[:, 0], truth)

    # Together.
    yield "all covered", np.all(off_RA <= arms.critical_t(n_arms, n), axis=1)
    words_RA = decide.words(mean_RA, arms.holm(p_RA), arms.holm(p_equivalent_RA))
    yield "any wrong word", np.any(is_wrong(words_RA, truth), axis=1)


def is_wrong(words: np.ndarray, truth: float) -> NDArray[np.bool_]:
    """Which words the truth is not: `better` of what is not below 0, `worse` of what is not above, `equivalent` of what
    is not within the margin. `inconclusive` never is."""
    wrong: NDArray[np.bool_] = (words == decide.BETTER) & (truth >= 0) | (words == decide.WORSE) & (truth <= 0)
    return wrong | (words == decide.EQUIVALENT) & (abs(truth) >= MARGIN)


def _of_ranks(noise_RAn: np.ndarray) -> np.ndarray:
    """(R,) bool: whether every model's true rank lies in its interval, where three models are better than the rest."""
    n_arms = noise_RAn.shape[1]
    truth_A = np.where(np.arange(n_arms) < 3, np.arange(n_arms) - 6.0, 0.0)  # -6, -5, -4, and 0 for all others
    low_RA, high_RA = arms.ranks(noise_RAn + truth_A[:, None])
    better_A = (truth_A[None] < truth_A[:, None]).sum(1)
    worse_A = (truth_A[None] > truth_A[:, None]).sum(1)
    return ((low_RA <= 1 + better_A) & (high_RA >= n_arms - worse_A)).all(1)
