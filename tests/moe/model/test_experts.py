"""Experts of every kind: the dense MLP, stacks of several widths, and those that cost next to nothing."""

import pytest
import torch
from torch.nn import functional

from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.model.experts import MLP, MixedExperts
from moe.routing.contract import UNUSED
from tests.small_layers import BACKENDS, EXACT, run_layer, states


@BACKENDS
def test_cheap_experts_that_nobody_chooses_change_nothing(make_layer, backend):
    cfg = RouterConfig("sigmoid", selection_bias=True)
    plain = make_layer(cfg, n_experts=8, k=3)
    other = make_layer(cfg, n_experts=8, k=3, n_null=1, n_copy=1, n_constant=2)
    with torch.no_grad():
        other.router.bias_E[:8], other.router.bias_E[8:] = plain.router.bias_E, -100
        other.router.w_ED[:8] = plain.router.w_ED
    other.experts.load_state_dict(plain.experts.state_dict())
    (out, report), (expected, _) = run_layer(other, states(), backend), run_layer(plain, states(), backend)
    torch.testing.assert_close(out, expected, **EXACT)
    assert report.count_E[8:].sum() == 0


def test_the_gradients_of_experts_of_several_widths_are_told_in_the_experts_order(make_layer):
    layer = make_layer(RouterConfig("softmax"), n_experts=4, k=2, widths=[8, 4, 8, 4])
    assert layer.experts.gradient_norms().tolist() == [0.0] * 4
    out, _ = run_layer(layer, states(), "torch")
    out.square().sum().backward()
    norms = layer.experts.gradient_norms().tolist()
    for stack, places in zip(layer.experts.stacks, ((1, 3), (0, 2)), strict=True):
        for i, e in enumerate(places):
            squares = stack.w_up_EFD.grad[i].square().sum() + stack.w_down_EDF.grad[i].square().sum()
            assert norms[e] == pytest.approx(squares.sqrt().item(), rel=1e-5)


@BACKENDS
def test_cheap_experts_alone_give_nothing_the_token_or_a_mix(make_layer, backend):
    cfg = RouterConfig("sigmoid", selection_bias=True, renormalize=True)
    layer, x = make_layer(cfg, n_experts=5, k=1, n_null=1, n_copy=1, n_constant=1), states()
    mix = (x @ layer.cheap.mix.weight.T).softmax(-1)
    expected = [0 * x, x, mix[..., :1] * x + mix[..., 1:] * layer.cheap.v_ZD[0]]
    for e, each in enumerate(expected, start=5):
        layer.router.bias_E.zero_()[e] = 100.0
        out, report = run_layer(layer, x, backend)
        assert report.count_E[e] == 18
        torch.testing.assert_close(out, each, **EXACT)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_dense_mlp_is_the_formula(model_config, activation, bias):
    mlp, x = MLP(model_config(activation=activation, bias=bias), 7).double(), states()
    hidden = x @ mlp.up.weight.T + (mlp.up.bias if bias else 0)
    expected = {
        "swiglu": lambda: functional.silu(hidden[..., :7]) * hidden[..., 7:],
        "gelu": lambda: functional.gelu(hidden),
        "gelu_tanh": lambda: functional.gelu(hidden, approximate="tanh"),
        "relu2": lambda: hidden.relu().square(),
    }[activation]() @ mlp.down.weight.T + (mlp.down.bias if bias else 0)
    torch.testing.assert_close(mlp(x), expected, **EXACT)


def test_experts_of_several_widths_lie_in_a_stack_for_each_width_narrowest_first(model_config):
    moe = MoEConfig(n_experts=4, widths=[5, 2, 5, 3])
    mixed = MixedExperts(model_config(moe=moe), moe)
    assert [tuple(stack.w_down_EDF.shape) for stack in mixed.stacks] == [(1, 12, 2), (1, 12, 3), (2, 12, 5)]
    none = UNUSED
    assert mixed.local_GE.tolist() == [[none, 0, none, none], [none, none, none, 0], [0, none, 1, none]]
