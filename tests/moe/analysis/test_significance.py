"""Claims about what is more than chance: closed forms, every permutation, loops, and the share of simulations."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moe.analysis import planted, specialisation
from moe.analysis import significance as of
from moe.analysis.planted import Recipe
from tests.planted_traces import random_routes, write_trace

E, K, Y = 8, 2, 3
seeds = st.integers(0, 2**32 - 1)


def _documents(seed, n=30, layers=2, experts=E):
    generator = np.random.default_rng(seed)
    return of.Documents(
        generator.poisson(5, (n, layers, experts)).astype(np.float32), generator.permutation(np.arange(n) % Y)
    )


# Counting.


def _routed(seed, tokens=400, layers=2):
    generator = np.random.default_rng(seed)
    expert_TLK = random_routes(tokens, layers, E, K, seed).copy()
    expert_TLK[generator.random(expert_TLK.shape) < 0.1] = -1
    doc_T = np.sort(generator.integers(0, 20, tokens)) * 7
    return doc_T, doc_T // 7 % Y, expert_TLK, generator.integers(0, 30, tokens)


@given(seeds)
def test_rows_are_counted_by_document_layer_and_expert(seed):
    doc_T, domain_T, expert_TLK, _ = _routed(seed)
    docs = of.of_tokens(doc_T, domain_T, expert_TLK, E)
    for d, doc in enumerate(np.unique(doc_T)):
        assert docs.domain_D[d] == doc // 7 % Y
        for layer in range(2):
            taken = expert_TLK[doc_T == doc, layer]
            assert docs.rows_DLE[d, layer].tolist() == np.bincount(taken[taken >= 0], minlength=E).tolist()
    assert docs.expected_DLE is None


def test_a_trace_is_counted_part_by_part_to_the_same(tmp_path):
    tokens = 48_000  # two parts of its routes
    doc_T, domain_T, expert_TLK, _ = _routed(0, tokens)
    trace = write_trace(
        tmp_path / "trace", expert_TLK, doc=doc_T, domain=domain_T, domains=["a", "b", "c"], n_experts=[E, E]
    )
    docs, whole = of.documents(trace), of.of_tokens(doc_T, domain_T, expert_TLK, E)
    assert len(list(trace.batches(65536))) == 2
    assert np.array_equal(docs.rows_DLE, whole.rows_DLE)
    assert np.array_equal(docs.domain_D, whole.domain_D)


@given(seeds)
def test_what_tokens_explain_is_every_ids_mean(seed):
    doc_T, domain_T, expert_TLK, token_T = _routed(seed, 200)
    docs = of.of_tokens(doc_T, domain_T, expert_TLK, E, token_T)
    mean_VLE = np.zeros((30, 2, E))
    for token in np.unique(token_T):
        taken_NLK = expert_TLK[token_T == token]
        mean_VLE[token] = [[(taken_NLK[:, layer] == e).sum() / len(taken_NLK) for e in range(E)] for layer in range(2)]
    expected = [mean_VLE[token_T[doc_T == doc]].sum(0) for doc in np.unique(doc_T)]
    assert docs.expected_DLE == pytest.approx(np.array(expected), abs=1e-4)


def test_a_router_that_goes_by_token_id_leaves_nothing_beyond_tokens():
    doc_T, domain_T, _, token_T = _routed(0)
    docs = of.of_tokens(doc_T, domain_T, (token_T % E)[:, None, None], E, token_T)
    assert of.deviation(docs, of_tokens=True) == pytest.approx(0, abs=1e-4)
    assert (of.permuted(of.deviation(docs, of_tokens=True), docs.domain_D, Y).p == 1).all()


# Intervals.


@given(seeds)
def test_the_numbers_are_those_of_specialisation(seed):
    docs = _documents(seed)
    found = of.intervals(docs, K, Y, resamples=40)
    for layer in range(2):
        count_YE = np.stack([docs.rows_DLE[docs.domain_D == y, layer].sum(0) for y in range(Y)])
        count_YE = torch.from_numpy(count_YE)
        assert found.share.value[layer] == pytest.approx(specialisation.key_specialisation(count_YE, K).numpy())
        assert found.lift.value[layer] == pytest.approx(specialisation.lift(count_YE).numpy())
        assert found.information.value[layer] == pytest.approx(specialisation.information(count_YE), abs=1e-5)
    for estimate in (found.share, found.lift):
        assert (estimate.low <= estimate.value).all()
        assert (estimate.value <= estimate.high).all()


def test_a_domain_of_one_document_has_no_interval_and_one_of_none_has_no_number():
    docs = of.Documents(np.ones((4, 1, 2), np.float32), np.array([0, 0, 0, 1]))
    share = of.intervals(docs, 1, 3, resamples=40).share
    assert share.value[0, :, 0].tolist() == pytest.approx([0.5, 0.5, np.nan], nan_ok=True)
    assert np.isnan(share.low[0, :, 0]).tolist() == [False, True, True]


SIMULATED = 600  # studies, as layers of one call
LENGTH, A, B = 50, (2.0, 5.0), (6.0, 5.0)  # rows of a document; its share for expert 0 is Beta(a, b) of its domain


def _studies(n):
    """Documents of two domains, n of each; their tokens' true shares of expert 0."""
    generator = np.random.default_rng(0)
    domain_D = np.repeat([0, 1], n)
    share_DL = generator.beta(np.array(A)[domain_D, None], np.array(B)[domain_D, None], (2 * n, SIMULATED))
    first_DL = generator.binomial(LENGTH, share_DL)
    rows_DLE = np.stack([first_DL, LENGTH - first_DL], -1).astype(np.float32)
    return of.Documents(rows_DLE, domain_D), np.array(A) / (np.array(A) + np.array(B))


