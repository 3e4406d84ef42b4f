"""Claims about what experts are for: loops over rows, scikit-free closed forms, and what chance gives."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moe.analysis import specialisation as of

T, M, E, K = 60, 4, 6, 2
seeds = st.integers(0, 2**32 - 1)


def _routed(seed, tokens=T, dropped=0.1):
    generator = np.random.default_rng(seed)
    expert_TK = np.array([generator.permutation(E)[:K] for _ in range(tokens)])
    expert_TK[generator.random(expert_TK.shape) < dropped] = -1
    return torch.from_numpy(generator.integers(0, M, tokens)), torch.from_numpy(expert_TK)


@given(seeds)
def test_rows_are_counted_by_key_and_expert_and_none_is_no_expert(seed):
    key_T, expert_TK = _routed(seed)
    counted = Counter((int(m), e) for m, row in zip(key_T, expert_TK.tolist(), strict=True) for e in row if e >= 0)
    assert of.count_by(key_T, expert_TK, M, E).tolist() == [[counted[m, e] for e in range(E)] for m in range(M)]


def test_specialisation_is_the_share_of_a_keys_tokens_and_uniform_routing_has_k_of_e():
    uniform = torch.full((M, E), 7)
    assert of.key_specialisation(uniform, K).tolist() == pytest.approx(np.full((M, E), K / E))
    one_hot = torch.tensor([[9, 9, 0, 0], [0, 0, 4, 4]])
    assert of.key_specialisation(one_hot, 2).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert of.key_specialisation(torch.tensor([[0, 0]]), 1).isnan().all()


@given(seeds)
def test_lift_is_one_for_independent_counts_and_a_ratio_of_shares_otherwise(seed):
    generator = np.random.default_rng(seed)
    key_M, expert_E = generator.integers(1, 9, M), generator.integers(1, 9, E)
    assert of.lift(torch.from_numpy(np.outer(key_M, expert_E))).numpy() == pytest.approx(np.ones((M, E)))
    count = generator.integers(1, 50, (M, E))
    expected = (count / count.sum(1, keepdims=True)) / (count.sum(0) / count.sum())
    assert of.lift(torch.from_numpy(count)).numpy() == pytest.approx(expected)


@given(seeds)
def test_information_is_the_entropies_sum_less_the_joint_one(seed):
    count = np.random.default_rng(seed).integers(0, 50, (M, E))
    entropy = lambda values: stats.entropy(np.ravel(values), base=2)
    expected = entropy(count.sum(0)) + entropy(count.sum(1)) - entropy(count)
    assert of.information(torch.from_numpy(count)) == pytest.approx(expected, abs=1e-9)


def test_information_is_a_bit_where_experts_tell_two_domains_apart_and_none_where_they_do_not():
    assert of.information(torch.tensor([[7, 0], [0, 7]])) == pytest.approx(1.0)
    assert of.information(torch.tensor([[7, 7], [7, 7]])) == 0
    assert of.information(torch.zeros(2, 2)) == 0


def test_few_rows_inform_by_chance_by_as_much_as_the_docstring_says():
    generator, n = np.random.default_rng(0), 400
    count = lambda: torch.from_numpy(np.bincount(generator.integers(0, M * E, n), minlength=M * E).reshape(M, E))
    chance = (M - 1) * (E - 1) / (2 * n * np.log(2))
    assert np.mean([of.information(count()) for _ in range(300)]) == pytest.approx(chance, rel=0.1)


def test_keys_dealt_out_anew_inform_less_than_true_ones_and_as_much_as_meaningless_ones():
    generator = np.random.default_rng(0)
    key_D = torch.from_numpy(np.repeat(np.arange(M), 10))
    base = np.eye(M, E) * 40 + 5
    document_DE = torch.from_numpy(generator.poisson(base[key_D.numpy()]))
    true = torch.zeros(M, E, dtype=torch.float64).index_add(0, key_D, document_DE.double())
    null = of.permuted_information(document_DE, key_D, M, 100)
    assert of.information(true) > null.max()
    meaningless = torch.from_numpy(generator.permutation(key_D.numpy()))
    dealt = of.information(torch.zeros(M, E, dtype=torch.float64).index_add(0, meaningless, document_DE.double()))
    assert null.min() <= dealt <= null.max()
    assert np.array_equal(null, of.permuted_information(document_DE, key_D, M, 100))


@given(seeds)
def test_co_activation_counts_the_tokens_that_take_both(seed):
    _, expert_TK = _routed(seed)
    sets = [set(row) - {-1} for row in expert_TK.tolist()]
    share = of.co_activation(expert_TK, E)
    for i in range(E):
        with_i = [row for row in sets if i in row]
        for j in range(E):
            expected = sum(j in row for row in with_i) / len(with_i) if with_i else np.nan
            assert share[i, j].item() == pytest.approx(expected, nan_ok=True)


def test_random_choices_go_together_as_often_as_chance_has_it():
    _, expert_TK = _routed(0, 40_000, dropped=0)
    off_diagonal = of.co_activation(expert_TK, E)[~torch.eye(E, dtype=torch.bool)]
    assert off_diagonal.numpy() == pytest.approx(np.full(E * (E - 1), (K - 1) / (E - 1)), abs=0.02)


@given(seeds)
def test_flow_counts_from_one_layer_to_another(seed):
    (_, one), (_, other) = _routed(seed), _routed(seed + 1)
    share = of.flow(one, other, E, E)
    for i in range(E):
        rows = [set(b) for a, b in zip(one.tolist(), other.tolist(), strict=True) if i in a]
        for j in range(E):
            expected = sum(j in row for row in rows) / len(rows) if rows else np.nan
            assert share[i, j].item() == pytest.approx(expected, nan_ok=True)
