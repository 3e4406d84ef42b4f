"""Claims about Muon: against singular value decompositions, torch's own Muon matrix by matrix, and torch's AdamW."""

import copy

import numpy as np
import pytest
import torch

from moe.config.balance import BalanceConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.config.train import OptimConfig
from moe.model.transformer import Transformer, hidden_matrices
from moe.train.muon import RMS, Muon, orthogonal
from moe.train.optimizer import build_optimizer, optimizer_tensors, restore_optimizer


def _model(activation="swiglu", n_shared=0):
    moe = MoEConfig(n_experts=4, k=2, d_expert=8, n_shared=n_shared)
    cfg = ModelConfig("t", 32, 16, n_layers=2, d_model=16, n_heads=2, d_ff=24, activation=activation, moe=moe)
    return Transformer(cfg, RouterConfig(), BalanceConfig()).initialize(0)


def _fill(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5)])
def test_a_matrix_made_orthogonal_keeps_its_singular_vectors_and_has_singular_values_near_one(shape):
    x_MAB = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for x_AB, y_AB in zip(x_MAB.numpy(), orthogonal(x_MAB).numpy(), strict=True):
        u, s, vh = np.linalg.svd(x_AB, full_matrices=False)
        inside = u.T @ y_AB @ vh.T
        assert inside == pytest.approx(np.diag(np.diag(inside)), abs=1e-9)
        large = np.diag(inside)[s > 0.05 * s.max()]
        assert ((large > 0.6) & (large < 1.3)).all()


def test_every_expert_is_made_orthogonal_by_itself():
    stack = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonal(stack[e : e + 1]) for e in range(4)])
    assert torch.allclose(orthogonal(stack), alone, atol=1e-6)


@pytest.mark.parametrize("n_above", [1, 2])
def test_a_stack_moves_as_its_matrices_would_under_torchs_muon(n_above):
    """Torch's own takes matrices alone, in bf16; its rule for one learning rate with AdamW is called by its name there.
    Three steps: momentum and decay are in it."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 2 * n_above * 4, 8, generator=generator))
    pieces = [torch.nn.Parameter(m.clone()) for m in stack.detach().reshape(3 * n_above, -1, 8)]
    ours = Muon([{"params": [stack], "weight_decay": 0.1, "momentum": 0.9, "n_above": n_above}], lr=0.02)
    theirs = torch.optim.Muon(pieces, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    start = stack.detach().clone()
    for _ in range(3):
        stack.grad = torch.randn(stack.shape, generator=generator)
        for piece, gradient in zip(pieces, stack.grad.reshape(3 * n_above, -1, 8), strict=True):
            piece.grad = gradient.clone()
        ours.step()
        theirs.step()
    expected = torch.stack([piece.detach() for piece in pieces]).view(stack.shape)
    assert (stack.detach() - expected).abs().max() < 0.05 * (expected - start).abs().max()  # bf16 has three digits


def test_a_step_has_the_size_of_an_adamw_step():
    p = torch.nn.Parameter(torch.zeros(2, 32, 16))
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    Muon([{"params": [p], "weight_decay": 0.0, "momentum": 0.9, "n_above": 1}], lr=1.0).step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(RMS, rel=0.2)


def test_attention_mlps_and_experts_are_hidden_matrices_and_nothing_else_is():
    names = hidden_matrices(_model(n_shared=1))
    assert {name.split(".", 2)[2] for name in names} == {
        "attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.o.weight", "mlp.experts.w_up_EFD",
        "mlp.experts.w_down_EDF", "mlp.shared.up.weight", "mlp.shared.down.weight",
    }  # fmt: skip
    assert {name for name, n in names.items() if n == 2} == {
        f"blocks.{i}.mlp.{kind}" for i in range(2) for kind in ("experts.w_up_EFD", "shared.up.weight")
    }
    assert set(hidden_matrices(_model("gelu")).values()) == {1}


def test_what_is_no_hidden_matrix_moves_as_under_adamw_bit_by_bit():
    one, other = _model(), _model()
    first = build_optimizer(one, OptimConfig(name="muon", weight_decay=0.2))
    second = build_optimizer(other, OptimConfig(weight_decay=0.2))
    for seed in range(3):
        for model, optimizer in ((one, first), (other, second)):
            _fill(model, seed)
            optimizer.step()
    hidden = hidden_matrices(one)
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) == (name not in hidden), name


def test_frozen_matrices_stay_and_every_parameter_has_one_group():
    model = _model()
    frozen = model.blocks[0].mlp.experts.w_up_EFD.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == sum(p.requires_grad for p in model.parameters())
    _fill(model)
    optimizer.step()
    assert torch.equal(frozen, before)


def test_a_loss_goes_down_with_it():
    model = _model()
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=3e-2))
    tokens = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        logits = model(tokens[:, :-1]).logits_BSV
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_its_state_goes_to_another_model_and_goes_on_bit_by_bit():
    model = _model()
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    _fill(model)
    optimizer.step()
    tensors = optimizer_tensors(model, optimizer)
    assert {name.split("/")[0] for name in tensors} == {"momentum", "exp_avg", "exp_avg_sq", "step"}
    other = copy.deepcopy(model)
    again = build_optimizer(other, OptimConfig(name="muon"))
    restore_optimizer(other, again, tensors)
    for trained, by in ((model, optimizer), (other, again)):
        _fill(trained, 1)
        by.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