def _holds(estimate, truth):
    return np.mean((estimate.low <= truth) & (truth <= estimate.high), axis=0)


@pytest.mark.parametrize("n", [6, 25])
def test_intervals_over_documents_hold_the_truth_in_95_of_100_studies(n):
    """Within three deviations of a share of 600, and a little for the bootstrap of few documents."""
    docs, share_Y = _studies(n)
    found = of.intervals(docs, 1, 2)
    joint = np.stack([share_Y, 1 - share_Y], 1) / 2
    bits = stats.entropy(joint.sum(0), base=2) + 1 - stats.entropy(joint.ravel(), base=2)
    assert _holds(found.share, np.stack([share_Y, 1 - share_Y], 1)) == pytest.approx(0.95, abs=0.035)
    assert _holds(found.lift, joint / (joint.sum(0) / 2)) == pytest.approx(0.95, abs=0.045)
    assert _holds(found.information, bits) == pytest.approx(0.95, abs=0.045)


def test_where_experts_tell_nothing_of_domains_the_interval_of_information_has_0():
    """Eight experts, four domains of eight documents each: by chance they inform, in every study."""
    generator = np.random.default_rng(0)
    share_DLE = generator.dirichlet(np.ones(E), (32, 200))
    docs = of.Documents(generator.multinomial(LENGTH, share_DLE).astype(np.float32), np.arange(32) % 4)
    found = of.intervals(docs, 1, 4).information
    assert (found.value > 0.01).all()
    assert (found.low == 0).mean() > 0.93


def test_intervals_over_tokens_are_too_narrow():
    """The same studies, each token resampled as if it were a draw of its own: the reason to resample documents."""
    docs, share_Y = _studies(25)
    first_L = docs.rows_DLE[docs.domain_D == 0, :, 0].sum(0)
    tokens = 25 * LENGTH
    drawn_RL = np.random.default_rng(1).binomial(tokens, first_L / tokens, (400, SIMULATED)) / tokens
    low_L, high_L = np.quantile(drawn_RL, (0.025, 0.975), axis=0)
    assert np.mean((low_L <= share_Y[0]) & (share_Y[0] <= high_L)) < 0.6


# The null.


@given(seeds)
def test_a_deviation_is_what_a_document_gives_above_the_experts_share_of_all(seed):
    docs = _documents(seed)
    for layer in range(2):
        rows_DE = docs.rows_DLE[:, layer].astype(np.float64)
        expected_DE = np.outer(rows_DE.sum(1), rows_DE.sum(0)) / rows_DE.sum()
        assert of.deviation(docs)[:, layer] == pytest.approx(rows_DE - expected_DE, abs=1e-4)


def test_documents_that_differ_in_length_alone_do_not_deviate():
    length_D = np.random.default_rng(0).integers(1, 1000, 30)
    docs = of.Documents(
        (length_D[:, None, None] * np.array([[1, 2, 4]])).astype(np.float32), (length_D > 500).astype(int)
    )
    tested = of.permuted(of.deviation(docs), docs.domain_D, 2)
    assert (tested.z == 0).all()
    assert (tested.p == 1).all()


def _sums(deviation_DLE, label_D):
    return np.stack([deviation_DLE[label_D == y].sum(0) for y in range(Y)], 1)


@pytest.mark.parametrize("strata", [None, [0, 0, 1, 0, 1, 1, 1]], ids=["one", "two"])
def test_z_has_the_mean_and_deviation_of_every_deal_of_the_labels(strata):
    """All 5,040 permutations of seven labels; in strata those that deal them within each."""
    docs = _documents(1, n=7, layers=1, experts=3)
    deviation = of.deviation(docs).astype(np.float64)
    stratum_D = np.zeros(7, int) if strata is None else np.array(strata)
    orders = [order for order in itertools.permutations(range(7)) if np.array_equal(stratum_D[list(order)], stratum_D)]
    null = np.array([_sums(deviation, docs.domain_D[list(order)]) for order in orders])
    z = of.permuted(of.deviation(docs), docs.domain_D, Y, 10, stratum_D=None if strata is None else stratum_D).z
    assert z == pytest.approx((_sums(deviation, docs.domain_D) - null.mean(0)) / null.std(0), abs=1e-4)


