"""Claims about how decided a router is: brute force token by token, and the closed forms of the two ends."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moe.analysis import decisions


def _probabilities(seed, tokens=23, experts=6):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(experts, 0.4), tokens))


def _choices(seed, tokens=40, experts=7, k=3):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(np.array([generator.permutation(experts)[:k] for _ in range(tokens)]))


seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(1, 5))
def test_each_number_is_the_mean_over_tokens_of_what_a_loop_counts(seed, k):
    prob_TE = _probabilities(seed)
    ranked = [sorted(row.tolist(), reverse=True) for row in prob_TE]
    assert decisions.token_entropy(prob_TE) == pytest.approx(np.mean([stats.entropy(row) for row in ranked]))
    assert decisions.top_k_mass(prob_TE, k) == pytest.approx(np.mean([sum(row[:k]) for row in ranked]))
    assert decisions.margin(prob_TE, k) == pytest.approx(np.mean([row[k - 1] - row[k] for row in ranked]))


@given(seeds)
def test_router_information_is_the_divergence_of_tokens_from_their_mean(seed):
    prob_TE = _probabilities(seed)
    mean_E = prob_TE.mean(0).numpy()
    assert decisions.router_information(prob_TE) == pytest.approx(
        np.mean([stats.entropy(row, mean_E) for row in prob_TE])
    )


def test_the_ends_are_uniform_and_one_hot():
    uniform, sure = torch.full((12, 6), 1 / 6), torch.eye(6).repeat(2, 1)
    assert decisions.token_entropy(uniform) == pytest.approx(math.log(6))
    assert decisions.token_entropy(sure) == 0
    assert decisions.top_k_mass(uniform, 2) == pytest.approx(2 / 6)
    assert decisions.top_k_mass(sure, 1) == 1
    assert decisions.margin(uniform, 2) == 0
    assert decisions.margin(sure, 1) == 1
    assert decisions.margin(sure, 6) == 0
    assert decisions.router_information(uniform) == pytest.approx(0, abs=1e-12)
    assert decisions.router_information(sure) == pytest.approx(math.log(6))
    assert decisions.router_information(sure[:1].repeat(9, 1)) == pytest.approx(0, abs=1e-12)  # decided, and collapsed


@given(seeds)
def test_agreement_is_the_mean_share_of_shared_experts(seed):
    one, other = _choices(seed), _choices(seed + 1)
    expected = np.mean([len(set(a) & set(b)) / 3 for a, b in zip(one.tolist(), other.tolist(), strict=True)])
    assert decisions.agreement(one, other) == pytest.approx(expected)
    assert decisions.agreement(one, one.flip(-1)) == 1


def test_random_choices_agree_in_k_of_e():
    assert decisions.agreement(_choices(0, 20_000), _choices(1, 20_000)) == pytest.approx(3 / 7, abs=0.01)


def test_agreement_is_of_the_experts_that_a_token_took():
    one, other = torch.tensor([[0, -2], [1, 2], [-1, -2]]), torch.tensor([[0, -2], [2, 3], [-1, -2]])
    assert decisions.agreement(one, other) == 0.75  # all of one, half of the next; the last took none
    assert math.isnan(decisions.agreement(one[2:], other[2:]))


def test_a_flip_is_another_set_and_not_another_order():
    one, other = torch.tensor([[0, 1], [2, 3], [4, 5], [6, -1]]), torch.tensor([[1, 0], [2, 4], [4, 5], [6, 0]])
    assert decisions.route_flips(one, other) == 0.5


def test_no_tokens_are_no_numbers_to_divide_by():
    nothing = torch.zeros(0, 4)
    assert (
        decisions.token_entropy(nothing) == decisions.router_information(nothing) == decisions.margin(nothing, 2) == 0
    )
