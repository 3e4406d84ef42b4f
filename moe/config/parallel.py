"""How the ranks of a run share its work: part of its result only where it is sent in fewer bits."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from moe.config.parse import Between, OneOf
from moe.errors import BadInput

RANKS = 2**20


@dataclass
class ParallelConfig:
    """Two meshes over the same ranks, which torchrun or a cluster starts (1 without them): what is not routed lies on
    (replicate, shard), the routed experts on (replicate, shard / ep, ep)."""

    # copies of the model, each kept by `shard` ranks; 0: as many as there are ranks for
    replicate: Annotated[int, Between(0, RANKS)] = 0
    # ranks that keep one copy of weights, gradients and optimiser state between them; 0: all that replicate leaves
    shard: Annotated[int, Between(0, RANKS)] = 0
    # ranks, of those, that the experts of a layer are shared out to, every token's rows being sent there and back; 1:
    # each has all of them, 0: as many as `shard`
    ep: Annotated[int, Between(0, RANKS)] = 1
    # weights are sent and computed with as: same (as they are kept) | bf16, half the bytes to gather
    weights: Annotated[str, OneOf("same", "bf16")] = "same"
    # gradients are summed over ranks as: same (as weights are computed with) | fp32 | bf16
    gradients: Annotated[str, OneOf("same", "fp32", "bf16")] = "same"
    timeout: Annotated[float, Between(1.0, 86400.0)] = 300.0  # seconds that ranks wait for another


class Layout(NamedTuple):
    """The sizes of the two meshes."""

    replicate: int = 1
    shard: int = 1
    ep: int = 1

    def ranks(self) -> int:
        """All of them."""
        return self.replicate * self.shard

    def expert_shard(self) -> int:
        """Ranks that keep the weights of one rank's experts between them."""
        return self.shard // self.ep


def layout(cfg: ParallelConfig, n_ranks: int) -> Layout:
    """The meshes that `cfg` means for so many ranks. Raises `BadInput` for sizes that do not multiply or divide."""
    replicate, shard, ep = cfg.replicate, cfg.shard, cfg.ep
    for key, size in (("replicate", replicate), ("shard", shard)):
        if size and n_ranks % size:
            raise BadInput(
                f"parallel.{key}={size} does not divide the {n_ranks} ranks: accepted are {_divisors(n_ranks)}, or 0 "
                "for what is left."
            )
    shard = shard or n_ranks // (replicate or 1)
    replicate = replicate or n_ranks // shard
    if replicate * shard != n_ranks:
        raise BadInput(
            f"parallel.replicate={replicate} times parallel.shard={shard} are {replicate * shard} ranks, and {n_ranks} "
            "were started: make one of them 0 to have it derived."
        )
    ep = ep or shard
    if shard % ep:
        raise BadInput(
            f"parallel.ep={ep} does not divide parallel.shard={shard}, out of which it is taken: accepted are "
            f"{_divisors(shard)}."
        )
    return Layout(replicate, shard, ep)


def check_experts(experts: int, ep: int, what: str = "model.moe.n_experts") -> None:
    """Refuse experts that cannot be shared out evenly. Raises `BadInput`."""
    if experts % ep:
        raise BadInput(
            f"parallel.ep={ep} does not divide {what}={experts}: every rank must have as many experts; accepted are "
            f"{_divisors(experts)}."
        )


def check_products(in_fp8: bool, ep: int) -> None:
    """Refuse experts whose products are in fp8 where ranks share them out. Raises `BadInput`."""
    if in_fp8 and ep > 1:
        raise BadInput(
            f"parallel.ep={ep} with model.moe.precision=fp8: a row's weight would get another gradient than in one "
            "process, because it is applied elsewhere than the expert; accepted are parallel.ep=1 and "
            "model.moe.precision=same."
        )


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
