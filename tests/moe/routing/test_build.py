"""The router family: which class a name means, a router of one's own, and what the formulas leave to the module."""

import sys

import pytest
import torch

from kernels import operands, reference
from moe.config.balance import BalanceConfig, validate
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.routing.build import build_router, router_class
from moe.routing.token_choice import HashRouter, TopKRouter


def _router(cfg, d=6, n_experts=5, k=3, dtype=torch.float64):
    router = build_router(cfg, d, MoEConfig(n_experts=n_experts, k=k))
    torch.nn.init.normal_(router.w_ED, generator=torch.Generator().manual_seed(0))
    return router.to(dtype)


def _x(dtype=torch.float64):
    return torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_weights_of_renormalised_routers_sum_to_the_scale(router):
    router.scale = 2.5
    total = _router(router)(_x(), "reference").weight.sum(-1)
    router.scale = 1.0  # the settings are shared by the session
    assert torch.allclose(total, torch.tensor(2.5, dtype=torch.float64), rtol=1e-12) == router.renormalize


def test_probabilities_sum_to_one_and_experts_are_distinct(router):
    routing = _router(router)(_x(), "reference")
    torch.testing.assert_close(routing.prob_E.sum().item(), 40.0)
    assert all(len(set(row)) == 3 for row in routing.expert.tolist())
    assert routing.token_N is None


def test_a_tokens_experts_do_not_depend_on_the_other_tokens(router):
    module, x = _router(router), _x()
    alone = torch.cat([module(x[t : t + 1], "reference").expert for t in range(len(x))])
    assert torch.equal(alone, module(x, "reference").expert)


@pytest.mark.parametrize("name", operands.SCORES)
def test_the_selection_bias_moves_the_choice_and_not_the_weight(name):
    module = _router(RouterConfig(name=name, selection_bias=True, renormalize=False))
    plain = module(_x(), "reference")
    module.bias_E[4] = 10.0
    biased = module(_x(), "reference")
    assert (biased.expert[:, 0] == 4).all()
    assert not (plain.expert[:, 0] == 4).all()
    scores = reference.scores(plain.logits_TE, name)
    torch.testing.assert_close(biased.weight, scores.gather(1, biased.expert))
    torch.testing.assert_close(biased.prob_E, plain.prob_E)
    assert "bias_E" in module.state_dict()
    assert "bias_E" not in dict(module.named_parameters())


def test_without_a_selection_bias_there_is_no_buffer():
    assert list(_router(RouterConfig()).state_dict()) == ["w_ED"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_float32_at_least_even_under_autocast(router, dtype):
    module, wide = _router(router, dtype=dtype), torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        routing = module(_x(dtype), "reference")
    assert {routing.weight.dtype, routing.logits_TE.dtype, routing.prob_E.dtype} == {wide}
    torch.testing.assert_close(routing.logits_TE, _x(dtype).to(wide) @ module.w_ED.to(wide).T)


def test_scores_that_all_underflow_give_no_nan():
    module = _router(RouterConfig(name="sigmoid"), dtype=torch.float32)
    with torch.no_grad():
        module.w_ED.fill_(-1e4)
    routing = module(torch.ones(2, 6), "reference")
    assert routing.prob_E.isfinite().all()
    assert routing.weight.isfinite().all()


def test_a_router_that_cannot_be_imported_is_refused():
    with pytest.raises(BadInput, match=r"router\.name=no_such:Router cannot be imported"):
        build_router(RouterConfig(name="no_such:Router"), 4, MoEConfig())
    with pytest.raises(
        BadInput, match=r"router\.name=moe\.routing\.build:build_router is no subclass of moe\.routing\.contract"
    ):
        build_router(RouterConfig(name="moe.routing.build:build_router"), 4, MoEConfig())
    assert isinstance(build_router(RouterConfig(name="sigmoid"), 4, MoEConfig()), TopKRouter)


OWN = '''
import torch
from moe.routing.contract import Router, Routing

class First(Router):
    """Every token to the experts from options.first on."""

    def forward(self, x_TD, backend, context):
        expert_K = torch.arange(self.k) + self.cfg.options["first"]
        weight = x_TD.new_full((len(x_TD), self.k), 1 / self.k)
        return Routing(expert_K.expand(len(x_TD), self.k), weight, None)

class Plain:
    pass

number = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module with a router on the path."""
    (tmp_path / "switchyard_own_router.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "switchyard_own_router"
    sys.modules.pop("switchyard_own_router", None)


def test_a_router_of_ones_own_runs_in_a_model_and_reads_its_options(own, make_model, tokens):
    cfg = RouterConfig(f"{own}:First", options={"first": 2})
    validate([MoEConfig(n_experts=5, k=3)], cfg, BalanceConfig())
    model = make_model(cfg)
    out = model(tokens)
    assert out.logits_BSV.isfinite().all()
    for each in out.routing:
        assert each.count_E.tolist() == [0, 0, 22, 22, 22]
        assert each.aux == each.z == 0
    out.logits_BSV.sum().backward()


@pytest.mark.parametrize("name", [":Missing", ":Plain", ":number", ":", "", ":First.forward"])
def test_what_is_no_router_is_refused(own, name):
    with pytest.raises(BadInput, match=r"router\.name"):
        router_class(own + name)


@pytest.mark.parametrize("name", ["no_such_module_here:Router", ":Router", "nothing", "..:x", "os:path"])
def test_a_module_that_is_none_is_refused(name):
    with pytest.raises(BadInput, match=r"router\.name"):
        router_class(name)


def test_a_module_that_fails_to_import_is_refused(tmp_path, monkeypatch):
    (tmp_path / "switchyard_broken_router.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match="a_module_that_is_not_there"):
        router_class("switchyard_broken_router:Router")


def test_the_librarys_own_are_found_by_name():
    assert router_class("softmax") is router_class("sigmoid") is router_class("sqrt_softplus") is TopKRouter
    assert router_class("hash") is HashRouter
