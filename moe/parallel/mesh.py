"""The two meshes of a run: the same ranks, once for what every token passes and once for the routed experts."""

import functools
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.config.parallel import Layout

DENSE = ("replicate", "shard")
EXPERTS = ("replicate", "expert_shard", "ep")


class Meshes(NamedTuple):
    """Rank r·shard + f·ep + e is at (r, f·ep + e) of the dense mesh and at (r, f, e) of the experts': ranks that share
    out experts are neighbours, so that their rows stay within a machine as far as it reaches."""

    layout: Layout
    dense: DeviceMesh  # (replicate, shard)
    experts: DeviceMesh  # (replicate, expert_shard, ep)

    def expert_group(self) -> dist.ProcessGroup:
        """The ranks that this one shares experts out with."""
        return self.experts.get_group("ep")

    def expert_rank(self) -> int:
        """The number of this rank among them."""
        return self.experts.get_local_rank("ep")


@functools.cache  # groups of ranks, and the threads of each, are never given back
def build_meshes(layout: Layout, device: str) -> Meshes:
    """The meshes of a layout over all ranks, on cpu or cuda."""
    dense = init_device_mesh(device, (layout.replicate, layout.shard), mesh_dim_names=DENSE)
    sizes = (layout.replicate, layout.expert_shard(), layout.ep)
    return Meshes(layout, dense, init_device_mesh(device, sizes, mesh_dim_names=EXPERTS))
