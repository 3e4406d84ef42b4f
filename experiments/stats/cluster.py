"""Machines that are not here, ranks laid out on them, and what a transfer between them takes.

A node is the GPUs that NVLink joins; between nodes every GPU has its own network card. A transfer takes
hops · latency + bytes / (bandwidth · efficiency), in seconds; collectives are rings, as NCCL counts their steps.

Two meshes lie over the same ranks: dense weights (replicate, shard), experts (replicate, shard / ep, ep), the last one
innermost. So the ranks of an expert group, and those of a shard group, are neighbours.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

from moe.config.parallel import Layout, ParallelConfig, check_experts, layout
from moe.config.parse import ANY, MANY, Between
from moe.errors import BadInput


@dataclass
class LinkConfig:
    """One kind of link, of one GPU and in one direction."""

    bandwidth: Annotated[float, Between(1, ANY)] = 450e9  # bytes per second
    efficiency: Annotated[float, Between(1e-09, 1)] = 0.7  # the share of it that large transfers reach
    hop: Annotated[float, Between(0, 1)] = 3.4e-6  # seconds of one step of a ring


@dataclass
class MachineConfig:
    """A cluster of equal nodes. The sources of its numbers stand in its file, conf/machine/NAME.yaml."""

    name: str = "h100"  # what tables call it
    gpus: Annotated[int, Between(1, MANY)] = 8  # of one node
    memory: Annotated[float, Between(1, ANY)] = 80e9  # bytes of one GPU
    hbm: Annotated[float, Between(1, ANY)] = 3.35e12  # bytes per second of its memory
    peak_bf16: Annotated[float, Between(1, ANY)] = 989e12  # FLOPs per second, without sparsity
    peak_fp8: Annotated[float, Between(0, ANY)] = 1979e12  # 0: it has none
    # the share of the peak that attention and dense matmuls reach, and experts' matmuls; in fp8 of the peak in fp8
    dense_bf16: Annotated[float, Between(1e-09, 1)] = 0.4
    experts_bf16: Annotated[float, Between(1e-09, 1)] = 0.4  # see dense_bf16
    dense_fp8: Annotated[float, Between(1e-09, 1)] = 0.36  # see dense_bf16
    experts_fp8: Annotated[float, Between(1e-09, 1)] = 0.16  # see dense_bf16
    launch: Annotated[float, Between(0, 1)] = 33e-6  # seconds that an all-to-all takes before its first byte arrives
    nvlink: LinkConfig = field(default_factory=LinkConfig)  # inside a node
    network: LinkConfig = field(default_factory=lambda: LinkConfig(50e9, 0.9, 9.6e-6))  # between nodes


class Group(NamedTuple):
    """Ranks of a collective: how many, and how many of them stand in a node."""

    ranks: int
    inside: int

    @property
    def nodes(self) -> int:
        """Over how many it stretches."""
        return math.ceil(self.ranks / self.inside)


def layout_of(parallel: ParallelConfig) -> Layout:
    """The ranks that settings ask for, without a process that was started; what is not given is 1. Raises `BadInput` as
    `moe.config.parallel.layout`."""
    return layout(parallel, max(1, parallel.replicate) * max(1, parallel.shard))


def check_layout(parallel: Layout, machine: MachineConfig, n_experts: int) -> None:
    """Raises `BadInput` for ranks that do not share out experts, or nodes, evenly. `n_experts`: of a layer; 0: a dense
    model."""
    ep, shard, gpus = parallel.ep, parallel.shard, machine.gpus
    if ep > 1 and not n_experts:
        raise BadInput(f"parallel.ep={ep} shares experts out, and a dense model has none: leave it 1.")
    check_experts(n_experts, ep)
    for name, ranks in (("parallel.ep", ep), ("parallel.shard", shard)):
        if max(ranks, gpus) % min(ranks, gpus):
            raise BadInput(f"{name}={ranks} must divide machine.gpus={gpus} of a node, or be a multiple of it.")


def group(machine: MachineConfig, ranks: int, stride: int = 1) -> Group:
    """So many ranks, every `stride`-th one."""
    return Group(ranks, max(1, min(ranks, machine.gpus // stride)))


def meshes(machine: MachineConfig, parallel: Layout) -> dict[str, Group]:
    """The groups of every rank by name: shard and expert_shard hold weights in parts, replicate copies."""
    return {
        "shard": group(machine, parallel.shard),
        "expert_shard": group(machine, parallel.shard // parallel.ep, parallel.ep),
        "replicate": group(machine, parallel.replicate, parallel.shard),
        "ep": group(machine, parallel.ep),
    }


def transfer(link: LinkConfig, n_bytes: float, hops: float = 0) -> float:
    """Seconds that so many bytes take over a link."""
    return hops * link.hop + n_bytes / (link.bandwidth * link.efficiency)


def gather(machine: MachineConfig, ranks: Group, n_bytes: float) -> float:
    """Seconds until every rank has all `n_bytes` that they hold in parts; a reduce-scatter takes as long.

    A rank receives all parts but its own. Of what comes from other nodes each of the node's cards takes its share, and
    NVLink hands it around meanwhile: the slower one counts. A ring takes ranks − 1 steps, nodes − 1 of them between
    nodes."""
    if ranks.ranks == 1:
        return 0.0
    outside = ranks.nodes - 1
    latency = (ranks.ranks - 1 - outside) * machine.nvlink.hop + outside * machine.network.hop
    received = n_bytes * (ranks.ranks - 1) / ranks.ranks
    within = transfer(machine.nvlink, received) if ranks.inside > 1 else 0.0
    between = transfer(machine.network, n_bytes * outside / ranks.nodes / ranks.inside) if outside else 0.0
    return latency + max(within, between)


def all_reduce(machine: MachineConfig, ranks: Group, n_bytes: float) -> float:
    """Seconds until every rank has the sum of all ranks' `n_bytes`: a reduce-scatter and an all-gather."""
    return 2 * gather(machine, ranks, n_bytes)
