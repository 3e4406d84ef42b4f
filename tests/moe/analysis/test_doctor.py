"""Claims about alarms: when each is raised, once, and by a doctor that was interrupted as by one that was not."""

import copy
import dataclasses
import json
import math
import random
import re

import pytest

from moe.analysis import doctor as module
from moe.analysis.doctor import RULES, Doctor
from moe.run.summary import LayerMetrics, MetricsLine, line_from_json, line_to_json

STEPS = 700
HEALTHY = dict(max_vio=0.4, load_entropy=0.98, effective_experts=7.5, dead=0, dropped=0.0, skipped=0.0, rows=2.0)
WATCHED = dict(starved=0, entropy=0.8, bias=0.05, weakest=0.6, losses={"aux": 1.0, "z": 4.0})


def lines(change=lambda step: {}, loss=lambda step: 3.0, steps=STEPS):
    """A run's lines: two layers that are well, but for what `change` says of the second at a step."""
    return [
        MetricsLine(
            step,
            float(step),
            lm_loss=loss(step),
            layers=[
                LayerMetrics(layer, **(HEALTHY | WATCHED | (change(step) if layer == 3 else {}))) for layer in (1, 3)
            ],
        )
        for step in range(1, steps + 1)
    ]


def raised(run, **options):
    doctor = Doctor(**options)
    return [alarm for line in run for alarm in doctor.read(line)]


SICK = {
    "dead experts": {"dead": 2},
    "starved experts": {"starved": 1},
    "uneven load": {"max_vio": 3.0},
    "router without doubt": {"entropy": 0.02},
    "bias runs away": {"bias": 1.7},
    "logits grow": {"losses": {"z": 160.0}},
    "an expert hardly learns": {"weakest": 0.001},
}


def test_every_rule_is_tried_here():
    assert set(SICK) == {rule.kind for rule in RULES}


def test_a_healthy_run_raises_nothing_however_its_numbers_shake():
    shake = random.Random(0)
    change = lambda step: {
        "max_vio": shake.uniform(0.1, 1.0), "dead": shake.choice([0, 0, 0, 1]), "entropy": shake.uniform(0.5, 0.9),
    }  # fmt: skip
    assert raised(lines(change, lambda step: 3.0 + shake.gauss(0, 0.1))) == []


@pytest.mark.parametrize("kind", SICK)
def test_an_illness_is_told_once_with_its_layer_soon_after_it_begins(kind):
    (alarm,) = [alarm for alarm in raised(lines(lambda step: SICK[kind] if step > 300 else {})) if alarm.kind == kind]
    assert alarm.layer == 3
    assert 300 < alarm.step <= 300 + module.WINDOW
    assert all(alarm.evidence and alarm.cause and alarm.advice for _ in [0])
    assert str(alarm.step) in alarm.sentence()
    assert "layer 3" in alarm.sentence()


@pytest.mark.parametrize("kind", SICK)
def test_an_illness_that_is_over_and_comes_again_is_told_again(kind):
    change = lambda step: SICK[kind] if 200 < step <= 300 or step > 500 else {}
    steps = [alarm.step for alarm in raised(lines(change)) if alarm.kind == kind]
    assert len(steps) == 2
    assert steps[1] > 500


@pytest.mark.parametrize("kind", SICK)
def test_a_single_bad_step_and_the_first_steps_are_no_illness(kind):
    change = lambda step: SICK[kind] if step == 200 or step <= module.YOUNG else {}
    assert raised(lines(change)) == []


def test_with_few_rows_an_expert_without_any_is_no_news():
    run = lines(lambda step: {"dead": 1, "starved": 2})
    assert {alarm.kind for alarm in raised(run, fair={1: 500.0, 3: 40.0})} == {"dead experts", "starved experts"}
    assert raised(run, fair={1: 500.0, 3: 4.0}) == []


def test_a_spike_of_the_loss_is_told_and_a_noisy_loss_is_not():
    shake = random.Random(1)
    noisy = lambda step: 4.0 - step / 200 + shake.gauss(0, 0.15)
    assert raised(lines(loss=noisy)) == []
    (alarm,) = raised(lines(loss=lambda step: noisy(step) + 3.0 * (step in (300, 301, 302))))
    assert (alarm.kind, alarm.step, alarm.layer) == ("loss spike", 300, None)
    assert "nats per token" in alarm.evidence


CURVES = {  # step -> loss without its noise; the noise, as a share of it
    "even": (lambda step: 3.0, 0.05),
    "falling": (lambda step: 2.0 + 7.0 * math.exp(-step / 100), 0.1),
    "learnt by heart": (lambda step: 5e-4 + 6.0 * math.exp(-step / 20), 0.1),
}


@pytest.mark.parametrize("curve", CURVES)
def test_ten_times_the_loss_is_told_at_its_step_and_a_healthy_one_is_not_whatever_its_size(curve):
    shake = random.Random(curve)
    mean, share = CURVES[curve]
    losses = [mean(step) * math.exp(shake.gauss(0, share)) for step in range(1, 2001)]
    doctor, false, caught = Doctor(), 0, []
    for step, loss in enumerate(losses, 1):
        if step > module.FEW:
            sick = copy.deepcopy(doctor).read(MetricsLine(step, float(step), lm_loss=10 * loss))
            caught.append([(alarm.kind, alarm.step) for alarm in sick] == [("loss spike", step)])
        false += len(doctor.read(MetricsLine(step, float(step), lm_loss=loss)))
    assert false <= len(losses) / 1000
    assert sum(caught) >= 0.99 * len(caught), f"{sum(caught)} of {len(caught)}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_neither_is_a_spike_nor_hides_one(value):
    doctor = Doctor()
    lost = lambda step: value if step % 3 == 0 or 200 < step <= 270 else 3.0
    assert [alarm for line in lines(loss=lost, steps=300) for alarm in doctor.read(line)] == []
    (alarm,) = doctor.read(MetricsLine(301, 301.0, lm_loss=30.0))
    assert (alarm.kind, alarm.step) == ("loss spike", 301)


def test_the_evidence_has_the_numbers():
    (alarm,) = raised(lines(lambda step: {"max_vio": 3.25} if step > 200 else {}))
    number = re.fullmatch(r"the median MaxVio of the last 50 steps is ([\d.]+)", alarm.evidence)[1]
    assert 1.5 < float(number) <= 3.25


@pytest.mark.parametrize("cut", [1, 60, 205, 249, 250, 251, 252, 300])
def test_a_doctor_that_reads_the_file_again_raises_what_the_first_would_have(cut):
    run = lines(lambda step: SICK["dead experts"] | SICK["logits grow"] if step > 200 else {})
    whole = Doctor()
    expected = [(line.step, whole.read(line)) for line in run]
    read_again = [line_from_json(json.loads(json.dumps(line_to_json(line)))) for line in run]
    other = Doctor().catch_up(read_again[:cut])
    assert [(line.step, other.read(line)) for line in run[cut:]] == expected[cut:]


def test_what_was_not_measured_raises_nothing():
    bare = [dataclasses.replace(line, layers=[LayerMetrics(0, **HEALTHY)], lm_loss=float("nan")) for line in lines()]
    assert raised(bare) == []
    assert raised([MetricsLine(0, 0.0)]) == []
