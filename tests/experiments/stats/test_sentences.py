"""Claims about experiments/stats/sentences.py."""

import pytest
from scipy import stats

from experiments.stats import verdict
from experiments.stats.decide import judge
from experiments.stats.sentences import sentences
from tests.fake_runs import fake_pair

WINDOWS = "over 64 windows of validation text)"


def pairs_of(*differences, **both):
    return [fake_pair(difference=each, seed=seed, **both) for seed, each in enumerate(differences)]


@pytest.mark.parametrize("difference", [-0.08, 0.05, -0.001])
def test_one_seed_gives_no_verdict_and_its_interval_is_called_one_over_windows(difference):
    first, *others = sentences([fake_pair(difference=difference)], "active_params")
    assert first.startswith("One seed gives no verdict: after 600 steps the MoE's validation loss, 3.")
    low, high = (verdict.signed(bound) for bound in verdict.loss_difference([fake_pair(difference=difference)])[1:])
    assert f"by {verdict.signed(difference)} (95% interval {low} to {high} {WINDOWS}, in bits per byte " in first
    assert first.endswith("not of what other seeds would give.")
    assert not any(word in " ".join([first, *others]) for word in ("better", "worse", "equivalent", "lower", "higher"))


def test_too_little_validation_text_is_said():
    first = sentences([fake_pair(n_windows=1)], "active_params")[0]
    assert first.startswith("One seed gives no verdict: ")
    assert first.endswith("; there is no interval from one window of validation text.")


def test_a_better_model_is_called_so_with_the_interval_over_seeds_in_nats_and_in_bits():
    first, second, *_ = sentences(pairs_of(-0.07, -0.08, -0.09), "active_params")
    assert first == (
        "The MoE is better than its dense twin after 600 steps: its validation loss, 3.227 nats per token on average, "
        "is 0.080 lower (95% interval 0.055 to 0.105 over 3 seeds), in bits per byte −0.037 (−0.049 to −0.026)."
    )
    assert second == (
        "The differences of 3 seeds have a standard deviation of 0.010, with which 3 seeds show a difference of 0.033 "
        "or more with 80% power. The interval is of the choice of initial weights and data order."
    )


def test_a_loss_is_said_to_be_one():
    first, _, third, _ = sentences(pairs_of(0.05, 0.055, 0.045), "active_params")
    assert first.startswith("The MoE is worse than its dense twin after 600 steps: its validation loss, ")
    assert "is 0.050 higher (95% interval 0.038 to 0.062 over 3 seeds)" in first
    assert third.startswith(
        "It did not reach the twin's final loss in 3 of 3 seeds within its 600 steps and 409.6 s; the"
    )


def test_a_better_model_within_the_margin_is_said_to_be_both():
    first, second, *_ = sentences(pairs_of(-0.007, -0.008, -0.009), "flops", margin=0.02)
    assert first.startswith("The MoE is better than its dense twin, though within the margin of 0.02, after 600 steps")
    assert "A larger one is ruled out by two one-sided tests" in second


def test_equivalence_is_said_with_the_margin_and_never_without_one():
    pairs = pairs_of(-0.007, 0.008, 0.009)
    first, second, *_ = sentences(pairs, "flops", margin=0.03)
    assert first.startswith("The MoE and its dense twin are equivalent within 0.03 nats per token after 600 steps: ")
    assert "The margin of 0.03 nats per token was declared before training. A larger one is ruled out" in second
    assert "would decide" not in second
    assert not any("equivalent" in each or "margin" in each for each in sentences(pairs, "flops"))


def test_an_inconclusive_comparison_says_how_many_seeds_would_decide():
    differences = (-0.1, 0.02, -0.04)
    first, second, *_ = sentences(pairs_of(*differences), "flops")
    assert first.startswith("Inconclusive after 600 steps: the MoE's validation loss, ")
    assert "differs from its dense twin's by −0.040 (95% interval −0.189 to +0.109 over 3 seeds)" in first
    needed = judge(differences).seeds_needed
    assert f"true ones, {needed} seeds in all would decide with 80% power." in second
    assert "not even 1,000 seeds would decide" in sentences(pairs_of(-0.1, 0.1), "flops")[1]


def test_a_router_that_sees_later_tokens_comes_before_any_verdict():
    pairs = [pair._replace(moe=pair.moe._replace(leak=0.5)) for pair in pairs_of(-0.07, -0.08, -0.09)]
    assert sentences(pairs, "flops")[0].startswith("No verdict: the router sees later tokens (")
    assert verdict.judgement(pairs) is None
    assert verdict.judgement(pairs_of(-0.07, -0.08, -0.09)).word == "better"


def test_two_seeds_that_disagree_say_how_many_reached_the_loss():
    third = sentences(pairs_of(-0.2, 0.1), "active_params")[2]
    assert "did not reach the twin's final loss in 1 of 2 seeds" in third


@pytest.mark.parametrize(
    ("speed", "said"), [(4000.0, "was ahead by the clock too"), (400.0, "but was behind by the clock")]
)
def test_the_clock_is_reported_whoever_it_favours(speed, said):
    pair = fake_pair(difference=-0.08, moe_speed=speed)
    second = sentences([pair], "active_params")[1]
    steps, seconds = (verdict.reach(*pair, axis) for axis in (0, 1))
    assert said in second
    assert f"after {steps:.0f} of 600 steps" in second
    assert f"{seconds:,.1f} s of training against 245.8 s. " in second
    assert f"Effective speedup: {600 / steps:.2f}× in steps, " in second
    assert f"{600 * 2048 / 5000 / seconds:.2f}× in seconds." in second


def test_the_speedup_over_seeds_has_an_interval_of_its_logarithm():
    pairs = pairs_of(-0.05, -0.08, -0.12)
    third = sentences(pairs, "active_params")[2]
    ratios = [600 / verdict.reach(*pair, 0) for pair in pairs]
    mean = stats.gmean(ratios)
    assert f"Effective speedup: {mean:.2f}× (" in third
    assert third.endswith(" in seconds (95% intervals over 3 seeds).")
