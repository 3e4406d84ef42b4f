"""Claims about what changed in routing between two models: against loops, planted routers, and all deals."""

import copy
import itertools

import numpy as np
import pytest
import torch

from moe.analysis.rerouting import Places, asking, check_alike, compare, dealt_changed, dealt_flips, of_layer
from moe.analysis.stability import routes
from moe.analysis.windows import Windows
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.errors import BadInput
from tests.router_presets import presets_of_routers
from tests.small_layers import model_of

PRESETS = presets_of_routers()
DOMAINS = ["even", "odd"]


def _windows(n=12, s=16):
    """Windows of a document each, of two domains in turn; the domain is in the tokens too."""
    token_N1 = np.random.default_rng(0).integers(0, 8, (n, s + 1)) * 2 + np.arange(n)[:, None] % 2
    place_NS = np.tile(np.arange(s), (n, 1))
    number_NS = np.repeat(np.arange(n)[:, None], s, 1)
    read = lambda chunk: (token_N1[chunk], number_NS[chunk] % 2, number_NS[chunk], place_NS[chunk], token_N1[chunk, 1:])
    return Windows(s, 4, np.arange(n) * s, read, DOMAINS, "of a test")


def _changed(model, seed, name):
    """A copy whose weights of this name are others."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in other.named_parameters():
            if name in key:
                p.normal_(0, 0.4, generator=generator)
    return other


def _sets(expert_TK):
    return [{e for e in row if e >= 0} for row in expert_TK.tolist()]


def _choices(model, windows):
    """Every layer's sets and what its router read, window by window, by what the router itself returns."""
    layers = [([], []) for _ in model.routers()]
    for read_BS1, *_ in windows:
        for window in read_BS1:
            given, hooks = [], []
            for router in model.routers():
                hooks.append(router.register_forward_pre_hook(lambda module, words, to=given: to.append(words)))
            with torch.no_grad():
                reports = model(torch.from_numpy(window[None, :-1])).routing
            for hook in hooks:
                hook.remove()
            for (sets, states), report, words in zip(layers, reports, given, strict=True):
                sets += _sets(report.expert)
                states.append(words)
    return layers


def test_flips_and_what_causes_them_are_those_of_a_loop_over_windows(make_model):
    """Router and states changed; asked by hand, a window at a time."""
    before = make_model(RouterConfig()).eval()
    after = _changed(_changed(before, 1, "router"), 2, "experts")
    windows = _windows()
    told = compare(before, after, windows)
    assert [(row.layer, row.domain) for row in told] == [(i, name) for i in (0, 1) for name in (None, *DOMAINS)]
    domain_T = np.concatenate([batch[1].ravel() for batch in windows])
    layers = zip(_choices(before, windows), _choices(after, windows), before.routers(), after.routers(), strict=True)
    for i, ((one, one_states), (other, other_states), one_router, other_router) in enumerate(layers):
        with torch.no_grad():
            by_states = [s for words in other_states for s in _sets(one_router(*words).expert)]
            by_router = [s for words in one_states for s in _sets(other_router(*words).expert)]
        for row in told[3 * i : 3 * i + 3]:
            kept = [t for t, y in enumerate(domain_T) if row.domain in (None, DOMAINS[y])]
            assert row.tokens == len(kept)
            share = lambda sets, kept=kept, one=one: np.mean([one[t] != sets[t] for t in kept])
            assert row.flips.value == pytest.approx(share(other))
            assert row.by_states.value == pytest.approx(share(by_states))
            assert row.by_router.value == pytest.approx(share(by_router))
            assert row.changed.value == pytest.approx(np.mean([len(one[t] - other[t]) / 3 for t in kept]))
            for side, sets in ((row.before, one), (row.after, other)):
                count_E = np.array([sum(e in sets[t] for t in kept) for e in range(5)])
                assert side.share_E == pytest.approx(count_E / len(kept))
                assert side.max_vio == pytest.approx(count_E.max() / count_E.mean() - 1)
                assert side.dead == (count_E == 0).sum()
            assert 0 <= row.flips.low < row.flips.value < row.flips.high <= 1
            assert (row.unit, row.units) == ("documents", 12 if row.domain is None else 6)


def test_a_model_compared_with_itself_has_no_flips(make_model):
    model = make_model(RouterConfig()).eval()
    for other in (model, copy.deepcopy(model)):
        for row in compare(model, other, _windows()):
            assert row.flips == row.changed == row.by_states == row.by_router == (0, 0, 0)
            assert row.before == row.after
            assert row.chance_flips > 0.3


def test_flips_are_the_routers_where_only_routers_changed_until_a_layer_is_fed_by_one(make_model):
    before = make_model(RouterConfig()).eval()
    first, *_, second = [
        row for row in compare(before, _changed(before, 1, "router"), _windows()) if row.domain is None
    ]
    assert first.by_states.value == 0
    assert first.by_router == first.flips
    assert first.flips.value > 0.3
    assert second.by_states.value > 0


def test_flips_are_the_states_where_only_experts_changed(make_model):
    before = make_model(RouterConfig()).eval()
    first, second = [row for row in compare(before, _changed(before, 1, "experts"), _windows()) if row.domain is None]
    assert first.flips.value == 0
    assert second.by_router.value == 0
    assert second.by_states == second.flips
    assert second.flips.value > 0.1


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"soft"}))
def test_every_router_with_routes_can_be_compared_and_asked(make_model, name):
    model = model_of(make_model, PRESETS[name])
    passed_by = [layer for layer, depth in enumerate(model.depths()) if depth is not None]
    for row in compare(model, copy.deepcopy(model), _windows()):
        assert row.flips.value == 0
        if row.layer in passed_by:
            assert row.by_states is row.by_router is None
        else:
            assert row.by_states.value == row.by_router.value == 0
    assert bool(passed_by) == (name == "mod")


