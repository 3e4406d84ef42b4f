"""Claims about experiments/stats/verdict.py."""

import dataclasses
import math

import pytest
from scipy.stats import ttest_rel

from experiments.stats import verdict
from experiments.stats.verdict import Pair, Row, cells, first_reach, sentences, table
from tests.fake_runs import DOMAINS, fake_pair, fake_run, with_dropped, with_routing


def test_loss_differences_over_several_seeds_are_paired():
    pairs = [fake_pair(difference=each, seed=seed) for seed, each in enumerate((-0.07, -0.08, -0.09))]
    losses = [[run.summary.val.loss for run in pair] for pair in pairs]
    expected = ttest_rel(*zip(*losses, strict=True)).confidence_interval(0.95)
    assert verdict.loss_difference(pairs) == pytest.approx((-0.08, expected.low, expected.high))


def test_runs_on_different_validation_windows_are_refused():
    moe, dense = fake_pair()
    dense.summary.val_windows.pop()
    with pytest.raises(ValueError, match="64 validation windows and dense-seed0 63"):
        verdict.loss_difference([Pair(moe, dense)])


def test_an_evaluation_that_is_not_finite_is_left_out_of_the_curve():
    run = fake_run()
    steps, _, loss = verdict.validation_curve(run)
    ruined = dataclasses.replace(run.metrics[200], val=dataclasses.replace(run.metrics[200].val, loss=math.nan))
    run.metrics[200] = ruined
    assert verdict.validation_curve(run)[0] == [step for step in steps if step != 200]
    assert verdict.validation_curve(run)[2] == [value for step, value in zip(steps, loss, strict=True) if step != 200]


def test_a_loss_is_reached_on_the_line_between_two_evaluations():
    steps, loss = [0, 100, 200, 300], [8.0, 4.0, 3.0, 3.5]
    assert first_reach(steps, loss, 3.25) == 175  # the first time, not the last
    assert first_reach(steps, loss, 4.0) == 100
    assert first_reach(steps, loss, 9.0) == 0
    assert first_reach(steps, loss, 2.9) is None


def test_steps_and_seconds_to_the_twins_loss_come_from_the_same_point():
    pair = fake_pair(difference=-0.08, moe_speed=2048.0)  # a step takes the MoE one second
    steps, seconds = (verdict.reach(*pair, axis) for axis in (0, 1))
    assert 100 < steps < 300
    assert seconds == pytest.approx(steps)


def test_a_curve_has_every_evaluation_once_and_ends_with_the_summary():
    logged, unlogged = fake_run(), fake_run()
    # Of a run that was resumed after its last step:
    unlogged.metrics[-1] = dataclasses.replace(unlogged.metrics[-1], val=None)
    for run in (logged, unlogged):
        steps, _, loss = verdict.validation_curve(run)
        assert steps == [0, 100, 200, 300, 400, 500, 600]
        assert loss[-1] == run.summary.val.loss


def test_a_win_of_one_seed_is_said_with_the_interval_over_validation_text():
    assert sentences([fake_pair(difference=-0.08)], "active_params")[0] == (
        "The MoE's validation loss, 3.240 nats per token, is 0.080 lower than its dense twin's after 600 steps "
        "(95% interval 0.074 to 0.085 over 64 windows of validation text; it does not cover the choice of seed)."
    )


def test_a_loss_is_said_to_be_one():
    first, second, _ = sentences([fake_pair(difference=0.05)], "active_params")
    assert "is 0.050 higher than its dense twin's after 600 steps (95% interval 0.0" in first
    assert second.startswith(
        "It did not reach the twin's final loss within its 600 steps and 409.6 s; the twin reached"
    )


def test_a_tie_is_said_not_to_tell_the_two_apart():
    first = sentences([fake_pair(difference=-0.001, noise=0.1)], "flops")[0]
    assert first.startswith("The MoE and its dense twin cannot be told apart after 600 steps: ")
    assert "differs from the twin's by −0.001 (95% interval −0.0" in first
    assert "lower" not in first
    assert "higher" not in first


