"""Claims about routing otherwise: against models that lack an expert, brute force, and what must change nothing."""

import dataclasses

import pytest
import torch

from moe.analysis.interventions import Change, check, intervene, remember, replaced, resume
from moe.config.balance import BalanceConfig
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig, facts
from moe.errors import BadInput
from moe.routing.contract import UNUSED, Context
from tests.router_presets import presets_of_routers
from tests.small_layers import EXACT, model_of

PRESETS = {name: preset for name, preset in presets_of_routers().items() if name not in ("soft", "dense")}
# Default vectors stay with the experts that the router named, and so do not move with rows.
MOVED = [name for name, preset in PRESETS.items() if preset.router.gradient != "default-vector"]
TOKENS = torch.randint(0, 17, (3, 16), generator=torch.Generator().manual_seed(1))
LAYER = 1  # the last of the tiny models, and an MoE layer in all of them


@pytest.fixture
def preset_model(make_model):
    """(name) -> the tiny model of a preset in float64."""
    return lambda name: model_of(make_model, PRESETS[name]).requires_grad_(False)


def _scored(name):
    return facts(PRESETS[name].router).scored


def _without(model, smaller, layer, expert):
    """`smaller` has the weights of `model` but for one expert of one layer."""
    state = model.state_dict()
    for key, wanted in smaller.state_dict().items():
        if state[key].shape != wanted.shape:
            (axis,) = [i for i, (a, b) in enumerate(zip(state[key].shape, wanted.shape, strict=True)) if a != b]
            rest = [e for e in range(state[key].shape[axis]) if e != expert]
            state[key] = state[key].index_select(axis, torch.tensor(rest))
    smaller.load_state_dict(state)
    return smaller


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(),
        RouterConfig(renormalize=False, scale=2.5),
        RouterConfig("sigmoid", selection_bias=True),
        RouterConfig("sigmoid", renormalize=False, selection_bias=True),
        RouterConfig(logits="cosine"),
        RouterConfig(gradient="default-vector"),
        RouterConfig(gradient="sparsemixer"),
        RouterConfig(gradient="straight-through"),
        RouterConfig("top-p", top_p=0.7),
        RouterConfig("relu"),
        RouterConfig("sinkhorn"),
    ],
    ids=lambda router: f"{router.name} {router.renormalize} {router.logits} {router.gradient}",
)
def test_a_model_with_a_masked_expert_is_the_model_without_it(make_model, router):
    shape = lambda sizes: dict(moe=MoEConfig(n_experts=6, k=3, d_expert=7, n_experts_by_layer=sizes))
    model = make_model(router, **shape([6, 6])).eval()
    if router.selection_bias:
        model.routers()[LAYER].bias_E[2] = 5.0  # chosen by every token, unless it is masked
    smaller = _without(model, make_model(router, **shape([6, 5])).eval(), LAYER, 2)
    assert not torch.equal(model(TOKENS).logits_BSV, smaller(TOKENS).logits_BSV)
    with intervene(model, [Change("mask", LAYER, [2])]):
        masked = model(TOKENS)
    torch.testing.assert_close(masked.logits_BSV, smaller(TOKENS).logits_BSV, **EXACT)


@pytest.mark.parametrize("name", [name for name in PRESETS if _scored(name)])
def test_no_token_goes_to_a_masked_expert_and_the_layers_before_do_not_notice(preset_model, name):
    model = preset_model(name)
    plain = model(TOKENS)
    busiest = plain.routing[-1].count_E.topk(2).indices
    with intervene(model, [Change("mask", LAYER, busiest.tolist())]):
        masked = model(TOKENS)
    assert masked.routing[-1].count_E[busiest].tolist() == [0, 0]
    assert not torch.isin(masked.routing[-1].expert, busiest).any()
    assert masked.logits_BSV.isfinite().all()
    assert torch.equal(masked.routing[0].count_E, plain.routing[0].count_E)
    assert torch.equal(model(TOKENS).logits_BSV, plain.logits_BSV), "the model is as it was"