@pytest.mark.parametrize("strata", [1, 2])
def test_labels_are_dealt_within_strata_and_none_is_lost(strata):
    domain_D, stratum_D = np.arange(12) % Y, np.arange(12) // 2 % strata
    dealt_RD = of.dealt(domain_D, stratum_D, 50, np.random.default_rng(0))
    for stratum in range(strata):
        inside = stratum_D == stratum
        assert (np.sort(dealt_RD[:, inside]) == np.sort(domain_D[inside])).all()
    assert len({tuple(row) for row in dealt_RD.tolist()}) > 40


def test_p_is_how_often_the_largest_z_of_a_deal_is_as_large():
    docs = _documents(2)
    docs.rows_DLE[docs.domain_D == 1, 0, 3] += 20
    tested = of.permuted(of.deviation(docs), docs.domain_D, Y, 60, seed=5)
    dealt_RD = of.dealt(docs.domain_D, np.zeros(30, int), 60, np.random.default_rng(5))
    largest_R = np.array([of.permuted(of.deviation(docs), label_D, Y, 1).z.max() for label_D in dealt_RD])
    expected = [(1 + (largest_R >= z - 1e-4).sum()) / 61 for z in tested.z.ravel()]
    assert tested.p.ravel().tolist() == pytest.approx(expected)
    assert tested.p[0, 1, 3] == pytest.approx(1 / 61)
    assert (tested.p > 0.05).mean() > 0.9


def test_p_is_the_same_in_parts(monkeypatch):
    docs = _documents(3)
    whole = of.permuted(of.deviation(docs), docs.domain_D, Y, 50)
    monkeypatch.setattr(of, "CHUNK", 7 * whole.z.size)
    assert np.array_equal(whole.p, of.permuted(of.deviation(docs), docs.domain_D, Y, 50).p)


def test_of_pages_without_any_specialisation_one_in_twenty_has_a_name():
    """Documents that differ much from each other, of unequal length, and domains that mean nothing: two layers, eight
    experts, four domains, one of them of three documents."""
    generator, pages, named = np.random.default_rng(0), 300, 0
    domain_D = np.repeat(np.arange(4), [15, 12, 10, 3])
    for _ in range(pages):
        share_DLE = generator.dirichlet(np.full(E, 0.3), (40, 2))
        rows_DLE = generator.multinomial(generator.integers(5, 80, (40, 2)), share_DLE).astype(np.float32)
        docs = of.Documents(rows_DLE, domain_D)
        named += of.permuted(of.deviation(docs), domain_D, 4, 199, seed=generator.integers(2**31)).p.min() <= 0.05
    assert named / pages <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / pages)
    assert named > 0


# Names.


def _planted(router, recipe=None, **changes):
    recipe = recipe or Recipe(**changes)
    text = planted.corpus(recipe, 0)
    expert_TK = planted.route(text, router, recipe, 1).expert_TK
    columns = (text.doc_T, text.domain_T, expert_TK[:, None])
    return text, of.of_tokens(*(column.numpy() for column in columns), 16, text.token_T.numpy())


def test_experts_of_domains_are_called_after_them_beyond_what_tokens_explain():
    named = of.names(_planted("domain")[1], 2, 4)
    assert [(name.layer, name.expert, name.domain) for name in named] == [(0, e, e % 4) for e in range(16)]
    for name in named:
        assert name.share_low < name.share < name.share_high
        assert 1 < name.lift_low < name.lift < name.lift_high
        assert name.p <= 0.05
        assert name.p_of_tokens <= 0.05


def test_experts_of_words_are_called_after_domains_only_because_of_their_tokens():
    named = of.names(_planted("words")[1], 2, 4)
    assert len(named) > 8
    assert all(name.p_of_tokens > 0.05 for name in named)


def test_experts_of_a_format_lose_their_names_within_formats():
    text, docs = _planted("format", follows=0.7)
    format_D = text.format_T.numpy()[np.unique(text.doc_T.numpy(), return_index=True)[1]]
    assert len(of.names(docs, 2, 4)) > 8
    assert of.names(docs, 2, 4, stratum_D=format_D) == []


def test_experts_of_documents_have_no_name_although_their_tokens_speak_for_one():
    """A test that takes every token for a draw of its own finds what documents that are dealt anew do not."""
    _, docs = _planted("document")
    count_YE = np.stack([docs.rows_DLE[docs.domain_D == y, 0].sum(0) for y in range(4)])
    assert stats.chi2_contingency(count_YE).pvalue < 1e-6
    assert of.names(docs, 2, 4) == []


def test_a_small_lift_earns_no_name_however_sure_it_is():
    _, docs = _planted("domain", documents=400)
    lift = of.intervals(docs, 2, 4).lift.value.max()
    assert of.names(docs, 2, 4, least=lift + 0.01) == []


def test_without_tokens_it_is_unknown_what_they_explain():
    _, docs = _planted("domain")
    assert all(np.isnan(name.p_of_tokens) for name in of.names(docs._replace(expected_DLE=None), 2, 4))
