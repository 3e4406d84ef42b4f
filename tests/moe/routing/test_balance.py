"""The balancing losses against loops over numbers, and the bias update in a loop that it must balance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from moe.routing import balance


def _importance_loss(*arguments):
    return balance.cv_squared(balance.importance(*arguments))


def _load_loss(*arguments):
    return balance.cv_squared(balance.smooth_load(*arguments))


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


# -- the balance within a sequence, and across micro-batches


@settings(max_examples=60, deadline=None)
@given(
    n_sequences=st.integers(1, 3),
    length=st.integers(0, 5),
    n_experts=st.integers(1, 5),
    k=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    ragged=st.booleans(),
)
def test_sequence_loss_is_the_mean_of_every_sequences_own(n_sequences, length, n_experts, k, seed, ragged):
    rng = np.random.default_rng(seed)
    prob = rng.dirichlet(np.ones(n_experts), n_sequences * length).reshape(-1, n_experts)
    expert = rng.integers(-2, n_experts, (n_sequences * length, k))
    expected = 0.0
    for s in range(n_sequences):
        tokens = range(s * length, (s + 1) * length)
        rows = [e for t in tokens for e in expert[t] if e >= 0]
        for i in range(n_experts):
            share = rows.count(i) / len(rows) if rows else 0.0
            expected += n_experts * share * sum(prob[t, i] for t in tokens) / max(1, length) / n_sequences
    given_expert, token = torch.from_numpy(expert), None
    if ragged:
        token = torch.arange(n_sequences * length).repeat_interleave(k)
        keep = given_expert.flatten() != -2
        given_expert, token = given_expert.flatten()[keep], token[keep]
    got = balance.sequence_balancing_loss(torch.from_numpy(prob), given_expert, token, n_sequences)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_sequence_loss_of_one_sequence_is_the_batch_loss():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expert, _, _, prob_E = reference.gate(logits, 2, "softmax")
    whole = balance.load_balancing_loss(prob_E, reference.count(expert.flatten(), 4), 6)
    torch.testing.assert_close(balance.sequence_balancing_loss(logits.softmax(-1), expert, None, 1), whole)
    with pytest.raises(AssertionError, match="6 tokens are not 4 sequences"):
        balance.sequence_balancing_loss(logits.softmax(-1), expert, None, 4)


def test_micro_batches_that_each_want_one_expert_are_not_the_balanced_batch_they_make_up():
    """Two micro-batches, each certain of its own expert of two: 2 each, and 1 for the whole, which is even."""
    prob = torch.tensor([[[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3])
    count = torch.tensor([[3, 0], [0, 3]])
    each = [balance.load_balancing_loss(prob[m].sum(0), count[m], 3).item() for m in range(2)]
    whole = balance.load_balancing_loss(prob.sum((0, 1)), count.sum(0), 6).item()
    assert (each, whole) == ([2.0, 2.0], 1.0)
    shared = [balance.load_balancing_loss(prob[m].sum(0), count.sum(0), 3).item() for m in range(2)]
    assert shared == [1.0, 1.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_micro_batches_with_the_steps_counts_are_the_whole_batch(n_micro, n_tokens, n_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_micro, n_tokens, n_experts, generator=generator, dtype=torch.float64, requires_grad=True)
    prob = logits.softmax(-1)
    expert = reference.gate(logits.flatten(0, 1), min(2, n_experts), "softmax")[0]
    count = reference.count(expert.flatten(), n_experts)
    whole = balance.load_balancing_loss(prob.sum((0, 1)), count, n_micro * n_tokens)
    parts = sum(balance.load_balancing_loss(p.sum(0), count, n_tokens) for p in prob) / n_micro
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (parts, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


# -- importance and load


@settings(max_examples=60)
@given(st.integers(0, 9), st.integers(1, 6), st.integers(0, 2**31))
def test_importance_is_the_variance_of_summed_weights_over_their_squared_mean(n_rows, n_experts, seed):
    rng = np.random.default_rng(seed)
    weight, expert = rng.random(n_rows), rng.integers(-2, n_experts, n_rows)
    total = [sum(weight[n] for n in range(n_rows) if expert[n] == i) for i in range(n_experts)]
    mean = sum(total) / n_experts
    expected = sum((x - mean) ** 2 for x in total) / n_experts / mean**2 if mean else 0.0
    got = _importance_loss(torch.from_numpy(weight), torch.from_numpy(expert), n_experts)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


def test_cv_squared_of_equal_one_or_no_loads_is_zero_and_of_one_hot_loads_is_e_minus_one():
    assert balance.cv_squared(torch.tensor([5, 5, 5])) == 0
    assert balance.cv_squared(torch.tensor([7.0])) == 0
    nothing = torch.zeros(3, requires_grad=True)
    balance.cv_squared(nothing).backward()
    assert balance.cv_squared(nothing) == 0
    assert nothing.grad.tolist() == [0, 0, 0]
    assert balance.cv_squared(torch.tensor([0, 12, 0, 0])) == 3
    assert balance.cv_squared(torch.tensor([0.0, 1e-30, 0.0, 0.0])) == pytest.approx(3)  # squares would underflow


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_smooth_load_is_the_chance_to_be_chosen_with_the_noise_drawn_again(n_tokens, n_experts, k, seed):
    k = min(k, n_experts)
    rng = np.random.default_rng(seed)
    clean, noise = rng.normal(size=(n_tokens, n_experts)), rng.uniform(0.1, 2, (n_tokens, n_experts))
    noisy = np.round(clean + noise * rng.normal(size=clean.shape), 1)  # with ties
    load = np.zeros(n_experts)
    for t in range(n_tokens):
        for i in range(n_experts):
            others = sorted((noisy[t, j] for j in range(n_experts) if j != i), reverse=True)
            beat = others[k - 1] if k - 1 < len(others) else -math.inf
            load[i] += 0.5 * (1 + math.erf((clean[t, i] - beat) / noise[t, i] / math.sqrt(2)))
    tensors = [torch.from_numpy(x) for x in (clean, noisy, noise)]
    np.testing.assert_allclose(balance.smooth_load(*tensors, k), load, rtol=1e-9, atol=1e-12)
    expected = load.var() / load.mean() ** 2 if n_tokens else 0.0
    np.testing.assert_allclose(_load_loss(*tensors, k), expected, rtol=1e-7, atol=1e-12)


def test_smooth_load_is_the_mean_count_over_many_draws_of_one_experts_noise():
    generator = torch.Generator().manual_seed(0)
    clean = torch.tensor([[0.3, 0.0, -0.4, 0.2]], dtype=torch.float64)
    noise = torch.tensor([[0.7, 1.0, 0.5, 0.9]], dtype=torch.float64)
    noisy = clean + noise * torch.randn(1, 4, generator=generator, dtype=torch.float64)
    drawn = noisy.expand(40_000, 4).clone()
    drawn[:, 1] = clean[0, 1] + noise[0, 1] * torch.randn(40_000, generator=generator, dtype=torch.float64)
    taken = (drawn.topk(2).indices == 1).any(-1).double().mean()
    assert balance.smooth_load(clean, noisy, noise, 2)[1].item() == pytest.approx(taken.item(), abs=0.01)


def test_without_noise_the_smooth_load_is_the_count_and_its_gradients_are_finite():
    clean = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]], requires_grad=True)
    noise = torch.zeros(2, 3, requires_grad=True)
    load = balance.smooth_load(clean, clean.detach(), noise, 1)
    load.sum().backward()
    assert load.tolist() == [1, 1, 0]
    assert clean.grad.isfinite().all()
    assert noise.grad.isfinite().all()


# -- entropy, spread, band


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 5), st.floats(0, 0.9), st.integers(0, 2**31))
def test_entropy_spread_and_band_are_the_formulas(n_tokens, n_experts, band, seed):
    prob = np.random.default_rng(seed).dirichlet(np.full(n_experts, 0.3), n_tokens)
    prob[0] = np.eye(n_experts)[0]  # probabilities of exactly 0 and 1
    entropy = lambda p: -sum(x * math.log(x) for x in p if x > 0)
    mean = [sum(prob[t, i] for t in range(n_tokens)) / n_tokens for i in range(n_experts)]
    got = torch.from_numpy(prob)
    np.testing.assert_allclose(balance.token_entropy(got), sum(map(entropy, prob)) / n_tokens, rtol=1e-12, atol=1e-15)
    expected = math.log(n_experts) - entropy(mean)
    np.testing.assert_allclose(balance.spread_loss(got.sum(0), n_tokens), expected, rtol=1e-9, atol=1e-14)
    expected = sum(max(0.0, abs(n_experts * p - 1) - band) ** 2 for p in mean) / n_experts
    np.testing.assert_allclose(balance.bandpass_loss(got.sum(0), n_tokens, band), expected, rtol=1e-9, atol=1e-20)


def test_an_even_batch_of_decided_tokens_has_no_entropy_and_full_spread():
    decided, undecided = torch.eye(4).repeat(2, 1), torch.full((8, 4), 0.25)
    assert balance.token_entropy(decided) == 0
    assert balance.token_entropy(undecided).item() == pytest.approx(math.log(4))
    for prob in (decided, undecided):
        assert balance.spread_loss(prob.sum(0), 8) == 0
        assert balance.bandpass_loss(prob.sum(0), 8, 0.0) == 0
    one = torch.eye(4)[:1].expand(8, 4)
    assert balance.spread_loss(one.sum(0), 8).item() == pytest.approx(math.log(4))
    assert balance.bandpass_loss(one.sum(0), 8, 0.5).item() == pytest.approx((2.5**2 + 3 * 0.5**2) / 4)


def test_probabilities_that_underflow_leave_entropy_gradients_finite():
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    prob = logits.softmax(-1)
    assert prob.tolist() == [[1, 0, 0]]
    (balance.token_entropy(prob) + balance.spread_loss(prob.sum(0), 1)).backward()
    assert logits.grad.isfinite().all()


SMOOTH = {
    "sequence": lambda z: balance.sequence_balancing_loss(
        z.softmax(-1), torch.tensor([[0, 1], [2, 0], [1, -1], [0, 2]]), None, 2
    ),
    "importance": lambda z: _importance_loss(z.exp()[:, :2], torch.tensor([[0, 1], [2, 0], [1, -1], [0, 2]]), 3),
    "cv": lambda z: balance.cv_squared(z.exp().sum(0)),
    "load": lambda z: _load_loss(z, z + torch.linspace(-1, 2, 12).view(4, 3), z.square() + 0.5, 2),
    "entropy": lambda z: balance.token_entropy(z.softmax(-1)),
    "spread": lambda z: balance.spread_loss(z.softmax(-1).sum(0), 4),
    "bandpass": lambda z: balance.bandpass_loss(z.softmax(-1).sum(0), 4, 0.1),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_the_derivative(name):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SMOOTH[name], logits)
    assert torch.autograd.grad(SMOOTH[name](logits), logits)[0].abs().max() > 1e-3


def test_no_token_and_one_expert_have_losses_of_zero():
    none_TE, none = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert balance.sequence_balancing_loss(none_TE, none.view(0, 2), None, 1) == 0
    assert balance.sequence_balancing_loss(torch.ones(2, 3) / 3, none, none, 2) == 0
    assert _importance_loss(torch.zeros(0), none, 3) == 0
    assert _load_loss(none_TE, none_TE, none_TE, 2) == 0
    assert balance.token_entropy(none_TE) == 0
    assert balance.spread_loss(torch.zeros(3), 0) == 0
    assert balance.bandpass_loss(torch.zeros(3), 0, 0.2) == 0

    one = torch.ones(5, 1)
    assert balance.sequence_balancing_loss(one, torch.zeros(5, 1, dtype=torch.int64), None, 5) == 1
    assert _importance_loss(torch.rand(5), torch.zeros(5, dtype=torch.int64), 1) == 0
    assert balance.smooth_load(one, one, one, 1).tolist() == [5]
    assert _load_loss(one, one, one, 1) == 0
    assert balance.token_entropy(one) == balance.spread_loss(one.sum(0), 5) == balance.bandpass_loss(one.sum(0), 5, 0.0)
    assert balance.token_entropy(one) == 0


# -- schedules and the bias


def test_a_schedule_is_straight_lines_between_factors_at_equal_distances():
    assert [balance.scheduled(0.5, [1, 1, 0], p) for p in (0, 0.25, 0.5, 0.75, 1)] == [0.5, 0.5, 0.5, 0.25, 0]
    assert [balance.scheduled(2.0, [0.0, 1.0], p) for p in (-1, 0.0, 0.3, 1.0, 7)] == [0, 0, 0.6, 2, 2]
    assert balance.scheduled(0.5, None, 0.3) == balance.scheduled(0.5, [], 1.0) == 0.5
    assert [balance.scheduled(0.5, [0.2], p) for p in (0, 0.4, 1)] == [0.1] * 3


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6), st.floats(0, 1))
def test_a_schedule_is_numpys_interpolation(factors, progress):
    expected = 3.0 * np.interp(progress, np.linspace(0, 1, len(factors)), factors)
    assert balance.scheduled(3.0, factors, progress) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_proportional_bias_step_is_the_relative_lack_of_load():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    balance.update_bias(bias, torch.tensor([8, 5, 0, 3]), 0.25, step="proportional")
    assert bias.tolist() == [0.25, 0.4375, 0.75, 0.5625]
    for step in ("sign", "proportional"):
        balance.update_bias(bias, torch.zeros(4, dtype=torch.int64), 0.25, step=step)
        assert bias.tolist() == [0.25, 0.4375, 0.75, 0.5625]
    with pytest.raises(ValueError, match=r"step='cubic' .* sign, proportional"):
        balance.update_bias(bias, torch.zeros(4), 0.25, step="cubic")
