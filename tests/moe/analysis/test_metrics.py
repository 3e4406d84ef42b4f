"""Claims about the routing metrics, against NumPy and by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.analysis.metrics import dead_experts, effective_experts, layer_metrics, load_entropy, max_violation
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
    assert {type(value) for value in entry.values()} <= {int, float}


def test_rows_per_token_weigh_an_experts_width_and_leave_cheap_ones_out():
    moe = MoEConfig(n_experts=2, widths=[10, 30], n_null=1)
    assert layer_metrics(0, torch.tensor([4, 2, 9]), 0, 0, 8, moe.work()).rows == (4 * 0.5 + 2 * 1.5) / 8
    assert layer_metrics(0, torch.tensor([4, 2, 9]), 0, 0, 8).rows == 15 / 8
