"""Gradients and other tensors of which every rank holds a part (torch's DTensor), told from plain ones by what they
can: a process of its own need not import what only several use."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe.parallel.collectives import n_ranks


def sum_gradients(model: nn.Module, last: bool) -> None:
    """Whether the next backward pass sums gradients over ranks: that of the `last` micro-batch of a step alone. Until
    then they stay where they are."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]


def settle(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows: ranks keep their parts of weights alone again, which is what
    the model's parameters are to be whenever somebody asks for them."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, itself where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator,no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; all must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator,no-any-return]


def copies(tensor: Tensor) -> int:
    """How many ranks hold the same part of a tensor as this one."""
    if not hasattr(tensor, "placements"):
        return n_ranks()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return math.prod(mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_replicate())


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """This rank's share of the squared norm of all gradients together, float64, whatever meshes they lie on: the sum
    over the ranks is the whole. What several ranks hold alike counts on each for its part of it."""
    squares = [torch.linalg.vector_norm(local(g), dtype=torch.float64).square() / copies(g) for g in gradients]
    return torch.stack(squares).sum()
