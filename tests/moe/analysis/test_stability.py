"""Claims about lookahead, saturation and churn: against sets counted token by token, and planted routings."""

import math

import numpy as np
import pytest
import torch

from moe.analysis.stability import chance, lookahead, over_checkpoints, routes
from moe.analysis.tracing import What, windows_of_run
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.run.load import load_run
from tests.router_presets import presets_of_routers
from tests.small_layers import model_of
from tests.small_runs import settings, train

PRESETS = presets_of_routers()


def _windows(n=3):
    tokens = np.random.default_rng(0).integers(0, 17, (n, 4, 17))
    place = np.zeros((4, 16), int)
    return [(read_BS1, place, place, place) for read_BS1 in tokens]


def _shared(one_TK, other_TK):
    """mean_t |S ∩ S'| / |S|, set by set; tokens without an expert are left out."""
    sets = [[{e for e in row if e >= 0} for row in choice.tolist()] for choice in (one_TK, other_TK)]
    return np.mean([len(one & other) / len(one) for one, other in zip(*sets, strict=True) if one])


@pytest.mark.parametrize("norm_at", ["before", "after"])
def test_lookahead_is_the_router_on_the_stream_of_the_layer_before(make_model, norm_at):
    """By hand: embedding, attention, the second layer's norm where it has one, its router, the first one's stream."""
    model, windows = make_model(RouterConfig(), norm_at=norm_at).eval().requires_grad_(False), _windows()
    for block in model.blocks:
        block.mlp_norm.weight.normal_(generator=torch.Generator().manual_seed(block.layer))
    early, actual = [], []
    for read_BS1, *_ in windows:
        tokens_BS = torch.from_numpy(read_BS1[:, :-1])
        rope = tuple(angles[:16].unsqueeze(-3) for angles in (model.cos_Sd, model.sin_Sd))
        stream_BSD = model.blocks[0].attend(model.embed(tokens_BS), rope, None)
        norm = model.blocks[1].mlp_norm if norm_at == "before" else torch.nn.Identity()
        state_TD = norm(stream_BSD).flatten(0, 1)
        early.append((state_TD @ model.routers()[1].w_ED.T).topk(3).indices)
        actual.append(model(tokens_BS).routing[1].expert)
    (told,) = lookahead(model, windows)
    assert told.layer == 1
    assert told.agreement == pytest.approx(_shared(torch.cat(actual), torch.cat(early)))
    assert 0 < told.agreement < 1
    assert told.chance == pytest.approx(3 / 5)


def test_where_nothing_happens_between_two_layers_lookahead_is_certain(make_model):
    model = make_model(RouterConfig()).eval().requires_grad_(False)
    model.blocks[0].mlp.experts.w_down_EDF.zero_()
    model.blocks[1].attn.o.weight.zero_()
    assert lookahead(model, _windows())[0].agreement == 1


@pytest.mark.parametrize(
    ("name", "agreement"),
    [("hash", 1), ("lookahead", 1), ("expert-choice", None), ("threshold", None), ("moepp", None)],
)
def test_every_router_can_be_asked_early_and_some_know(make_model, name, agreement):
    """A table of token ids differs between layers, not between states."""
    model = model_of(make_model, PRESETS[name]).requires_grad_(False)
    for block in model.blocks:
        block.mlp_norm.weight.normal_(generator=torch.Generator().manual_seed(block.layer))
    (told,) = lookahead(model, _windows())
    assert 0 < told.agreement <= 1
    assert agreement in (None, told.agreement)


def test_layers_that_tokens_pass_by_are_left_out(make_model):
    assert lookahead(model_of(make_model, PRESETS["mod"]), _windows()) == []


@pytest.mark.parametrize("name", ["softmax", "mod", "expert-choice", "relu"])
def test_routes_are_what_the_layers_report(make_model, name):
    model = model_of(make_model, PRESETS[name])
    told = routes(model, _windows())
    for i, expert_TK in enumerate(told):
        expected = []
        for read_BS1, *_ in _windows():
            with torch.no_grad():
                report = model(torch.from_numpy(read_BS1[:, :-1])).routing[i]
            token_N = report.token_N
            if token_N is None:
                token_N = torch.arange(64).repeat_interleave(report.expert.shape[1])
            sets = [set() for _ in range(64)]
            for t, e in zip(token_N.tolist(), report.expert.flatten().tolist(), strict=True):
                sets[t] |= {e} if e >= 0 else set()
            expected += sets
        assert [{e for e in row if e >= 0} for row in expert_TK.tolist()] == expected


def test_chance_is_what_random_experts_share():
    expert_TK = torch.tensor([[0, 1], [2, -1], [3, 4]])
    assert chance(expert_TK, 5) == pytest.approx(5 / 3 / 5)
    rng, shared = np.random.default_rng(0), []
    for _ in range(4000):
        other = torch.from_numpy(np.stack([rng.permutation(5)[:2] for _ in range(3)]))
        shared.append(_shared(torch.tensor([[0, 1], [2, 3], [3, 4]]), other))
    assert np.mean(shared) == pytest.approx(chance(torch.tensor([[0, 1], [2, 3], [3, 4]]), 5), abs=0.01)


def test_saturation_and_churn_are_those_of_the_checkpoints_own_routes(corpus, tmp_path):
    run, what = tmp_path / "run", What(tokens=600)
    train(settings(corpus, str(run), {"checkpoint.every": 2, "checkpoint.keep": 9, "optim.lr": 0.05}))
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert [int(name[5:]) for name in names] == [2, 4, 6, 7]
    told = over_checkpoints(run, what, names)
    model, tokenizer, cfg = load_run(run, "last")
    experts = []
    for name in names:
        model, parts = load_run(run, name)[0], []
        for read_BS1, *_ in windows_of_run(what, cfg, tokenizer):
            with torch.no_grad():
                parts.append([report.expert for report in model(torch.from_numpy(read_BS1[:, :-1])).routing])
        experts.append([torch.cat(layer) for layer in zip(*parts, strict=True)])
    assert told.layers == [0, 1]
    assert told.chance == [0.5, 0.5]
    assert "windows of 32 tokens" in told.sampling
    for c, checkpoint in enumerate(told.checkpoints):
        assert checkpoint.step == [2, 4, 6, 7][c]
        for layer in (0, 1):
            assert checkpoint.saturation[layer] == pytest.approx(_shared(experts[c][layer], experts[-1][layer]))
            churn = 1 - _shared(experts[c - 1][layer], experts[c][layer]) if c else math.nan
            assert checkpoint.churn[layer] == pytest.approx(churn, nan_ok=True)
    assert told.checkpoints[-1].saturation == [1, 1]
    assert min(told.checkpoints[0].saturation) < 1


def test_what_has_no_routes_to_compare_is_refused(make_model, tmp_path):
    with pytest.raises(BadInput, match="dense"):
        lookahead(make_model(moe=None), _windows())
    with pytest.raises(BadInput, match="soft"):
        routes(model_of(make_model, PRESETS["soft"]), _windows())
    with pytest.raises(BadInput, match="has 1 checkpoint to compare"):
        over_checkpoints(tmp_path, What(), ["step-7"])
