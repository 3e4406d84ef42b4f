"""The contract between routers and what follows them: rows of either form, and probabilities."""

import pytest
import torch

from moe.routing.contract import Routing, probabilities


def test_rows_name_every_choice_in_token_order():
    expert, weight = torch.tensor([[2, 0], [1, -1]]), torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    fixed = Routing(expert, weight, None, torch.zeros(2, 3), torch.zeros(2), torch.zeros(3))
    assert [each.tolist() for each in fixed.rows()] == [[0, 0, 1, 1], [2, 0, 1, -1], [0.5, 0.25, 1.0, 0.0]]
    ragged = Routing(torch.tensor([2, 1]), torch.tensor([1.0, 2.0]), torch.tensor([1, 1]), *fixed[3:])
    assert [each.tolist() for each in ragged.rows()] == [[1, 1], [2, 1], [1.0, 2.0]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus", "relu"])
def test_probabilities_are_the_scores_over_their_sum(score):
    logits_TE = torch.tensor([[0.5, -1.0, 2.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    scores = {
        "softmax": logits_TE.exp(),
        "sigmoid": 1 / (1 + (-logits_TE).exp()),
        "sqrt_softplus": (1 + logits_TE.exp()).log().sqrt(),
        "relu": logits_TE.clamp_min(0),
    }[score]
    expected = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(probabilities(logits_TE, score), expected, rtol=1e-12, atol=1e-12)
    routing = Routing(torch.zeros(2, 1), torch.ones(2, 1), None, logits_TE, score=score)
    torch.testing.assert_close(routing.prob_TE(), expected, rtol=1e-12, atol=1e-12)


def test_a_token_without_a_positive_score_has_no_probability_and_no_nan():
    assert probabilities(torch.tensor([[-1.0, -2.0]]), "relu").tolist() == [[0.0, 0.0]]


def test_a_router_without_scores_has_no_probabilities():
    with pytest.raises(AssertionError, match="without scores"):
        Routing(torch.zeros(2, 1), torch.ones(2, 1), None).prob_TE()
