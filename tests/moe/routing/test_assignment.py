"""The BASE router and its assignment, against scipy's."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.routing.assignment import BaseRouter, auction, balanced_assignment, place
from moe.routing.linear import FAR, bounded
from tests.moe.routing.batch_routers import (
    D,
    E,
    best_total,
    even,
    make_router,
    route,
    states,
    total,
)

sizes = {"n_tokens": st.integers(1, 40), "n_experts": st.integers(1, 9), "seed": st.integers(0, 2**31)}


@settings(max_examples=120, deadline=None)
@given(**sizes, epsilon=st.sampled_from([1e-6, 1e-3, 0.1, 1.0]), common=st.sampled_from([0.0, 1.0, 30.0]))
def test_the_assignment_is_even_and_within_epsilon_per_token_of_the_best(n_tokens, n_experts, seed, epsilon, common):
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randn(n_tokens, n_experts, dtype=torch.float64, generator=generator)
    score_TE = score_TE + common * torch.randn(n_experts, dtype=torch.float64, generator=generator)
    expert_T = balanced_assignment(score_TE, epsilon)
    assert even(expert_T, n_tokens, n_experts)
    assert total(score_TE, expert_T) >= best_total(score_TE.numpy()) - n_tokens * epsilon - 1e-9


@settings(max_examples=120, deadline=None)
@given(**sizes, spread=st.sampled_from([0, 1, 2, 5, 1000]))
def test_for_whole_scores_and_epsilon_below_one_over_t_the_assignment_is_the_best(n_tokens, n_experts, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randint(-spread, spread + 1, (n_tokens, n_experts), generator=generator).double()
    expert_T = balanced_assignment(score_TE, 0.5 / n_tokens)
    assert even(expert_T, n_tokens, n_experts)
    assert total(score_TE, expert_T) == best_total(score_TE.numpy())


@settings(max_examples=60, deadline=None)
@given(**sizes, spread=st.sampled_from([1, 3, 100]))
def test_shortest_paths_alone_find_the_best_assignment(n_tokens, n_experts, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randint(-spread, spread + 1, (n_tokens, n_experts), generator=generator).double()
    nobody_T, price_E = torch.full((n_tokens,), -1), torch.zeros(n_experts, dtype=torch.float64)
    expert_T = place(score_TE, nobody_T, price_E)
    assert even(expert_T, n_tokens, n_experts)
    assert total(score_TE, expert_T) == best_total(score_TE.numpy())


@settings(max_examples=60, deadline=None)
@given(n_tokens=st.integers(2, 40), n_experts=st.integers(2, 9), seed=st.integers(0, 2**31), coarse=st.booleans())
def test_after_an_auction_whoever_has_a_place_is_within_epsilon_of_its_best(n_tokens, n_experts, seed, coarse):
    n_tokens = max(n_tokens, n_experts)
    score_TE = torch.randn(n_tokens, n_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    start_T, start_E = torch.full((n_tokens,), -1), torch.zeros(n_experts, dtype=torch.float64)
    if coarse:  # from the prices and places that a larger epsilon left
        start_T, start_E = auction(score_TE, start_T, start_E, 0.5, 0)
    expert_T, price_E = auction(score_TE, start_T, start_E, 0.01, 0)
    placed = expert_T >= 0
    profit_TE = (score_TE - price_E)[placed]
    own_T = profit_TE.gather(1, expert_T[placed][:, None]).squeeze(1)
    assert (own_T >= profit_TE.amax(1) - 0.01 - 1e-12).all()
    assert torch.bincount(expert_T[placed], minlength=n_experts).max() <= n_tokens // n_experts


values = st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e30, 3e38, math.inf, -math.inf, math.nan])


@settings(max_examples=80, deadline=None)
@given(
    n_experts=st.integers(1, 6),
    rows=st.lists(st.lists(values, min_size=6, max_size=6), max_size=20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(n_experts=4, rows=[], dtype=torch.float32)
@example(n_experts=4, rows=[[math.inf] * 6] * 9, dtype=torch.float32)
@example(n_experts=4, rows=[[math.nan] * 6] * 9, dtype=torch.float64)
def test_any_scores_whatever_get_an_even_assignment_twice_the_same(n_experts, rows, dtype):
    score_TE = torch.tensor(rows, dtype=dtype).reshape(len(rows), 6)[:, :n_experts]
    expert_T = balanced_assignment(score_TE)
    assert even(expert_T, len(rows), n_experts)
    assert torch.equal(expert_T, balanced_assignment(score_TE))


def test_a_token_with_an_infinite_score_gets_that_expert_and_the_others_are_placed_as_without_it():
    score_TE = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    infinite_TE, huge_TE, large_TE = score_TE.clone(), score_TE.clone(), score_TE.clone()
    infinite_TE[4, 2], huge_TE[4, 2], large_TE[4, 2] = math.inf, 1e30, 1e4
    expert_T = balanced_assignment(infinite_TE)
    assert expert_T[4] == 2
    assert torch.equal(expert_T, balanced_assignment(huge_TE))
    assert total(large_TE, expert_T) >= best_total(large_TE.numpy()) - 12 * 1e-4


def test_bounded_scores_are_differences_from_the_best_within_a_finite_range():
    score_TE = torch.tensor(
        [
            [1.0, 3.0, 2.0],
            [math.inf, 0.0, math.inf],
            [-math.inf, 0.0, -5.0],
            [math.nan, 1.0, -1e30],
            [-math.inf, -math.inf, -math.inf],
            [3e38, -3e38, 0.0],
        ]
    )
    want_TE = [[-2, 0, -1], [0, -FAR, 0], [-FAR, 0, -5], [-FAR, 0, -FAR], [0, 0, 0], [0, -FAR, -FAR]]
    for dtype in (torch.float32, torch.float64):
        assert bounded(score_TE.to(dtype)).tolist() == want_TE


def test_an_auction_goes_on_until_enough_places_are_taken():
    """What it leaves, shortest paths place one by one: right, but slow."""
    generator = torch.Generator().manual_seed(0)
    score_TE = torch.randn(128, 8, dtype=torch.float64, generator=generator)
    score_TE = score_TE + 3 * torch.randn(8, dtype=torch.float64, generator=generator)
    free = {}
    for enough in (0, 16, 128):
        expert_T, _ = auction(score_TE, torch.full((128,), -1), torch.zeros(8, dtype=torch.float64), 0.1, enough)
        free[enough] = int((expert_T < 0).sum())
    assert free[0] == 0 < free[16] <= 16 < free[128]


def test_price_wars_and_a_single_favourite_end_soon():
    """Near ties and one common order of the experts: an auction alone would raise prices by epsilon for long."""
    generator = torch.Generator().manual_seed(0)
    tied_TE = torch.randint(0, 2, (96, 8), generator=generator).double()
    favourite_TE = torch.arange(8.0).expand(96, 8).double() * 1000
    for score_TE in (tied_TE, favourite_TE):
        expert_T = balanced_assignment(score_TE, 1e-9)
        assert even(expert_T, 96, 8)
        assert total(score_TE, expert_T) == best_total(score_TE.numpy())


def test_the_assignment_is_one_opaque_operator():
    score_TE = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.switchyard.balanced_assignment, (score_TE, 1e-3), test_utils=checks)


def test_base_gives_every_expert_its_share_of_tokens_and_the_best_total():
    for n_tokens in (40, 43, 3):
        x_TD, router = states(n_tokens), make_router("base")
        routing = route(router, x_TD)
        assert routing.expert.shape == routing.weight.shape == (n_tokens, 1)
        assert even(routing.expert[:, 0], n_tokens, E)
        logits_TE = (x_TD @ router.w_ED.T).detach()
        assert total(logits_TE, routing.expert[:, 0]) >= best_total(logits_TE.numpy()) - n_tokens * 1e-4


@pytest.mark.parametrize("training", [True, False])
def test_base_weighs_an_expert_by_the_sigmoid_of_its_logit(training):
    router, x_TD = make_router("base").train(training), states()
    routing = route(router, x_TD)
    for t, e in enumerate(routing.expert[:, 0].tolist()):
        logit = sum(x_TD[t, d].item() * router.w_ED[e, d].item() for d in range(D))
        assert routing.weight[t, 0].item() == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-12)


def test_base_takes_the_best_expert_in_evaluation():
    router, x_TD = make_router("base").eval(), states()
    assert torch.equal(route(router, x_TD).expert[:, 0], (x_TD @ router.w_ED.T).argmax(-1))
    assert route(router, torch.zeros(3, D, dtype=torch.float64)).expert.tolist() == [[0]] * 3  # ties: the lower


def test_base_refuses_more_than_one_expert_per_token():
    with pytest.raises(AssertionError, match="K=2"):
        BaseRouter(RouterConfig(name="base"), D, MoEConfig(n_experts=4, k=2))
