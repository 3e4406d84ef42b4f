"""AdamW or Muon beside it, and the learning-rate schedule."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from moe.config.train import OptimConfig, warmup_steps
from moe.model.transformer import Transformer, hidden_matrices
from moe.train.muon import MuonAdamW


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW (1711.05101), or with `cfg.name` muon Muon for the hidden matrices and AdamW for all else. Weight
    decay acts on matrices (embeddings and expert stacks among them), never on norms or biases. Parameters stand in
    `model.named_parameters()` order within each group; frozen ones are in none."""
    stacks = {}
    if cfg.name == "muon":
        assert isinstance(model, Transformer), "Muon asks a transformer for its hidden matrices"
        stacks = hidden_matrices(model)
    trainable = [p for name, p in model.named_parameters() if p.requires_grad and name not in stacks]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True)
    if cfg.name != "muon":
        return adamw
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [
        {"params": [p for name, p in named if stacks.get(name) == parts], "parts": parts, "peak": cfg.muon_lr or cfg.lr}
        for parts in sorted(set(stacks.values()))
    ]
    return MuonAdamW(
        matrices, adamw, lr=cfg.muon_lr or cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum,
        ns_steps=cfg.ns_steps, adjust=cfg.adjust,
    )  # fmt: skip


def learning_rate(cfg: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of optimiser step `step` (from 1) of `steps`: a linear warm-up over `warmup` steps, then
    cosine to `final` · lr (1608.03983), or constant with a linear decay to it over the last `decay` · steps (wsd,
    2404.06395)."""
    warmup = warmup_steps(cfg, steps)
    if step <= warmup:
        return cfg.lr * step / warmup
    match cfg.schedule:
        case "constant":
            share = 1.0
        case "cosine":
            progress = (step - warmup) / max(1, steps - warmup)
            share = cfg.final + (1 - cfg.final) * 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            n_decay = max(1, round(cfg.decay * steps))
            share = 1 - (1 - cfg.final) * max(0, step - (steps - n_decay)) / n_decay
        case _:
            raise ValueError(f"optim.schedule={cfg.schedule!r}")
    return cfg.lr * share


def set_learning_rates(optimizer: torch.optim.Optimizer, cfg: OptimConfig, step: int, steps: int) -> float:
    """Give every parameter group its rate at this step, under one schedule: the settings' own, or where a group has a
    `peak` from there. Returns the settings' own."""
    for group in optimizer.param_groups:
        of_group = dataclasses.replace(cfg, lr=group.get("peak", cfg.lr))
        group["lr"] = learning_rate(of_group, step, steps)
    return learning_rate(cfg, step, steps)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by flat name, `<kind>/<parameter>`: exp_avg, exp_avg_sq and step; of Muon's
    matrices momentum_buffer."""
    return {
        f"{kind}/{name}": value
        for name, p in model.named_parameters()
        for kind, value in optimizer.state.get(p, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`: every tensor is cloned into the optimiser's state."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        p = parameters[name]
        optimizer.state[p][kind] = value.detach().clone().to(p.device)
