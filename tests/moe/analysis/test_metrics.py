"""Claims about the routing metrics, against NumPy and by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.analysis.metrics import (
    coverage,
    cv_squared,
    dead_experts,
    effective_experts,
    gini,
    layer_metrics,
    load_entropy,
    load_ratio,
    max_violation,
    starved_experts,
)
from moe.config.model import MoEConfig

counts = st.lists(st.integers(0, 10**6), min_size=1, max_size=40)


@given(counts)
def test_max_violation_is_the_excess_of_the_busiest_over_the_mean(count):
    expected = max(count) / np.mean(count) - 1 if sum(count) else 0.0
    assert max_violation(torch.tensor(count)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(counts)
def test_load_entropy_is_the_normalised_entropy_of_the_shares(count):
    share = np.array([c for c in count if c], dtype=np.float64) / max(1, sum(count))
    degenerate = len(count) == 1 or not sum(count)
    expected = 1.0 if degenerate else -np.sum(share * np.log(share)) / np.log(len(count))
    assert load_entropy(torch.tensor(count)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert -1e-12 <= load_entropy(torch.tensor(count)) <= 1 + 1e-12


@given(counts)
def test_dead_experts_are_those_without_a_row(count):
    assert dead_experts(torch.tensor(count)) == count.count(0)


@given(counts, st.integers(0, 10**6))
def test_the_dropped_share_is_of_all_rows_and_the_skipped_one_of_all_tokens(count, dropped):
    entry = layer_metrics(3, torch.tensor(count), dropped, 3, 12)
    assert entry.skipped == 0.25
    assert entry.layer == 3
    total = sum(count) + dropped
    assert entry.dropped == pytest.approx(dropped / total if total else 0.0)


def test_an_even_load_and_a_collapsed_one_are_the_two_ends():
    even, collapsed = torch.full((8,), 5), torch.tensor([40, 0, 0, 0, 0, 0, 0, 0])
    assert max_violation(even) == 0
    assert max_violation(collapsed) == 7
    assert load_entropy(even) == pytest.approx(1.0)
    assert load_entropy(collapsed) == 0
    assert effective_experts(even) == pytest.approx(8)
    assert effective_experts(collapsed) == 1
    assert effective_experts(torch.zeros(8, dtype=torch.int64)) == 0
    assert dead_experts(collapsed) == 7


def test_an_entry_is_plain_numbers():
    entry = dataclasses.asdict(layer_metrics(0, torch.tensor([1, 2, 3]), 0, 0, 6, losses={"aux": 1.5}))
    assert entry.pop("losses") == {"aux": 1.5}
    assert {type(value) for value in entry.values()} <= {int, float, type(None)}


def test_what_was_watched_is_told_against_what_it_could_be():
    seen = {
        "prob": torch.tensor([6.0, 2.0, 1.0, 1.0]),  # of ten tokens
        "entropy": torch.tensor(10 * math.log(4) / 2),
        "bias": torch.tensor([0.1, -0.7, 0.2, 0.0]),
        "gradient": torch.tensor([2.0, 0.5, 8.0, 2.0]),
    }
    entry = layer_metrics(0, torch.tensor([9, 9, 1, 0]), 10, 0, 10, seen=seen)
    assert entry.entropy == pytest.approx(0.5)
    assert entry.bias == pytest.approx(0.7)
    assert entry.weakest == 0.25
    assert entry.starved == 1
    nothing = layer_metrics(0, torch.tensor([9, 9, 1, 0]), 0, 0, 10)
    assert (nothing.entropy, nothing.bias, nothing.weakest) == (None,) * 3


def test_a_layer_in_which_most_experts_have_no_gradient_has_no_weakest():
    entry = layer_metrics(0, torch.tensor([9, 0, 0]), 0, 0, 10, seen={"gradient": torch.tensor([1.0, 0.0, 0.0])})
    assert entry.weakest is None


def test_rows_per_token_weigh_an_experts_width_and_leave_cheap_ones_out():
    moe = MoEConfig(n_experts=2, widths=[10, 30], n_null=1)
    assert layer_metrics(0, torch.tensor([4, 2, 9]), 0, 0, 8, moe.work()).rows == (4 * 0.5 + 2 * 1.5) / 8
    assert layer_metrics(0, torch.tensor([4, 2, 9]), 0, 0, 8).rows == 15 / 8


@given(counts)
def test_gini_is_the_mean_difference_of_two_experts_over_twice_the_mean(count):
    values = np.array(count, dtype=np.float64)
    differences = np.abs(values[:, None] - values[None, :]).sum()
    expected = differences / (2 * len(values) * values.sum()) if values.sum() else 0.0
    assert gini(torch.tensor(count)) == pytest.approx(expected, abs=1e-9)


@given(counts)
def test_coverage_is_what_the_busiest_take_together(count):
    expected = [sum(sorted(count, reverse=True)[: n + 1]) / max(1, sum(count)) for n in range(len(count))]
    assert coverage(torch.tensor(count)).tolist() == pytest.approx(expected)


@given(counts)
def test_cv_squared_is_the_variance_over_the_squared_mean(count):
    expected = np.var(count) / np.mean(count) ** 2 if sum(count) else 0.0
    assert cv_squared(torch.tensor(count)) == pytest.approx(expected, abs=1e-9)


@given(counts)
def test_starved_experts_have_less_than_a_tenth_of_a_fair_load(count):
    fair = sum(count) / len(count)
    assert starved_experts(torch.tensor(count)) == sum(c < 0.1 * fair if fair else True for c in count)
    assert load_ratio(torch.tensor(count)).tolist() == pytest.approx([c / fair if fair else 0.0 for c in count])


def test_the_two_ends_of_every_measure_of_a_load():
    even, collapsed = torch.full((8,), 5), torch.tensor([40, 0, 0, 0, 0, 0, 0, 0])
    assert (gini(even), gini(collapsed)) == (pytest.approx(0), pytest.approx(7 / 8))
    assert (cv_squared(even), cv_squared(collapsed)) == (0, pytest.approx(7))
    assert (starved_experts(even), starved_experts(collapsed)) == (0, 7)
    assert coverage(even)[3].item() == pytest.approx(0.5)
