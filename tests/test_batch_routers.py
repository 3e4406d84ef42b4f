"""What all routers that decide over a batch hold: Sinkhorn, BASE, expert choice and soft."""

import pytest
import torch

from moe.routing.contract import Context
from tests.moe.routing.batch_routers import CASES, CAUSAL_IN_EVAL, E, even, make_router, route, states, weight_table


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
        router = make_router(case)
        assert (router.causal, router.causal_in_eval, router.per_token, router.fixed_k) == expected


@pytest.mark.parametrize("case", CASES)
def test_in_training_a_token_depends_on_later_tokens(case):
    router, x_TD = make_router(case), states()
    before = weight_table(router, x_TD)[:20] > 0
    changed_TD = torch.cat([x_TD[:20], 3 * states(20, seed=7) + 2])
    assert not torch.equal(before, weight_table(router, changed_TD)[:20] > 0)


@pytest.mark.parametrize("case", CAUSAL_IN_EVAL)
def test_in_evaluation_a_token_depends_on_no_other(case):
    router, x_TD = make_router(case).eval(), states()
    together = weight_table(router, x_TD)
    alone = torch.cat([weight_table(router, x_TD[t : t + 1]) for t in range(len(x_TD))])
    assert torch.equal(together > 0, alone > 0)
    torch.testing.assert_close(together, alone)


def test_plain_expert_choice_decides_in_evaluation_as_in_training():
    router, x_TD = make_router("expert-choice"), states()
    assert torch.equal(weight_table(router, x_TD), weight_table(router.eval(), x_TD))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_permuting_tokens_permutes_the_decision(case, training):
    router, x_TD = make_router(case).train(training), states()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(weight_table(router, x_TD[order]), weight_table(router, x_TD)[order])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_renaming_experts_renames_the_decision(case, training):
    router, x_TD = make_router(case).train(training), states()
    plain = weight_table(router, x_TD)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(weight[order])
    torch.testing.assert_close(weight_table(router, x_TD), plain[:, order])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_derivatives_where_the_choice_does_not_change(case):
    router = make_router(case)

    def weights(x_TD, w_ED):
        return torch.func.functional_call(router, {"w_ED": w_ED}, (x_TD, "reference", Context())).weight

    assert torch.autograd.gradcheck(weights, (states(10).requires_grad_(), router.w_ED))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_the_scores_for_the_balance_terms_are_those_of_the_plain_logits(case, training):
    router, x_TD = make_router(case).train(training), states()
    routing = route(router, x_TD)
    logits_TE = x_TD @ router.w_ED.T
    torch.testing.assert_close(routing.logits_TE, logits_TE)
    torch.testing.assert_close(routing.lse_T, logits_TE.exp().sum(-1).log())
    score_TE = logits_TE.sigmoid() if case == "base" else logits_TE.exp()
    torch.testing.assert_close(routing.prob_E, (score_TE / score_TE.sum(-1, keepdim=True)).sum(0))
    torch.testing.assert_close(routing.prob_TE().sum(0), routing.prob_E)


@pytest.mark.parametrize("case", [*CASES, "soft"])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_has_an_empty_decision_and_no_nan(case, training):
    router = make_router(case).train(training)
    decision = route(router, states(0))
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
    router = make_router(case, k=1, n_experts=1, renormalize=False).train(training)
    if case == "soft":
        assert route(router, states(7)).combine_BSEP.flatten().tolist() == [1.0] * 7
        return
    if case == "expert-choice-predictor":
        torch.nn.init.zeros_(router.w_predict_ED)  # it may refuse a token, and now does not
    table_TE = weight_table(router, states(7))
    want_TE = (states(7) @ router.w_ED.T).sigmoid() if case == "base" else torch.ones(7, 1).double()
    torch.testing.assert_close(table_TE, want_TE)


@pytest.mark.parametrize("case", CASES)
def test_fewer_tokens_than_experts_are_routed_like_any(case):
    for n_tokens in (1, 3):
        table_TE = weight_table(make_router(case, n_experts=8), states(n_tokens))
        assert table_TE.isfinite().all()
        if case.startswith("expert-choice"):
            assert (table_TE > 0).sum(0).tolist() == [1] * 8  # C = 1: experts may have to share a token
        else:
            assert (table_TE > 0).sum(1).tolist() == [1 if case == "base" else 2] * n_tokens


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [*CASES, "soft"])
@pytest.mark.parametrize("size", [0.0, 1e30])
def test_equal_and_huge_logits_have_finite_decisions(case, training, size):
    router = make_router(case, dtype=torch.float32).train(training)
    x_TD = size * states(20, dtype=torch.float32)
    decision = route(router, x_TD)
    if case == "soft":
        assert decision.dispatch_BSEP.isfinite().all()
        assert decision.combine_BSEP.isfinite().all()
        return
    assert decision.weight.isfinite().all()
    assert decision.expert.max() < E
    if training and case == "base":
        assert even(decision.expert[:, 0], 20, E)


@pytest.mark.parametrize("case", [*CASES, "soft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_float32_at_least_even_under_autocast(case, dtype):
    router, x_TD = make_router(case, dtype=torch.float32), states(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    decision = route(router, x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = route(router, x_TD)
    for name in ("dispatch_BSEP", "combine_BSEP") if case == "soft" else ("weight", "logits_TE", "lse_T", "prob_E"):
        assert getattr(decision, name).dtype == wide
        assert torch.equal(getattr(decision, name), getattr(under_autocast, name))


@pytest.mark.parametrize("case", [*CASES, "soft"])
def test_torch_compile_traces_a_router_without_a_break(case):
    router, x_TD = make_router(case), states()
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    for one, other in zip(route(compiled, x_TD), route(router, x_TD), strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other)


@pytest.mark.parametrize("case", [*CASES, "soft"])
def test_nothing_is_parked_on_a_router_and_a_rerun_is_bitwise_the_same(case):
    router = make_router(case)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    attributes = set(vars(router))
    first, second = route(router, states()), route(router, states())
    assert set(vars(router)) == attributes
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
    for a, b in zip(first, second, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
