"""What the ranks of one training run tell one another. In a process of its own, everything is the identity.

Ranks hold parts of every batch, as many tokens each, part after part in the order of the ranks: what one process would
have read as one batch. Letters beyond the glossary: R ranks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor


def n_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if n_ranks() > 1 else 0


def summed_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's; a tensor of its own where there are several."""
    if n_ranks() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def all_summed_over_ranks(values: list[Tensor]) -> list[Tensor]:
    """The same of many tensors by one transfer, in float64: exact for whole numbers up to 2^53."""
    if n_ranks() == 1 or not values:
        return values
    flat = torch.cat([value.detach().reshape(-1).double() for value in values])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in values])
    return [part.view(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True)]


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None, "ranks that have not met tell one another nothing"
    return dist.group.WORLD


# Its name has changed between the versions of torch that are accepted.
_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor


class Ranks(NamedTuple):
    """Who shares a batch with this process: `n` ranks, of which it is number `rank`. The default: nobody."""

    rank: int = 0
    n: int = 1

    def summed(self, value: Tensor) -> Tensor:
        """The sum of every rank's. No gradient passes."""
        if self.n == 1:
            return value
        return functional.wait_tensor(functional.all_reduce(value.detach(), "sum", _world()))  # type: ignore[no-any-return]

    def gathered(self, value_T: Tensor) -> Tensor:
        """Every rank's rows in the order of the whole batch: (T, ...) -> (R·T, ...). No gradient passes."""
        if self.n == 1:
            return value_T
        return functional.wait_tensor(_gather(value_T.detach().contiguous(), 0, _world()))  # type: ignore[no-any-return]

    def share(self, value_T: Tensor) -> Tensor:
        """This rank's rows of the whole batch's: (R·T, ...) -> (T, ...)."""
        return value_T if self.n == 1 else value_T.chunk(self.n)[self.rank]

    def drawn(self, draw: Callable[[Tensor], Tensor], like_T: Tensor) -> Tensor:
        """Random numbers, (T, ...) like `like_T`: this rank's share of what `draw` gives for the whole batch. Every
        rank's generator is in the same state, so a token's numbers are what one process would have drawn for it."""
        if self.n == 1:
            return draw(like_T)
        return self.share(draw(like_T.new_empty(self.n * like_T.shape[0], *like_T.shape[1:])))


def this_rank() -> Ranks:
    """This process among those that train together."""
    return Ranks(rank(), n_ranks())
