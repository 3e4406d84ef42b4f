"""Claims about the ledger: what is called confirmed, contradicted, inconclusive, of rows with known differences."""

import dataclasses
import math

import numpy as np
import pytest
import yaml
from scipy import stats

from experiments.cli import CONF
from experiments.stats import ledger
from experiments.stats.ledger import CONFIRMED, CONTRADICTED, INCONCLUSIVE, NOT_RUN, Claim, Contrast, Row


def _row(arm, seed, loss=3.0, **values):
    given = {
        "bpb": 2.0,
        "steps": 10,
        "tokens": 100,
        "active": 5,
        "total": 9,
        "flops": 1e6,
        "curve": [[10.0, 2.0, loss]],
    }
    return Row(id=f"{arm}{seed}", arm=arm, seed=seed, loss=loss, **given | values)


def _rows(differences, base=(3.0, 3.1, 2.9, 3.05, 2.95)):
    pairs = list(enumerate(zip(differences, base, strict=False)))
    return [_row("new", seed, b + d) for seed, (d, b) in pairs] + [_row("old", seed, b) for seed, (_, b) in pairs]


@pytest.mark.parametrize(
    ("differences", "lower", "higher", "same"),
    [
        ([-0.10, -0.11, -0.09, -0.10, -0.12], CONFIRMED, CONTRADICTED, CONTRADICTED),
        ([0.10, 0.11, 0.09, 0.10, 0.12], CONTRADICTED, CONFIRMED, CONTRADICTED),
        ([0.001, -0.001, 0.002, -0.002, 0.0005], CONTRADICTED, CONTRADICTED, CONFIRMED),
        ([0.10, -0.11, 0.09, -0.10, 0.02], INCONCLUSIVE, INCONCLUSIVE, INCONCLUSIVE),
        ([-0.0040, -0.0041, -0.0039, -0.0040, -0.0042], CONFIRMED, CONTRADICTED, CONFIRMED),  # sure, and small
        ([0.0, 0.0, 0.0], CONTRADICTED, CONTRADICTED, CONFIRMED),
        ([-0.5], INCONCLUSIVE, INCONCLUSIVE, INCONCLUSIVE),
    ],
    ids=["lower", "higher", "the same", "spread", "small and sure", "none at all", "one seed"],
)
def test_a_verdict_is_by_the_interval_and_by_what_was_expected(differences, lower, higher, same):
    rows = _rows(differences)
    said = [
        ledger.finding(Contrast("new", "old", expected), rows, 0.01).verdict for expected in ("lower", "higher", "same")
    ]
    assert said == [lower, higher, same]


def test_the_effect_is_the_mean_of_differences_paired_by_seed_with_students_interval():
    differences = [-0.05, -0.02, -0.06, -0.01, -0.03]
    judged = ledger.finding(Contrast("new", "old", "lower"), _rows(differences)[::-1], 0.01).judgement
    low, high = stats.t.interval(0.95, 4, np.mean(differences), stats.sem(differences))
    assert (judged.n, judged.mean) == (5, pytest.approx(-0.034))
    assert (judged.low, judged.high) == (pytest.approx(low), pytest.approx(high))


def test_a_seed_that_only_one_arm_has_is_left_out():
    rows = [*_rows([-0.1, -0.2, -0.15]), _row("new", 9, 0.0), _row("old", 8, 100.0)]
    assert ledger.paired(Contrast("new", "old", "lower"), rows) == pytest.approx([-0.1, -0.2, -0.15])


def test_arms_that_were_not_run_give_no_verdict():
    assert ledger.finding(Contrast("new", "old", "lower"), [_row("old", 0)], 0.01).verdict == NOT_RUN
    assert ledger.finding(Contrast("new", "old", "lower", "max_vio"), _rows([-0.1, -0.2]), 0.01).verdict == NOT_RUN


def test_a_leak_is_judged_in_each_seed_and_not_on_average():
    leaks = lambda *values: [_row("new", seed, leak=value) for seed, value in enumerate(values)]
    leaky, tight = Contrast("new", ledger.LEAK, "higher", "leak"), Contrast("new", ledger.LEAK, "lower", "leak")
    assert ledger.finding(leaky, leaks(0.1, 9.0, 0.3), 0.01).verdict == CONFIRMED
    assert ledger.finding(leaky, leaks(9.0, 9.0, 0.0), 0.01).verdict == CONTRADICTED
    assert ledger.finding(tight, leaks(0.0, 0.0, 0.0), 0.01).verdict == CONFIRMED
    assert ledger.finding(tight, leaks(0.0, 0.0, 1e-3), 0.01).verdict == CONTRADICTED


def test_the_clock_compares_the_time_to_the_others_final_loss():
    rows = [
        *(_row("new", seed, 2.0, curve=[[1.0, 1.0, 4.0], [2.0, 3.0, 2.0]]) for seed in range(2)),
        *(_row("old", seed, 3.0, curve=[[1.0, 4.0, 3.0]]) for seed in range(2)),
    ]
    (first, _) = ledger.paired(Contrast("new", "old", "lower", "log_seconds"), rows)
    assert first == pytest.approx(math.log(2.0 / 4.0))  # 3.0 is reached half-way between 1 and 3 seconds
    slow = [dataclasses.replace(row, loss=9.0, curve=[[1.0, 1.0, 9.0]]) if row.arm == "new" else row for row in rows]
    assert ledger.paired(Contrast("new", "old", "lower", "log_seconds"), slow) == []


def test_a_tier_that_a_claim_does_not_have_runs_none_of_it():
    claim = Claim("c", "p", [Contrast("new", "old", "lower")], tiers=("gpu",))
    assert ledger.findings(claim, _rows([-0.1, -0.1]), "cpu", 0.01) == []
    assert len(ledger.findings(claim, _rows([-0.1, -0.1]), "gpu", 0.01)) == 1


@pytest.mark.parametrize(("stem", "tier"), [("claims", "cpu"), ("claims-gpu", "gpu")])
def test_every_arm_of_a_contrast_is_in_the_tiers_study_and_every_arm_there_is_contrasted(stem, tier):
    study = yaml.safe_load((CONF / "experiment" / f"{stem}.yaml").read_text())["study"]
    contrasts = [contrast for claim in ledger.CLAIMS if tier in claim.tiers for contrast in claim.contrasts]
    named = {name for contrast in contrasts for name in (contrast.arm, contrast.against) if isinstance(name, str)}
    assert named == set(study["arms"])
    assert study["margin"] == 0.01
    assert len(study["seeds"]) >= 3


def test_at_least_ten_claims_are_tried_on_a_cpu():
    assert sum("cpu" in claim.tiers for claim in ledger.CLAIMS) >= 10