def test_several_seeds_are_said_to_be_what_the_interval_covers():
    pairs = [fake_pair(difference=each, seed=seed) for seed, each in enumerate((-0.07, -0.08, -0.09))]
    first = sentences(pairs, "active_params")[0]
    assert first.endswith(
        "is 0.080 lower than its dense twin's after 600 steps (95% interval 0.055 to 0.105 over 3 seeds)."
    )
    assert "validation text" not in first


def test_two_seeds_that_disagree_cannot_be_told_apart():
    pairs = [fake_pair(difference=-0.2, seed=0), fake_pair(difference=0.1, seed=1)]
    first, second, _ = sentences(pairs, "active_params")
    assert "cannot be told apart" in first
    assert "did not reach the twin's final loss in 1 of 2 seeds" in second


def test_too_little_validation_text_is_said():
    first = sentences([fake_pair(n_windows=1)], "active_params")[0]
    assert first.startswith("There is too little validation text to tell the MoE and its dense twin apart")


@pytest.mark.parametrize(
    ("speed", "said"), [(4000.0, "was ahead by the clock too"), (400.0, "but was behind by the clock")]
)
def test_the_clock_is_reported_whoever_it_favours(speed, said):
    pair = fake_pair(difference=-0.08, moe_speed=speed)
    second = sentences([pair], "active_params")[1]
    steps, seconds = (verdict.reach(*pair, axis) for axis in (0, 1))
    assert said in second
    assert f"after {steps:.0f} of 600 steps (effective speedup {600 / steps:.2f}×)" in second
    assert f"{seconds:,.1f} s of training against 245.8 s ({600 * 2048 / 5000 / seconds:.2f}×)" in second


def test_the_table_has_every_quantity_once():
    labels = [row.label for row in table([fake_pair()])]
    assert labels == [
        "Validation loss (nats per token)",
        "Validation bits per byte",
        *[f"{domain}: {what}" for domain in DOMAINS for what in ("loss (nats per token)", "bits per byte")],
        "Steps to the twin's final loss",
        "Seconds to the twin's final loss",
        "Training throughput (tokens/s)",
        "Active parameters",
        "Total parameters",
        "Forward FLOPs per token",
        "Peak memory (MiB)",
    ]


def test_every_row_reads_its_own_number():
    moe, dense = fake_pair(difference=-0.08)
    by_label = {label: cells for label, *cells in map(cells, table([Pair(moe, dense)]))}
    assert by_label["Validation loss (nats per token)"] == ["3.240", "3.320", "−0.080 (−0.085 to −0.074)"]
    assert by_label["code: loss (nats per token)"][:2] == ["3.440", "3.520"]
    assert by_label["Total parameters"] == ["3,000,000", "1,000,000", "3.00×"]
    assert by_label["Training throughput (tokens/s)"] == ["3,000", "5,000", "0.60×"]
    assert by_label["Forward FLOPs per token"] == ["2,100,000", "2,000,000", "1.05×"]
    assert by_label["Peak memory (MiB)"][0] == "512"
    assert by_label["Steps to the twin's final loss"][1] == "600"


def test_several_seeds_stand_as_a_mean_and_half_an_interval():
    row = Row("x", 1, [1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert cells(row) == ("x", "2.0 ± 2.5", "2.0", "1.00×")  # 4.303 · 1 / √3


def test_a_loss_never_reached_has_no_ratio():
    assert cells(Row("x", 0, [None], [600.0])) == ("x", "not reached", "600", "–")
    assert cells(Row("x", 0, [None, 5.0], [600.0, 600.0]))[1] == "not reached in 1 of 2 seeds"


def test_what_only_an_moe_has_stands_alone_in_the_table_and_is_left_out_where_it_was_not_measured():
    pair = fake_pair()
    assert not [row for row in table([pair]) if row.relation == "alone"]
    with_routing(pair.moe, max_vio=(0.5, 1.0), effective_experts=12.0, skipped=0.125)
    with_dropped(pair.moe, lambda step: (0.0625, 0.1875))
    found = {row.label: cells(row)[1:] for row in table([pair]) if row.relation == "alone"}
    assert list(found.values()) == [("0.75", "", ""), ("12.00", "", ""), ("12.5", "", ""), ("12.5", "", "")]
