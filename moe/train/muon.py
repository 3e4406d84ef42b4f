"""Muon (Jordan et al. 2024; at scale 2502.16982): a matrix moves by its momentum made orthogonal.

The momentum's singular values all become about 1, by five Newton-Schulz steps, so that rare directions move as far
as common ones. Experts stand in one stack and are made orthogonal each by itself, as matrices of their own would be;
so are swiglu's gate and up projections, which share a tensor only for the matmul's sake.

Letters beyond the glossary: A rows and B columns of a matrix, M matrices.
"""

import math
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, steepest at 0: what converges fastest from small values
STEPS = 5
RMS = 0.2  # of an AdamW step's entries: a matrix' step gets it too, so that both take one learning rate (2502.16982)


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups that have `n_above` matrices one above the other, AdamW for those with 0. Both
    kinds read `lr` and `weight_decay` (decoupled) of their group; Muon's also `momentum`, which is Nesterov's."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None, "the gradients are there already"
        groups = self.param_groups
        for group in groups:
            for p in group["params"]:
                if group["n_above"] and p.grad is not None:
                    self._move(p, p.grad, group)
        self.param_groups = [group for group in groups if not group["n_above"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[p], group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(state["momentum"], momentum)
        shape_MAB = (-1, p.shape[-2] // group["n_above"], p.shape[-1])
        update = orthogonal(ahead.reshape(shape_MAB)).view(p.shape)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] * RMS * math.sqrt(max(shape_MAB[1:])))


def orthogonal(x_MAB: Tensor) -> Tensor:
    """Matrices with the singular vectors of these and singular values near 1 (0.7 to 1.2), but for those that are next
    to nothing: (M, A, B) -> (M, A, B). In bf16 on a GPU, as its authors do, in the input's own dtype elsewhere."""
    a, b, c = COEFFICIENTS
    y_MAB = x_MAB.bfloat16() if x_MAB.is_cuda else x_MAB
    if x_MAB.shape[1] > x_MAB.shape[2]:  # the smaller square
        y_MAB = y_MAB.mT
    y_MAB = y_MAB / y_MAB.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)  # no singular value above 1
    for _ in range(STEPS):
        gram_MAA = y_MAB @ y_MAB.mT
        y_MAB = torch.baddbmm(y_MAB, torch.baddbmm(gram_MAA, gram_MAA, gram_MAA, beta=b, alpha=c), y_MAB, beta=a)
    return (y_MAB.mT if x_MAB.shape[1] > x_MAB.shape[2] else y_MAB).to(x_MAB.dtype)
