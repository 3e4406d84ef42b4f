"""Claims about what an intervention costs: against passes by hand, brute-force resamples and planted differences."""

import dataclasses

import numpy as np
import pytest
import torch

from moe.analysis import effects
from moe.analysis.effects import (
    Losses,
    Variant,
    differences,
    every_expert,
    every_rounding,
    keep,
    measure,
    most_hurt,
    used,
)
from moe.analysis.interventions import Change, intervene
from moe.config.router import RouterConfig
from moe.convert.quantize import rounded
from moe.errors import BadInput
from moe.model.transformer import next_token_loss
from tests.router_presets import presets_of_routers
from tests.small_layers import model_of

B, S = 3, 16
DOMAINS = ["one", "two"]
PRESETS = {name: preset for name, preset in presets_of_routers().items() if name not in ("soft", "dense")}


def _windows(n=2):
    rng = np.random.default_rng(0)
    doc_BS = lambda i: np.repeat(np.arange(i * B, (i + 1) * B)[:, None], S, 1)
    return [
        (rng.integers(0, 17, (B, S + 1)), rng.integers(0, 2, (B, S)), doc_BS(i), np.tile(np.arange(S), (B, 1)))
        for i in range(n)
    ]


@pytest.mark.parametrize("name", ["softmax", "expert-choice", "layer-shared"])
def test_a_rounding_has_the_loss_of_its_own_whole_pass(make_model, name):
    model, windows = (
        model_of(make_model, PRESETS[name], d_model=32, n_heads=2, head_dim=16, d_ff=32, d_expert=32),
        _windows(),
    )
    variants = every_rounding(model, "int4", one_by_one=True)
    n = model.cfg.moe.n_experts
    assert [variant.what for variant in variants[:3]] == ["int4 every matrix", "int4 all experts", "int4 0:0"]
    assert len(variants) == 2 + 2 * n
    losses = measure(model, windows, DOMAINS, variants)
    for q in (0, 1, 2 + n + 1):
        with torch.no_grad(), rounded(model, variants[q].rounding):
            after = [
                next_token_loss(model(torch.from_numpy(b[0][:, :-1])).logits_BSV, torch.from_numpy(b[0][:, 1:]), "none")
                for b in windows
            ]
        assert losses.after_QT[q].tolist() == torch.cat(after).float().flatten().tolist()
        assert losses.after_QT[q].tolist() != losses.before_T.tolist()


def _losses(before_T, after_QT, unit_T, domain_T=None, read_T=None):
    """Losses of planted tokens, each unit a document."""
    zeros = np.zeros(len(before_T), int)
    domain_T, read_T = zeros if domain_T is None else domain_T, np.arange(len(zeros)) if read_T is None else read_T
    return Losses(DOMAINS, read_T, read_T + 1, domain_T, unit_T, zeros, np.arange(len(zeros)), before_T, after_QT)


@pytest.mark.parametrize("name", ["softmax", "layer-shared", "lookahead", "mod", "threshold", "expert-choice", "mode"])
def test_every_variant_has_the_loss_of_its_own_whole_pass(make_model, name):
    model, windows = model_of(make_model, PRESETS[name]), _windows()
    variants = [
        Variant("last", [Change("mask", 1, [2])]),
        Variant("first", [Change("drop", 0, [0])]),
        Variant("both", [Change("force", 1, [1, 2]), Change("swap", 0, [0, 1])]),
        Variant("none"),
    ]
    losses = measure(model, windows, DOMAINS, variants)
    for q, variant in enumerate(variants):
        after = []
        for read_BS1, *_ in windows:
            read_BS1 = torch.from_numpy(read_BS1)
            with torch.no_grad(), intervene(model, variant.changes):
                logits_BSV = model(read_BS1[:, :-1]).logits_BSV
            after.append(next_token_loss(logits_BSV, read_BS1[:, 1:], "none").float().flatten())
        assert losses.after_QT[q].tolist() == torch.cat(after).tolist()
    assert losses.before_T.tolist() == losses.after_QT[3].tolist()
    assert losses.window_T.tolist() == np.repeat(np.arange(2 * B), S).tolist()


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if name != "expert-choice"])
def test_to_replay_a_models_own_routing_changes_no_bit(make_model, name):
    model, windows = model_of(make_model, PRESETS[name]), _windows()
    parts = []
    for read_BS1, *_ in windows:
        with torch.no_grad():
            routing = model(torch.from_numpy(read_BS1[:, :-1])).routing
        parts.append(torch.stack([report.expert for report in routing], 1))
    expert_TLK = torch.cat(parts).numpy().astype(np.int16)
    losses = measure(model, windows, DOMAINS, [Variant("own", (), expert_TLK), Variant("other", (), expert_TLK[::-1])])
    assert losses.after_QT[0].tolist() == losses.before_T.tolist()
    assert name != "softmax" or (losses.after_QT[1] != losses.before_T).mean() > 0.9


