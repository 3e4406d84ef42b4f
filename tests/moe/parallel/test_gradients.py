"""Claims about tensors of which every rank holds a part."""

import math

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moe.parallel.collectives import summed_over_ranks
from moe.parallel.gradients import copies, local, squared_norm, whole
from tests.ranks import run_ranks


def test_alone_every_tensor_is_whole_and_a_norm_is_a_norm():
    value = torch.tensor([3.0, 4.0])
    assert whole(value) is value
    assert local(value) is value
    assert copies(value) == 1
    assert squared_norm([value, torch.tensor([[12.0]])]).item() == 169.0


def _shared(full):
    dense = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    experts = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    one = distribute_tensor(full, dense, [Replicate(), Shard(0)])
    other = distribute_tensor(full, experts, [Shard(1)])
    gradients = [one, other, full]
    total = summed_over_ranks(squared_norm(gradients)).sqrt().item()
    return [copies(g) for g in gradients], [tuple(local(g).shape) for g in gradients], total, whole(other)


def test_the_norm_over_several_meshes_counts_every_number_once():
    full = torch.arange(1.0, 33.0, dtype=torch.float64).view(4, 8)
    for n_copies, shapes, norm, together in run_ranks(4, _shared, full):
        assert n_copies == [2, 1, 4]
        assert shapes == [(2, 8), (4, 2), (4, 8)]
        assert math.isclose(norm, math.sqrt(3) * full.norm().item(), rel_tol=1e-14)
        assert torch.equal(together, full)
