"""A model over many ranks: experts shared out, every block's weights sharded, gradients summed (FSDP2 on two meshes).

Nothing divides in here: a rank's loss is its share of the step's, gradients are sums, and so they are those of one
process whatever the layout. Weights keep their names and, as DTensors, their whole shapes.
"""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe.config.parallel import ParallelConfig, check_experts, check_products
from moe.errors import BadInput
from moe.model.experts import Experts
from moe.model.transformer import Transformer
from moe.parallel import exchange
from moe.parallel.mesh import Meshes

DTYPES = {"same": None, "bf16": torch.bfloat16, "fp32": torch.float32}


def parallelize(model: Transformer, meshes: Meshes, cfg: ParallelConfig, compiled: bool = False) -> Transformer:
    """Put an initialised model, the same on every rank, on the meshes, in place. `compiled`: every block by
    torch.compile. Raises `BadInput` for experts that cannot be shared out."""
    # What torch says of every tensor that ranks hold in turns, and of outputs that are views: nothing is amiss.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")

    # Experts first: each rank keeps its own and knows the way to the others.
    stacks = [module for module in model.modules() if isinstance(module, Experts)]
    if meshes.layout.ep > 1:
        for stack in stacks:
            share_out(stack, meshes)
    if compiled:
        for block in model.blocks:
            block.compile()

    # Then a group of weights for each block, and one for the rest. A router that layers share is read in all of them,
    # and so is a group by itself, kept whole between the first and the last.
    policy = MixedPrecisionPolicy(DTYPES[cfg.weights], DTYPES[cfg.gradients])
    settings: dict[str, Any] = dict(mesh=meshes.dense, mp_policy=policy)
    placement = None
    if meshes.layout.ep > 1:
        placement = placement_of_experts(meshes, {p for stack in stacks for p in stack.parameters()})
    if model.router.shared and model.cfg.moe:
        fully_shard(model.routers()[0], reshard_after_forward=False, **settings)
    for block in model.blocks:
        fully_shard(block, shard_placement_fn=placement, **settings)
    fully_shard(model, **settings)

    # Sums, no means.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def share_out(stack: Experts, meshes: Meshes) -> None:
    """Keep of a stack of experts those of this rank, and send rows to the rank of their expert."""
    n_experts, (ep, rank) = len(stack.w_up_EFD), (meshes.layout.ep, meshes.expert_rank())
    check_experts(n_experts, ep, "the number of experts of one width")
    check_products(bool(stack.form.fp8), ep)
    for name, w in list(stack.named_parameters(recurse=False)):
        local = w.detach().chunk(ep)[rank].clone()
        shared = DTensor.from_local(local, meshes.experts["ep"], [Shard(0)], run_check=False)
        setattr(stack, name, nn.Parameter(shared, requires_grad=w.requires_grad))
    stack.exchange = partial(torch.compiler.disable(exchange.experts), group=meshes.expert_group())


def placement_of_experts(meshes: Meshes, of_experts: set[nn.Parameter]) -> Callable[[nn.Parameter], Any]:
    """Where a block's weights lie, as fully_shard asks: experts' on their own mesh, by expert where every rank gets as
    many and else by rows; all else where it is told. What is returned raises `BadInput` where neither is even."""
    try:  # not every torch that is accepted has them
        from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo, ShardPlacementResult
    except ImportError:
        raise BadInput(
            f"parallel.ep={meshes.layout.ep} needs a newer torch than {torch.__version__}: 2.13 has what it takes, or "
            "take parallel.ep=1."
        ) from None

    shard, mesh = meshes.layout.expert_shard(), HSDPMeshInfo(meshes.experts["replicate", "expert_shard"], 1, 0)

    def place(p: nn.Parameter) -> Any:
        if p not in of_experts:
            return None
        n_local = len(p) // meshes.layout.ep
        if shard > 1 and n_local % shard == 0:
            return ShardPlacementResult(Shard(0), mesh)
        if p.shape[1] % shard == 0:
            return ShardPlacementResult(Shard(1), mesh)
        raise BadInput(
            f"parallel.shard={meshes.layout.shard} with parallel.ep={meshes.layout.ep} leaves {shard} ranks to keep "
            f"{n_local} experts with {p.shape[1]} rows: one of the two must be a multiple of {shard}."
        )

    return place
