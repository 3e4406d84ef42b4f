"""Claims about rounded weights: the numbers are those of a loop in float64, and the model is given back as it was."""

import math

import pytest
import torch

from kernels.quantized import FORMATS
from kernels.quantized import dequantize as dequantized
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.convert.quantize import DTYPES, LARGEST, Rounding, dequantize, quantize, rounded
from moe.errors import BadInput
from moe.model.quantized import store
from moe.model.transformer import Transformer

NEVER_ROUNDED = ("norm", "router", "shared_gate", "position", "bias", "cheap")


def model(**changes):
    moe = MoEConfig(4, 2, 32, **{"n_shared": 1, "shared_gate": True, "first_dense": 1} | changes)
    cfg = ModelConfig(
        vocab_size=23, context=16, n_layers=3, d_model=64, n_heads=2, d_ff=96, bias=True, norm="layer", moe=moe,
        position="learned",
    )  # fmt: skip
    return Transformer(cfg, RouterConfig()).initialize(0)


def weights_of(network):
    return {name: w.detach().clone() for name, w in network.state_dict().items()}


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(("columns", "group"), [(64, 64), (96, 48), (100, 50), (32, 32), (130, 65)])
def test_a_weight_is_its_nearest_multiple_of_its_groups_scale(dtype, columns, group):
    w = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    w[1, :group] = 0
    if group > 64:
        with pytest.raises(BadInput, match=f"dtype={dtype} needs groups of 32 to 64 weights, and none divides the 130"):
            quantize("mlp.up", w, dtype)
        return
    q, scale = quantize("mlp.up", w, dtype)
    assert (q.dtype, scale.shape) == (torch.int8, (3, columns // group))
    for row in range(3):
        for column in range(columns):
            start = column // group * group
            largest = max(abs(float(x)) for x in w[row, start : start + group])
            s = float(scale[row, column // group])
            assert s == pytest.approx(largest / LARGEST[dtype], rel=1e-6)
            distance = abs(int(q[row, column]) * s - float(w[row, column]))
            assert distance <= s / 2 * (1 + 1e-5)
    assert q.abs().max() == LARGEST[dtype]
    assert torch.equal(dequantize(q, scale)[1, :group], torch.zeros(group))


def test_int8_is_nearer_than_int4_by_the_ratio_of_their_steps():
    w = torch.randn(64, 640, generator=torch.Generator().manual_seed(1))
    error = {dtype: float((dequantize(*quantize("w", w, dtype)) - w).std()) for dtype in LARGEST}
    assert error["int4"] / error["int8"] == pytest.approx(127 / 7, rel=0.02)


@pytest.mark.parametrize("dtype", LARGEST)
def test_every_matrix_is_rounded_but_routers_gates_norms_biases_and_positions(dtype):
    network = model()
    before = weights_of(network)
    with rounded(network, Rounding(dtype)):
        inside = weights_of(network)
    assert all(torch.equal(w, before[name]) for name, w in network.state_dict().items())
    for name, w in before.items():
        if any(word in name for word in NEVER_ROUNDED):
            assert torch.equal(inside[name], w), name
        elif name != "head.weight":  # tied: the embedding
            assert torch.equal(inside[name], dequantize(*quantize(name, w, dtype))), name
            assert not torch.equal(inside[name], w), name


@pytest.mark.parametrize("widths", [[], [32, 64, 32, 64]])
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in LARGEST])
def test_another_format_rounds_all_experts_to_what_it_stores_of_them(dtype, widths):
    network, stored = model(widths=widths), model(widths=widths)
    store(stored, dtype, dict(stored.named_parameters()).__getitem__)
    tokens_BS = torch.randint(0, 23, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), rounded(network, Rounding(dtype, {1: range(4), 2: range(4)})):
        assert torch.equal(network(tokens_BS).logits_BSV, stored(tokens_BS).logits_BSV)
    # And every other matrix too, as one of a stack of one.
    before = weights_of(network)
    with rounded(network, Rounding(dtype)):
        inside = weights_of(network)
    assert torch.equal(inside["embed.weight"], dequantized(FORMATS[dtype](before["embed.weight"][None]))[0])
    assert all(torch.equal(w, before[name]) for name, w in inside.items() if any(of in name for of in NEVER_ROUNDED))


def test_a_width_that_a_format_does_not_hold_is_refused_by_the_matrixs_name():
    network = Transformer(ModelConfig("m", 23, 16, 1, 64, 2, d_ff=40), RouterConfig()).initialize(0)
    sentence = "dtype=mxfp4 cannot hold blocks.0.mlp.down.weight: mxfp4 takes rows of 32 weights or a multiple"
    with pytest.raises(BadInput, match=sentence), rounded(network, Rounding("mxfp4")):
        raise AssertionError("not reached")


@pytest.mark.parametrize("widths", [[], [32, 64, 32, 64]])
def test_of_some_experts_these_alone_are_rounded(widths):
    network = model(widths=widths)
    before = weights_of(network)
    with rounded(network, Rounding("int4", {1: [2], 2: [0, 3]})):
        inside = weights_of(network)
    changed = {name: (inside[name] != w).flatten(1).any(1) for name, w in before.items() if "experts.w_" in name}
    assert not any((inside[name] != w).any() for name, w in before.items() if ".experts." not in name)
    if widths:  # stacks of a width each
        total = sum(int((inside[name] != w).flatten(1).any(1).sum()) for name, w in before.items() if "stacks" in name)
        assert total == 2 * 3
        return
    for name, changed_E in changed.items():
        assert changed_E.nonzero().flatten().tolist() == ([2] if ".1." in name else [0, 3]), name


def test_the_weights_come_back_after_an_error_and_from_float64():
    network = model().double()
    before = weights_of(network)
    with pytest.raises(ZeroDivisionError), rounded(network, Rounding("int8")):
        raise ZeroDivisionError
    assert all(torch.equal(w, before[name]) for name, w in network.state_dict().items())
    assert math.isclose(Rounding("int8").first, 0)
    assert Rounding("int8", {2: [0], 1: [1]}).first == 1


@pytest.mark.parametrize(("layer", "expert", "n"), [(1, 4, 4), (1, -1, 4), (0, 0, 0), (7, 0, 0)])
def test_an_expert_that_there_is_not_is_refused(layer, expert, n):
    network = model()
    with (
        pytest.raises(BadInput, match=f"int8: layer {layer} has no expert {expert}: it has {n}."),
        rounded(network, Rounding("int8", {layer: [expert]})),
    ):
        raise AssertionError("not reached")
