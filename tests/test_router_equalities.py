"""Routers that are the same where one is a case of another, and what layers share or read of one another."""

import dataclasses

import pytest
import torch

from kernels import reference
from moe.config.balance import BalanceConfig, validate
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.model.transformer import next_token_loss
from moe.routing.contract import Mixture, Routing
from moe.train import step
from tests.small_layers import (
    BACKENDS,
    EXACT,
    TRAINING,
    experts_of,
    gradients_of,
    layer_of,
    run_layer,
    same_bits,
    states,
)


def _pair(make_layer, one, other, training=False, **moe):
    """Two layers with the same weights, whatever the second has besides."""
    first = make_layer(one, n_experts=8, **{"k": 3, **moe}).train(training)
    second = make_layer(other, n_experts=8, **{"k": 3, **moe}).train(training)
    second.load_state_dict(first.state_dict(), strict=False)
    return first, second


@BACKENDS
def test_a_threshold_between_a_tokens_kth_and_next_score_is_top_k(make_layer, backend):
    x = states(1, 1)
    plain = make_layer(RouterConfig(), n_experts=8, k=3).eval()
    best = plain.router.logits(x[0]).softmax(-1).sort(descending=True).values[0]
    threshold = 8 * (best[2] + best[3]).item() / 2
    other = _pair(make_layer, RouterConfig(), RouterConfig("threshold", threshold=threshold))[1]
    torch.testing.assert_close(run_layer(other, x, backend)[0], run_layer(plain, x, backend)[0], **EXACT)


@BACKENDS
@pytest.mark.parametrize("cfg", [RouterConfig("top-p", top_p=1.0), RouterConfig("threshold", threshold=0.0)])
def test_taking_all_of_the_probability_is_the_dense_mixture(make_layer, backend, cfg):
    dense, other = _pair(make_layer, RouterConfig(), cfg, k=8)
    torch.testing.assert_close(run_layer(other, states(), backend)[0], run_layer(dense, states(), backend)[0], **EXACT)


@pytest.mark.parametrize("cfg", [RouterConfig("top-p", top_p=0.0), RouterConfig("threshold", threshold=1e9)])
def test_taking_as_little_as_possible_is_top_1(make_layer, cfg):
    one, other = _pair(make_layer, RouterConfig(), cfg, k=1)
    torch.testing.assert_close(run_layer(other, states())[0], run_layer(one, states())[0], **EXACT)


@BACKENDS
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_choosing_all_groups_is_choosing_among_all_experts(make_layer, backend, name):
    plain, grouped = _pair(make_layer, RouterConfig(name), RouterConfig(name, groups=4, k_groups=4))
    assert torch.equal(run_layer(grouped, states(), backend)[0], run_layer(plain, states(), backend)[0])


@pytest.mark.parametrize("factor", [1e9, float("inf")])
def test_more_capacity_than_rows_is_dropless_to_the_last_bit(make_layer, preset, factor):
    try:
        validate([MoEConfig(**experts_of(preset))], preset.router, BalanceConfig(aux=0, z=0, capacity=2.0))
    except BadInput as refusal:
        assert preset.router.name in ("soft", "expert-choice")
        pytest.skip(str(refusal))
    dropless = dataclasses.replace(preset.balance, capacity=0.0)
    one, other = (
        layer_of(make_layer, preset._replace(balance=each), training=True)
        for each in (dropless, dataclasses.replace(dropless, capacity=factor))
    )
    assert torch.equal(run_layer(one, states())[0], run_layer(other, states())[0])
    same_bits(gradients_of(one, states(), "torch"), gradients_of(other, states(), "torch"))