def test_where_fewer_than_k_are_left_a_token_takes_those(preset_model):
    model = preset_model("softmax")
    with intervene(model, [Change("mask", LAYER, [e for e in range(8) if e not in (2, 5)])]):
        routing = model(TOKENS).routing[-1]
    assert routing.expert.sort(-1).values.tolist() == [[UNUSED, 2, 5]] * TOKENS.numel()
    torch.testing.assert_close(routing.weight.sum(-1), torch.ones(TOKENS.numel(), dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("name", PRESETS)
def test_to_drop_an_expert_is_to_take_its_output_for_nothing(preset_model, name):
    model = preset_model(name)
    e = int(model(TOKENS).routing[-1].count_E[:5].argmax())  # a real one
    with intervene(model, [Change("drop", LAYER, [e])]):
        dropped = model(TOKENS)
    experts = model.blocks[LAYER].mlp.experts
    if hasattr(experts, "stacks"):
        (g,) = torch.nonzero(experts.local_GE[:, e] >= 0)[0].tolist()
        experts.stacks[g].w_down_EDF[experts.local_GE[g, e]] = 0
    else:
        experts.w_down_EDF[e] = 0
    torch.testing.assert_close(dropped.logits_BSV, model(TOKENS).logits_BSV, **EXACT)
    assert dropped.routing[-1].count_E[e] == 0
    assert dropped.routing[-1].dropped > 0


@pytest.mark.parametrize("name", [name for name in MOVED if "widths" not in PRESETS[name].moe])
def test_to_swap_two_experts_weights_and_their_rows_changes_nothing(preset_model, name):
    model = preset_model(name)
    plain = model(TOKENS)
    experts = model.blocks[LAYER].mlp.experts
    for weight in (experts.w_up_EFD, experts.w_down_EDF):
        weight[[0, 4, 1, 2]] = weight[[4, 0, 2, 1]].clone()
    assert not torch.allclose(model(TOKENS).logits_BSV, plain.logits_BSV)
    with intervene(model, [Change("swap", LAYER, [0, 4, 1, 2])]):
        swapped = model(TOKENS)
    torch.testing.assert_close(swapped.logits_BSV, plain.logits_BSV, **EXACT)
    count_E = plain.routing[-1].count_E.clone()
    count_E[[0, 4, 1, 2]] = count_E[[4, 0, 2, 1]].clone()
    assert torch.equal(swapped.routing[-1].count_E, count_E)


@pytest.mark.parametrize("name", MOVED)
def test_to_force_every_expert_is_the_dense_mixture(preset_model, name):
    """Each token's experts by its probabilities, times the sum of its own weights; one expert at a time."""
    model = preset_model(name)
    layer, inputs = model.blocks[LAYER].mlp, []
    with replaced(layer, forward=lambda *given, run=layer.forward: (inputs.append(given), run(*given))[1]):
        model(TOKENS)
    x_BSD, backend, layer_input = inputs[0]
    n = layer.n_with_cheap
    with intervene(model, [Change("force", LAYER, list(range(n)))]):
        y_BSD, report = layer(x_BSD, backend, layer_input)
    assert report.count_E.tolist() == [x_BSD[..., 0].numel()] * n
    # By hand.
    x_TD, router = x_BSD.flatten(0, 1), layer_input.router or layer.router
    state_TD = layer_input.previous_TD if layer.reads_previous else x_TD
    decided = router(state_TD, backend, Context(layer_input.tokens_T, len(x_BSD)))
    mass_T = torch.zeros(len(x_TD), dtype=torch.float64)
    for token, expert, weight in zip(*decided.rows(), strict=True):
        mass_T[token] += weight if expert >= 0 else 0
    even_TE = torch.full((len(x_TD), n), 1 / n, dtype=torch.float64)
    prob_TE = even_TE if decided.logits_TE is None else decided.prob_TE()
    expected_TD = torch.zeros_like(x_TD)
    for e in range(n):
        one_T1 = torch.full((len(x_TD), 1), e)
        routing = decided._replace(expert=one_T1, weight=(mass_T * prob_TE[:, e])[:, None], token_N=None)
        expected_TD += layer.apply_experts(x_TD, routing, "reference")[0]
    if layer.shared is not None:
        expected_TD += layer.shared(x_TD)
    torch.testing.assert_close(y_BSD.flatten(0, 1), expected_TD, **EXACT)


@pytest.mark.parametrize("name", PRESETS)
def test_blocks_below_a_change_can_be_remembered_to_the_last_bit(preset_model, name):
    model, change = preset_model(name), Change("drop", LAYER, [1])
    with remember(model) as blocks:
        plain = model(TOKENS)
    assert torch.equal(plain.logits_BSV, model(TOKENS).logits_BSV)
    with intervene(model, [change]):
        whole = model(TOKENS)
        ran = []
        block = model.blocks[0]
        with (
            replaced(block, forward=lambda *given, run=block.forward: (ran.append(1), run(*given))[1]),
            resume(model, blocks, LAYER),
        ):
            part = model(TOKENS)
    assert torch.equal(part.logits_BSV, whole.logits_BSV)
    assert not ran
    assert [routing.count_E.tolist() for routing in part.routing] == [r.count_E.tolist() for r in whole.routing]


def test_a_router_that_layers_share_is_changed_in_one_of_them(preset_model):
    model = preset_model("layer-shared")
    assert len(set(model.routers())) == 1 < len(model.routers())
    plain = model(TOKENS)
    with intervene(model, [Change("mask", 0, [1])]):
        changed = model(TOKENS)
    assert plain.routing[0].count_E[1] > 0 == changed.routing[0].count_E[1]
    assert changed.routing[1].count_E[1] > 0


def test_changes_of_a_layer_come_one_after_the_other(preset_model):
    model = preset_model("softmax")
    plain = model(TOKENS).routing[-1]
    with intervene(model, [Change("swap", LAYER, [0, 1]), Change("drop", LAYER, [1])]):
        changed = model(TOKENS).routing[-1]
    assert changed.dropped == plain.count_E[0]
    assert changed.count_E[0] == plain.count_E[1]
    assert changed.count_E[1] == 0


def test_an_error_inside_leaves_the_model_as_it_was(preset_model):
    model = preset_model("softmax")
    plain = model(TOKENS).logits_BSV
    with pytest.raises(ValueError, match="exceed"), intervene(model, [Change("mask", LAYER, [1])]):
        model(TOKENS.repeat(1, 2))
    with pytest.raises(RuntimeError), intervene(model, [Change("mask", LAYER, [1])]):
        model.blocks[LAYER].mlp(torch.zeros(1, 1, 5), "torch")
    assert torch.equal(model(TOKENS).logits_BSV, plain)
    assert "forward" not in vars(model.blocks[LAYER].mlp) | vars(model.routers()[-1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (Change("mask", 2, [0]), "layer 2 has no experts; MoE layers are 0, 1"),
        (Change("drop", 0, [8]), "layer 0 has no expert 8: accepted is 0 to 7"),
        (Change("drop", 0, [-1]), "no expert -1"),
        (Change("mask", 0, list(range(8))), "no expert left"),
        (Change("swap", 0, [1]), "pairs of different experts"),
        (Change("swap", 0, [1, 1]), "pairs of different experts"),
        (Change("force", 0, [3, 3]), "has 3, 3, and accepted are different experts"),
        (Change("force", 0, []), "has none"),
        (Change("lift", 0, [3]), "lift is not one of mask"),
    ],
)
def test_what_cannot_be_changed_is_refused_in_a_sentence(preset_model, change, sentence):
    model = preset_model("softmax")
    with pytest.raises(BadInput, match=sentence):
        check(model, [change])


def test_models_whose_choices_cannot_be_changed_are_refused(make_model, preset_model):
    mask = Change("mask", LAYER, [1])
    with pytest.raises(BadInput, match="dense"):
        check(make_model(moe=None), [mask])
    soft = model_of(make_model, presets_of_routers()["soft"])
    with pytest.raises(BadInput, match="soft"):
        check(soft, [mask])
    with pytest.raises(BadInput, match="without logits"):
        check(preset_model("hash"), [mask])
    check(preset_model("hash"), [Change("drop", LAYER, [1])])
    forced = make_model(balance=dataclasses.replace(BalanceConfig(), force="balanced"))
    with pytest.raises(BadInput, match=r"balance\.force=balanced"):
        check(forced, [mask])
    mixer = make_model(RouterConfig(gradient="sparsemixer"))
    with pytest.raises(BadInput, match=r"2 experts left, and router\.gradient=sparsemixer takes 3"):
        check(mixer, [Change("mask", LAYER, [0, 1, 2])])
