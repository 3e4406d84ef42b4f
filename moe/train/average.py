"""The mean of a model's weights over the last steps of training (1803.05407), which the model becomes at its end."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe.config.train import OptimConfig


@dataclass
class Average:
    """The mean of the trained weights after each of `count` steps, in float32, by the parameters' names. Buffers, such
    as routers' selection biases, are none of it: the model keeps its last ones."""

    count: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """The weights after one more step."""
        self.count += 1
        for name, p in _trained(model):
            if name not in self.weights:
                self.weights[name] = torch.zeros_like(p, dtype=torch.float32)
            self.weights[name].lerp_(p.float(), 1 / self.count)

    @torch.no_grad()
    def give(self, model: nn.Module) -> None:
        """Make the mean the model's weights, and keep nothing."""
        for name, p in _trained(model):
            p.copy_(self.weights[name])
        self.count, self.weights = 0, {}


def is_averaged(cfg: OptimConfig, step: int, steps: int) -> bool:
    """Whether the weights after `step` (from 1) of `steps` are part of the mean; the last ones are, if there is one."""
    return cfg.average > 0 and step > steps - max(1, round(cfg.average * steps))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
