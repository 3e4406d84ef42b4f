"""Training on several ranks is training: losses, gradients, parameters, counts and biases are one process' own."""

import pytest
import torch

from experiments.suites import equalities
from experiments.suites.equalities import LAYOUTS, compared, config, trained
from moe.config.parallel import Layout
from moe.errors import BadInput
from moe.parallel.collectives import n_ranks
from tests.ranks import run_ranks

ROUTERS = sorted(path.stem for path in (equalities.cli.CONF / "router").glob("*.yaml"))
EP = Layout(1, 2, 2)


def agrees(cfg, layout: Layout, steps: int = 3, tolerance: float = 1e-12, timeout: float = 120.0) -> dict:
    """A row of the suite, held to the tolerance."""
    many = run_ranks(layout.replicate * layout.shard, trained, cfg, layout, steps, timeout=timeout)
    row = compared(trained(cfg, Layout(), steps), many[0])
    assert max(row["loss"], row["gradients"], row["norm"], row["parameters"]) <= tolerance, row
    assert row["counts"], row
    for other in many[1:]:  # every rank has the same whole
        assert all(torch.equal(other.parameters[name], value) for name, value in many[0].parameters.items())
    return row


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_trains_as_one_process_for_20_steps(layout):
    agrees(config("sigmoid-bias", "torch"), layout, steps=20)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_trains_as_one_process_where_experts_are_shared_out(router):
    agrees(config(router, "torch"), EP)


@pytest.mark.parametrize("router", ["softmax", "sinkhorn", "expert-choice", "relu", "moepp", "mod"])
def test_the_reference_trains_so_too_on_four_ranks(router):
    agrees(config(router, "reference"), Layout(2, 2, 2))


@pytest.mark.parametrize("router", ["softmax", "relu", "expert-choice"])
def test_the_kernels_train_so_too_in_tritons_interpreter(router):
    agrees(config(router, "triton", "train.batch_size=2", "model.n_layers=1"), EP, steps=1, tolerance=1e-5)


VARIANTS = {
    "two micro-batches": ["train.accumulate=2"],
    "four micro-batches": ["train.batch_size=16", "train.accumulate=4", "balance.scope=global"],
    "global scope": ["balance.scope=global", "balance.importance=0.1", "balance.spread=0.1"],
    "batch scope": ["balance.scope=batch", "balance.importance=0.1", "balance.bandpass=0.1", "balance.band=0.01"],
    "sequence scope": ["balance.scope=sequence"],
    "capacity by position": ["balance.capacity=1.0"],
    "capacity by score": ["balance.capacity=1.0", "balance.priority=score"],
    "capacity, the next expert": ["balance.capacity=1.0", "balance.overflow=next"],
    "capacity, by score, the next": ["balance.capacity=1.0", "balance.priority=score", "balance.overflow=next"],
    "forced balance": ["balance.force=balanced"],
    "shared experts": ["model.moe.n_shared=1"],
    "experts of several widths": ["model.moe.widths=[16,16,16,16,24,24,24,24]"],
    "dense layers first": ["model.moe.first_dense=1"],
    "expert biases": ["model.expert_bias=true", "model.activation=gelu"],
    "weights on the input": ["model.moe.weigh_input=true"],
    "activations computed again": ["train.checkpoint_activations=true"],
    "tied embeddings": ["model.tie_embeddings=true"],
    "jitter": ["router.jitter=0.1"],
    "muon": ["optim.name=muon"],
    "one expert": ["model.moe.n_experts=2", "model.moe.k=2"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_of_a_step_is_one_process_own(name):
    agrees(config("softmax", "torch", *VARIANTS[name]), Layout(1, 4, 2))


def test_products_in_fp8_are_one_process_own_where_ranks_share_no_expert_out():
    agrees(config("softmax", "torch", "model.moe.precision=fp8"), Layout(1, 2, 1))


@pytest.mark.parametrize("router", ["noisy", "gshard", "sparsemixer"])
def test_noise_is_the_tokens_own_whatever_the_layout(router):
    agrees(config(router, "torch", "train.accumulate=2"), Layout(1, 4, 2))


def test_compiled_blocks_train_as_one_process():
    agrees(config("softmax", "torch", "train.compile=true"), EP, steps=2, tolerance=1e-9, timeout=280)


def _refused(cfg, layout):
    try:
        trained(cfg, layout, 1)
    except BadInput as bad:
        return str(bad), n_ranks()


def test_experts_that_do_not_divide_are_a_sentence_on_every_rank():
    cfg = config("softmax", "torch", "model.moe.n_experts=6")
    for said, ranks in run_ranks(4, _refused, cfg, Layout(1, 4, 4)):
        assert said.startswith("parallel.ep=4 does not divide the number of experts of one width=6")
        assert ranks == 4


def test_products_in_fp8_of_experts_that_are_shared_out_are_a_sentence_on_every_rank():
    cfg = config("softmax", "torch", "model.moe.precision=fp8")
    for said, ranks in run_ranks(2, _refused, cfg, Layout(1, 2, 2)):
        assert said.startswith("parallel.ep=2 with model.moe.precision=fp8: a row's weight would get another gradient")
        assert ranks == 2
