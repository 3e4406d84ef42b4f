"""Many models at once: verdicts corrected for their number, intervals that hold together, ranks that are intervals.

Of twenty routers that are all alike the best seems better than the baseline. Holm's correction keeps the chance of a
single wrong word at 5%, whatever the comparisons have in common. Intervals hold together at the quantile of the
largest |t| (max-t). Every comparison has a deviation of its own: one shared by all is the more powerful for arms that
are alike, and calls a noisy router better that is not. Comparisons share arms, but with few seeds that hardly shows in
the largest |t|, so its quantile is that of independent ones: none too small for what has something in common (Šidák
1967).

Letters: A models, or comparisons of them · n seeds · R simulated studies.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import scipy

from experiments.stats.decide import INCONCLUSIVE, Judgement, detectable_ratio, judge, seeds_needed, words
from experiments.stats.statistics import CONFIDENCE, Interval
from moe.errors import BadInput


def holm(p_values: np.ndarray | list[float]) -> np.ndarray:
    """Holm's step-down correction (1979) of the p-values on the last axis, (..., A) -> (..., A): the smallest times A,
    the next times A - 1, and none smaller than one before it."""
    p_A = np.asarray(p_values, dtype=float)
    order_A = np.argsort(p_A, axis=-1, kind="stable")
    factors_A = np.arange(p_A.shape[-1], 0, -1)
    stepped_A = np.minimum(np.maximum.accumulate(np.take_along_axis(p_A, order_A, -1) * factors_A, axis=-1), 1)
    adjusted_A = np.empty_like(p_A)
    np.put_along_axis(adjusted_A, order_A, stepped_A, -1)
    return adjusted_A


def judge_arms(
    differences: Sequence[Sequence[float]], margin: float | None = None, confidence: float = CONFIDENCE
) -> list[Judgement]:
    """`decide.judge` of each of A comparisons with two seeds or more, corrected for their number: words and p-values by
    Holm, intervals that hold together, and the power of the latter. A word can say more than its interval, as Holm asks
    less of the second smallest p-value than of the smallest."""
    if not differences:
        return []
    single = [judge(values, margin, confidence) for values in differences]
    p_A = holm([judgement.p or 0.0 for judgement in single])
    p_equivalent_A = holm([1.0 if margin is None else judgement.p_equivalent or 0.0 for judgement in single])
    word_A = words(np.array([judgement.mean for judgement in single]), p_A, p_equivalent_A, confidence)

    # What one comparison among A needs: a level of its own.
    level = 1 - confidence ** (1 / len(single))
    corrected = []
    for values, judgement, word, p, p_equivalent in zip(differences, single, word_A, p_A, p_equivalent_A, strict=True):
        ((mean, low, high),) = max_t(np.array([values]), 1 - level)
        deviation = judgement.deviation or 0.0
        needed = seeds_needed(mean, deviation, margin, 1 - level) if word == INCONCLUSIVE else None
        corrected.append(
            replace(
                judgement,
                word=str(word),
                low=low,
                high=high,
                detectable=deviation * detectable_ratio(judgement.n, level),
                p=float(p),
                equivalent=None if margin is None else bool(p_equivalent < 1 - confidence),
                p_equivalent=None if margin is None else float(p_equivalent),
                seeds_needed=needed,
            )
        )
    return corrected


def max_t(differences_An: np.ndarray, confidence: float = CONFIDENCE) -> list[Interval]:
    """Intervals of A arms' differences to one baseline, (A, n), that all hold at once in `confidence` of studies.

    Raises `BadInput` for a single seed."""
    differences_An = np.atleast_2d(differences_An)
    n_arms, n = differences_An.shape
    if n < 2:
        raise BadInput("seeds: one seed gives no interval; name two or more, such as seeds=[0,1,2].")
    half_A = critical_t(n_arms, n, confidence) * differences_An.std(-1, ddof=1) / math.sqrt(n)
    return [Interval(*map(float, (m, m - h, m + h))) for m, h in zip(differences_An.mean(-1), half_A, strict=True)]


def rank_intervals(scores_An: np.ndarray, confidence: float = CONFIDENCE) -> list[tuple[int, int]]:
    """For each of A models with n scores (A, n), lower being better and seeds the same for all, the ranks it may have,
    1 the best: 1 + the models significantly better, to A - those significantly worse, by all pairs' intervals at once.
    All of them hold the true rank in at least `confidence` of studies (Mohamad et al. 2019; Klein et al. 2020).

    Raises `BadInput` for a single seed."""
    scores_An = np.atleast_2d(scores_An)
    if scores_An.shape[-1] < 2:
        raise BadInput("seeds: one seed gives no rank; name two or more, such as seeds=[0,1,2].")
    low_A, high_A = ranks(scores_An[None], confidence)
    return [(int(low), int(high)) for low, high in zip(low_A[0], high_A[0], strict=True)]


def ranks(scores_RAn: np.ndarray, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest rank of every model in each of R studies, (R, A) both, as in `rank_intervals`."""
    n_studies, n_arms, n = scores_RAn.shape
    low_RA, high_RA = np.ones((n_studies, n_arms), int), np.full((n_studies, n_arms), n_arms)
    if n_arms == 1:
        return low_RA, high_RA
    critical = critical_t(n_arms * (n_arms - 1) // 2, n, confidence) / math.sqrt(n)
    for arm in range(n_arms):
        difference_RAn = scores_RAn[:, arm, None] - scores_RAn
        mean_RA, half_RA = difference_RAn.mean(-1), critical * difference_RAn.std(-1, ddof=1)
        low_RA[:, arm] += (mean_RA > half_RA).sum(-1)
        high_RA[:, arm] -= (mean_RA < -half_RA).sum(-1)
    return low_RA, high_RA


def critical_t(n_comparisons: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The quantile of the largest |t| of independent comparisons of n seeds each; Student's for a single one."""
    return float(scipy.stats.t.ppf((1 + confidence ** (1 / n_comparisons)) / 2, n - 1))
