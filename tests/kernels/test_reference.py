"""The definition of correct, against loops over Python numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import operands, reference

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu2", "swiglu_clipped")


def _sigmoid(z):
    return 1 / (1 + math.exp(-z))


def _gate(logits, k, score, bias, renormalize, scale):
    """One token's experts and weights."""
    if score == "softmax":
        scores = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
    elif score == "sigmoid":
        scores = [_sigmoid(z) for z in logits]
    else:
        scores = [math.sqrt(math.log1p(math.exp(z))) for z in logits]
    chosen = sorted(range(len(logits)), key=lambda e: (-(scores[e] + (bias[e] if bias else 0)), e))[:k]
    total = sum(scores[e] for e in chosen) if renormalize else 1
    return chosen, [scale * scores[e] / total for e in chosen], scores


@settings(max_examples=150)
@given(st.data())
def test_gate_is_the_formula_and_ties_go_to_the_lower_expert(data):
    n_experts = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, n_experts))
    row = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 2.0]), min_size=n_experts, max_size=n_experts)
    logits = data.draw(st.lists(row, min_size=1, max_size=4))
    score, renormalize = data.draw(st.sampled_from(operands.SCORES)), data.draw(st.booleans())
    bias = data.draw(st.none() | row)
    expert, weight, lse, prob = reference.gate(
        torch.tensor(logits, dtype=torch.float64),
        k,
        score,
        None if bias is None else torch.tensor(bias, dtype=torch.float64),
        renormalize,
        2.5,
    )
    want_prob = np.zeros(n_experts)
    for t, each in enumerate(logits):
        want_expert, want_weight, want_scores = _gate(each, k, score, bias, renormalize, 2.5)
        assert expert[t].tolist() == want_expert
        np.testing.assert_allclose(weight[t], want_weight, rtol=1e-13)
        np.testing.assert_allclose(lse[t], math.log(sum(map(math.exp, each))), rtol=1e-12, atol=1e-14)
        want_prob += np.array(want_scores) / sum(want_scores)
    np.testing.assert_allclose(prob, want_prob, rtol=1e-12)


@pytest.mark.parametrize("score", operands.SCORES)
@pytest.mark.parametrize("renormalize", [True, False])
def test_gate_gradients_are_the_derivative_and_the_bias_gets_none(score, renormalize):
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    function = lambda logits: reference.gate(logits, 3, score, bias.detach(), renormalize, 0.7)[1:]
    assert torch.autograd.gradcheck(function, (logits,))
    reference.gate(logits, 3, score, bias, renormalize, 0.7)[1].square().sum().backward()
    assert bias.grad is None


def _sorted_choice(rank, group_score, k, groups, k_groups, group_top):
    """One token's experts, by sorting: the best groups' first, then the higher rank, then the lower index."""
    each = len(rank) // groups
    score = [sum(sorted(group_score[g * each : (g + 1) * each], reverse=True)[:group_top]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: (-score[g], g))[:k_groups]
    return sorted(range(len(rank)), key=lambda e: (e // each not in best, -rank[e], e))[:k]


@settings(max_examples=300)
@given(st.data())
def test_the_choice_is_a_stable_sort_whatever_is_equal_or_minus_infinity(data):
    groups, each = data.draw(st.sampled_from([(1, 1), (1, 5), (1, 16), (1, 70), (2, 4), (4, 3), (8, 8)]))
    n_experts, k_groups = groups * each, data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, k_groups * each) | st.sampled_from([1, k_groups * each]))
    value = st.sampled_from([-math.inf, -1e38, -1.0, -0.0, 0.0, 2.0])
    row = st.lists(value, min_size=n_experts, max_size=n_experts) | value.map(lambda v: [v] * n_experts)
    logits = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)), dtype=torch.float32)
    bias = data.draw(st.none() | st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=n_experts, max_size=n_experts))
    group_top = data.draw(st.integers(1, 3))
    expert = reference.gate(
        logits, k, "sigmoid", None if bias is None else torch.tensor(bias), groups=groups, k_groups=k_groups,
        group_top=group_top,
    )[0]  # fmt: skip
    score = logits.sigmoid()
    rank = logits if bias is None else score + torch.tensor(bias)
    group_score = score if bias is None else rank
    for t in range(len(logits)):
        want = _sorted_choice(rank[t].tolist(), group_score[t].tolist(), k, groups, k_groups, group_top)
        assert expert[t].tolist() == want


@pytest.mark.parametrize("k", [1, 4, 20, 64])
def test_infinite_logits_are_chosen_in_order_and_nan_stays_within_range(k):
    logits = torch.zeros(3, 64)
    logits[0, 5::2], logits[1, ::3] = math.inf, math.nan
    logits[2] = math.nan
    expert = reference.gate(logits, k, "sigmoid")[0]
    assert expert[0].tolist() == logits[0].sort(descending=True, stable=True).indices[:k].tolist()
    assert ((expert >= 0) & (expert < 64)).all()


