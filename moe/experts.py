"""MLPs: the dense one, which also serves as the shared expert, and the stacked weights of routed experts."""

import torch
from torch import Tensor, nn

from kernels.reference import activate
from moe.config import ModelConfig, MoEConfig


class MLP(nn.Module):
    """down(act(up(x))): (..., D) -> (..., D). For swiglu, `up` holds the gate's rows, then the up projection's."""

    def __init__(self, cfg: ModelConfig, width: int) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.up = nn.Linear(cfg.d_model, up_width(cfg, width), bias=cfg.bias)
        self.down = nn.Linear(width, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activate(self.up(x), self.activation))


class Experts(nn.Module):
    """The weights of E routed experts; `dispatch.experts` applies them. Experts have no biases."""

    def __init__(self, cfg: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.w_up_EFD = nn.Parameter(torch.empty(moe.n_experts, up_width(cfg, moe.d_expert), cfg.d_model))
        self.w_down_EDF = nn.Parameter(torch.empty(moe.n_experts, cfg.d_model, moe.d_expert))


def up_width(cfg: ModelConfig, width: int) -> int:
    """Rows of the up projection: swiglu has a gate beside it."""
    return 2 * width if cfg.activation == "swiglu" else width