def test_a_record_may_be_narrower_than_the_routing_and_have_nothing_beyond_it(make_model):
    model, windows = model_of(make_model, PRESETS["threshold"]), _windows(1)  # names up to E experts of a token
    expert_TLK = np.full((B * S, 2, 1), 4, np.int16)
    one, forced = measure(
        model, windows, DOMAINS, [Variant("x", (), expert_TLK), Variant("y", [Change("force", i, [4]) for i in (0, 1)])]
    ).after_QT
    assert one == pytest.approx(forced, rel=1e-6)
    model = model_of(make_model, PRESETS["softmax"])  # names three
    beyond_TLK = np.pad(expert_TLK, ((0, 0), (0, 0), (0, 9)), constant_values=-2)
    measure(model, windows, DOMAINS, [Variant("x", (), beyond_TLK)])
    beyond_TLK[3, 1, 7] = 2
    with pytest.raises(BadInput, match="more experts than the 3 that its router names"):
        measure(model, windows, DOMAINS, [Variant("x", (), beyond_TLK)])


def test_experts_that_choose_tokens_have_nothing_to_replay(make_model):
    model = model_of(make_model, PRESETS["expert-choice"])
    with pytest.raises(BadInput, match="experts choose tokens in this model"):
        measure(model, _windows(), DOMAINS, [Variant("x", (), np.zeros((2 * B * S, 2, 3), np.int16))])


