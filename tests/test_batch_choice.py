"""The routers that decide over a batch: Sinkhorn, BASE, expert choice and soft, against independent oracles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moe.batch_choice import (
    FAR,
    BaseRouter,
    ExpertChoiceRouter,
    SinkhornRouter,
    SoftRouter,
    auction,
    balanced_assignment,
    best_tokens,
    bounded,
    place,
    sinkhorn,
)
from moe.config.balance import BalanceConfig
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.routing import UNUSED, Context

D, E = 6, 5
CASES = ["sinkhorn", "base", "expert-choice", "expert-choice-threshold", "expert-choice-predictor"]
CAUSAL_IN_EVAL = ["sinkhorn", "base", "expert-choice-threshold", "expert-choice-predictor"]


def _router(case, k=2, n_experts=E, d=D, dtype=torch.float64, **settings):
    """A router with random weights."""
    moe = MoEConfig(n_experts=n_experts, k=1 if case == "base" else k)
    if case.startswith("expert-choice"):
        settings["causal"] = case.removeprefix("expert-choice").removeprefix("-") or "none"
        router = ExpertChoiceRouter(RouterConfig(name="expert-choice", **settings), d, moe)
    else:
        kind = {"sinkhorn": SinkhornRouter, "base": BaseRouter, "soft": SoftRouter}[case]
        router = kind(RouterConfig(name=case, **settings), d, moe)
    generator = torch.Generator().manual_seed(0)
    for weight in router.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, generator=generator)
    return router.to(dtype)


def _x(n_tokens=40, dtype=torch.float64, seed=1):
    return torch.randn(n_tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _route(router, x_TD, n_sequences=1):
    return router(x_TD, "reference", Context(n_sequences=n_sequences))


def _weight_TE(router, x_TD):
    """The decision as a table: the weight of every token at every expert, 0 where it does not go."""
    token_N, expert_N, weight_N = _route(router, x_TD).rows()
    table_TE = torch.zeros(len(x_TD), router.n_experts, dtype=weight_N.dtype)
    used = expert_N >= 0
    assert len(set(zip(token_N[used].tolist(), expert_N[used].tolist(), strict=True))) == int(used.sum())
    return table_TE.index_put((token_N[used], expert_N[used]), weight_N[used])


def _best_total(score_TE):
    """The most that an even assignment can collect, by scipy: places as columns, and in every place beyond the
    floor(T/E) first ones of an expert a token or one of the rows that stand for nobody."""
    n_tokens, n_experts = score_TE.shape
    floor, rest = divmod(n_tokens, n_experts)
    value = np.repeat(score_TE, floor, axis=1)
    if rest:
        nobody = np.full((n_experts - rest, (floor + 1) * n_experts), -1e12)
        nobody[:, floor * n_experts :] = 0
        value = np.concatenate([np.concatenate([value, score_TE], axis=1), nobody])
    row, column = linear_sum_assignment(value, maximize=True)
    return value[row, column].sum()


def _total(score_TE, expert_T):
    return score_TE.double().gather(1, expert_T[:, None]).sum().item()


def _even(expert_T, n_tokens, n_experts):
    count = torch.bincount(expert_T, minlength=n_experts)
    return (
        len(expert_T) == n_tokens and count.min() >= n_tokens // n_experts and count.max() <= -(-n_tokens // n_experts)
    )


# --- BASE: the assignment ---------------------------------------------------------------------------------------------


sizes = {"n_tokens": st.integers(1, 40), "n_experts": st.integers(1, 9), "seed": st.integers(0, 2**31)}


@settings(max_examples=120, deadline=None)
@given(**sizes, epsilon=st.sampled_from([1e-6, 1e-3, 0.1, 1.0]), common=st.sampled_from([0.0, 1.0, 30.0]))
def test_the_assignment_is_even_and_within_epsilon_per_token_of_the_best(n_tokens, n_experts, seed, epsilon, common):
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randn(n_tokens, n_experts, dtype=torch.float64, generator=generator)
    score_TE = score_TE + common * torch.randn(n_experts, dtype=torch.float64, generator=generator)
    expert_T = balanced_assignment(score_TE, epsilon)
    assert _even(expert_T, n_tokens, n_experts)
    assert _total(score_TE, expert_T) >= _best_total(score_TE.numpy()) - n_tokens * epsilon - 1e-9


@settings(max_examples=120, deadline=None)
@given(**sizes, spread=st.sampled_from([0, 1, 2, 5, 1000]))
def test_for_whole_scores_and_epsilon_below_one_over_t_the_assignment_is_the_best(n_tokens, n_experts, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randint(-spread, spread + 1, (n_tokens, n_experts), generator=generator).double()
    expert_T = balanced_assignment(score_TE, 0.5 / n_tokens)
    assert _even(expert_T, n_tokens, n_experts)
    assert _total(score_TE, expert_T) == _best_total(score_TE.numpy())


@settings(max_examples=60, deadline=None)
@given(**sizes, spread=st.sampled_from([1, 3, 100]))
def test_shortest_paths_alone_find_the_best_assignment(n_tokens, n_experts, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randint(-spread, spread + 1, (n_tokens, n_experts), generator=generator).double()
    nobody_T, price_E = torch.full((n_tokens,), -1), torch.zeros(n_experts, dtype=torch.float64)
    expert_T = place(score_TE, nobody_T, price_E)
    assert _even(expert_T, n_tokens, n_experts)
    assert _total(score_TE, expert_T) == _best_total(score_TE.numpy())


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
    assert _even(expert_T, len(rows), n_experts)
    assert torch.equal(expert_T, balanced_assignment(score_TE))


def test_a_token_with_an_infinite_score_gets_that_expert_and_the_others_are_placed_as_without_it():
    score_TE = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    infinite_TE, huge_TE, large_TE = score_TE.clone(), score_TE.clone(), score_TE.clone()
    infinite_TE[4, 2], huge_TE[4, 2], large_TE[4, 2] = math.inf, 1e30, 1e4
    expert_T = balanced_assignment(infinite_TE)
    assert expert_T[4] == 2
    assert torch.equal(expert_T, balanced_assignment(huge_TE))
    assert _total(large_TE, expert_T) >= _best_total(large_TE.numpy()) - 12 * 1e-4


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
        assert _even(expert_T, 96, 8)
        assert _total(score_TE, expert_T) == _best_total(score_TE.numpy())


def test_the_assignment_is_one_opaque_operator():
    score_TE = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.switchyard.balanced_assignment, (score_TE, 1e-3), test_utils=checks)


def test_base_gives_every_expert_its_share_of_tokens_and_the_best_total():
    for n_tokens in (40, 43, 3):
        x_TD, router = _x(n_tokens), _router("base")
        routing = _route(router, x_TD)
        assert routing.expert.shape == routing.weight.shape == (n_tokens, 1)
        assert _even(routing.expert[:, 0], n_tokens, E)
        logits_TE = (x_TD @ router.w_ED.T).detach()
        assert _total(logits_TE, routing.expert[:, 0]) >= _best_total(logits_TE.numpy()) - n_tokens * 1e-4


@pytest.mark.parametrize("training", [True, False])
def test_base_weighs_an_expert_by_the_sigmoid_of_its_logit(training):
    router, x_TD = _router("base").train(training), _x()
    routing = _route(router, x_TD)
    for t, e in enumerate(routing.expert[:, 0].tolist()):
        logit = sum(x_TD[t, d].item() * router.w_ED[e, d].item() for d in range(D))
        assert routing.weight[t, 0].item() == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-12)


def test_base_takes_the_best_expert_in_evaluation():
    router, x_TD = _router("base").eval(), _x()
    assert torch.equal(_route(router, x_TD).expert[:, 0], (x_TD @ router.w_ED.T).argmax(-1))
    assert _route(router, torch.zeros(3, D, dtype=torch.float64)).expert.tolist() == [[0]] * 3  # ties: the lower


def test_base_refuses_more_than_one_expert_per_token():
    with pytest.raises(AssertionError, match="K=2"):
        BaseRouter(RouterConfig(name="base"), D, MoEConfig(n_experts=4, k=2))


# --- Sinkhorn ---------------------------------------------------------------------------------------------------------


def test_sinkhorns_columns_are_exact_and_its_rows_converge():
    logits_TE = 2 * torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for iterations in (1, 4, 16, 64):
        balanced_TE = sinkhorn(logits_TE, iterations).exp()
        torch.testing.assert_close(balanced_TE.sum(0), torch.full((5,), 6.0).double(), rtol=1e-12, atol=0)
        errors.append((balanced_TE.sum(1) - 1).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_sinkhorn_only_scales_rows_and_columns():
    """log of the ratio to exp(logits) is a sum of a term per row and one per column."""
    logits_TE = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor_TE = sinkhorn(logits_TE, 8) - logits_TE
    mixed_TE = factor_TE - factor_TE[:, :1] - factor_TE[:1] + factor_TE[0, 0]
    torch.testing.assert_close(mixed_TE, torch.zeros_like(mixed_TE), rtol=0, atol=1e-12)


def test_sinkhorn_equals_a_loop_over_numbers():
    logits_TE = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = [[math.exp(v) for v in row] for row in logits_TE.tolist()]
    for _ in range(8):
        table = [[v / sum(row) for v in row] for row in table]
        total = [sum(row[e] for row in table) for e in range(3)]
        table = [[row[e] / total[e] * 7 / 3 for e in range(3)] for row in table]
    torch.testing.assert_close(sinkhorn(logits_TE, 8).exp(), torch.tensor(table).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_is_finite_for_any_logits(bad, dtype):
    logits_TE = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits_TE[2, 1] = bad
    logits_TE[3] = bad
    logits_TE[:, 3] = bad
    assert sinkhorn(logits_TE, 8).isfinite().all()


def test_sinkhorn_loads_are_more_even_than_the_logits():
    router = _router("sinkhorn", k=1, iterations=50, renormalize=False)
    x_TD = _x(400) + 0.7  # a shift that all tokens share favours some experts
    load = {}
    for training in (True, False):
        load[training] = torch.bincount(_route(router.train(training), x_TD).expert.flatten(), minlength=E).max().item()
    assert load[True] < 0.7 * load[False]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_sinkhorn_takes_the_best_of_the_balanced_scores_weighted_by_the_plain_ones(renormalize, training):
    router = _router("sinkhorn", k=2, renormalize=renormalize, scale=2.5).train(training)
    x_TD = _x()
    routing = _route(router, x_TD)
    logits_TE = (x_TD @ router.w_ED.T).detach()
    rank_TE = sinkhorn(logits_TE, 8) if training else logits_TE
    for t in range(len(x_TD)):
        chosen = sorted(range(E), key=lambda e: (-rank_TE[t, e].item(), e))[:2]
        prob = [math.exp(v) for v in logits_TE[t].tolist()]
        weight = [prob[e] / sum(prob) for e in chosen]
        weight = [2.5 * w / (sum(weight) if renormalize else 1) for w in weight]
        assert routing.expert[t].tolist() == chosen
        assert routing.weight[t].tolist() == pytest.approx(weight, rel=1e-12)


def test_with_equal_scores_sinkhorn_takes_the_lower_experts():
    routing = _route(_router("sinkhorn", k=2), torch.zeros(6, D, dtype=torch.float64))
    assert routing.expert.tolist() == [[0, 1]] * 6
    assert routing.weight.tolist() == [[0.5, 0.5]] * 6


# --- Expert choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_tokens", "k", "capacity"), [(40, 2, 16), (41, 2, 17), (3, 2, 2), (1, 1, 1), (4, 5, 4)])
def test_every_expert_takes_exactly_its_capacity_and_the_best_tokens(n_tokens, k, capacity):
    router, x_TD = _router("expert-choice", k=k, scale=0.5), _x(n_tokens)
    routing = _route(router, x_TD)
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
    table_TE = _weight_TE(_router("expert-choice", renormalize=True), _x())
    assert torch.equal(table_TE, _weight_TE(_router("expert-choice", renormalize=False), _x()))
    assert table_TE.sum(-1).max() <= 1


def test_among_equal_scores_experts_take_the_earlier_tokens():
    token_CE, _ = best_tokens(torch.full((7, 3), 1 / 3), 1)
    assert token_CE.tolist() == [[0] * 3, [1] * 3, [2] * 3]
    token_CE, best_CE = best_tokens(torch.tensor([[0.0], [math.inf], [-math.inf], [math.inf]]), 1)
    assert token_CE[:, 0].tolist() == [1, 3, 0, 2]
    assert best_CE[:, 0].tolist() == [math.inf, math.inf, 0.0, -math.inf]


def test_the_cutoff_is_the_running_mean_of_the_worst_score_an_expert_took():
    router = _router("expert-choice-threshold", decay=0.75)
    assert router.cutoff_E.tolist() == pytest.approx([1 / E] * E)
    want = None
    for step in range(3):
        observed, worst = {}, []
        for micro in range(2):
            x_TD = _x(30, seed=10 * step + micro)
            routing = _route(router, x_TD)
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
    router = _router("expert-choice-threshold")
    for n_tokens, seen in ((0, 0), (30, 1), (0, 1)):
        before = router.cutoff_E.clone()
        router.update(BalanceConfig(), 0.0, torch.zeros(E), _route(router, _x(n_tokens)).observed)
        assert router.seen == seen
        assert torch.equal(before, router.cutoff_E) == (n_tokens == 0)


def test_with_a_threshold_an_expert_takes_whoever_reaches_its_cutoff():
    router, x_TD = _router("expert-choice-threshold", scale=2.0).eval(), _x()
    router.cutoff_E.copy_(torch.tensor([0.0, 0.1, 0.3, 0.6, 2.0]))
    routing = _route(router, x_TD)
    assert routing.token_N is None
    score_TE = (x_TD @ router.w_ED.T).softmax(-1)
    for t in range(len(x_TD)):
        for e, cutoff in enumerate(router.cutoff_E.tolist()):
            taken = score_TE[t, e].item() >= cutoff
            assert routing.expert[t, e] == (e if taken else UNUSED)
            assert routing.weight[t, e].item() == pytest.approx(2 * score_TE[t, e].item() if taken else 0, rel=1e-12)


def test_a_trained_threshold_takes_about_k_experts_per_token():
    router = _router("expert-choice-threshold", k=2, decay=0.9)
    for step in range(40):
        observed = _route(router, _x(100, seed=step)).observed
        router.update(BalanceConfig(), 0.0, torch.zeros(E), observed)
    taken = (_route(router.eval(), _x(2000, seed=99)).expert >= 0).double().sum(-1).mean()
    assert taken.item() == pytest.approx(2, rel=0.1)


def test_the_predictors_loss_is_the_cross_entropy_against_the_choice():
    router, x_TD = _router("expert-choice-predictor"), _x(20).requires_grad_()
    routing = _route(router, x_TD)
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
    router, x_TD = _router("expert-choice-predictor", k=2), _x(200)
    x_TD = x_TD - x_TD.mean(0)  # states that no direction tells how few are taken
    optimizer = torch.optim.Adam([router.w_predict_ED, router.predict_bias_E], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        _route(router, x_TD).losses["predictor"].backward()
        optimizer.step()
    chosen_TE = _weight_TE(router, x_TD) > 0
    predicted_TE = _weight_TE(router.eval(), x_TD) > 0
    assert (chosen_TE == predicted_TE).double().mean() > 0.85
    assert predicted_TE.sum(-1).double().mean().item() == pytest.approx(2, rel=0.15)


def test_in_evaluation_a_predictor_takes_whoever_has_a_logit_of_at_least_zero():
    router, x_TD = _router("expert-choice-predictor").eval(), _x()
    with torch.no_grad():
        router.predict_bias_E.copy_(torch.linspace(-1, 1, E))
    routing = _route(router, x_TD)
    want_TE = torch.where(x_TD @ router.w_predict_ED.T + torch.linspace(-1, 1, E) >= 0, torch.arange(E), UNUSED)
    assert torch.equal(routing.expert, want_TE)
    score_TE = (x_TD @ router.w_ED.T).softmax(-1)
    torch.testing.assert_close(routing.weight, torch.where(want_TE >= 0, score_TE, 0.0))
    assert routing.losses is None
    with torch.no_grad():
        router.w_predict_ED.zero_()
        router.predict_bias_E.zero_()
    assert (_route(router, x_TD).expert >= 0).all()


def test_only_what_a_variant_learns_from_is_returned():
    for case, observed, losses in (
        ("sinkhorn", None, None),
        ("base", None, None),
        ("expert-choice", None, None),
        ("expert-choice-threshold", ["cutoff_E", "batches"], None),
        ("expert-choice-predictor", None, ["predictor"]),
    ):
        routing = _route(_router(case), _x())
        assert (routing.observed and list(routing.observed)) == observed
        assert (routing.losses and list(routing.losses)) == losses
        quiet = _route(_router(case).eval(), _x())
        assert quiet.observed is quiet.losses is None


# --- Soft -------------------------------------------------------------------------------------------------------------


def test_soft_dispatch_sums_to_one_over_tokens_and_combine_over_slots():
    router = _router("soft", slots=3)
    mixture = _route(router, _x(24), n_sequences=4)
    assert mixture.dispatch_BSEP.shape == mixture.combine_BSEP.shape == (4, 6, E, 3)
    torch.testing.assert_close(mixture.dispatch_BSEP.sum(1), torch.ones(4, E, 3).double())
    torch.testing.assert_close(mixture.combine_BSEP.sum((2, 3)), torch.ones(4, 6).double())


def test_soft_equals_a_loop_over_numbers():
    router, x_TD = _router("soft", slots=2, n_experts=3), _x(8)
    with torch.no_grad():
        router.gain.fill_(3.0)
    mixture = _route(router, x_TD, n_sequences=2)

    def cosine(a, b):
        return sum(map(lambda u, v: u * v, a, b)) / math.hypot(*a) / math.hypot(*b)

    for b in range(2):
        x, phi = x_TD[4 * b : 4 * b + 4].tolist(), router.w_phi.tolist()
        weight = [[[math.exp(3 * cosine(x[s], phi[e][p])) for p in range(2)] for e in range(3)] for s in range(4)]
        for s in range(4):
            total = sum(map(sum, weight[s]))
            for e in range(3):
                for p in range(2):
                    column = sum(weight[r][e][p] for r in range(4))
                    assert mixture.dispatch_BSEP[b, s, e, p].item() == pytest.approx(weight[s][e][p] / column)
                    assert mixture.combine_BSEP[b, s, e, p].item() == pytest.approx(weight[s][e][p] / total)


def test_soft_ignores_the_length_of_states_and_slots_and_other_sequences():
    router, x_TD = _router("soft", slots=2), _x(12)
    plain = _route(router, x_TD, n_sequences=3)
    torch.testing.assert_close(_route(router, x_TD[4:8]).dispatch_BSEP[0], plain.dispatch_BSEP[1])
    with torch.no_grad():
        router.w_phi.mul_(7.0)
    scaled = _route(router, 5 * x_TD, n_sequences=3)
    torch.testing.assert_close(scaled.dispatch_BSEP, plain.dispatch_BSEP)
    torch.testing.assert_close(scaled.combine_BSEP, plain.combine_BSEP)


@pytest.mark.parametrize(
    ("slots", "n_experts", "k", "context", "expected"),
    [(3, 4, 2, 16, 3), (0, 4, 2, 16, 8), (0, 4, 1, 17, 5), (0, 4, 2, 0, 1), (0, 4, 4, 16, 16)],
)
def test_soft_has_the_slots_it_is_given_else_as_many_as_k_experts_cost(slots, n_experts, k, context, expected):
    cfg, moe = RouterConfig(name="soft", slots=slots), MoEConfig(n_experts=n_experts, k=k)
    router = SoftRouter(cfg, D, moe, context=context)
    assert router.w_phi.shape == (n_experts, expected, D)
    assert router.gain.shape == (1,)
    assert router.gain.item() == 1


def test_soft_refuses_tokens_that_are_not_sequences_of_one_length():
    with pytest.raises(AssertionError, match="7 tokens are not 2 sequences"):
        _route(_router("soft"), _x(7), n_sequences=2)
    with pytest.raises(AssertionError, match="there is no sequence"):
        _route(_router("soft"), _x(0), n_sequences=0)


def test_soft_gradients_are_derivatives():
    router = _router("soft", slots=2, n_experts=2)

    def both(x_TD, w_phi, gain):
        call = torch.func.functional_call
        return call(router, {"w_phi": w_phi, "gain": gain}, (x_TD, "reference", Context(n_sequences=2)))

    assert torch.autograd.gradcheck(both, (_x(6).requires_grad_(), router.w_phi, router.gain))


# --- All of them ------------------------------------------------------------------------------------------------------


def test_each_says_what_it_promises():
    promises = {
        "sinkhorn": (False, True, True, True),
        "base": (False, True, True, True),
        "expert-choice": (False, False, False, False),
        "expert-choice-threshold": (False, True, True, False),
        "expert-choice-predictor": (False, True, True, False),
        "soft": (False, False, False, False),
    }
    for case, expected in promises.items():
        router = _router(case)
        assert (router.causal, router.causal_in_eval, router.per_token, router.fixed_k) == expected


@pytest.mark.parametrize("case", CASES)
def test_in_training_a_token_depends_on_later_tokens(case):
    router, x_TD = _router(case), _x()
    before = _weight_TE(router, x_TD)[:20] > 0
    changed_TD = torch.cat([x_TD[:20], 3 * _x(20, seed=7) + 2])
    assert not torch.equal(before, _weight_TE(router, changed_TD)[:20] > 0)


@pytest.mark.parametrize("case", CAUSAL_IN_EVAL)
def test_in_evaluation_a_token_depends_on_no_other(case):
    router, x_TD = _router(case).eval(), _x()
    together = _weight_TE(router, x_TD)
    alone = torch.cat([_weight_TE(router, x_TD[t : t + 1]) for t in range(len(x_TD))])
    assert torch.equal(together > 0, alone > 0)
    torch.testing.assert_close(together, alone)


def test_plain_expert_choice_decides_in_evaluation_as_in_training():
    router, x_TD = _router("expert-choice"), _x()
    assert torch.equal(_weight_TE(router, x_TD), _weight_TE(router.eval(), x_TD))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_permuting_tokens_permutes_the_decision(case, training):
    router, x_TD = _router(case).train(training), _x()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(_weight_TE(router, x_TD[order]), _weight_TE(router, x_TD)[order])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_renaming_experts_renames_the_decision(case, training):
    router, x_TD = _router(case).train(training), _x()
    plain = _weight_TE(router, x_TD)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(weight[order])
    torch.testing.assert_close(_weight_TE(router, x_TD), plain[:, order])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_derivatives_where_the_choice_does_not_change(case):
    router = _router(case)

    def weights(x_TD, w_ED):
        return torch.func.functional_call(router, {"w_ED": w_ED}, (x_TD, "reference", Context())).weight

    assert torch.autograd.gradcheck(weights, (_x(10).requires_grad_(), router.w_ED))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_the_scores_for_the_balance_terms_are_those_of_the_plain_logits(case, training):
    router, x_TD = _router(case).train(training), _x()
    routing = _route(router, x_TD)
    logits_TE = x_TD @ router.w_ED.T
    torch.testing.assert_close(routing.logits_TE, logits_TE)
    torch.testing.assert_close(routing.lse_T, logits_TE.exp().sum(-1).log())
    score_TE = logits_TE.sigmoid() if case == "base" else logits_TE.exp()
    torch.testing.assert_close(routing.prob_E, (score_TE / score_TE.sum(-1, keepdim=True)).sum(0))
    torch.testing.assert_close(routing.prob_TE().sum(0), routing.prob_E)


@pytest.mark.parametrize("case", [*CASES, "soft"])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_has_an_empty_decision_and_no_nan(case, training):
    router = _router(case).train(training)
    decision = _route(router, _x(0))
    if case == "soft":
        assert decision.dispatch_BSEP.shape == (1, 0, E, 1)
        return
    token_N, expert_N, weight_N = decision.rows()
    assert len(token_N) == len(expert_N) == len(weight_N) == 0
    assert decision.prob_E.tolist() == [0] * E
    for value in (decision.losses or {}).values():
        assert value.item() == 0
    for value in (decision.observed or {}).values():
        assert not value.any()


@pytest.mark.parametrize("case", [*CASES, "soft"])
@pytest.mark.parametrize("training", [True, False])
def test_a_single_expert_gets_every_token(case, training):
    router = _router(case, k=1, n_experts=1, renormalize=False).train(training)
    if case == "soft":
        assert _route(router, _x(7)).combine_BSEP.flatten().tolist() == [1.0] * 7
        return
    if case == "expert-choice-predictor":
        torch.nn.init.zeros_(router.w_predict_ED)  # it may refuse a token, and now does not
    table_TE = _weight_TE(router, _x(7))
    want_TE = (_x(7) @ router.w_ED.T).sigmoid() if case == "base" else torch.ones(7, 1).double()
    torch.testing.assert_close(table_TE, want_TE)


@pytest.mark.parametrize("case", CASES)
def test_fewer_tokens_than_experts_are_routed_like_any(case):
    for n_tokens in (1, 3):
        table_TE = _weight_TE(_router(case, n_experts=8), _x(n_tokens))
        assert table_TE.isfinite().all()
        if case.startswith("expert-choice"):
            assert (table_TE > 0).sum(0).tolist() == [1] * 8  # C = 1: experts may have to share a token
        else:
            assert (table_TE > 0).sum(1).tolist() == [1 if case == "base" else 2] * n_tokens


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [*CASES, "soft"])
@pytest.mark.parametrize("size", [0.0, 1e30])
def test_equal_and_huge_logits_have_finite_decisions(case, training, size):
    router = _router(case, dtype=torch.float32).train(training)
    x_TD = size * _x(20, dtype=torch.float32)
    decision = _route(router, x_TD)
    if case == "soft":
        assert decision.dispatch_BSEP.isfinite().all()
        assert decision.combine_BSEP.isfinite().all()
        return
    assert decision.weight.isfinite().all()
    assert decision.expert.max() < E
    if training and case == "base":
        assert _even(decision.expert[:, 0], 20, E)


@pytest.mark.parametrize("case", [*CASES, "soft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_float32_at_least_even_under_autocast(case, dtype):
    router, x_TD = _router(case, dtype=torch.float32), _x(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    decision = _route(router, x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = _route(router, x_TD)
    for name in ("dispatch_BSEP", "combine_BSEP") if case == "soft" else ("weight", "logits_TE", "lse_T", "prob_E"):
        assert getattr(decision, name).dtype == wide
        assert torch.equal(getattr(decision, name), getattr(under_autocast, name))


@pytest.mark.parametrize("case", [*CASES, "soft"])
def test_torch_compile_traces_a_router_without_a_break(case):
    router, x_TD = _router(case), _x()
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    for one, other in zip(_route(compiled, x_TD), _route(router, x_TD), strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other)


@pytest.mark.parametrize("case", [*CASES, "soft"])
def test_nothing_is_parked_on_a_router_and_a_rerun_is_bitwise_the_same(case):
    router = _router(case)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    attributes = set(vars(router))
    first, second = _route(router, _x()), _route(router, _x())
    assert set(vars(router)) == attributes
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
    for a, b in zip(first, second, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
