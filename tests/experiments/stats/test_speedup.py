"""Claims about experiments/stats/speedup.py."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.stats.speedup import AXES, Curve, first_reach, mean_speedup, speedup


def curve(loss, seconds_per_step=1.0, flops_per_step=1.0) -> Curve:
    """Evaluations every 100 steps."""
    steps = [100.0 * i for i in range(len(loss))]
    return Curve(steps, [seconds_per_step * x for x in steps], loss, [flops_per_step * x for x in steps])


def test_a_loss_is_reached_on_the_line_between_two_evaluations():
    steps, loss = [0, 100, 200, 300], [8.0, 4.0, 3.0, 3.5]
    assert first_reach(steps, loss, 3.25) == 175  # the first time, not the last
    assert first_reach(steps, loss, 4.0) == 100
    assert first_reach(steps, loss, 9.0) == 0
    assert first_reach(steps, loss, 2.9) is None


def test_a_model_that_is_twice_as_quick_has_a_speedup_of_two_and_its_rival_of_a_half():
    quick, slow = curve([8.0, 4.0, 2.0]), curve([8.0, 6.0, 4.0])
    assert speedup(quick, slow, "steps") == 2
    assert speedup(slow, quick, "steps") == 0.5


def test_each_axis_has_its_own_cost_of_a_step():
    quick, slow = curve([8.0, 4.0, 2.0], seconds_per_step=4.0, flops_per_step=3.0), curve([8.0, 6.0, 4.0])
    assert {axis: speedup(quick, slow, axis) for axis in AXES} == {
        "steps": 2, "flops": pytest.approx(2 / 3), "seconds": 0.5
    }  # fmt: skip


def test_a_loss_that_was_there_before_the_first_step_gives_no_speedup():
    assert speedup(curve([3.0, 2.0]), curve([8.0, 4.0]), "steps") is None


def test_the_interval_is_students_on_the_logarithm():
    ratios = [1.2, 1.5, 1.1]
    expected = stats.ttest_1samp(np.log(ratios), 0).confidence_interval(0.95)
    assert mean_speedup(ratios) == pytest.approx((stats.gmean(ratios), math.exp(expected.low), math.exp(expected.high)))
    # So twice as quick and half as quick are none on average.
    assert mean_speedup([2.0, 0.5]).mean == pytest.approx(1)


def test_one_seed_has_no_bounds_and_a_speedup_that_is_not_known_no_mean():
    assert mean_speedup([1.5]) == (pytest.approx(1.5), 0.0, math.inf)
    assert mean_speedup([1.5, None]) is None
    assert mean_speedup([]) is None
