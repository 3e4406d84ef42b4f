"""Backends over the same expert weights.

reference   obvious, float64-capable, slow: the definition of correct
torch       one matmul per expert in one autograd function: the fast path wherever there is no GPU
triton      fused kernels for a GPU; none are built yet, so naming it is refused
"""

import torch
from torch import Tensor

from kernels import grouped, reference
from moe.config import BadInput
from moe.experts import Experts
from moe.router import Routing


def choose(name: str, device: torch.device) -> str:
    """The backend that dispatch=`name` means on `device`. Raises `BadInput` for one that cannot work there."""
    if name == "triton":
        raise BadInput("dispatch=triton is not available: its kernels are not written yet; use dispatch=torch.")
    return "torch" if name == "auto" else name


def apply(experts: Experts, x_TD: Tensor, routing: Routing, backend: str) -> Tensor:
    """Send every routed row through its expert and combine each token's rows by weight: (T, D) -> (T, D)."""
    token_N, expert_N, weight_N = routing.rows()
    arguments = (x_TD, experts.w_up_EFD, experts.w_down_EDF, token_N, expert_N, weight_N, experts.activation)
    match backend:
        case "reference":
            return reference.experts(*arguments)
        case "torch":
            return grouped.experts(*arguments)
    raise ValueError(f"backend={backend!r} is not one of reference, torch")
