"""AdamW and the learning-rate schedule."""

import math

import torch
from torch import Tensor, nn

from moe.config.train import OptimConfig, warmup_steps


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (1711.05101). Weight decay acts on matrices (embeddings and expert stacks among them), never on norms
    or biases. Parameters stand in `model.named_parameters()` order within each group."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True)


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
    """The optimiser's state by flat name, `<kind>/<parameter>`: exp_avg, exp_avg_sq and step."""
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
