"""What the ranks of one training run tell one another. In a process of its own, everything is the identity."""

import torch.distributed as dist
from torch import Tensor


def n_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's; a tensor of its own where there are several."""
    if n_ranks() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value