def test_a_router_is_asked_what_the_other_models_router_is_asked(make_model):
    """A model asked beside itself says what it says."""
    model = make_model(RouterConfig("sigmoid", shared=True)).eval()
    with asking(model, copy.deepcopy(model)) as said:
        chosen = routes(model, _windows())
    assert all(torch.equal(torch.cat(parts), layer) for parts, layer in zip(said, chosen, strict=True))
    assert not model.routers()[0]._forward_hooks


def test_chance_is_the_mean_over_all_deals():
    """Of five tokens all 120; a token without an expert counts for flips alone."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(5, 4, generator=generator).topk(2).indices for _ in range(2))
    one[0] = torch.tensor([2, -1])
    one[1] = -1
    flips, lost = [], []
    for deal in itertools.permutations(range(5)):
        pairs = list(zip(_sets(one), _sets(other[list(deal)]), strict=True))
        flips.append(np.mean([a != b for a, b in pairs]))
        lost.append(np.mean([len(a - b) / len(a) for a, b in pairs if a]))
    assert dealt_flips(one, other) == pytest.approx(np.mean(flips))
    assert dealt_changed(one, other, 4) == pytest.approx(np.mean(lost))


def _planted(n=4000, shift=0):
    """Experts by document: of domain 0 either 0 or 1, of domain 1 either 2 or 3, or all moved on by some."""
    rng = np.random.default_rng(0)
    doc_T = np.repeat(np.arange(40), n // 40)
    domain_T = doc_T % 2
    expert_T1 = torch.from_numpy((2 * domain_T + rng.integers(0, 2, n) + shift) % 4)[:, None]
    return expert_T1, Places(domain_T, doc_T, doc_T)


def test_experts_that_are_dealt_anew_flip_as_often_as_chance_has_it():
    expert_T1, places = _planted()
    dealt_T1 = expert_T1[torch.randperm(len(expert_T1), generator=torch.Generator().manual_seed(0))]
    row = of_layer(0, 4, expert_T1, dealt_T1, None, places, DOMAINS)[0]
    assert row.chance_flips == row.chance_changed == pytest.approx(3 / 4, abs=0.001)
    assert row.flips.value == pytest.approx(row.chance_flips, abs=0.02)
    assert row.flips.low < row.chance_flips < row.flips.high


def test_specialisation_that_is_lost_is_seen_against_dealt_labels():
    expert_T1, places = _planted()
    dealt_T1 = expert_T1[torch.randperm(len(expert_T1), generator=torch.Generator().manual_seed(0))]
    row, *of_domains = of_layer(0, 4, expert_T1, dealt_T1, None, places, DOMAINS)
    assert row.before.bits.value == pytest.approx(1, abs=0.001)
    assert row.before.bits.chance < 0.1
    assert row.after.bits.value < 0.01
    assert row.after.bits.value == pytest.approx(row.after.bits.chance, abs=0.002)
    assert [side.bits for part in of_domains for side in (part.before, part.after)] == [None] * 4
    assert of_domains[0].before.share_E == pytest.approx([0.5, 0.5, 0, 0], abs=0.03)
    assert of_domains[0].after.share_E == pytest.approx([0.25] * 4, abs=0.03)


def test_experts_that_exchanged_numbers_flip_all_tokens_and_keep_load_and_bits():
    (expert_T1, places), (moved_T1, _) = _planted(), _planted(shift=2)
    row = of_layer(0, 4, expert_T1, moved_T1, None, places, DOMAINS)[0]
    assert row.flips == (1, 1, 1)
    assert row.flips.value > row.chance_flips
    assert row.before.bits.value == pytest.approx(row.after.bits.value)
    assert row.before.max_vio == pytest.approx(row.after.max_vio)


def test_a_domain_without_tokens_has_no_row_and_one_document_no_narrow_interval():
    expert_T1, _ = _planted()
    alone = Places(np.zeros(4000, int), np.zeros(4000, int), np.zeros(4000, int))
    rows = of_layer(0, 4, expert_T1, expert_T1.roll(1, 0), None, alone, DOMAINS)
    assert [row.domain for row in rows] == [None, "even"]
    assert (rows[0].unit, rows[0].units, rows[0].flips[1:]) == ("windows", 1, (0, 1))
    assert rows[0].before.bits is None


def test_models_that_cannot_be_compared_are_refused_in_a_sentence(make_model):
    model = make_model(RouterConfig())
    moe = MoEConfig(n_experts=6, k=3, d_expert=7)
    for other, said in (
        (make_model(RouterConfig(), moe=moe), r"experts by MoE layer, \[5, 5\] before and \[6, 6\] after"),
        (make_model(RouterConfig(), moe=MoEConfig(n_experts=5, k=2, d_expert=7)), "K by MoE layer"),
        (make_model(RouterConfig(), moe=MoEConfig(n_experts=5, k=3, d_expert=7, every=2)), "differ in MoE layers"),
        (make_model(RouterConfig("sigmoid")), "router, softmax before and sigmoid after"),
        (make_model(moe=None), "dense"),
        (model_of(make_model, PRESETS["soft"]), "soft"),
    ):
        with pytest.raises(BadInput, match=said):
            check_alike(model, other)
