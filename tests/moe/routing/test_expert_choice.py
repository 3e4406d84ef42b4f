"""Expert choice in training and its three ways to decide in evaluation."""

import math

import pytest
import torch

from moe.config.balance import BalanceConfig
from moe.routing.contract import UNUSED
from moe.routing.expert_choice import best_tokens
from tests.moe.routing.batch_routers import (
    E,
    make_router,
    route,
    states,
    weight_table,
)


@pytest.mark.parametrize(("n_tokens", "k", "capacity"), [(40, 2, 16), (41, 2, 17), (3, 2, 2), (1, 1, 1), (4, 5, 4)])
def test_every_expert_takes_exactly_its_capacity_and_the_best_tokens(n_tokens, k, capacity):
    router, x_TD = make_router("expert-choice", k=k, scale=0.5), states(n_tokens)
    routing = route(router, x_TD)
    token_N, expert_N, weight_N = routing.rows()
    assert torch.bincount(expert_N, minlength=E).tolist() == [capacity] * E
    score_TE = (x_TD @ router.w_ED.T).softmax(-1).tolist()
    want = set()
    for e in range(E):
        best = sorted(range(n_tokens), key=lambda t: (-score_TE[t][e], t))[:capacity]
        want |= {(t, e) for t in best}
    rows = list(zip(token_N.tolist(), expert_N.tolist(), strict=True))
    assert rows == sorted(want)  # by token, then by expert
    assert weight_N.tolist() == pytest.approx([score_TE[t][e] / 2 for t, e in rows], rel=1e-12)
    assert token_N.dtype == expert_N.dtype == torch.int64


def test_expert_choice_never_renormalises():
    table_TE = weight_table(make_router("expert-choice", renormalize=True), states())
    assert torch.equal(table_TE, weight_table(make_router("expert-choice", renormalize=False), states()))
    assert table_TE.sum(-1).max() <= 1


def test_among_equal_scores_experts_take_the_earlier_tokens():
    token_CE, _ = best_tokens(torch.full((7, 3), 1 / 3), 1)
    assert token_CE.tolist() == [[0] * 3, [1] * 3, [2] * 3]
    token_CE, best_CE = best_tokens(torch.tensor([[0.0], [math.inf], [-math.inf], [math.inf]]), 1)
    assert token_CE[:, 0].tolist() == [1, 3, 0, 2]
    assert best_CE[:, 0].tolist() == [math.inf, math.inf, 0.0, -math.inf]


def test_the_cutoff_is_the_running_mean_of_the_worst_score_an_expert_took():
    router = make_router("expert-choice-threshold", decay=0.75)
    assert router.cutoff_E.tolist() == pytest.approx([1 / E] * E)
    want = None
    for step in range(3):
        observed, worst = {}, []
        for micro in range(2):
            x_TD = states(30, seed=10 * step + micro)
            routing = route(router, x_TD)
            for name, value in routing.observed.items():
                observed[name] = observed.get(name, 0) + value
            token_N, expert_N, _ = routing.rows()
            score_TE = (x_TD @ router.w_ED.T).softmax(-1)
            worst.append([min(score_TE[t, e].item() for t in token_N[expert_N == e].tolist()) for e in range(E)])
        mean = [(a + b) / 2 for a, b in zip(*worst, strict=True)]
        want = mean if want is None else [0.75 * old + 0.25 * new for old, new in zip(want, mean, strict=True)]
        router.update(BalanceConfig(), 0.0, torch.zeros(E), observed)
        assert router.cutoff_E.tolist() == pytest.approx(want, rel=1e-12)
        assert router.seen == step + 1
    assert {"cutoff_E", "seen"} <= set(router.state_dict())


def test_a_step_without_tokens_leaves_the_cutoff_as_it_is():
    router = make_router("expert-choice-threshold")
    for n_tokens, seen in ((0, 0), (30, 1), (0, 1)):
        before = router.cutoff_E.clone()
        router.update(BalanceConfig(), 0.0, torch.zeros(E), route(router, states(n_tokens)).observed)
        assert router.seen == seen
        assert torch.equal(before, router.cutoff_E) == (n_tokens == 0)


