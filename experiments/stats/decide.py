"""Is one of two models better? The verdict from paired differences over seeds, and what these seeds could have shown.

A difference is a loss minus another's with the same seed: below 0 is better. Four words: `better` and `worse` where the
95% interval leaves out 0; `equivalent` where it does not, but lies so near to 0 that a margin declared beforehand holds
the 90% interval (two one-sided tests, Schuirmann 1987); `inconclusive` otherwise. One seed gives none: `single`.

Letters: A comparisons · n seeds.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy

from experiments.stats.statistics import CONFIDENCE, Interval

POWER = 0.8  # the share of studies that would show an effect which is called detectable
MOST_SEEDS = 1000  # beyond these, no number of seeds is named

BETTER, WORSE, EQUIVALENT, INCONCLUSIVE, SINGLE = "better", "worse", "equivalent", "inconclusive", "single"


class Tests(NamedTuple):
    """What is computed of A comparisons at once, (A,) each."""

    mean: np.ndarray
    deviation: np.ndarray  # standard, of the paired differences
    p: np.ndarray  # two-sided, of no difference
    p_equivalent: np.ndarray  # of a difference of the margin or more; 1 without a margin


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it rests on; None is what one seed, or a study without a margin, does not give."""

    word: str  # better | worse | equivalent | inconclusive | single
    n: int  # seeds
    mean: float
    low: float | None  # 95% interval over seeds
    high: float | None
    deviation: float | None  # standard, of the paired differences
    detectable: float | None  # smallest difference that this many seeds show in 80% of studies
    p: float | None
    margin: float | None = None
    equivalent: bool | None = None  # within the margin, whatever the word is
    p_equivalent: float | None = None
    seeds_needed: int | None = (
        None  # in all, where the word is inconclusive: at this mean and deviation, with 80% power
    )

    @property
    def interval(self) -> Interval:
        """The mean and its 95% interval, without bounds for one seed."""
        return Interval(
            self.mean, -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        )

    def said(self) -> str:
        """The word, with what else is true."""
        return f"{self.word}, though within the margin" if self.equivalent and self.word != EQUIVALENT else self.word


def judge(
    differences: Sequence[float] | np.ndarray, margin: float | None = None, confidence: float = CONFIDENCE
) -> Judgement:
    """The verdict on a model from its paired differences (n,), one per seed. Raises ValueError for none, for one that
    is not finite, and for a margin that is not positive."""
    values, n = np.asarray(differences, dtype=float), len(differences)
    if not n or not np.isfinite(values).all():
        raise ValueError(f"differences={differences} must be finite numbers, and one at least")
    if margin is not None and not 0 < margin < math.inf:
        raise ValueError(f"margin={margin} must be a number above 0")
    if n == 1:
        return Judgement(SINGLE, 1, float(values[0]), None, None, None, None, None, margin)

    # The tests, and the interval that leaves out 0 exactly where the first one rejects.
    tests = paired_tests(values[None], margin)
    mean, deviation, p, p_equivalent = (float(column[0]) for column in tests)
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
    word = str(words(tests.mean, tests.p, tests.p_equivalent, confidence)[0])
    return Judgement(
        word=word,
        n=n,
        mean=mean,
        low=mean - half,
        high=mean + half,
        deviation=deviation,
        detectable=deviation * detectable_ratio(n, 1 - confidence),
        p=p,
        margin=margin,
        equivalent=None if margin is None else p_equivalent < 1 - confidence,
        p_equivalent=None if margin is None else p_equivalent,
        seeds_needed=seeds_needed(mean, deviation, margin, confidence) if word == INCONCLUSIVE else None,
    )


def paired_tests(differences_An: np.ndarray, margin: float | None = None) -> Tests:
    """Student's t test of every comparison's n differences (A, n), and with a margin the two one-sided ones."""
    n = differences_An.shape[-1]
    mean_A, deviation_A = differences_An.mean(-1), differences_An.std(-1, ddof=1)
    # What all seeds give alike is certain.
    standard_A = np.maximum(deviation_A / math.sqrt(n), 1e-200)
    p_A = 2 * scipy.stats.t.sf(np.abs(mean_A) / standard_A, n - 1)
    if margin is None:
        return Tests(mean_A, deviation_A, p_A, np.ones_like(p_A))
    return Tests(mean_A, deviation_A, p_A, scipy.stats.t.sf((margin - np.abs(mean_A)) / standard_A, n - 1))


def words(
    mean_A: np.ndarray, p_A: np.ndarray, p_equivalent_A: np.ndarray, confidence: float = CONFIDENCE
) -> np.ndarray:
    """A word for each of A comparisons, of p-values that were corrected for their number where they should be."""
    level = 1 - confidence
    decided_A = np.where(mean_A < 0, BETTER, WORSE)
    return np.where(p_A < level, decided_A, np.where(p_equivalent_A < level, EQUIVALENT, INCONCLUSIVE))


def power(ratio: float, n: int, level: float = 1 - CONFIDENCE) -> float:
    """The share of studies of n seeds whose two-sided t test finds a true difference of `ratio` deviations."""
    critical, centre = scipy.stats.t.ppf(1 - level / 2, n - 1), abs(ratio) * math.sqrt(n)
    # A difference found on the other side, far out: rounded to not a number.
    wrong = np.nan_to_num(scipy.stats.nct.cdf(-critical, n - 1, centre))
    return float(scipy.stats.nct.sf(critical, n - 1, centre) + wrong)


def power_of_equivalence(mean: float, deviation: float, margin: float, n: int, level: float = 1 - CONFIDENCE) -> float:
    """The share of studies of n seeds whose two one-sided tests find a true difference of `mean` within the margin;
    nearly, for few seeds (Phillips 1990), and exactly for many."""
    critical, standard = scipy.stats.t.ppf(1 - level, n - 1), deviation / math.sqrt(n)
    within = scipy.stats.nct.sf(critical, n - 1, (margin - mean) / standard)
    beyond = np.nan_to_num(scipy.stats.nct.cdf(critical, n - 1, (margin + mean) / standard))
    return max(0.0, float(within - beyond))


@functools.cache
def detectable_ratio(n: int, level: float = 1 - CONFIDENCE) -> float:
    """The smallest difference, in deviations of paired differences, that n seeds show in `POWER` of studies."""
    critical = float(scipy.stats.t.ppf(1 - level / 2, n - 1))
    # One and a half times what half of the studies would find, and more for the few seeds whose deviation is unsure.
    high = (critical + 2) / math.sqrt(n)
    while power(high, n, level) < POWER:
        high *= 2
    return float(scipy.optimize.brentq(lambda ratio: power(ratio, n, level) - POWER, 0, high, xtol=1e-10))


def seeds_needed(
    mean: float, deviation: float, margin: float | None = None, confidence: float = CONFIDENCE
) -> int | None:
    """How many seeds in all would decide in `POWER` of studies, were this mean and deviation the true ones: that there
    is a difference or, with a margin, that there is none beyond it. None for more than `MOST_SEEDS`."""
    level = 1 - confidence
    if deviation == 0:
        return None

    def decides(n: int) -> bool:
        shown = power(mean / deviation, n, level) >= POWER
        near = margin is not None and abs(mean) < margin
        return shown or (near and power_of_equivalence(mean, deviation, margin, n, level) >= POWER)  # type: ignore[arg-type]

    # Both powers rise with n: halve what lies between too few and enough.
    if not decides(MOST_SEEDS):
        return None
    few, enough = 1, MOST_SEEDS
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if decides(middle) else (middle, enough)
    return enough