def test_a_difference_is_the_mean_over_tokens_and_its_interval_that_of_resampled_documents():
    """Brute force: documents drawn one by one, with all their tokens."""
    rng = np.random.default_rng(1)
    unit_T = np.repeat(np.arange(40), rng.integers(1, 60, 40))
    before_T = rng.normal(3, 1, len(unit_T)).astype(np.float32)
    after_T = (before_T + 1 + rng.normal(0, 0.2, 40)[unit_T] + rng.normal(0, 0.1, len(unit_T))).astype(np.float32)
    losses = _losses(before_T, after_T[None], unit_T)
    assert losses.unit == "documents"
    (difference,) = differences(losses, np.ones(len(unit_T), bool))
    assert difference.difference == pytest.approx((after_T - before_T).mean(), abs=1e-6)
    assert difference.before == pytest.approx(before_T.mean(), abs=1e-5)
    assert difference.after == pytest.approx(after_T.mean(), abs=1e-5)
    assert (difference.tokens, difference.units) == (len(unit_T), 40)
    means = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(unit_T == u) for u in rng.integers(0, 40, 40)])
        means.append((after_T[rows] - before_T[rows]).mean(dtype=np.float64))
    low, high = np.quantile(means, [0.025, 0.975])
    assert difference.high - difference.low == pytest.approx((high - low) * 1.0455, rel=0.06)  # t_39 for the normal
    assert difference.low == pytest.approx(low, abs=0.015)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of documents that differ; an interval that takes tokens for independent would miss far more often."""
    rng, unit_T, hits = np.random.default_rng(2), np.repeat(np.arange(15), 20), 0
    after_QT = 0.1 + rng.normal(0, 0.3, (400, 15))[:, unit_T] + rng.normal(0, 0.1, (400, 300))
    for difference in differences(_losses(np.zeros(300), after_QT, unit_T), np.ones(300, bool)):
        hits += difference.low < 0.1 < difference.high
    assert 0.92 < hits / 400 < 0.98


def test_few_documents_leave_windows_to_resample_and_one_unit_has_no_interval():
    losses = dataclasses.replace(
        _losses(np.zeros(64), np.ones((1, 64)), np.zeros(64, int)), window_T=np.repeat(np.arange(4), 16)
    )
    assert losses.unit == "windows"
    assert differences(losses, np.ones(64, bool))[0].units == 4
    (one,) = differences(losses, np.arange(64) < 16)
    assert (one.difference, one.low, one.high, one.units) == (1.0, -np.inf, np.inf, 1)


def test_domains_have_the_differences_of_their_own_tokens():
    domain_T, unit_T = np.arange(100) % 2, np.arange(100) // 5
    after_T = np.where(domain_T == 1, 2.0, 0.5)
    (effect,) = effects.effects(_losses(np.zeros(100), after_T[None], unit_T, domain_T), [Variant("planted")])
    assert {name: d.difference for name, d in effect.domains.items()} == {"one": 0.5, "two": 2.0}
    assert effect.total.difference == pytest.approx(1.25)
    assert [d.tokens for d in effect.domains.values()] == [50, 50]


def test_the_most_hurt_tokens_are_the_worst_of_each_pair_and_none_that_gained():
    after_T = np.array([0.0, 3.0, 1.0, 2.0, -1.0, 5.0])
    losses = _losses(np.zeros(6), after_T[None], np.arange(6), read_T=np.array([7, 8, 8, 9, 9, 8]))
    assert [(hurt.read, hurt.place, hurt.after) for hurt in most_hurt(losses, 0, 9)] == [(8, 5, 5.0), (9, 3, 2.0)]
    assert len(most_hurt(losses, 0, 1)) == 1


def test_an_expert_that_gives_nothing_has_no_importance_and_the_others_do(make_model):
    """Dropped: a mask would send its rows to another expert, which gives something."""
    model = make_model(RouterConfig("hash"))
    with torch.no_grad():
        model.blocks[1].mlp.experts.w_down_EDF[3] = 0
    windows, variants = _windows(4), every_expert(model)
    assert [variant.what for variant in variants] == [f"drop {layer}:{e}" for layer in (0, 1) for e in range(5)]
    told = {effect.what: effect for effect in effects.effects(measure(model, windows, DOMAINS, variants), variants)}
    assert [what for what, effect in told.items() if effect.total.difference == 0] == ["drop 1:3"]
    assert told["drop 1:3"].hurt == []


@pytest.mark.parametrize("name", ["softmax", "threshold", "expert-choice", "moepp"])
def test_use_is_what_the_layers_count(make_model, name):
    model, windows = model_of(make_model, PRESETS[name]), _windows()
    rows = used(model, windows, 2)
    for i, row_YE in enumerate(rows):
        expected = np.zeros_like(row_YE)
        for read_BS1, domain_BS, *_ in windows:
            with torch.no_grad():
                report = model(torch.from_numpy(read_BS1[:, :-1])).routing[i]
            token_N = report.token_N
            if token_N is None:
                token_N = torch.arange(B * S).repeat_interleave(report.expert.shape[1])
            for t, e in zip(token_N.tolist(), report.expert.flatten().tolist(), strict=True):
                expected[domain_BS.ravel()[t], e] += e >= 0
        assert row_YE.tolist() == expected.tolist()


def test_the_experts_that_are_kept_are_the_busiest_and_each_domain_has_its_own(make_model):
    """Every composite is measured again by itself."""
    model = model_of(make_model, PRESETS["softmax"])
    windows = [(read_BS1, (read_BS1[:, :-1] == 5).astype(int), *rest) for read_BS1, _, *rest in _windows(4)]
    told = {effect.what: effect for effect in keep(model, windows, DOMAINS, 0.25)}
    assert list(told) == ["by use", "by each domain's use", *(f"at random, draw {i}" for i in range(3))]
    rows = used(model, windows, 2)
    busiest = [set(np.argsort(-row_YE.sum(0), kind="stable")[:2].tolist()) for row_YE in rows]
    for change, kept in zip(told["by use"].changes, busiest, strict=True):
        assert set(change.experts) == set(range(8)) - kept
    assert all(len(change.experts) == 6 for change in told["at random, draw 2"].changes)
    assert len({frozenset(np.argsort(-row_Y, kind="stable")[:2].tolist()) for row_Y in rows[0]}) == 2
    for y, name in enumerate(DOMAINS):
        rest = [np.argsort(-row_YE[y], kind="stable")[2:].tolist() for row_YE in rows]
        variant = Variant("own", [Change("mask", layer, experts) for layer, experts in enumerate(rest)])
        (effect,) = effects.effects(measure(model, windows, DOMAINS, [variant]), [variant])
        assert told["by each domain's use"].domains[name] == effect.domains[name]


def test_to_keep_all_but_none_changes_nothing_and_one_expert_stays_at_least(make_model):
    model, windows = model_of(make_model, PRESETS["softmax"]), _windows()
    assert all(effect.total.difference == 0 for effect in keep(model, windows, DOMAINS, 0.99))
    assert all(len(change.experts) == 7 for change in keep(model, windows, DOMAINS, 0.01)[0].changes)
