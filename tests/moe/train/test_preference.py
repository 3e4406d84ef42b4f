"""The losses of preferences, against closed forms, loops and finite differences in float64."""

import itertools
import math

import pytest
import torch

from moe.data.loader import NO_TARGET
from moe.train.preference import Answers, answer_log_probs, dpo_loss, reward_loss, token_log_probs

LENGTHS = torch.tensor([3, 1, 2, 5])


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def answers(log_prob_B, length_B=LENGTHS):
    return Answers(log_prob_B, length_B)


def test_log_probabilities_are_those_of_a_loop_over_tokens_and_untrained_places_count_nowhere():
    logits = drawn(2, 4, 5)
    targets = torch.tensor([[NO_TARGET, 2, 0, 4], [NO_TARGET, NO_TARGET, 1, NO_TARGET]])
    sums, counts = [0.0, 0.0], [0, 0]
    for b, s in itertools.product(range(2), range(4)):
        if (target := int(targets[b, s])) >= 0:
            weights = [math.exp(z) for z in logits[b, s].tolist()]
            sums[b] += math.log(weights[target] / sum(weights))
            counts[b] += 1
    found = answer_log_probs(logits, targets)
    assert found.log_prob_B.tolist() == pytest.approx(sums, rel=1e-12)
    assert found.length_B.tolist() == counts == [3, 1]
    assert found.per_token().tolist() == pytest.approx([sums[0] / 3, sums[1]], rel=1e-12)


def test_log_probabilities_are_in_float32_whatever_the_logits_are_in():
    logits = drawn(1, 2, 50).bfloat16()
    targets = torch.tensor([[7, 9]])
    assert token_log_probs(logits, targets).dtype == torch.float32
    torch.testing.assert_close(token_log_probs(logits, targets), token_log_probs(logits.float(), targets))


def test_a_temperature_divides_the_logits():
    logits, targets = drawn(1, 2, 5), torch.tensor([[1, 3]])
    torch.testing.assert_close(token_log_probs(logits, targets, 0.5), token_log_probs(2 * logits, targets))


def test_a_reward_loss_is_the_logarithm_of_how_often_the_preferred_one_wins():
    chosen, rejected = drawn(6), drawn(6, seed=1)
    wins = [1 / (1 + math.exp(-(c - r - 0.3))) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert reward_loss(chosen, rejected, 0.3).tolist() == pytest.approx([-math.log(p) for p in wins], rel=1e-12)
    assert reward_loss(torch.tensor([1000.0]), torch.tensor([-1000.0])).item() == 0
    assert reward_loss(torch.tensor([-1000.0]), torch.tensor([1000.0])).item() == 2000


def by_hand(policy, reference, lengths, beta, loss):
    """Pair by pair, in Python's own numbers."""
    losses = []
    for i in range(0, len(policy), 2):
        ratios = [policy[j] - reference[j] for j in (i, i + 1)]
        if loss != "sigmoid":
            ratios = [ratio / lengths[j] for ratio, j in zip(ratios, (i, i + 1), strict=True)]
        h = ratios[0] - ratios[1]
        losses.append((h - 1 / (2 * beta)) ** 2 if loss == "ipo" else math.log1p(math.exp(-beta * h)))
    return losses


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo"])
def test_dpo_is_what_it_is_by_hand_and_its_gradient_that_of_finite_differences(loss):
    policy, reference = drawn(4).requires_grad_(), drawn(4, seed=1)
    margins = dpo_loss(answers(policy), answers(reference), 0.3, loss)
    expected = by_hand(policy.tolist(), reference.tolist(), LENGTHS.tolist(), 0.3, loss)
    assert margins.loss_P.tolist() == pytest.approx(expected, rel=1e-12)
    total = lambda p: dpo_loss(answers(p), answers(reference), 0.3, loss).loss_P.sum()
    assert torch.autograd.gradcheck(total, (policy,))
    assert not margins.chosen_P.requires_grad


def test_the_reference_gets_no_gradient():
    policy, reference = drawn(4).requires_grad_(), drawn(4, seed=1).requires_grad_()
    dpo_loss(answers(policy), answers(reference), 0.3).loss_P.sum().backward()
    assert policy.grad.abs().min() > 0
    assert reference.grad is None


def test_a_policy_that_is_its_reference_knows_nothing():
    same = answers(drawn(4))
    assert dpo_loss(same, same, 0.3).loss_P.tolist() == pytest.approx([math.log(2)] * 2)


def test_only_the_summed_loss_moves_the_longer_of_two_answers_that_are_alike_by_token():
    policy, reference = LENGTHS * -0.9, LENGTHS * -1.0
    assert dpo_loss(answers(policy), answers(reference), 1.0).chosen_P.tolist() == pytest.approx([0.3, 0.2])
    assert dpo_loss(answers(policy), answers(reference), 1.0, "sigmoid_norm").chosen_P.tolist() == pytest.approx(
        [0.1] * 2
    )


def test_the_minimum_of_dpo_over_all_preferences_is_the_policy_that_the_paper_derives():
    """π ∝ ref · exp(r / beta), where preferences are Bradley-Terry's of rewards r (2305.18290, eq. 4)."""
    reward, beta = torch.tensor([0.0, 0.7, -0.4], dtype=torch.float64), 0.5
    reference = torch.log_softmax(drawn(3), 0)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    pairs = list(itertools.permutations(range(3), 2))
    index = torch.tensor(pairs).flatten()
    weight = torch.stack([torch.sigmoid(reward[i] - reward[j]) for i, j in pairs])
    one = torch.ones_like(index)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, 0)
        loss = (weight * dpo_loss(answers(policy[index], one), answers(reference[index], one), beta).loss_P).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.softmax(reference + reward / beta, 0)
    torch.testing.assert_close(torch.softmax(logits, 0).detach(), expected, rtol=1e-5, atol=1e-6)


def test_ipo_is_0_where_the_log_ratios_differ_by_half_of_one_over_beta():
    policy = torch.tensor([3 * 2.0, -0.5], dtype=torch.float64)
    lengths = torch.tensor([3, 1])
    margins = dpo_loss(Answers(policy, lengths), Answers(torch.zeros(2), lengths), 0.2, "ipo")
    assert margins.loss_P.tolist() == pytest.approx([0.0], abs=1e-12)


def test_a_loss_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="loss='hinge' is not one of sigmoid, sigmoid_norm, ipo"):
        dpo_loss(answers(drawn(4)), answers(drawn(4)), 0.1, "hinge")
