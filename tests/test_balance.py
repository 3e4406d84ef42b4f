"""The balancing losses against loops over numbers, and the bias update in a loop that it must balance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from moe import balance


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**31))
def test_load_balancing_loss_is_the_formula(n_tokens, n_experts, seed):
    rng = np.random.default_rng(seed)
    prob = rng.dirichlet(np.ones(n_experts), n_tokens)
    count = rng.integers(0, 9, n_experts)
    expected = 0.0
    for i in range(n_experts):
        share = count[i] / count.sum() if count.sum() else 0.0
        expected += share * sum(prob[t, i] for t in range(n_tokens)) / n_tokens
    got = balance.load_balancing_loss(torch.from_numpy(prob.sum(0)), torch.from_numpy(count), n_tokens)
    np.testing.assert_allclose(got, n_experts * expected, rtol=1e-12)


@pytest.mark.parametrize(("n_experts", "k"), [(4, 1), (6, 3)])
def test_load_balancing_loss_is_one_when_uniform_and_e_over_k_when_k_experts_take_all(n_experts, k):
    uniform = torch.full((6, n_experts), 1 / n_experts, dtype=torch.float64)
    even, hot = torch.full((n_experts,), 3), torch.tensor([6] * k + [0] * (n_experts - k))
    collapsed = (hot / hot.sum()).double().expand(6, n_experts)
    torch.testing.assert_close(balance.load_balancing_loss(uniform.sum(0), even, 6).item(), 1.0)
    torch.testing.assert_close(balance.load_balancing_loss(collapsed.sum(0), hot, 6).item(), n_experts / k)


def test_load_balancing_gradient_reaches_the_scores_by_share_of_load():
    prob = torch.full((2, 3), 1 / 3, dtype=torch.float64, requires_grad=True)
    balance.load_balancing_loss(prob.sum(0), torch.tensor([4, 0, 2]), 2).backward()
    np.testing.assert_allclose(prob.grad, [[3 * 4 / 6 / 2, 0, 3 * 2 / 6 / 2]] * 2)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_z_loss_is_the_formula(n_tokens, n_experts, seed):
    logits = np.random.default_rng(seed).normal(0, 3, (n_tokens, n_experts))
    expected = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits) / n_tokens
    np.testing.assert_allclose(balance.z_loss(torch.from_numpy(logits).logsumexp(-1)), expected, rtol=1e-11)


def test_z_loss_of_huge_logits_is_finite():
    assert balance.z_loss(torch.full((2, 3), 1e4).logsumexp(-1)).item() == pytest.approx(
        (1e4 + math.log(3)) ** 2, rel=1e-6
    )


def test_no_token_has_losses_of_zero():
    assert balance.load_balancing_loss(torch.zeros(3), torch.zeros(3, dtype=torch.int64), 0) == 0
    assert balance.z_loss(torch.zeros(0)) == 0


def test_the_bias_rises_below_the_mean_load_and_falls_above_it():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    balance.update_bias(bias, torch.tensor([8, 4, 0, 4]), 0.25)
    assert bias.tolist() == [0.25, 0.5, 0.75, 0.5]


def test_the_bias_update_balances_a_skewed_router():
    generator = torch.Generator().manual_seed(0)
    skew, bias = torch.linspace(-1, 1, 8), torch.zeros(8)

    def load():
        logits = skew + torch.randn(512, 8, generator=generator)
        expert = reference.gate(logits, 2, "sigmoid", bias, True, 1.0)[0]
        return torch.bincount(expert.flatten(), minlength=8)

    violation = lambda count: (count.max() / count.float().mean() - 1).item()
    before = violation(load())
    for _ in range(400):
        balance.update_bias(bias, load(), 0.003)
    after = [violation(load()) for _ in range(5)]
    assert before > 1.0
    assert max(after) < 0.25
