"""AdamW, Muon and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from moe.config.train import OptimConfig, warmup_steps
from moe.model.transformer import Transformer, hidden_matrices
from moe.train.muon import Muon


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (1711.05101), or Muon for the model's hidden matrices and AdamW for the rest. Weight decay acts on
    matrices (embeddings and expert stacks among them), never on norms or biases. Parameters stand in
    `model.named_parameters()` order within each group."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    n_above = {}
    if cfg.name == "muon":
        assert isinstance(model, Transformer), "Muon asks a transformer for its hidden matrices"
        n_above = {name: n for name, n in hidden_matrices(model).items() if name in trainable}
    rest = [p for name, p in trainable.items() if name not in n_above]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    common: dict[str, Any] = dict(lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, **common)
    matrices = [
        {
            "params": [trainable[name] for name, n in n_above.items() if n == many],
            "weight_decay": cfg.weight_decay,
            "momentum": cfg.momentum,
            "n_above": many,
        }
        for many in sorted(set(n_above.values()))
    ]
    return Muon([*(group | {"n_above": 0} for group in groups), *matrices], **common)


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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by flat name, `<kind>/<parameter>`: exp_avg, exp_avg_sq and step; momentum of
    Muon's."""
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
