"""Muon: the momentum of a matrix, orthogonalised, is its update (Jordan et al., 2024; at scale: 2502.16982).

torch.optim.Muon takes 2-D weights alone. Here a weight is a stack of matrices, of one or of many, so that there is one
path: an expert's matrix in (E, F, D) is orthogonalised by itself, and so are the gate and the up projection, two maps
that swiglu keeps in one weight. As one matrix they would share one set of singular directions, and the size of each
one's update would depend on the other's gradient.

Letters beyond the glossary: M matrices of a stack · R rows · C columns of each (here no capacity).
"""

import math
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steep at 0, and values end in about [0.7, 1.2]
EPS = 1e-7  # the least norm that is divided by: a matrix without any gradient stays where it is


def orthogonalize(x_MRC: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Near U V^T of each matrix U S V^T: (M, R, C) -> (M, R, C), by so many Newton-Schulz steps. `dtype`: of the
    arithmetic; None: bfloat16 on a GPU, and elsewhere the matrices' own, as processors may only emulate bfloat16."""
    a, b, c = COEFFICIENTS
    tall = x_MRC.shape[-2] > x_MRC.shape[-1]
    x = x_MRC.to(dtype or (torch.bfloat16 if x_MRC.is_cuda else x_MRC.dtype))
    if tall:
        x = x.mT  # the smaller Gram matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(x_MRC.dtype)


def rate_ratio(adjust: str, rows: int, columns: int) -> float:
    """What a matrix' learning rate is multiplied by: `original` has updates of one spectral norm for square and wide
    matrices, `match_rms_adamw` of the root mean square that AdamW's usually have (2502.16982, section 2.2)."""
    match adjust:
        case "original":
            return math.sqrt(max(1.0, rows / columns))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
    raise ValueError(f"adjust={adjust!r}")


class Muon(torch.optim.Optimizer):
    """Weights (R, C) or (E, R, C), in groups; a group's `parts` says how many matrices lie below one another in its
    rows. Nesterov momentum, and weight decay apart from the gradient, as torch.optim.Muon has them."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust: str = "match_rms_adamw",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.momentum, self.ns_steps, self.adjust, self.dtype = momentum, ns_steps, adjust, dtype
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "parts": 1})
        self.matrices = list(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        assert closure is None, "no step evaluates the model again"
        for group in self.matrices:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        # The momentum, and the look ahead of Nesterov's.
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffer = self.state[p]["momentum_buffer"]
        buffer.lerp_(gradient, 1 - self.momentum)
        update = gradient.lerp(buffer, self.momentum)

        # Each matrix of the stack by itself.
        rows, columns = p.shape[-2] // group["parts"], p.shape[-1]
        update_MRC = orthogonalize(update.reshape(-1, rows, columns), self.ns_steps, self.dtype)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update_MRC.reshape(p.shape), alpha=-group["lr"] * rate_ratio(self.adjust, rows, columns))


class MuonAdamW(Muon):
    """Muon for matrices and AdamW for the rest, as one optimiser: its groups are those of both, and its state of all
    parameters."""

    def __init__(self, groups: list[dict[str, Any]], adamw: torch.optim.AdamW, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.adamw = adamw
        self.param_groups += adamw.param_groups
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        super().step(closure)
        self.adamw.step()
