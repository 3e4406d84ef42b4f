"""Claims about planted text and routers: each goes by what it says, and by nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from moe.analysis import planted
from moe.analysis.planted import MARKS, OWN, ROUTERS, SHARED, Recipe

E, K = 16, 2
RECIPE = Recipe(documents=200)
GROUPS = RECIPE.domains


def _marks(text):
    return text.token_T >= SHARED + OWN * GROUPS


def _own(text):
    return (text.token_T >= SHARED) & ~_marks(text)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_so_many_words_are_the_domains_own(share):
    text = planted.corpus(replace(RECIPE, separable=share), 0)
    own_T = _own(text)[~_marks(text)]
    assert own_T.double().mean().item() == pytest.approx(share, abs=0.03)
    whose_T = (text.token_T - SHARED) // OWN
    assert torch.equal(whose_T[_own(text)], text.domain_T[_own(text)])


@pytest.mark.parametrize("follows", [0.25, 0.7, 1.0])
def test_a_format_is_the_domains_as_often_as_it_says(follows):
    text = planted.corpus(Recipe(documents=4000, follows=follows, shortest=8, longest=8), 0)
    same_D = (text.format_T == text.domain_T).view(-1, 8)[:, 0]
    assert same_D.double().mean().item() == pytest.approx(follows, abs=0.02)
    format_T = (text.token_T - SHARED - OWN * GROUPS) // MARKS
    assert torch.equal(format_T[_marks(text)], text.format_T[_marks(text)])
    assert torch.equal(_marks(text), text.pos_T % planted.EVERY == 0)


def test_documents_stand_one_after_the_other_and_repeat_themselves():
    text = planted.corpus(RECIPE, 0)
    doc_T = text.doc_T.numpy()
    assert np.all(np.diff(doc_T) >= 0)
    lengths = np.bincount(doc_T)
    assert lengths.min() >= RECIPE.shortest
    assert lengths.max() <= RECIPE.longest
    assert torch.equal(text.pos_T, torch.cat([torch.arange(n) for n in lengths.tolist()]))
    assert torch.equal(text.next_T[:-1], text.token_T[1:])
    late_T = (text.pos_T >= planted.FIRST) & ~_marks(text)
    first_DF = torch.stack([text.token_T[text.doc_T == d][: planted.FIRST] for d in range(RECIPE.documents)])
    repeats = lambda first_DF: (text.token_T[:, None] == first_DF[text.doc_T]).any(1)[late_T].double().mean()
    assert repeats(first_DF) > repeats(first_DF.roll(GROUPS, 0)) + 0.1  # than another document's first


def test_domains_are_of_equal_size_or_each_half_of_the_one_before():
    assert np.bincount(planted.sizes(Recipe(documents=100))).tolist() == [25] * 4
    assert np.bincount(planted.sizes(Recipe(documents=100, even=False))).tolist() == [57, 25, 12, 6]
    assert np.bincount(planted.sizes(Recipe(documents=12, even=False))).tolist() == [5, 3, 2, 2]


KEYS = {
    "domain": lambda text: text.domain_T,
    "words": lambda text: text.token_T,
    "token": lambda text: text.token_T,
    "frequency": lambda text: text.token_T,
    "next": lambda text: text.next_T,
    "format": lambda text: text.format_T,
    "document": lambda text: text.doc_T,
    "position": lambda text: text.pos_T,
}


@pytest.mark.parametrize("router", KEYS)
def test_a_router_goes_by_what_it_is_called_after(router):
    """Without noise both experts of a token are of the same group, and tokens of one key have one group."""
    text = planted.corpus(RECIPE, 0)
    expert_TK, prob_TE = planted.route(text, router, RECIPE, 1, noise=0)
    group_TK = expert_TK % GROUPS
    assert (group_TK[:, 0] == group_TK[:, 1]).double().mean() > 0.999
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
    key_T = KEYS[router](text)
    groups_of_key = {}
    for key, group in zip(key_T.tolist(), group_TK[:, 0].tolist(), strict=True):
        groups_of_key.setdefault(key, []).append(group)
    sure = np.mean([np.mean(np.array(groups) == stats.mode(groups).mode) for groups in groups_of_key.values()])
    assert sure > 0.999
    assert len(set(group_TK[:, 0].tolist())) == GROUPS
    assert prob_TE.sum(1) == pytest.approx(1)


def test_domains_take_the_experts_of_their_number_and_words_those_of_their_domain():
    text = planted.corpus(RECIPE, 0)
    for router, which_T in (("domain", torch.ones(len(text.doc_T), dtype=bool)), ("words", _own(text))):
        group_TK = planted.route(text, router, RECIPE, 1, noise=0).expert_TK % GROUPS
        assert (group_TK[which_T] == text.domain_T[which_T, None]).double().mean() > 0.999
        assert which_T.any()


def test_frequent_tokens_have_a_group_of_their_own_and_groups_are_even():
    text = planted.corpus(RECIPE, 0)
    group_T = planted.groups(text, "frequency", GROUPS, torch.Generator())
    assert group_T.bincount().double().numpy() == pytest.approx(len(group_T) / GROUPS, rel=0.1)
    count_T = text.token_T.bincount()[text.token_T]
    for group in range(GROUPS - 1):
        assert count_T[group_T == group].min() >= count_T[group_T == group + 1].max()


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_noise_is_the_share_of_the_tokens_that_go_anywhere(noise):
    text = planted.corpus(RECIPE, 0)
    expert_TK = planted.route(text, "domain", RECIPE, 1, noise).expert_TK
    inside = (expert_TK % GROUPS == text.domain_T[:, None]).double().mean().item()
    assert inside == pytest.approx(1 - noise + noise / GROUPS, abs=0.02)


def test_random_is_even_and_popular_goes_as_one_over_rank():
    text = planted.corpus(Recipe(documents=1000), 0)
    count = lambda router: planted.route(text, router, RECIPE, 1, k=1).expert_TK.flatten().bincount(minlength=E)
    even = count("random").numpy()
    assert stats.chisquare(even).pvalue > 0.001
    share = 1 / np.arange(1, E + 1)
    assert stats.chisquare(count("popular").numpy(), share / share.sum() * even.sum()).pvalue > 0.001


@pytest.mark.parametrize("router", ROUTERS)
def test_the_same_seed_is_the_same_text_and_the_same_routes(router):
    one, two = (planted.corpus(RECIPE, 3) for _ in range(2))
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one.token_T[:100], planted.corpus(RECIPE, 4).token_T[:100])
    assert all(map(torch.equal, planted.route(one, router, RECIPE, 5), planted.route(two, router, RECIPE, 5)))
