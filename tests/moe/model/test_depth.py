"""Mixture-of-Depths against the plain block, run on the tokens that enter one sequence at a time."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from moe.config.balance import BalanceConfig
from moe.config.model import MoEConfig, entering
from moe.config.router import RouterConfig
from moe.model import cost
from moe.model.attention import KVCache, within_documents, within_window
from moe.model.depth import DepthRouter
from moe.model.layer import LayerInput
from moe.model.transformer import Block
from moe.routing.contract import UNUSED, rows
from moe.train import step

EXACT = dict(rtol=1e-12, atol=1e-12)
MOE = dict(n_experts=5, k=3, d_expert=7, depth=0.4, depth_every=2)
CAUSAL = pytest.mark.parametrize("depth_causal", ["threshold", "predictor"])
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
CAUSAL_ROUTERS = {"softmax": RouterConfig(), "hash": RouterConfig("hash"), "threshold": RouterConfig("threshold")}


@pytest.fixture
def model(make_model):
    """(**settings of the experts) -> a model of two layers whose second one has a depth router."""

    def make(router="softmax", dtype=torch.float64, position="rope", **moe):
        cfg = RouterConfig(router) if isinstance(router, str) else router
        none = BalanceConfig(aux=0.0, z=0.0)
        made = make_model(cfg, dtype, balance=none, moe=MoEConfig(**{**MOE, **moe}), position=position)
        if made.depths()[1].predict is None:
            made.depths()[1].cutoff.fill_(0.1)
        return made

    return make


def _x(length=11, sequences=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((sequences, length, 12), generator=generator, dtype=torch.float64)


def _ids(x):
    return torch.randint(0, 17, x.shape[:2], generator=torch.Generator().manual_seed(5))


def _run(model, x):
    """The second block alone."""
    rope = model.cos_Sd[: x.shape[1]].double(), model.sin_Sd[: x.shape[1]].double()
    torch.manual_seed(7)
    return model.blocks[1](x, rope, "torch", None, LayerInput(_ids(x).flatten()))


def _plain(model):
    """The same block without a depth router."""
    cfg = model.cfg
    moe = MoEConfig(**{**MOE, "depth": 1.0})
    block = Block(type(cfg)(**{**vars(cfg), "moe": moe}), model.router, BalanceConfig(aux=0.0, z=0.0), 1).double()
    block.load_state_dict({k: v for k, v in model.blocks[1].state_dict().items() if not k.startswith("depth.")})
    return block.train(model.training)


def _score(linear, x_D):
    """w · x / rms(x) (+ c), in plain numbers."""
    rms = math.sqrt(sum(each * each for each in x_D.tolist()) / len(x_D) + torch.finfo(torch.float64).eps)
    total = sum(w * each / rms for w, each in zip(linear.weight[0].tolist(), x_D.tolist(), strict=True))
    return total + (linear.bias.item() if linear.bias is not None else 0.0)


def _entering(model, x_SD):
    """The positions of one sequence that enter, by their definition."""
    depth = model.blocks[1].depth
    if not model.training and depth.predict is None:
        return [s for s, x_D in enumerate(x_SD) if _score(depth.score, x_D) >= 0.1]
    if not model.training:
        return [s for s, x_D in enumerate(x_SD) if _score(depth.predict, x_D) >= 0]
    ranked = sorted(range(len(x_SD)), key=lambda s: -_score(depth.score, x_SD[s]))
    return sorted(ranked[: max(1, math.ceil(0.4 * len(x_SD) - 1e-9))])


@CAUSAL
@TRAINING
@pytest.mark.parametrize("router", CAUSAL_ROUTERS)
def test_the_block_is_the_plain_block_on_the_tokens_that_enter(model, router, training, depth_causal):
    model = model(CAUSAL_ROUTERS[router], depth_causal=depth_causal).train(training)
    x, plain = _x(), _plain(model)
    out, report = _run(model, x)
    n_entered = 0
    for b, x_SD in enumerate(x):
        at = _entering(model, x_SD)
        n_entered += len(at)
        rope = model.cos_Sd[at].double(), model.sin_Sd[at].double()  # at their own positions
        y_SD = plain(x_SD[at][None], rope, "reference", None, LayerInput(_ids(x)[b, at]))[0][0]
        expected = x_SD.clone()
        for y_D, s in zip(y_SD, at, strict=True):
            gate = 1 / (1 + math.exp(-_score(model.blocks[1].depth.score, x_SD[s])))
            expected[s] = (1 - gate) * x_SD[s] + gate * y_D
        torch.testing.assert_close(out[b], expected, **EXACT)
        outside = [s for s in range(11) if s not in at]
        assert torch.equal(out[b, outside], x_SD[outside])
    assert 0 < n_entered < 33
    assert report.skipped == 33 - n_entered


@CAUSAL
@TRAINING
def test_of_separate_documents_the_tokens_that_enter_see_those_of_their_own(model, training, depth_causal):
    """Who enters is decided in the whole window."""
    model = model(depth_causal=depth_causal).train(training)
    x, plain = _x(), _plain(model)
    ends = [[3, 7], [0, 5], []]
    place, mask = within_documents(torch.tensor([[s in row for s in range(11)] for row in ends]).long(), 1)
    rope = tuple(angles[place][:, None].double() for angles in (model.cos_Sd, model.sin_Sd))
    out, _ = model.blocks[1](x, rope, "torch", None, LayerInput(_ids(x).flatten()), mask)
    for b, x_SD in enumerate(x):
        entered, expected, starts = _entering(model, x_SD), x_SD.clone(), [0, *(end + 1 for end in ends[b]), 11]
        for start, end in itertools.pairwise(starts):
            at = [s for s in entered if start <= s < end]
            own = [s - start for s in at]
            angles = model.cos_Sd[own].double(), model.sin_Sd[own].double()
            y_SD = plain(x_SD[at][None], angles, "reference", None)[0][0] if at else []
            for y_D, s in zip(y_SD, at, strict=True):
                gate = 1 / (1 + math.exp(-_score(model.blocks[1].depth.score, x_SD[s])))
                expected[s] = (1 - gate) * x_SD[s] + gate * y_D
        torch.testing.assert_close(out[b], expected, **EXACT)


@CAUSAL
@TRAINING
def test_a_window_counts_the_tokens_that_pass_by_too(model, training, depth_causal):
    """A token sees those that enter among the 4 positions up to its own: each by itself, with no others beside it."""
    model = model(depth_causal=depth_causal).train(training)
    x, plain = _x(), _plain(model)
    rope = tuple(angles[:11].double()[None] for angles in (model.cos_Sd, model.sin_Sd))
    mask = within_window(0, 11, 4, x.device, None)
    out, _ = model.blocks[1](x, rope, "torch", None, LayerInput(_ids(x).flatten()), mask)
    for b, x_SD in enumerate(x):
        entered, expected = _entering(model, x_SD), x_SD.clone()
        for s in entered:
            at = [key for key in entered if s - 4 < key <= s]
            y_SD = plain(x_SD[at][None], (model.cos_Sd[at].double(), model.sin_Sd[at].double()), "torch", None)[0][0]
            gate = 1 / (1 + math.exp(-_score(model.blocks[1].depth.score, x_SD[s])))
            expected[s] = (1 - gate) * x_SD[s] + gate * y_SD[-1]
        torch.testing.assert_close(out[b], expected, **EXACT)


@pytest.mark.parametrize("router", ["softmax", "expert-choice"])
def test_the_report_speaks_of_all_tokens(model, router):
    model, x = model(router).train(), _x()
    _, report = _run(model, x)
    entered = {b * 11 + s for b, x_SD in enumerate(x) for s in _entering(model, x_SD)}
    token_N, expert_N, weight_N = rows(report.token_N, report.expert, report.weight)
    assert {t for t, e in zip(token_N.tolist(), expert_N.tolist(), strict=True) if e >= 0} <= entered
    assert report.count_E.tolist() == torch.bincount(expert_N[expert_N >= 0], minlength=5).tolist()
    if router == "softmax":
        assert report.expert.shape == report.weight.shape == (33, 3)
        outside = sorted(set(range(33)) - entered)
        assert (report.expert[outside] == UNUSED).all()
        assert (report.weight[outside] == 0).all()
        torch.testing.assert_close(report.weight[sorted(entered)].sum(-1), torch.ones(15).double(), **EXACT)
        assert report.count_E.sum() == 15 * 3
        assert report.skipped == 18
    else:
        assert (token_N.diff() >= 0).all()
        served = {t for t, e in zip(token_N.tolist(), expert_N.tolist(), strict=True) if e >= 0}
        assert report.skipped == 33 - len(served)
        assert (weight_N > 0).all()


def test_replaying_a_pass_is_that_pass(model, tokens):
    model = model().train()
    first = model(tokens)
    again = model(tokens, recorded=[each.expert for each in first.routing])
    assert torch.equal(first.logits_BSV, again.logits_BSV)
    other = model(tokens, recorded=[(each.expert + 1) % 5 for each in first.routing])
    assert not torch.allclose(first.logits_BSV, other.logits_BSV)


def test_equal_scores_let_the_earliest_tokens_enter(model):
    model = model().train()
    x = torch.ones(2, 11, 12, dtype=torch.float64)
    entry = model.blocks[1].depth(x)
    assert entry.token_I.tolist() == [0, 1, 2, 3, 4, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(("share", "length", "expected"), [(0.07, 100, 7), (0.07, 101, 8), (0.125, 4, 1), (1e-6, 7, 1)])
def test_a_share_is_taken_for_the_decimal_that_it_was_written_as(share, length, expected):
    assert entering(MoEConfig(depth=share), length) == expected
    router = DepthRouter(12, MoEConfig(depth=share)).train()
    assert len(router(torch.randn(2, length, 12)).token_I) == 2 * expected


def test_the_threshold_is_the_running_mean_of_the_cut_offs(model):
    model = model().train()
    depth, steps = model.depths()[1], [_x(seed=seed) for seed in range(6)]
    expected = None
    for first, second in zip(steps[::2], steps[1::2], strict=True):  # two micro-batches a step, of unlike size
        totals = step.layer_totals(_run(model, first)[1], 33)
        totals.add(step.layer_totals(_run(model, second[:2])[1], 22))
        depth.update(totals.observed)
        sequences = (*first, *second[:2])
        mean = sum(sorted(_score(depth.score, x_D) for x_D in x_SD)[-5] for x_SD in sequences) / 5
        expected = mean if expected is None else 0.99 * expected + 0.01 * mean
        assert depth.cutoff.item() == pytest.approx(expected, rel=1e-12)
    assert 0 < len(depth.eval()(_x()).token_I) < 33


def test_a_step_of_training_moves_the_threshold(make_model, tokens):
    moe = MoEConfig(**{**MOE, "depth_every": 1})
    model = make_model(RouterConfig(shared=True), moe=moe, balance=BalanceConfig()).train()
    routing = model(tokens).routing
    step.update_routers(model, [step.layer_totals(each, 22) for each in routing], BalanceConfig(), 0.0)
    for depth, each in zip(model.depths(), routing, strict=True):
        assert depth.cutoff.item() == pytest.approx(each.observed["depth_cutoff"].item() / 2, rel=1e-12)
        assert depth.cutoff.item() != 0


def test_the_predictor_learns_the_choice_and_tells_the_states_nothing(model):
    model, x = model(depth_causal="predictor").train(), _x().requires_grad_()
    depth = model.blocks[1].depth
    entry = depth(x)
    predicted = torch.tensor([[_score(depth.predict, x_D) for x_D in x_SD] for x_SD in x.detach()], dtype=torch.float64)
    enters = torch.zeros(33, dtype=torch.float64).index_fill(0, entry.token_I, 1.0).view(3, 11)
    expected = -(enters * F.logsigmoid(predicted) + (1 - enters) * F.logsigmoid(-predicted)).mean()
    torch.testing.assert_close(entry.losses["depth"], expected, **EXACT)
    entry.losses["depth"].backward()
    assert x.grad is None
    assert depth.score.weight.grad is None
    optimizer = torch.optim.Adam(depth.predict.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        depth(x).losses["depth"].backward()
        optimizer.step()
    agree = (depth.eval()(x).token_I[:, None] == entry.token_I).any(0)
    assert agree.all()


@TRAINING
def test_gradients_are_the_derivative(model, training):
    """Of states and scores: an entering token's weight is how the score learns."""
    model, x = model().train(training), _x(5, 1)
    depth = model.blocks[1].depth

    def out(x, weight):
        rope = model.cos_Sd[:5].double(), model.sin_Sd[:5].double()
        given = {"depth.score.weight": weight}
        return torch.func.functional_call(model.blocks[1], given, (x, rope, "reference", None), {})[0]

    assert torch.autograd.gradcheck(out, (x.requires_grad_(), depth.score.weight.detach().clone().requires_grad_()))


