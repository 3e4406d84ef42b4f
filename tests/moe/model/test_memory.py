"""Claims about walking a step for its memory. The oracle is the record that torch's profiler keeps of its allocator
while a real step is taken: no code in common with the walk."""

import dataclasses
from functools import partial

import pytest
import torch

from experiments.suites.memory import State
from moe.config.model import LatentConfig, ModelConfig, MoEConfig
from moe.config.run import Config
from moe.config.train import OptimConfig, TrainConfig
from moe.model import cost
from moe.model.memory import walk
from moe.model.transformer import hidden_matrices
from moe.train.optimizer import build_optimizer
from tests.router_presets import presets_of_routers

PRESETS = presets_of_routers()
BATCH, CONTEXT = 4, 64


def _config(
    name="softmax",
    precision="fp32",
    n_micro=1,
    checkpointed=False,
    dense=False,
    optimizer="adamw",
    shape=None,
    products="same",
):
    router, balance, changes = PRESETS[name]
    moe = MoEConfig(n_experts=8, k=2, d_expert=32, precision=products)
    changes = {key: moe.n_experts if value == "all" else value for key, value in changes.items()}
    moe = None if dense else dataclasses.replace(moe, **changes)
    model = ModelConfig("small", 128, CONTEXT, n_layers=2, d_model=64, n_heads=2, d_ff=64, moe=moe, **(shape or {}))
    train = TrainConfig(
        batch_size=BATCH * n_micro, accumulate=n_micro, precision=precision, device="cpu",
        checkpoint_activations=checkpointed,
    )  # fmt: skip
    optim = OptimConfig(name=optimizer)
    return Config(model=model, router=router, balance=balance, train=train, optim=optim)


def _walk(cfg):
    train = cfg.train
    return walk(
        cfg.model, cfg.router, cfg.balance, train.batch_size // train.accumulate, n_micro=train.accumulate,
        precision=train.precision, checkpoint_activations=train.checkpoint_activations,
        optimizer=partial(build_optimizer, cfg=cfg.optim), average=cfg.optim.average > 0,
    )  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_with_every_router_asks_the_allocator_for_what_was_walked(name):
    cfg = _config(name)
    assert _walk(cfg).peak == pytest.approx(State(cfg).asked_for(), rel=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        dict(dense=True),
        dict(precision="bf16"),
        dict(n_micro=2),
        dict(n_micro=4),
        dict(checkpointed=True),
        dict(optimizer="muon"),
        dict(shape=dict(latent=LatentConfig(24, 16, 20, 12, 28))),
        dict(shape=dict(sinks=True, expert_bias=True, activation="swiglu_clipped", window=16)),
    ],
    ids=str,
)
def test_a_step_asks_for_what_was_walked(settings):
    cfg = _config(**settings)
    assert _walk(cfg).peak == pytest.approx(State(cfg).asked_for(), rel=0.01)


def test_what_rounding_to_fp8_takes_is_walked_as_if_one_expert_got_every_row():
    cfg = _config(products="fp8")
    asked = State(cfg).asked_for()
    assert asked <= _walk(cfg).peak <= 1.1 * asked


def test_gradients_that_stay_raise_the_peak_of_a_second_micro_batch():
    one, two = _walk(_config()), _walk(_config(n_micro=2))
    assert one.peak < two.peak <= one.peak + one.gradients


def test_weights_gradients_and_adam_are_four_and_eight_bytes_a_parameter():
    cfg = _config()
    memory, total = _walk(cfg), cost.size(cfg.model).total
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * total, 4 * total, 8 * total)
    assert memory.logits == 4 * BATCH * CONTEXT * cfg.model.vocab_size


def _muon(cfg, **settings):
    return dataclasses.replace(cfg, optim=OptimConfig(name="muon", **settings))


def test_muon_keeps_four_bytes_for_each_number_in_its_matrices_and_adamw_eight_for_the_rest():
    cfg = _config()
    memory, model = _walk(_muon(cfg)), State(cfg).model
    matrices = sum(p.numel() for name, p in model.named_parameters() if name in hidden_matrices(model))
    assert memory.optimizer == 8 * cost.size(cfg.model).total - 4 * matrices
    assert memory.peak < _walk(cfg).peak


@pytest.mark.parametrize("frozen", [False, True])
def test_a_mean_of_the_weights_takes_as_much_as_those_that_are_trained(frozen):
    cfg = _config("random" if frozen else "softmax")
    averaged = dataclasses.replace(cfg, optim=OptimConfig(average=0.1))
    plain, mean = _walk(cfg), _walk(averaged)
    assert mean.optimizer - plain.optimizer == mean.peak - plain.peak == plain.gradients


@pytest.mark.parametrize("batch", [BATCH, 1], ids=["activations are the most", "an update is the most"])
def test_a_step_with_muon_asks_for_what_was_walked(batch):
    cfg = _muon(_config(dense=True))
    if batch == 1:  # matrices that outweigh activations
        model = dataclasses.replace(cfg.model, context=8, d_ff=1024)
        cfg = dataclasses.replace(cfg, model=model, train=dataclasses.replace(cfg.train, batch_size=1))
        muon, adamw = _walk(cfg), _walk(dataclasses.replace(cfg, optim=OptimConfig()))
        assert muon.peak - muon.optimizer > adamw.peak - adamw.optimizer
    assert _walk(cfg).peak == pytest.approx(State(cfg).asked_for(), rel=0.01)


def test_frozen_weights_have_neither_gradients_nor_a_state():
    cfg = _config("random")
    memory = _walk(cfg)
    frozen = sum(4 * 8 * 64 for _ in range(2))  # a router's E x D in each of two layers
    assert memory.gradients == memory.weights - frozen
    assert memory.optimizer == 2 * memory.gradients


def test_checkpointing_keeps_less_for_backward_and_computes_more():
    whole, checkpointed = _walk(_config()), _walk(_config(checkpointed=True))
    assert checkpointed.saved < whole.saved / 2
    assert checkpointed.activations < whole.activations
    assert checkpointed.operations > whole.operations


def test_autocast_keeps_bf16_copies_of_the_matrices_that_are_multiplied():
    cfg = _config(precision="bf16", dense=True)
    memory = _walk(cfg)
    matmuls = sum(p.numel() for p in State(cfg).model.parameters() if p.dim() == 2)
    assert memory.copies == 2 * matmuls  # the embedding is the output map too
    assert _walk(_config(dense=True)).copies == 0


def test_nothing_of_a_model_that_no_machine_holds_is_allocated():
    model = ModelConfig("huge", 128_000, 4096, n_layers=2, d_model=16384, n_heads=128, d_ff=53248)
    memory = walk(model, PRESETS["softmax"].router, PRESETS["softmax"].balance, 1)
    assert memory.weights == 4 * cost.size(model).total > 2**34
    assert torch.ones(2).tolist() == [1, 1]  # outside the walk tensors have data again
