"""The MoE layer: what it reports, and that it parks nothing."""

import pytest
import torch

from moe.config.router import RouterConfig
from moe.routing import balance
from tests.small_layers import states


def test_what_the_layer_reports_is_its_routers_decision(make_layer, router, backend):
    layer = make_layer(router)
    out, report = layer(states(), backend)
    routing = layer.router(states().flatten(0, 1), backend)
    assert out.shape == (2, 9, 12)
    assert torch.equal(report.expert, routing.expert)
    assert torch.equal(report.weight, routing.weight)
    assert report.count_E.tolist() == torch.bincount(routing.expert.flatten(), minlength=5).tolist()
    torch.testing.assert_close(report.aux, balance.load_balancing_loss(routing.prob_E, report.count_E, 18))
    torch.testing.assert_close(report.z, balance.z_loss(routing.logits_TE.logsumexp(-1)))
    assert report.count_E.dtype == report.dropped.dtype == torch.int64


def test_losses_carry_gradient_to_the_router_and_reports_carry_none(make_layer, router, backend):
    layer = make_layer(router)
    report = layer(states(), backend)[1]
    assert not report.weight.requires_grad
    for loss in (report.aux, report.z):
        (gradient,) = torch.autograd.grad(loss, layer.router.w_ED, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_a_forward_pass_parks_nothing_on_the_module(make_layer, router, backend):
    layer = make_layer(router)
    state = {name: each.clone() for name, each in layer.state_dict().items()}
    attributes = [set(vars(module)) for module in layer.modules()]
    layer(states(), backend)
    assert all(torch.equal(layer.state_dict()[name], each) for name, each in state.items())
    assert [set(vars(module)) for module in layer.modules()] == attributes


def test_shared_experts_alone_remain_when_the_routed_ones_are_zero(make_layer, backend):
    layer = make_layer(RouterConfig(), n_shared=2)
    with torch.no_grad():
        layer.experts.w_down_EDF.zero_()
    torch.testing.assert_close(layer(states(), backend)[0], layer.shared(states()))


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "gelu_tanh", "relu2"])
def test_the_layers_activation_reaches_its_experts(make_layer, backend, activation):
    layer = make_layer(RouterConfig(), activation=activation)
    width = layer.experts.w_up_EFD.shape[1]
    assert width == (14 if activation == "swiglu" else 7)
    torch.testing.assert_close(layer(states(), backend)[0], layer(states(), "reference")[0], rtol=1e-12, atol=1e-12)


def test_float32_is_the_layers_dtype_under_autocast_except_for_the_products(make_layer, router, backend):
    layer = make_layer(router, torch.float32)
    exact = layer(states(dtype=torch.float32), backend)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out, report = layer(states(dtype=torch.float32), backend)
    assert report.aux.dtype == report.z.dtype == report.weight.dtype == torch.float32
    assert (out - exact).norm() / exact.norm() < 2e-2