def test_no_token_and_every_token_may_enter_in_evaluation(model):
    model, x = model().eval(), _x()
    depth, plain = model.blocks[1].depth, _plain(model)
    with torch.no_grad():
        depth.cutoff.fill_(100.0)
        out, report = _run(model, x)
        assert torch.equal(out, x)
        assert report.skipped == 33
        assert report.count_E.sum() == 0
        depth.cutoff.fill_(-100.0)
        out, report = _run(model, x)
        rope = model.cos_Sd[:11].double(), model.sin_Sd[:11].double()
        whole = plain(x, rope, "torch", None)[0]
        gate = depth(x).weight_I.view(3, 11, 1)
        torch.testing.assert_close(out, (1 - gate) * x + gate * whole, **EXACT)
        assert report.skipped == 0


@CAUSAL
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_sequence_in_pieces_is_the_whole_one(model, tokens, position, depth_causal):
    model = model(position=position, depth_causal=depth_causal).eval()
    with torch.no_grad():
        whole = model(tokens)
        assert 0 < whole.routing[1].skipped < 22
        for pieces in ([1] * 11, [4, 1, 6], [10, 1]):
            cache = KVCache(model.cfg, 2, torch.float64, tokens.device)
            parts = [model(part, cache=cache) for part in tokens.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat([each.logits_BSV for each in parts], 1), whole.logits_BSV, **EXACT)
            assert sum(each.routing[1].skipped for each in parts) == whole.routing[1].skipped
        cache.length = 0  # what an earlier text left behind is not read
        again = torch.cat([model(part, cache=cache).logits_BSV for part in tokens.flip(1).split([5, 6], dim=1)], 1)
        torch.testing.assert_close(again, model(tokens.flip(1)).logits_BSV, **EXACT)


