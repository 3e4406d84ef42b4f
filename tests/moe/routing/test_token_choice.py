"""The token-choice routers against oracles of their own: loops over numbers, frequencies within five deviations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe.config.balance import BalanceConfig
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.routing.contract import UNUSED, Context
from moe.routing.token_choice import MIXER_EPS, HashRouter, sparsemixer
from tests.moe.routing.token_routers import EXACT, D, E, K, make_router, route, states


def _reads_logits(cfg, k=K, n_experts=E, training=False):
    """A router whose states are its logits."""
    router = make_router(cfg, k, n_experts, d=n_experts)
    with torch.no_grad():
        router.w_ED.copy_(torch.eye(n_experts))
    return router.train(training)


def _softmax(z):
    z = np.exp(z - z.max())
    return z / z.sum()


def _near(hits, probability, message=""):
    """A sum of independent draws lies within five standard deviations of its mean."""
    probability = np.broadcast_to(probability, hits.shape).astype(float)
    deviation = math.sqrt((probability * (1 - probability)).sum())
    assert abs(hits.sum() - probability.sum()) <= 5 * deviation + 1e-9, (message, hits.sum(), probability.sum())


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_weights_are_divided_by_their_sum_but_by_no_less_than_norm_min(scale):
    """Ernie 4.5's: softmax, a bias in the choice alone; about half of these tokens' sums are above the least one."""
    router = _reads_logits(RouterConfig(selection_bias=True, norm_min=0.7, scale=scale))
    router.bias_E.copy_(torch.linspace(-0.5, 0.5, E))
    z = states(50, d=E)
    routing, above = route(router, z), 0
    for z_E, expert_K, weight_K in zip(z.numpy(), routing.expert.tolist(), routing.weight.tolist(), strict=True):
        p_E = _softmax(z_E)
        chosen = sorted(range(E), key=lambda e: -(p_E[e] + router.bias_E[e].item()))[:K]
        assert set(expert_K) == set(chosen)
        total = p_E[chosen].sum()
        above += total > 0.7
        assert weight_K == pytest.approx([scale * p_E[e] / max(total, 0.7) for e in expert_K], abs=1e-12)
    assert 5 < above < 45


# --- The second expert ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_second_expert_is_kept_with_twice_its_share_of_the_two_weights(renormalize):
    router = make_router(RouterConfig(second="random", renormalize=renormalize), k=2)
    x = states(20_000)
    plain, routing = route(router.eval(), x), route(router.train(), x)
    p = np.sort(np.array([_softmax(z) for z in plain.logits_TE.detach().numpy()]), axis=1)
    keep = np.minimum(1, 2 * p[:, -2] / (p[:, -1] + p[:, -2]))
    kept = (routing.expert[:, 1] >= 0).numpy()
    for low in np.arange(0, 1, 0.1):
        some = (keep >= low) & (keep < low + 0.1)
        _near(kept[some], keep[some], f"kept with {low:.1f}")
    assert torch.equal(routing.expert[:, 0], plain.expert[:, 0])
    assert torch.equal(routing.weight, plain.weight)
    second = routing.expert[:, 1]
    assert torch.equal(torch.where(second < 0, plain.expert[:, 1], second), plain.expert[:, 1])
    assert set(second[second < 0].tolist()) == {UNUSED}
    assert (plain.expert >= 0).all()


# --- Gradients of the choice ------------------------------------------------------------------------------------------


def _mixer_steps(z, taken_K):
    """For the experts that a token took one after the other: (near, pi, best) of each step, by a loop over numbers."""
    left = list(range(len(z)))
    for e in taken_K:
        best = max(left, key=lambda i: (z[i], -i))
        near = [i for i in left if z[best] - z[i] <= 2 * MIXER_EPS * max(abs(z[i]), z[best], key=abs)]
        total = sum(math.exp(z[i] - z[best]) for i in near)
        yield near, {i: math.exp(z[i] - z[best]) / total for i in near}, best
        left.remove(e)


def test_sparsemixer_is_greedy_in_evaluation_and_weighs_by_the_near_ones():
    z = states(60, E).abs() + 1
    expert, weight = sparsemixer(z, K, training=False)
    assert torch.equal(expert, z.sort(descending=True, stable=True).indices[:, :K])
    for t in range(len(z)):
        steps = list(_mixer_steps(z[t].tolist(), expert[t].tolist()))
        expected = [pi[e] for e, (_, pi, _) in zip(expert[t].tolist(), steps, strict=True)]
        assert weight[t].tolist() == pytest.approx(expected, rel=1e-12)


def test_sparsemixer_samples_only_near_experts_and_a_third_of_pi_three_times_in_four():
    torch.manual_seed(0)
    z = 1 + 0.25 * torch.rand(4000, E, dtype=torch.float64)  # some near, some far
    expert, weight = sparsemixer(z, K, training=True)
    full, others = [], 0
    for t in range(len(z)):
        taken = expert[t].tolist()
        assert len(set(taken)) == K
        for e, w, (near, pi, best) in zip(taken, weight[t].tolist(), _mixer_steps(z[t].tolist(), taken), strict=True):
            assert e in near
            ratio = w / pi[e]
            assert ratio == pytest.approx(1, rel=1e-9) or ratio == pytest.approx(1 / 3, rel=1e-9)
            if e == best:
                assert ratio == pytest.approx(1, rel=1e-9)
            else:
                full.append(ratio > 0.5)
            others += len(near) < len(z[t])
    assert others > 100  # far ones there were
    assert len(full) > 1000
    _near(np.array(full), 0.25)


def test_sparsemixer_samples_by_the_probabilities():
    torch.manual_seed(0)
    z_E = [2.0, 2.1, 1.9, 1.2, 2.05]
    expert, _ = sparsemixer(torch.tensor(z_E, dtype=torch.float64).expand(20_000, E), 2, training=True)
    (_, pi, _), _ = _mixer_steps(z_E, expert[0].tolist())
    assert set(pi) == {0, 1, 2, 4}
    for e, p in pi.items():
        _near((expert[:, 0] == e).numpy(), p, f"first {e}")
        after = expert[:, 0] == 1
        if e != 1:
            _near((expert[after, 1] == e).numpy(), p / (1 - pi[1]), f"second {e} after 1")


@pytest.mark.parametrize("training", [True, False])
def test_sparsemixers_weight_has_the_gradient_of_pi_whatever_its_value(training):
    torch.manual_seed(0)
    z = (1 + 0.25 * torch.rand(30, E, dtype=torch.float64)).requires_grad_()
    expert, weight = sparsemixer(z, K, training)
    pi = torch.zeros_like(weight)
    rows = []
    for t in range(len(z)):
        steps = _mixer_steps(z[t].tolist(), expert[t].tolist())
        for e, (near, _, _) in zip(expert[t].tolist(), steps, strict=True):
            rows.append(z[t, near].softmax(-1)[near.index(e)])
    pi = torch.stack(rows).view_as(weight)
    push = torch.linspace(-1, 1, weight.numel(), dtype=torch.float64).view_as(weight)
    (mine,) = torch.autograd.grad((weight * push).sum(), z, retain_graph=True)
    (expected,) = torch.autograd.grad((pi * push).sum(), z)
    torch.testing.assert_close(mine, expected, **EXACT)
    assert torch.allclose(weight, pi) == (not training)


def test_sparsemixer_compiled_draws_the_same_samples():
    z = (1 + 0.25 * torch.rand(50, E, generator=torch.Generator().manual_seed(0))).requires_grad_()
    drawn = []
    for function in (sparsemixer, torch.compile(sparsemixer, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(7)
        drawn.append(function(z, K, True))
    for eager, compiled in zip(*drawn, strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_sparsemixer_takes_near_and_distinct_experts_whatever_is_drawn(monkeypatch, extreme):
    """rand gives 0 once in 2^24 float32 numbers: for an expert that may not be taken, or for the only one that may."""
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, extreme))
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(extreme).log_().neg_())  # as compiled
    z = torch.tensor([[1.0, 50.0, 1000.0, 7.0, 200.0]])
    assert sparsemixer(z, 4, training=True)[0].tolist() == [[2, 4, 1, 3]]


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_sparsemixer_router_scales_the_estimate(scale):
    cfg = RouterConfig(gradient="sparsemixer", renormalize=False, scale=scale)
    router, x = make_router(cfg), states()
    routing = route(router, x)
    torch.manual_seed(0)
    expert, weight = sparsemixer(x @ router.w_ED.T, K, training=True)
    assert torch.equal(routing.expert, expert)
    torch.testing.assert_close(routing.weight, weight * scale, **EXACT)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_straight_through_weights_are_equal_and_have_the_derivative_of_the_probabilities(name, renormalize):
    cfg = RouterConfig(name, gradient="straight-through", renormalize=renormalize, scale=2.5)
    router = make_router(cfg)
    exact = make_router(RouterConfig(name, renormalize=renormalize, scale=2.5))
    one, other = route(router, states()), route(exact, states())
    assert torch.equal(one.expert, other.expert)
    torch.testing.assert_close(one.weight, torch.full((40, K), 2.5 / K, dtype=torch.float64), **EXACT)
    push = torch.linspace(-1, 1, 40 * K, dtype=torch.float64).view(40, K)
    for each, routing in ((router, one), (exact, other)):
        (routing.weight * push).sum().backward()
        assert each.w_ED.grad.norm() > 1e-3
    torch.testing.assert_close(router.w_ED.grad, exact.w_ED.grad, **EXACT)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_default_vectors_get_the_scores_of_the_experts_that_were_not_taken(name):
    router, x = make_router(RouterConfig(name, gradient="default-vector", renormalize=False, scale=2.5)), states()
    routing = route(router, x)
    for t, z in enumerate((x @ router.w_ED.T).detach().numpy()):
        p = _softmax(z) if name == "softmax" else 1 / (1 + np.exp(-z))
        taken = sorted(range(E), key=lambda e: -z[e])[:K]
        expected = [0.0 if e in taken else 2.5 * p[e] for e in range(E)]
        assert routing.rest_TE[t].tolist() == pytest.approx(expected, rel=1e-12)
        assert routing.weight[t].tolist() == pytest.approx([2.5 * p[e] for e in taken], rel=1e-12)
    (gradient,) = torch.autograd.grad(routing.rest_TE.square().sum(), router.w_ED)
    assert gradient.norm(dim=1).min() > 0


# --- Sets of experts --------------------------------------------------------------------------------------------------

logits_of_a_token = st.lists(st.floats(-6, 6), min_size=1, max_size=9)


def _check_set(router, z, wanted, renormalize, scale):
    """The token with logits z takes the experts `wanted`, best first."""
    p = _softmax(np.array(z))
    routing = router(torch.tensor([z], dtype=torch.float64), "reference", Context())
    taken = [e for e in routing.expert[0].tolist() if e >= 0]
    assert taken == wanted
    assert set(routing.expert[0, len(taken) :].tolist()) <= {UNUSED}
    total = sum(p[e] for e in wanted) if renormalize else 1.0
    weights = [scale * p[e] / total for e in wanted] + [0.0] * (routing.expert.shape[1] - len(wanted))
    assert routing.weight[0].tolist() == pytest.approx(weights, rel=1e-9, abs=1e-15)


@settings(max_examples=100)
@given(logits_of_a_token, st.floats(0, 4), st.integers(0, 10), st.booleans(), st.sampled_from([1.0, 2.5]))
def test_a_threshold_takes_every_expert_that_reaches_it_and_at_least_one(z, threshold, k_max, renormalize, scale):
    n = len(z)
    p = _softmax(np.array(z))
    assume(min(abs(p - threshold / n)) > 1e-9)
    order = sorted(range(n), key=lambda e: (-z[e], e))
    wanted = [e for i, e in enumerate(order) if (p[e] >= threshold / n or i == 0) and i < (k_max or n)]
    cfg = RouterConfig("threshold", threshold=threshold, k_max=k_max, renormalize=renormalize, scale=scale)
    _check_set(_reads_logits(cfg, 1, n), z, wanted, renormalize, scale)


@settings(max_examples=100)
@given(logits_of_a_token, st.floats(0, 1), st.integers(0, 10), st.booleans(), st.sampled_from([1.0, 2.5]))
def test_top_p_takes_the_fewest_best_experts_that_sum_to_it(z, top_p, k_max, renormalize, scale):
    n = len(z)
    p = _softmax(np.array(z))
    order = sorted(range(n), key=lambda e: (-z[e], e))
    sums = [sum(p[e] for e in order[: i + 1]) for i in range(n)]
    assume(min(abs(each - top_p) for each in sums) > 1e-9)
    fewest = next((i + 1 for i, each in enumerate(sums) if each >= top_p), n)
    wanted = order[: max(1, min(fewest, k_max or n))]
    cfg = RouterConfig("top-p", top_p=top_p, k_max=k_max, renormalize=renormalize, scale=scale)
    _check_set(_reads_logits(cfg, 1, n), z, wanted, renormalize, scale)


def test_an_expert_exactly_at_the_threshold_is_taken():
    router = _reads_logits(RouterConfig("threshold", threshold=1.0), n_experts=4)
    assert router(torch.zeros(1, 4, dtype=torch.float64), "reference", Context()).expert.tolist() == [[0, 1, 2, 3]]


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(-3, 3), min_size=E, max_size=E), min_size=1, max_size=6), st.integers(1, E))
def test_relu_takes_what_is_positive_and_its_loss_presses_the_busy_ones(z, k):
    cfg = RouterConfig("relu", l1=0.25, scale=2.5)
    routing = _reads_logits(cfg, k)(torch.tensor(z, dtype=torch.float64), "reference", Context())
    n = len(z)
    for t in range(n):
        for e in range(E):
            assert routing.expert[t, e] == (e if z[t][e] > 0 else UNUSED)
            assert routing.weight[t, e].item() == pytest.approx(2.5 * max(z[t][e], 0))
    loss = 0.0
    for e in range(E):
        f = sum(z[t][e] > 0 for t in range(n)) * E / (k * n)
        loss += f * sum(max(z[t][e], 0) for t in range(n)) / n
    assert routing.losses["l1"].item() == pytest.approx(0.25 * loss, rel=1e-9, abs=1e-12)
    assert routing.observed["tokens"] == n


def test_the_l1_coefficient_comes_back_from_where_it_was_for_thousands_of_steps():
    router, tokens = make_router(RouterConfig("relu")), {"tokens": torch.tensor(40)}
    for rows in [0] * 3000 + [200] * 300:
        router.update(BalanceConfig(aux=0, z=0), 0.0, torch.tensor([rows, 0, 0, 0, 0]), tokens)
    assert router.l1.item() > 1.0


@pytest.mark.parametrize(("rows", "factor"), [(121, 1.5), (119, 1 / 1.5), (120, 1.0), (0, 1 / 1.5)])
def test_the_l1_coefficient_grows_when_tokens_take_more_than_k_experts(rows, factor):
    router = make_router(RouterConfig("relu", l1=0.5, l1_factor=1.5))
    observed = {"tokens": torch.tensor(40)}  # of two micro-batches
    router.update(BalanceConfig(aux=0, z=0), 0.0, torch.tensor([rows, 0, 0, 0, 0]), observed)
    assert router.l1.tolist() == pytest.approx([0.5 * factor])
    assert "l1" in router.state_dict()
    assert "l1" not in dict(router.named_parameters())


# --- No scores -------------------------------------------------------------------------------------------------------


def _hash(layer=0, vocab=500, n_experts=E, k=K, scale=1.0):
    moe = MoEConfig(n_experts=n_experts, k=k)
    return HashRouter(RouterConfig("hash", scale=scale), D, moe, layer=layer, vocab_size=vocab)


def test_hash_gives_an_id_the_same_distinct_experts_wherever_it_stands():
    router, ids = _hash(scale=2.5), torch.randint(0, 500, (300,), generator=torch.Generator().manual_seed(0))
    one = router(states(300), "reference", Context(ids, 3))
    other = _hash(scale=2.5)(states(300, seed=2).flip(0), "reference", Context(ids.flip(0), 1))
    assert torch.equal(one.expert, other.expert.flip(0))
    assert all(len(set(each)) == K for each in one.expert.tolist())
    assert one.expert.min() >= 0
    assert one.expert.max() < E
    torch.testing.assert_close(one.weight, torch.full((300, K), 2.5 / K, dtype=torch.float64), **EXACT)
    assert one.logits_TE is one.lse_T is one.prob_E is None
    assert not list(router.parameters())
    assert torch.equal(router.state_dict()["table_VK"], router.table_VK)  # a checkpoint keeps it


def test_hash_is_roughly_even_over_ids_places_and_pairs():
    table = _hash(vocab=5000, n_experts=8, k=2).table_VK.numpy()
    for column in table.T:
        for e in range(8):
            _near(column == e, 1 / 8, f"expert {e}")
    for e in range(7):
        _near((table[:, 0] == e) & (table[:, 1] == e + 1), 1 / 56, f"pair {e}")


def test_hash_differs_by_layer_vocabulary_and_number_of_experts():
    table = _hash().table_VK
    assert torch.equal(_hash().table_VK, table)
    for other in (_hash(layer=1), _hash(vocab=501), _hash(n_experts=E + 1)):
        agree = (other.table_VK[:500] == table).float().mean()
        assert agree < 0.3  # 1/5 by chance


def test_hash_without_ids_is_refused():
    with pytest.raises(AssertionError, match="reads token ids"):
        _hash()(states(), "reference", Context())
