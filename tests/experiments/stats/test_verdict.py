"""Claims about experiments/stats/verdict.py."""

import dataclasses
import math

import pytest
from scipy.stats import ttest_rel

from experiments.stats import verdict
from experiments.stats.sentences import sentences
from experiments.stats.verdict import Pair, Row, cells, table
from moe.errors import BadInput
from tests.fake_runs import DOMAINS, fake_pair, fake_run, with_dropped, with_routing


def test_loss_differences_over_several_seeds_are_paired():
    pairs = [fake_pair(difference=each, seed=seed) for seed, each in enumerate((-0.07, -0.08, -0.09))]
    losses = [[run.summary.val.loss for run in pair] for pair in pairs]
    expected = ttest_rel(*zip(*losses, strict=True)).confidence_interval(0.95)
    assert verdict.loss_difference(pairs) == pytest.approx((-0.08, expected.low, expected.high))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda run: {"dataset": "0ther"}, r"the same text \(5eed and 0ther\)"),
        (lambda run: {"tokenizer": "gpt2"}, r"the same tokenizer \(70cea and gpt2\)"),
        (lambda run: {"val_windows": run.val_windows[1:]}, r"the same number of validation windows \(64 and 63\)"),
        (
            lambda run: {"val": dataclasses.replace(run.val, domains={"drama": run.val.domains["drama"]})},
            "the same validation tokens of each domain",
        ),
    ],
    ids=["text", "tokenizer", "windows", "domains"],
)
def test_runs_of_different_text_tokens_or_windows_are_refused_in_a_sentence(change, what):
    first, second = fake_pair(), fake_pair(seed=1)
    verdict.check_comparable([*first, *second])
    other = second.dense._replace(summary=dataclasses.replace(second.dense.summary, **change(second.dense.summary)))
    with pytest.raises(BadInput, match=f"moe-seed0 and dense-seed1 do not have {what}.*cannot be compared; train both"):
        verdict.check_comparable([*first, second.moe, other])


def test_bits_per_byte_are_judged_seed_by_seed_too():
    pairs = [fake_pair(difference=each, seed=seed) for seed, each in enumerate((-0.07, -0.08, -0.09))]
    bits = [[run.summary.val.bpb for run in pair] for pair in pairs]
    expected = ttest_rel(*zip(*bits, strict=True)).confidence_interval(0.95)
    assert verdict.judge_bits(pairs).interval[1:] == pytest.approx((expected.low, expected.high))
    by_label = {label: cells for label, *cells in map(cells, table(pairs))}
    assert by_label["Validation bits per byte"][2].startswith("−0.037 (−0.0")
    assert by_label["Deviation of the difference of losses"] == ["", "", "0.010"]
    assert by_label["Smallest difference 3 seeds show"] == ["", "", "0.033"]  # statsmodels' 3.264 deviations


def test_what_differs_from_seed_to_seed_is_what_the_interval_covers():
    def pairs(**fixed):
        found = [fake_pair(seed=seed) for seed in (0, 1)]
        return [
            Pair(*(run._replace(summary=dataclasses.replace(run.summary, **fixed)) for run in pair)) for pair in found
        ]

    assert verdict.sources(pairs()) == ["initial weights", "data order"]
    assert verdict.sources(pairs(seed_init=0)) == ["data order"]
    assert verdict.sources(pairs(seed_data=4)) == ["initial weights"]
    assert verdict.sources(pairs(seed_init=0, seed_data=0)) == []
    said = [sentences(pairs(**fixed), "flops")[1] for fixed in ({}, {"seed_init": 0}, {"seed_init": 0, "seed_data": 0})]
    assert said[0].endswith("The interval is of the choice of initial weights and data order.")
    assert said[1].endswith("of the choice of data order, not of initial weights, the same for all.")
    assert said[2].endswith("The interval is of the choice of noise in training alone.")


def test_flops_of_training_are_an_axis_of_their_own():
    moe, dense = fake_pair(difference=-0.08)
    costly = dataclasses.replace(moe.summary, flops=moe.summary.flops._replace(training=12_000_000))
    pair = Pair(moe._replace(summary=costly), dense)
    ratios = verdict.speedups([pair])
    assert ratios["steps"] == [pytest.approx(600 / verdict.reach(*pair, 0))]
    assert ratios["flops"] == [pytest.approx(ratios["steps"][0] / 2)]  # its twin takes 6 million a token
    assert verdict.validation_curve(dense).flops[-1] == 600 * 2048 * 6_000_000


def test_an_evaluation_that_is_not_finite_is_left_out_of_the_curve():
    run = fake_run()
    steps, _, loss, _ = verdict.validation_curve(run)
    ruined = dataclasses.replace(run.metrics[200], val=dataclasses.replace(run.metrics[200].val, loss=math.nan))
    run.metrics[200] = ruined
    assert verdict.validation_curve(run)[0] == [step for step in steps if step != 200]
    assert verdict.validation_curve(run)[2] == [value for step, value in zip(steps, loss, strict=True) if step != 200]


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
        steps, _, loss, _ = verdict.validation_curve(run)
        assert steps == [0, 100, 200, 300, 400, 500, 600]
        assert loss[-1] == run.summary.val.loss


def test_the_table_has_every_quantity_once():
    labels = [row.label for row in table([fake_pair()])]
    assert labels == [
        "Validation loss (nats per token)",
        "Validation bits per byte",
        *[f"{domain}: {what}" for domain in DOMAINS for what in ("loss (nats per token)", "bits per byte")],
        "Steps to the twin's final loss",
        "Seconds to the twin's final loss",
        *[f"Effective speedup in {axis}" for axis in ("steps", "FLOPs", "seconds")],
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