def test_checkpointing_changes_no_bit(model, tokens):
    model = model(depth_causal="predictor").train()
    found = []
    for checkpoint in (False, True):
        model.zero_grad(set_to_none=True)
        out = model(tokens, checkpoint_activations=checkpoint)
        (out.logits_BSV.square().sum() + out.routing[1].losses["depth"]).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert {"blocks.1.depth.score.weight", "blocks.1.depth.predict.bias"} <= found[0].keys()


@TRAINING
def test_compiled_it_is_the_same(model, tokens, training):
    model = model().train(training)
    with torch.no_grad():
        plain = model(tokens).logits_BSV
        # In evaluation how many enter is known to the numbers alone, and the graph may break there.
        compiled = torch.compile(model, backend="aot_eager", fullgraph=training)
        torch.testing.assert_close(compiled(tokens).logits_BSV, plain, **EXACT)


def test_bf16_chooses_in_float32(model, tokens):
    model = model(dtype=torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens)
        entry = model.blocks[1].depth(_x().bfloat16())
    assert entry.weight_I.dtype == torch.float32
    assert out.logits_BSV.isfinite().all()
    model = model.bfloat16()
    assert model(tokens).logits_BSV.dtype == torch.bfloat16


def test_what_a_token_costs_is_counted_by_the_share_that_enters(model_config):
    whole = model_config(moe=MoEConfig(**{**MOE, "depth": 1.0}))
    half = model_config(moe=MoEConfig(**{**MOE, "depth": 0.5}))
    d, s = 12, 16
    attention = d * 16 + 2 * d * 8 + 16 * d  # q, k, v, o
    moe = 3 * (3 * 7 * d) + 5 * d  # the K experts, and the router
    norms = 2 * d
    routers = d  # with a threshold
    assert cost.size(half).total == cost.size(whole).total + routers
    assert cost.size(half).active == cost.size(whole).active - round((attention + moe + norms) / 2) + routers
    scores = 4 * s * 16  # every position with every other
    saved = (2 * (attention + moe) + scores) / 2 + scores / 4 - 2 * d
    assert cost.flops(half).forward == cost.flops(whole).forward - saved
