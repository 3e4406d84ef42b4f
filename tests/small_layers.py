"""MoE layers of every preset in small, what they are fed, and one pass through them: for the tests of layers."""

import pytest
import torch

from moe.config.model import MoEConfig
from moe.model.layer import LayerInput
from moe.routing.contract import Context

EXACT = dict(rtol=1e-12, atol=1e-12)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def experts_of(preset, **moe):
    """The settings of the experts that go with a preset: E=8 is the least that four groups of two need."""
    moe = {"n_experts": 8, "k": 3, **preset.moe, **moe}
    cheap = sum(moe.get(name, 0) for name in ("n_null", "n_copy", "n_constant"))
    return moe | ({"k": moe["n_experts"] + cheap} if moe["k"] == "all" else {})


def layer_of(make_layer, preset, dtype=torch.float64, training=False, **moe):
    """The layer that a preset makes, with what balances it."""
    return make_layer(preset.router, dtype, balance=preset.balance, **experts_of(preset, **moe)).train(training)


def model_of(make_model, preset, dtype=torch.float64, training=False, every=1, d_expert=7, **changes):
    """A tiny transformer with the layers that a preset makes."""
    moe = MoEConfig(d_expert=d_expert, every=every, **experts_of(preset))
    return make_model(preset.router, dtype, balance=preset.balance, moe=moe, **changes).train(training)


def states(n_sequences=2, length=9, dtype=torch.float64, seed=3):
    """(B, S, 12) states, the same in every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n_sequences, length, 12), generator=generator, dtype=torch.float64).to(dtype)


def token_ids(x, seed=5):
    """(B, S) ids for states (B, S, D)."""
    return torch.randint(0, 17, x.shape[:2], generator=torch.Generator().manual_seed(seed))


def run_layer(layer, x, backend="torch", tokens=None, **given):
    """One pass, with the same random numbers in every call."""
    torch.manual_seed(7)
    return layer(x, backend, LayerInput((token_ids(x) if tokens is None else tokens).flatten(), **given))


def objective(out, routing):
    """A scalar that every output of the layer feeds."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return (out * weights).sum() + sum(routing.losses.values())


def one_pass(layer, x, backend):
    """Output, report and named gradients of one pass."""
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    out, report = run_layer(layer, x, backend)
    objective(out, report).backward()
    return out.detach(), report, {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def gradients_of(layer, x, backend):
    """The gradients of one pass, by name; the states' is x."""
    return one_pass(layer, x, backend)[2]


def same_bits(first, second):
    """Two dicts of tensors are equal to the last bit."""
    assert first.keys() == second.keys()
    for name in first:
        one, other = first[name], second[name]
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


def decide(layer, x):
    """What the router says, before anything limits it."""
    torch.manual_seed(7)
    return layer.router(x.flatten(0, 1), "reference", Context(token_ids(x).flatten(), len(x)))
