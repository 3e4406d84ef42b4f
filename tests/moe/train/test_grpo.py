"""GRPO's parts, against loops, enumeration and finite differences in float64."""

import math
import statistics

import pytest
import torch

from moe.errors import BadInput
from moe.train.grpo import advantages, clipped_loss, kl_estimate, token_weights

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.3, 0.3, 0.3, 0.3, 2.0, -1.0, 0.5, 0.25]
# Answers of 3, 1, 4 and 2 tokens behind prompts of one.
ANSWER = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalisation", ["grpo", "dr_grpo"])
def test_an_advantage_is_a_reward_against_its_group(normalisation):
    expected = []
    for i in range(0, len(REWARDS), 4):
        group = REWARDS[i : i + 4]
        mean, deviation = statistics.fmean(group), statistics.pstdev(group)
        scale = 1.0 if normalisation == "dr_grpo" else deviation
        expected += [(r - mean) / scale if deviation > 1e-12 else 0.0 for r in group]
    found = advantages(torch.tensor(REWARDS), 4, normalisation)
    assert found.advantage_B.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_group_without_variance_is_counted_and_teaches_nothing():
    """Although the deviation of equal numbers may be a rounding error above 0."""
    assert torch.full((7,), 0.1, dtype=torch.float64).std(correction=0) > 0
    found = advantages(torch.full((14,), 0.1, dtype=torch.float64), 7)
    assert found.flat == 2
    assert found.advantage_B.tolist() == [0.0] * 14
    assert advantages(torch.tensor(REWARDS), 4).flat == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(BadInput, match=f"the reward of an answer is {bad}: accepted is a finite number"):
        advantages(torch.tensor([0.0, 1.0, bad, 0.0]), 2)


def test_the_three_normalisations_are_the_papers_sums():
    values = drawn(4, 5)
    rows = [
        [v for v, m in zip(row, mask, strict=True) if m]
        for row, mask in zip(values.tolist(), ANSWER.tolist(), strict=True)
    ]
    expected = {
        "grpo": statistics.fmean(statistics.fmean(row) for row in rows),
        "dapo": sum(map(sum, rows)) / sum(map(len, rows)),
        "dr_grpo": sum(map(sum, rows)) / (4 * 6),
    }
    for normalisation, mean in expected.items():
        weights = token_weights(ANSWER, normalisation, longest=6).double()
        assert (weights * values).sum().item() == pytest.approx(mean, rel=1e-6)
        assert (weights[~ANSWER] == 0).all()
    with pytest.raises(ValueError, match="normalisation='ppo' is not one of grpo, dapo, dr_grpo"):
        token_weights(ANSWER, "ppo", 6)


def test_a_wrong_answer_that_is_longer_costs_less_a_token_under_grpo_alone():
    wrong = torch.tensor([-1.0, -1.0])
    answer = torch.tensor([[True, False, False, False], [True, True, True, True]])
    cost = lambda kind: (token_weights(answer, kind, 4) * -wrong[:, None])[:, 0].tolist()
    assert cost("grpo")[1] < cost("grpo")[0]
    assert cost("dapo")[1] == cost("dapo")[0]
    assert cost("dr_grpo")[1] == cost("dr_grpo")[0]


def test_a_clipped_loss_is_the_smaller_of_two_products():
    """With the four ways a ratio may lie to the advantage's sign and the limits."""
    for ratio, advantage in ((1.05, 1), (1.5, 1), (0.5, 1), (1.5, -1), (0.5, -1), (0.95, -1)):
        clipped = min(max(ratio, 0.8), 1.28)
        found = clipped_loss(
            torch.tensor([[math.log(ratio)]], dtype=torch.float64),
            torch.zeros(1, 1),
            torch.tensor([advantage]),
            0.2,
            0.28,
        )
        assert found.item() == pytest.approx(-min(ratio * advantage, clipped * advantage))


def test_a_ratio_beyond_its_limit_on_the_advantages_side_gives_no_gradient():
    for advantage, far, near in ((1.0, 0.5, -0.5), (-1.0, -0.5, 0.5)):
        for log_ratio, moves in ((far, False), (near, True)):
            log_prob = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
            clipped_loss(log_prob, torch.zeros(1, 1), torch.tensor([advantage]), 0.2, 0.2).sum().backward()
            assert (log_prob.grad.item() != 0) == moves


def test_the_gradient_of_the_clipped_loss_is_that_of_finite_differences():
    old = drawn(4, 5)
    log_prob = (old + 0.3 * drawn(4, 5, seed=1)).requires_grad_()
    loss = lambda p: (clipped_loss(p, old, drawn(4, seed=2), 0.2, 0.28) * ANSWER).sum()
    assert torch.autograd.gradcheck(loss, (log_prob,))


def test_at_ratios_of_1_the_gradient_is_reinforces():
    """−A · the gradient of the log-probability, although the loss itself is 0."""
    advantage = advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4).advantage_B
    log_prob = drawn(4, 5).requires_grad_()
    loss = (token_weights(ANSWER, "grpo", 5) * clipped_loss(log_prob, log_prob.detach(), advantage, 0.2, 0.2)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(log_prob.grad, (-advantage[:, None] * token_weights(ANSWER, "grpo", 5)).double())


V = 5


def _kl(p, q):
    return (p.exp() * (p - q)).sum()


def _gradients(estimate):
    """Of the estimate's mean over all V tokens drawn from `old`, of KL(π || ref) and of KL(ref || π), by the logits."""
    logits, reference = drawn(V).requires_grad_(), torch.log_softmax(drawn(V, seed=1), 0)
    policy = torch.log_softmax(logits, 0)
    mean = (policy.detach().exp() * estimate(policy, policy.detach(), reference)).sum()
    towards, back = _kl(policy, reference), _kl(reference, policy)
    gradient = lambda value: torch.autograd.grad(value, logits, retain_graph=True)[0]
    return (mean, towards), tuple(map(gradient, (mean, towards, back)))


def test_the_estimate_has_the_mean_and_the_gradient_of_the_exact_kl():
    (mean, exact), (estimated, towards, _) = _gradients(kl_estimate)
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimated, towards, rtol=1e-10, atol=1e-12)


def test_without_the_ratio_the_value_is_right_and_the_gradient_that_of_the_other_kl():
    k3 = lambda policy, old, reference: (reference - policy).exp() - (reference - policy) - 1
    (mean, exact), (estimated, towards, back) = _gradients(k3)
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimated, back, rtol=1e-10, atol=1e-12)
    assert (estimated - towards).abs().max() > 1e-2


def test_the_estimate_stays_right_where_the_tokens_were_drawn_from_another_policy():
    policy, old, reference = (torch.log_softmax(drawn(V, seed=seed), 0) for seed in range(3))
    mean = (old.exp() * kl_estimate(policy, old, reference)).sum()
    torch.testing.assert_close(mean, _kl(policy, reference), rtol=1e-12, atol=1e-12)