def test_with_a_threshold_an_expert_takes_whoever_reaches_its_cutoff():
    router, x_TD = make_router("expert-choice-threshold", scale=2.0).eval(), states()
    router.cutoff_E.copy_(torch.tensor([0.0, 0.1, 0.3, 0.6, 2.0]))
    routing = route(router, x_TD)
    assert routing.token_N is None
    score_TE = (x_TD @ router.w_ED.T).softmax(-1)
    for t in range(len(x_TD)):
        for e, cutoff in enumerate(router.cutoff_E.tolist()):
            taken = score_TE[t, e].item() >= cutoff
            assert routing.expert[t, e] == (e if taken else UNUSED)
            assert routing.weight[t, e].item() == pytest.approx(2 * score_TE[t, e].item() if taken else 0, rel=1e-12)


def test_a_trained_threshold_takes_about_k_experts_per_token():
    router = make_router("expert-choice-threshold", k=2, decay=0.9)
    for step in range(40):
        observed = route(router, states(100, seed=step)).observed
        router.update(BalanceConfig(), 0.0, torch.zeros(E), observed)
    taken = (route(router.eval(), states(2000, seed=99)).expert >= 0).double().sum(-1).mean()
    assert taken.item() == pytest.approx(2, rel=0.1)


def test_the_predictors_loss_is_the_cross_entropy_against_the_choice():
    router, x_TD = make_router("expert-choice-predictor"), states(20).requires_grad_()
    routing = route(router, x_TD)
    token_N, expert_N, _ = routing.rows()
    taken = set(zip(token_N.tolist(), expert_N.tolist(), strict=True))
    total = 0.0
    for t in range(20):
        for e in range(E):
            p = 1 / (1 + math.exp(-(x_TD[t] @ router.w_predict_ED[e] + router.predict_bias_E[e]).item()))
            total -= math.log(p if (t, e) in taken else 1 - p)
    loss = routing.losses["predictor"]
    assert loss.item() == pytest.approx(total / (20 * E), rel=1e-12)
    loss.backward()
    assert router.w_predict_ED.grad.abs().sum() > 0
    assert router.predict_bias_E.grad.abs().sum() > 0
    assert x_TD.grad is None  # the predictor learns from the states and does not shape them
    assert router.w_ED.grad is None


def test_a_trained_predictor_agrees_with_the_choice():
    router, x_TD = make_router("expert-choice-predictor", k=2), states(200)
    x_TD = x_TD - x_TD.mean(0)  # states that no direction tells how few are taken
    optimizer = torch.optim.Adam([router.w_predict_ED, router.predict_bias_E], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        route(router, x_TD).losses["predictor"].backward()
        optimizer.step()
    chosen_TE = weight_table(router, x_TD) > 0
    predicted_TE = weight_table(router.eval(), x_TD) > 0
    assert (chosen_TE == predicted_TE).double().mean() > 0.85
    assert predicted_TE.sum(-1).double().mean().item() == pytest.approx(2, rel=0.15)


def test_in_evaluation_a_predictor_takes_whoever_has_a_logit_of_at_least_zero():
    router, x_TD = make_router("expert-choice-predictor").eval(), states()
    with torch.no_grad():
        router.predict_bias_E.copy_(torch.linspace(-1, 1, E))
    routing = route(router, x_TD)
    want_TE = torch.where(x_TD @ router.w_predict_ED.T + torch.linspace(-1, 1, E) >= 0, torch.arange(E), UNUSED)
    assert torch.equal(routing.expert, want_TE)
    score_TE = (x_TD @ router.w_ED.T).softmax(-1)
    torch.testing.assert_close(routing.weight, torch.where(want_TE >= 0, score_TE, 0.0))
    assert routing.losses is None
    with torch.no_grad():
        router.w_predict_ED.zero_()
        router.predict_bias_E.zero_()
    assert (route(router, x_TD).expert >= 0).all()


def test_only_what_a_variant_learns_from_is_returned():
    for case, observed, losses in (
        ("sinkhorn", None, None),
        ("base", None, None),
        ("expert-choice", None, None),
        ("expert-choice-threshold", ["cutoff_E", "batches"], None),
        ("expert-choice-predictor", None, ["predictor"]),
    ):
        routing = route(make_router(case), states())
        assert (routing.observed and list(routing.observed)) == observed
        assert (routing.losses and list(routing.losses)) == losses
        quiet = route(make_router(case).eval(), states())
        assert quiet.observed is quiet.losses is None
