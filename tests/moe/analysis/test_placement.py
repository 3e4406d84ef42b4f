"""Claims about what a load means for devices and decode batches."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.analysis import placement

loads = st.lists(st.integers(0, 1000), min_size=8, max_size=8)


@given(loads, st.sampled_from([1, 2, 4, 8]))
def test_a_device_has_its_experts_rows(load, n_devices):
    held = 8 // n_devices
    expected = [sum(load[d * held : (d + 1) * held]) for d in range(n_devices)]
    assert placement.device_load(torch.tensor(load), n_devices).tolist() == expected
    mean = sum(load) / n_devices
    assert placement.imbalance(torch.tensor(expected)) == pytest.approx(max(expected) / mean if mean else 1.0)


def test_the_ends_are_even_and_all_on_one_device():
    assert placement.imbalance(placement.device_load(torch.full((8,), 3), 4)) == 1
    assert placement.imbalance(placement.device_load(torch.tensor([9] + [0] * 7), 4)) == 4


@given(loads, st.sampled_from([(2, 0), (2, 2), (4, 4), (4, 8)]))
def test_copies_keep_every_row_and_no_device_has_more_slots_than_the_others(load, shape):
    n_devices, n_replicas = shape
    rows_D = placement.replicated_load(torch.tensor(load), n_devices, n_replicas)
    assert len(rows_D) == n_devices
    assert rows_D.sum().item() == pytest.approx(sum(load))


@given(st.lists(st.integers(0, 100), min_size=6, max_size=6))
def test_greedy_placement_is_within_a_sixth_of_the_best_there_is(load):
    """Longest first on two devices with three slots each, against all ways to halve six experts."""
    best = min(max(sum(half), sum(load) - sum(half)) for half in itertools.combinations(load, 3))
    assert placement.replicated_load(torch.tensor(load), 2, 0).max().item() <= best * 7 / 6 + 1e-9


def test_a_copy_of_the_busiest_expert_halves_what_it_costs():
    load = torch.tensor([80, 0, 10, 10, 10, 10, 0])
    plain = placement.replicated_load(load, 7, 0)
    copied = placement.replicated_load(load, 8, 1)
    assert plain.max() == 80
    assert copied.max() == 40


@pytest.mark.parametrize("arguments", [(torch.ones(8), 3), (torch.ones(8), 0)])
def test_devices_that_do_not_divide_the_experts_are_refused(arguments):
    with pytest.raises(ValueError, match="does not divide 8"):
        placement.device_load(*arguments)
    with pytest.raises(ValueError, match="does not divide 8"):
        placement.replicated_load(*arguments, 0)


def test_distinct_experts_are_counted_by_batch_and_none_is_no_expert():
    expert_TK = torch.tensor([[0, 1], [1, 2], [3, -1], [3, 3], [5, 6]])
    assert placement.distinct_experts(expert_TK, 2) == (3 + 1) / 2
    assert np.isnan(placement.distinct_experts(expert_TK, 6))


def test_random_tokens_touch_as_many_experts_as_expected():
    generator = np.random.default_rng(0)
    expert_TK = torch.from_numpy(np.array([generator.permutation(16)[:2] for _ in range(8 * 4000)]))
    assert placement.distinct_experts(expert_TK, 8) == pytest.approx(placement.expected_distinct(16, 2, 8), rel=0.01)
    assert placement.expected_distinct(16, 2, 1) == 2
