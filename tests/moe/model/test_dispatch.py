"""Which backend is taken where, and why."""

import importlib.metadata
import importlib.util
import re

import pytest
import torch

from kernels import tuning
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.model import dispatch
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routing.contract import Context, Routing
from tests.small_layers import states

CPU = torch.device("cpu")


@pytest.mark.parametrize("interpreting", ["1", "0"])
def test_auto_on_a_cpu_is_the_torch_backend_and_says_why(monkeypatch, interpreting):
    monkeypatch.setenv("TRITON_INTERPRET", interpreting)
    backend, why = dispatch.choose("auto", CPU)
    assert backend == "torch"
    assert "no GPU" in why or "need a GPU" in why


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_backend_asked_for_by_name_is_taken(name):
    assert dispatch.choose(name, CPU) == (name, "as asked")


def test_triton_without_a_gpu_is_refused_unless_it_is_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("triton", CPU)[0] == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        BadInput, match=r"dispatch=triton cannot run here: .* need a GPU and the device is cpu .*torch can"
    ):
        dispatch.choose("triton", CPU)


def test_triton_that_is_missing_or_untested_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    with pytest.raises(BadInput, match=r"Triton 3\.5\.1 is installed, and the kernels are tested with 3\.6, 3\.7"):
        dispatch.choose("triton", CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"Triton is not installed\. dispatch=torch can"):
        dispatch.choose("triton", CPU)


CHECKPOINTS = {
    "gpt-oss": dict(expert_bias=True, activation="swiglu_clipped"),
    "another limit": dict(activation="swiglu_clipped", swiglu_alpha=1.2, swiglu_limit=0.3),
    "biases of gelu": dict(expert_bias=True, activation="gelu"),
}


@pytest.mark.parametrize("precision", ["same", "fp8"])
@pytest.mark.parametrize("weigh_input", [False, True])
@pytest.mark.parametrize("change", CHECKPOINTS)
def test_every_backend_computes_what_checkpoints_have(model_config, change, weigh_input, precision):
    cfg = model_config(**{**CHECKPOINTS[change], **({"expert_bias": False} if weigh_input else {})})
    cfg.moe.weigh_input, cfg.moe.precision = weigh_input, precision
    torch.manual_seed(0)
    layer = MoELayer(cfg, cfg.moe, RouterConfig()).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.5)
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    results = []
    for backend in ("reference", "torch", "triton"):
        y = layer(x, backend)[0]
        results.append([y, *torch.autograd.grad(y.square().sum(), layer.parameters())])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_biases_of_the_down_projection_come_with_a_tokens_weight_and_not_to_rows_without_expert(model_config):
    cfg = model_config(expert_bias=True)
    experts = Experts(cfg, cfg.moe).double()
    with torch.no_grad():
        for p in experts.parameters():
            p.zero_()
        experts.down_bias_ED.copy_(torch.arange(5)[:, None] + 1)
    expert_TK = torch.tensor([[0, 4, -1], [-1, -1, -1], [2, 2, 1]])
    weight_TK = torch.tensor([[0.5, 2.0, 9.0], [9.0, 9.0, 9.0], [1.0, 1.0, 3.0]], dtype=torch.float64)
    for backend in ("reference", "torch", "triton"):
        y_TD, _ = dispatch.apply(experts, torch.ones(3, 12).double(), Routing(expert_TK, weight_TK, None), backend)
        assert y_TD[:, 0].tolist() == [0.5 + 2 * 5, 0, 3 + 3 + 3 * 2]


WRONG = {
    "bool ids": (lambda r: r._replace(expert=r.expert > 0), "takes expert in torch.int64; they are torch.bool."),
    "int32 ids": (lambda r: r._replace(expert=r.expert.int()), "takes expert in torch.int64; they are torch.int32."),
    "rows without tokens": (
        lambda r: r._replace(expert=r.expert.flatten(), weight=r.weight.flatten()),
        "(N,) with token_N (N,); of 4 tokens they are (12,), (12,), None.",
    ),
    "fewer tokens": (
        lambda r: r._replace(expert=r.expert[:3], weight=r.weight[:3]),
        "of 4 tokens they are (3, 3), (3, 3), None.",
    ),
    "weights the other way round": (
        lambda r: r._replace(weight=r.weight.T),
        "of 4 tokens they are (4, 3), (3, 4), None.",
    ),
    "tokens of other rows": (
        lambda r: r._replace(token_N=torch.arange(4)),
        "of 4 tokens they are (4, 3), (4, 3), (4,).",
    ),
}


@pytest.mark.parametrize("kind", [{}, {"n_copy": 1}, {"widths": [4, 4, 8, 8, 8]}], ids=["equal", "cheap", "mixed"])
@pytest.mark.parametrize("case", WRONG)
def test_a_routing_of_another_form_or_type_is_refused_by_every_backend(make_layer, backend, case, kind):
    layer, (spoil, sentence) = make_layer(RouterConfig(), **kind), WRONG[case]
    x_TD = states(1, 4).flatten(0, 1)
    routing = layer.router(x_TD, backend, Context())
    with pytest.raises(ValueError, match=f"^dispatch={backend} takes .*" + re.escape(sentence.removeprefix("takes "))):
        layer.apply_experts(x_TD, spoil(routing), backend)


@pytest.mark.parametrize(("found", "expected"), [("sm_90", "triton"), ("sm_70", "torch")])
def test_auto_on_a_gpu_takes_triton_where_its_kernels_are_built_for_it(found, expected):
    device = torch.device("cuda")
    with tuning.target(found):
        backend, why = dispatch.choose("auto", device)
        assert backend == expected
        assert found in why
        if expected == "torch":
            with pytest.raises(BadInput, match=f"the GPU is {found}, and the kernels are built for .*sm_90"):
                dispatch.choose("triton", device)


def test_an_unknown_backend_is_refused(make_layer):
    with pytest.raises(ValueError, match="backend='cuda' is not one of"):
        make_layer(RouterConfig())(states(), "cuda")
