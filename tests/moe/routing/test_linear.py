"""The logits that most routers start from: their formulas, noise and jitter, and a router that is not trained."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from moe.config.router import RouterConfig
from moe.config.train import OptimConfig
from moe.routing.balance import smooth_load
from moe.routing.contract import Context
from moe.train.optimizer import build_optimizer
from tests.moe.routing.token_routers import EXACT, E, K, make_router, route, states


def test_cosine_logits_are_the_cosine_over_the_temperature_times_the_gain():
    router, x = make_router(RouterConfig(logits="cosine")), states()
    assert router.gain.item() == 1
    with torch.no_grad():
        router.gain.fill_(1.7)
    w = router.w_ED.detach().numpy()
    expected = [
        [1.7 / 0.3 * (t @ e) / (math.sqrt((t * t).sum()) * math.sqrt((e * e).sum())) for e in w] for t in x.numpy()
    ]
    torch.testing.assert_close(router.logits(x), torch.tensor(expected, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(router.logits(10 * x), router.logits(x), **EXACT)
    assert (router.logits(0 * x) == 0).all()
    router.logits(x).square().sum().backward()
    assert router.gain.grad.abs() > 0


@pytest.mark.parametrize("logits", ["linear", "cosine"])
def test_a_bias_is_added_to_every_experts_logit_and_learns(logits):
    router, plain = make_router(RouterConfig(logits=logits, bias=True)), make_router(RouterConfig(logits=logits))
    with torch.no_grad():
        router.logit_bias.copy_(torch.arange(E))
    found = router.logits(states())
    torch.testing.assert_close(found, plain.logits(states()) + torch.arange(E), **EXACT)
    found.sum().backward()
    assert (router.logit_bias.grad == len(states())).all()


@pytest.mark.parametrize("logits", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sqrt_softplus", "threshold", "top-p", "relu"])
def test_every_linear_router_reads_the_same_logits(name, logits):
    cfg, plain = RouterConfig(name, logits=logits), RouterConfig(logits=logits)
    assert torch.equal(route(make_router(cfg), states()).logits_TE, make_router(plain).logits(states()))


@pytest.mark.parametrize("name", ["softmax", "threshold", "top-p", "relu"])
def test_jitter_multiplies_every_element_within_its_bounds_in_training_only(name):
    router, x = make_router(RouterConfig(name, jitter=0.3)), states(400)
    torch.manual_seed(0)
    ratio = router.train().jittered(x) / x
    assert ratio.min() >= 0.7 - 1e-12
    assert ratio.max() <= 1.3 + 1e-12
    # Uniform: mean 1 and variance 0.3² / 3, the former within five deviations of a mean of 2,400 draws.
    deviation = 0.3 / math.sqrt(3)
    assert abs(ratio.mean() - 1) < 5 * deviation / math.sqrt(ratio.numel())
    assert abs(ratio.std() - deviation) < 0.1 * deviation
    assert router.eval().jittered(x) is x
    training, evaluation = (route(router.train(mode), x).logits_TE for mode in (True, False))
    assert not torch.equal(training, evaluation)
    assert torch.equal(evaluation, x @ router.w_ED.T)


def test_noise_has_the_learned_size_and_is_independent():
    router, x = make_router(RouterConfig(noisy=True)), states(4000)
    routing = route(router, x)
    size = np.log1p(np.exp(x.numpy() @ router.w_noise_ED.detach().numpy().T))
    unit = (routing.logits_TE - x @ router.w_ED.T).detach().numpy() / size
    n = len(x)
    assert (np.abs(unit.mean(0)) < 5 / math.sqrt(n)).all()
    assert (np.abs(unit.var(0) - 1) < 5 * math.sqrt(2 / n)).all()
    correlation = np.corrcoef(unit.T) - np.eye(E)
    assert (np.abs(correlation) < 5 / math.sqrt(n)).all()
    assert (np.abs(unit) > 2).mean() == pytest.approx(0.0455, abs=0.008)
    clean_TE = x @ router.w_ED.T
    load_E = smooth_load(clean_TE, routing.logits_TE, torch.from_numpy(size), K)
    torch.testing.assert_close(routing.smooth_E, load_E, **EXACT)
    assert not routing.losses, "balance.load is the layer's to compute"
    # the choice is made by the noisy logits, the weights are theirs too
    assert torch.equal(routing.expert, routing.logits_TE.sort(descending=True, stable=True).indices[:, :K])
    torch.testing.assert_close(routing.weight, routing.logits_TE.gather(1, routing.expert).softmax(-1), **EXACT)
    still = route(router.eval(), x)
    assert torch.equal(still.logits_TE, x @ router.w_ED.T)
    assert still.smooth_E is None


@pytest.mark.parametrize("cfg", [RouterConfig(frozen=True), RouterConfig(frozen=True, noisy=True, logits="cosine")])
def test_a_frozen_router_has_no_gradient_and_no_optimizer(make_model, tokens, cfg):
    model = make_model(cfg)
    optimizer = build_optimizer(model, OptimConfig())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    model(tokens).logits_BSV.square().sum().backward()
    for name, p in model.named_parameters():
        frozen = ".router." in name
        assert (p.grad is None) == frozen, name
        assert (id(p) in held) != frozen, name


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "threshold", "top-p"])
def test_frozen_is_read_by_every_router_that_says_so(name):
    assert not make_router(RouterConfig(name, frozen=True)).w_ED.requires_grad
    assert make_router(RouterConfig(name)).w_ED.requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("logits", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["softmax", "sqrt_softplus", "threshold", "relu"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_logits_of_16_bits_are_rounded_once_and_all_that_reads_them_is_float32(precision, dtype, name, logits, backend):
    cfg = RouterConfig(name, logits=logits, bias=True, precision=precision)
    router, plain = make_router(cfg).float(), make_router(dataclasses.replace(cfg, precision="fp32")).float()
    for each in (router, plain):
        torch.nn.init.constant_(each.logit_bias, 0.3)
    x = states().float()
    routing, exact = (each(x, backend, Context()) for each in (router, plain))
    assert router.logits(x).dtype == dtype
    assert {routing.weight.dtype, routing.logits_TE.dtype, routing.lse_T.dtype, routing.prob_E.dtype} == {torch.float32}
    assert routing.logits_TE.equal(routing.logits_TE.to(dtype).float())
    assert not routing.logits_TE.equal(exact.logits_TE)
    unit = torch.finfo(dtype).eps * exact.logits_TE.abs().max().item()
    torch.testing.assert_close(routing.logits_TE, exact.logits_TE, rtol=0, atol=4 * unit)
    (routing.weight.square().sum() + routing.lse_T.sum()).backward()
    (exact.weight.square().sum() + exact.lse_T.sum()).backward()
    error = (router.w_ED.grad - plain.w_ED.grad).norm() / plain.w_ED.grad.norm()
    assert 0 < error < 16 * torch.finfo(dtype).eps