@pytest.mark.parametrize("groups", [1, 4])
def test_tokens_chosen_for_in_parts_get_what_they_get_together(monkeypatch, groups):
    logits = torch.randint(-3, 3, (103, 64), generator=torch.Generator().manual_seed(0)).double()
    choose = lambda: reference.gate(logits, 3, "softmax", groups=groups, k_groups=2)[0]
    whole = choose()
    for cached in (1, 64 * 10, 64 * 103):
        monkeypatch.setattr(reference, "CACHED", cached)
        assert choose().equal(whole)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_gate_compiles_to_one_graph(groups):
    logits = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    gate = torch.compile(reference.gate, fullgraph=True, backend="eager")
    for k in (2, 20):
        compiled = gate(logits, k, "softmax", groups=groups, k_groups=2)[0]
        assert compiled.equal(reference.gate(logits, k, "softmax", groups=groups, k_groups=2)[0])


def test_the_choice_leaves_the_logits_as_they_were():
    logits = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    reference.gate(logits, 3, "softmax")
    assert logits.equal(before)


def test_renormalising_scores_that_underflow_gives_no_nan():
    weight = reference.gate(torch.full((1, 3), -200.0), 2, "sigmoid", None, True, 1.0)[1]
    assert (weight == 0).all()


@settings(max_examples=150)
@given(st.integers(1, 6).flatmap(lambda e: st.tuples(st.just(e), st.lists(st.integers(-1, e - 1), max_size=20))))
def test_plan_is_a_stable_sort_with_the_rows_of_no_expert_last(case):
    n_experts, expert = case
    order, slot, offset = reference.plan(torch.tensor(expert, dtype=torch.int64), n_experts)
    assert order.tolist() == sorted(range(len(expert)), key=lambda n: (expert[n] % (n_experts + 1), n))
    assert [order.tolist()[s] for s in slot.tolist()] == list(range(len(expert)))
    counts = [expert.count(e) for e in range(n_experts)]
    assert offset.tolist() == [sum(counts[:e]) for e in range(n_experts + 1)]
    assert order.dtype == slot.dtype == offset.dtype == torch.int64


def _act(z, activation):
    """The activation of one row of numbers."""
    if activation == "swiglu":
        half = len(z) // 2
        return [g * _sigmoid(g) * u for g, u in zip(z[:half], z[half:], strict=True)]
    if activation == "swiglu_clipped":
        pairs = [(min(g, 7), max(-7, min(u, 7))) for g, u in zip(z[::2], z[1::2], strict=True)]
        return [g * _sigmoid(1.702 * g) * (u + 1) for g, u in pairs]
    scalar = {
        "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
        "gelu_tanh": lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
        "relu2": lambda v: max(v, 0) ** 2,
    }[activation]
    return [scalar(v) for v in z]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_are_the_weighted_sum_of_mlps_row_by_row(activation, biased):
    rng = np.random.default_rng(0)
    x, up, down = rng.normal(size=(4, 3)), rng.normal(size=(5, 6, 3)), rng.normal(size=(5, 3, 6))
    if activation.startswith("swiglu"):
        x, down = 5 * x, down[:, :, :3]  # far enough to be clipped
    bias = rng.normal(size=(5, 6)) if biased else np.zeros((5, 6))
    token, expert, weight = [0, 0, 2, 2, 2, 3], [1, 1, -1, 4, 0, 3], rng.normal(size=6)
    expected = np.zeros_like(x)
    for t, e, w in zip(token, expert, weight, strict=True):
        if e >= 0:
            expected[t] += w * (down[e] @ np.array(_act((up[e] @ x[t] + bias[e]).tolist(), activation)))
    tensors = [torch.from_numpy(each) for each in (x, up, down)]
    rows = torch.tensor(token), torch.tensor(expert), torch.from_numpy(weight)
    got = reference.experts(*tensors, *rows, activation, torch.from_numpy(bias) if biased else None)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_expert_gradients_are_the_derivative(activation):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    token, expert = torch.tensor([0, 0, 1, 3]), torch.tensor([2, 0, -1, 2])
    function = lambda x, up, down, weight: reference.experts(x, up, down, token, expert, weight, activation)
    width = 2 if activation.startswith("swiglu") else 4
    assert torch.autograd.gradcheck(function, (draw(4, 3), draw(3, 4, 3), draw(3, 3, width), draw(4)))


def test_under_autocast_the_reference_multiplies_in_bf16_and_sums_in_float32():
    x, up, down = torch.randn(4, 8), torch.randn(2, 8, 8), torch.randn(2, 8, 4)
    row = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        got = reference.experts(x, up, down, row, row % 2, torch.ones(4), "swiglu")
    expected = reference.experts(x, up, down, row, row % 2, torch.ones(4), "swiglu")
    error = (got - expected).norm() / expected.norm()
    assert got.dtype == torch.float32
    assert 1e-5 < error < 2e-2


def test_an_unknown_score_or_activation_is_refused():
    with pytest.raises(ValueError, match="score='tanh' is not one of softmax, sigmoid, sqrt_softplus"):
        reference.gate(torch.zeros(1, 2), 1, "tanh", None, True, 1.0)
    with pytest.raises(ValueError, match="activation='relu' is not one of swiglu"):
        reference.activate(torch.zeros(1, 2), "relu")
