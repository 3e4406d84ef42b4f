"""Claims about fits of scaling laws: known parameters are found again from losses with this project's noise."""

import dataclasses

import numpy as np
import pytest

from experiments.stats import scaling
from experiments.stats.scaling import FORMS, Fit, Record, fit
from moe.errors import BadInput

NOISE = 0.01  # nats, about what a seed does to a loss here
TRUTH = {
    "chinchilla": dict(alpha=0.4, beta=0.35, c=1.7, a=120.0, b=60.0),
    "granularity": dict(alpha=0.4, beta=0.35, gamma=0.6, c=1.7, a=60.0, g=80.0, b=60.0),
    "joint": dict(alpha=0.4, beta=0.35, delta=0.2, omega=0.05, c=1.7, a=150.0, b=60.0),
    "routed": {"ln E_start": 0.7, "ln E_max": 4.5, "d": 2.6, "a": -0.12, "b": -0.09, "c": 0.004},
}


def _records(name, noise=NOISE, seeds=(0, 1), sizes=(3e4, 1e5, 3e5, 1e6, 3e6), seed=0):
    """Runs of every size and length, with losses that the form gives."""
    generator = np.random.default_rng(seed)
    records = []
    for n in sizes:
        for d in (1e6,) if name == "routed" else (3e5, 1e6, 3e6, 1e7):
            for e in (1, 8, 32) if name in ("joint", "routed") else (8,):
                for g in (1, 2, 8) if name == "granularity" else (1,):
                    for s in seeds:
                        records.append(Record(f"{n}-{d}-{e}-{g}", s, int(n), int(n * e), e, g, int(d), 6 * n * d, 0.0))
    true = Fit(name, TRUTH[name], 0.0, "", ())
    losses = true.predict(records) + noise * generator.standard_normal(len(records))
    return [dataclasses.replace(record, loss=float(loss)) for record, loss in zip(records, losses, strict=True)]


@pytest.mark.parametrize("name", FORMS)
def test_known_parameters_are_found_again_without_noise(name):
    found = fit(_records(name, noise=0.0), name)
    assert found.rms < 1e-4
    told = ("a", "c") if name == "routed" else TRUTH[name]  # how E saturates and its slope make up for each other
    for parameter, value in ((parameter, TRUTH[name][parameter]) for parameter in told):
        assert found.parameters[parameter] == pytest.approx(value, rel=0.05, abs=2e-3), parameter


@pytest.mark.parametrize("name", ["chinchilla", "joint"])
def test_exponents_are_found_again_with_the_noise_of_seeds(name):
    found = fit(_records(name), name)
    assert found.rms < 1.2 * NOISE
    assert found.stuck == ""
    for parameter in ("alpha", "beta"):
        assert found.parameters[parameter] == pytest.approx(TRUTH[name][parameter], abs=0.06)


def test_intervals_hold_the_truth_and_say_what_is_identified():
    records = _records("chinchilla")
    told = scaling.estimates(records, fit(records, "chinchilla"), resamples=60)
    for parameter in ("alpha", "beta", "c"):
        estimate = told[parameter]
        assert estimate.low <= TRUTH["chinchilla"][parameter] <= estimate.high
        assert estimate.identified


def test_what_the_runs_do_not_tell_is_not_identified():
    """Two sizes near each other: any exponent will do."""
    records = _records("chinchilla", sizes=(1e5, 1.1e5))
    told = scaling.estimates(records, fit(records, "chinchilla"), resamples=60)
    assert not told["a"].identified
    assert told["beta"].identified


def test_one_outlier_hardly_moves_the_fit():
    records = _records("chinchilla", noise=0.001)
    bad = [dataclasses.replace(records[0], loss=records[0].loss + 1.0), *records[1:]]
    found = fit(bad, "chinchilla")
    assert found.parameters["alpha"] == pytest.approx(TRUTH["chinchilla"]["alpha"], abs=0.05)


def test_a_fit_that_stays_at_its_start_or_ends_at_a_bound_says_so():
    names = ("alpha", "beta")
    low, high = np.array([0.01, 0.01]), np.array([2.0, 2.0])
    assert scaling.why_stuck(np.array([0.3, 0.5]), (0.3, 0.5), low, high, names) == "it never left its starting grid"
    assert "beta ended at its bound, 2" in scaling.why_stuck(np.array([0.3, 2.0]), (0.3, 0.5), low, high, names)
    assert scaling.why_stuck(np.array([0.3, 0.52]), (0.3, 0.5), low, high, names) == ""
    flat = [dataclasses.replace(record, loss=3.0) for record in _records("chinchilla", noise=0.0)]
    assert fit(flat, "chinchilla").stuck  # nothing to learn an exponent from


def test_the_largest_runs_are_predicted_by_the_others():
    records = _records("chinchilla", noise=0.002)
    largest = scaling.held_out(records, "chinchilla")
    assert largest.arm == max(records, key=lambda record: record.flops).arm
    assert largest.predicted == pytest.approx(largest.loss, abs=0.01)
    assert largest.deviation < 0.01


def test_the_largest_is_the_largest_model_of_a_budget_and_not_what_steps_were_rounded_up_to():
    records = [
        dataclasses.replace(r, flops=1e12 * (1.0005 if r.active == 30000 else 1)) for r in _records("chinchilla")
    ]
    assert scaling.held_out(records, "chinchilla").arm.startswith("3000000.0-")


def test_draws_of_too_few_sizes_are_counted_out():
    """Six arms and six needed: only a draw of each arm once has enough, about one in 65."""
    some = [r for r in _records("chinchilla", sizes=(3e4, 3e5, 3e6)) if r.tokens in (300_000, 10_000_000)]
    told = scaling.estimates(some, fit(some, "chinchilla"), resamples=200)
    assert 0 < told["alpha"].draws < 20
    records = _records("chinchilla")
    assert scaling.estimates(records, fit(records, "chinchilla"), resamples=10)["alpha"].draws == 10


def test_a_form_of_equal_tokens_is_not_fitted_to_others():
    with pytest.raises(BadInput, match="is of runs with equal tokens; here they have 300,000 to 10,000,000"):
        fit(_records("joint"), "routed")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda records: records[:4], "needs runs of 6 sizes; here are 2"),
        (lambda records: [r for r in records if r.active == 100000] * 2, "needs runs of 6 sizes"),
        (lambda records: [dataclasses.replace(r, active=7, experts=i) for i, r in enumerate(records, 1)], "of active"),
        (lambda records: [dataclasses.replace(records[0], loss=float("nan")), *records[1:]], "is not finite"),
        (lambda records: [dataclasses.replace(records[0], active=0), *records[1:]], "active=0 of .* above 0"),
        (lambda records: [dataclasses.replace(records[0], tokens=-5), *records[1:]], "tokens=-5 of .* above 0"),
        (lambda records: [dataclasses.replace(records[0], loss=-1.0), *records[1:]], "loss=-1 of .* above 0"),
    ],
)
def test_records_that_say_nothing_are_refused(change, sentence):
    with pytest.raises(BadInput, match=sentence):
        fit(change(_records("chinchilla")), "chinchilla")