@BACKENDS
def test_mixtures_of_one_token_each_are_a_routing(make_layer, preset, backend):
    """Slot p of expert e reads the p-th token that goes there, and nobody else does."""
    if preset.router.name != "softmax":
        pytest.skip("said once per router that chooses by softmax")
    layer, x = layer_of(make_layer, preset), states(2, 6)
    layer.cheap = layer.default_ED = None
    expert_T = torch.randint(0, 8, (12,), generator=torch.Generator().manual_seed(0))
    one_hot = torch.zeros(2, 6, 8, 6, dtype=torch.float64)
    for t, e in enumerate(expert_T.tolist()):
        slot = sum(each == e for each in expert_T[t // 6 * 6 : t].tolist())
        one_hot[t // 6, t % 6, e, slot] = 1
    mixed, report = layer.mix(x, Mixture(one_hot, one_hot), backend)
    weight_T1 = torch.ones(12, 1, dtype=torch.float64)
    routed, _ = layer.send(x, Routing(expert_T[:, None], weight_T1, None), backend)
    torch.testing.assert_close(mixed, routed, **EXACT)
    assert report.count_E.tolist() == [12] * 8


@BACKENDS
@TRAINING
def test_a_selection_bias_of_zero_is_none(make_layer, backend, training):
    plain, biased = _pair(make_layer, RouterConfig("sigmoid"), RouterConfig("sigmoid", selection_bias=True), training)
    biased.router.bias_E.zero_()
    assert torch.equal(run_layer(biased, states(), backend)[0], run_layer(plain, states(), backend)[0])
    same_bits(gradients_of(biased, states(), backend), gradients_of(plain, states(), backend))


@BACKENDS
@pytest.mark.parametrize(
    ("cfg", "k"),
    [
        (RouterConfig(noisy=True), 3),
        (RouterConfig(jitter=0.5), 3),
        (RouterConfig(second="random"), 2),
        (RouterConfig(frozen=True), 3),
        (RouterConfig(input="previous"), 3),
        (RouterConfig("sinkhorn"), 3),
    ],
    ids=["noisy", "jitter", "gshard", "frozen", "first of lookahead", "sinkhorn"],
)
def test_what_only_training_does_is_plain_top_k_in_evaluation(make_layer, backend, cfg, k):
    plain, other = _pair(make_layer, RouterConfig(), cfg, k=k)
    torch.testing.assert_close(run_layer(other, states(), backend)[0], run_layer(plain, states(), backend)[0], **EXACT)


@pytest.mark.parametrize("cfg", [RouterConfig(noisy=True), RouterConfig(jitter=0.5), RouterConfig("sinkhorn")])
def test_what_only_training_does_is_done_in_training(make_layer, cfg):
    plain, other = _pair(make_layer, RouterConfig(), cfg, training=True)
    assert (run_layer(other, states())[0] - run_layer(plain, states())[0]).abs().max() > 1e-3


@BACKENDS
@TRAINING
def test_experts_that_choose_every_token_are_the_dense_mixture(make_layer, backend, training):
    dense, other = _pair(make_layer, RouterConfig(renormalize=False), RouterConfig("expert-choice"), training, k=8)
    torch.testing.assert_close(run_layer(other, states(), backend)[0], run_layer(dense, states(), backend)[0], **EXACT)


@BACKENDS
def test_equal_widths_are_one_width(make_layer, preset, backend):
    one = layer_of(make_layer, preset, training=True)
    other = layer_of(make_layer, preset, training=True, widths=[7] * 8)
    state = {name.replace("experts.w_", "experts.stacks.0.w_"): each for name, each in one.state_dict().items()}
    other.load_state_dict(state)
    (expected, report), (out, report_other) = run_layer(one, states(), backend), run_layer(other, states(), backend)
    torch.testing.assert_close(out, expected, **EXACT)
    assert torch.equal(report.count_E, report_other.count_E)


@BACKENDS
def test_experts_of_several_widths_are_those_experts_padded_with_zeros(make_layer, preset, backend):
    widths = [3, 7, 1, 7, 3, 2, 7, 5]
    mixed = layer_of(make_layer, preset, training=True, widths=widths)
    padded = layer_of(make_layer, preset, training=True)
    padded.load_state_dict({k: v for k, v in mixed.state_dict().items() if not k.startswith("experts.")}, strict=False)
    with torch.no_grad():
        padded.experts.w_up_EFD.zero_()
        padded.experts.w_down_EDF.zero_()
        for stack, local_E in zip(mixed.experts.stacks, mixed.experts.local_GE.tolist(), strict=True):
            for e, local in enumerate(local_E):
                if local >= 0:
                    f = widths[e]
                    padded.experts.w_up_EFD[e, :f] = stack.w_up_EFD[local, :f]
                    padded.experts.w_up_EFD[e, 7 : 7 + f] = stack.w_up_EFD[local, f:]
                    padded.experts.w_down_EDF[e, :, :f] = stack.w_down_EDF[local]
    (out, report), (expected, report_padded) = run_layer(mixed, states(), backend), run_layer(padded, states(), backend)
    torch.testing.assert_close(out, expected, **EXACT)
    assert torch.equal(report.count_E, report_padded.count_E)


@BACKENDS
def test_replaying_a_pass_is_that_pass_to_the_last_bit(make_layer, preset, backend):
    layer, x = layer_of(make_layer, preset), states()
    expected, report = run_layer(layer, x, backend)
    if preset.router.name == "soft" or report.token_N is not None:
        with pytest.raises(ValueError, match="replay"):
            run_layer(layer, x, backend, recorded_TK=report.expert)
        return
    out, again = run_layer(layer, x, backend, recorded_TK=report.expert)
    assert torch.equal(out, expected)
    assert torch.equal(again.expert, report.expert)


@BACKENDS
def test_relu_with_positive_logits_takes_every_expert_by_its_logit(make_layer, backend):
    layer, x = make_layer(RouterConfig("relu", scale=0.5), n_experts=8, k=3), states().abs()
    with torch.no_grad():
        layer.router.w_ED.abs_()
    out, report = run_layer(layer, x, backend)
    logits_TE = layer.router.logits(x.flatten(0, 1))
    experts = layer.experts
    hidden = torch.einsum("td,efd->tef", x.flatten(0, 1), experts.w_up_EFD)
    each = torch.einsum("tef,edf->ted", reference.activate(hidden, "swiglu"), experts.w_down_EDF)
    torch.testing.assert_close(out.flatten(0, 1), (0.5 * logits_TE[..., None] * each).sum(1), **EXACT)
    assert report.count_E.tolist() == [18] * 8


def test_a_shared_router_is_one_module_whose_gradient_is_the_sum_over_layers(make_model, tokens):
    moe = MoEConfig(n_experts=5, k=3, d_expert=7)
    shared = make_model(RouterConfig(shared=True), moe=moe, n_layers=3)
    assert len(set(shared.routers())) == 1
    assert len(shared.routers()) == 3
    assert [block.mlp.router is None for block in shared.blocks] == [False, True, True]
    alone = make_model(RouterConfig(), moe=moe, n_layers=3)
    state = shared.state_dict()
    w_ED = state["blocks.0.mlp.router.w_ED"]
    alone.load_state_dict(state | {f"blocks.{layer}.mlp.router.w_ED": w_ED for layer in range(3)})
    logits = []
    for model in (shared, alone):
        out = model(tokens)
        logits.append(out.logits_BSV)
        next_token_loss(out.logits_BSV[:, :-1], tokens[:, 1:]).backward()
    assert torch.equal(*logits)
    expected = sum(router.w_ED.grad for router in alone.routers())
    torch.testing.assert_close(shared.routers()[0].w_ED.grad, expected, **EXACT)


def test_a_shared_router_learns_from_all_its_layers_at_once(make_model, tokens):
    model = make_model(RouterConfig("sigmoid", selection_bias=True, shared=True))
    out = model(tokens)
    before = model.routers()[0].bias_E.clone()
    totals = [step.layer_totals(each, tokens.numel()) for each in out.routing]
    step.update_routers(model, totals, BalanceConfig(aux=0.0, z=0.0, bias_rate=0.125), 0.0)
    count_E = sum(each.wanted_E for each in out.routing).double()
    torch.testing.assert_close(model.routers()[0].bias_E - before, 0.125 * (count_E.mean() - count_E).sign(), **EXACT)


def test_lookahead_routes_by_the_previous_layers_input(make_model, tokens):
    model = make_model(RouterConfig(input="previous"), n_layers=4).eval()
    assert all(each.state_TD is None for each in make_model(RouterConfig())(tokens).routing)  # nobody reads it there
    read, entered = [], []
    for router in model.routers():
        router.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    for block in model.blocks:
        block.mlp_norm.register_forward_hook(lambda module, inputs, output: entered.append(output.flatten(0, 1)))
    model(tokens)
    assert [[torch.equal(one, other) for other in entered].index(True) for one in read] == [0, 0, 1, 2]
