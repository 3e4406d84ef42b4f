"""Tokens to experts on other ranks and back (expert parallelism): counts, rows, local experts, rows back.

Ranks of a group hold E / R experts each, in order. A rank sends every routed row to the rank of its expert, with the
rows of one expert beside one another; what comes in is computed there by whatever computes local experts, and goes the
way back. The sum over a token's rows is made at home, in token order, without atomics. Every rank takes part in every
transfer, with no rows too.

Letters beyond the glossary: R ranks of the group · M rows that this rank is sent · L local experts (here no layers).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Rows (M, D) and the local expert of each, (M,) int64, to their outputs (M, D).
LocalExperts = Callable[[Tensor, Tensor], Tensor]


def experts(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    n_experts: int,
    local: LocalExperts,
    group: dist.ProcessGroup,
) -> Tensor:
    """Every routed row through its expert, on whatever rank of `group` that is, and each token's rows summed by weight:
    (T, D) -> (T, D). `token_N` ascending; a negative expert is none. `n_experts`: of all ranks of the group."""
    n_ranks, width = dist.get_world_size(group), n_experts // dist.get_world_size(group)

    # Rows that have an expert, by expert, and how many each rank has for each of its experts.
    order_N = torch.where(expert_N < 0, n_experts, expert_N).argsort(stable=True)
    count_E = torch.bincount(expert_N[expert_N >= 0], minlength=n_experts)
    order_N = order_N[: int(count_E.sum())]
    count_RL = count_E.new_empty(n_ranks, width)
    dist.all_to_all_single(count_RL, count_E.view(n_ranks, width), group=group)
    sent, received = count_E.view(n_ranks, width).sum(1).tolist(), count_RL.sum(1).tolist()

    # Rows out, through the experts here, and back.
    row_ND = Rows.apply(x_TD, token_N[order_N])
    row_MD = Sent.apply(row_ND, received, sent, group)
    expert_M = torch.arange(width, device=x_TD.device).repeat(n_ranks).repeat_interleave(count_RL.flatten())
    y_ND = Sent.apply(local(row_MD, expert_M), sent, received, group)

    # Home again: in row order, and each token's rows in one sum.
    home_ND = y_ND.new_zeros(len(expert_N), y_ND.shape[1]).index_copy(0, order_N, y_ND)
    return Sum.apply(home_ND, weight_N, token_N, len(x_TD))  # type: ignore[no-any-return]


class Sent(torch.autograd.Function):
    """Rows to other ranks, `outgoing` of them to each in order, `incoming` from each; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, row_ND: Tensor, incoming: list[int], outgoing: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.incoming, ctx.outgoing, ctx.group = incoming, outgoing, group
        return _sent(row_ND, incoming, outgoing, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _sent(gradients[0], ctx.outgoing, ctx.incoming, ctx.group), None, None, None


def _sent(row_ND: Tensor, incoming: list[int], outgoing: list[int], group: dist.ProcessGroup) -> Tensor:
    row_MD = row_ND.new_empty(sum(incoming), row_ND.shape[1])
    dist.all_to_all_single(row_MD, row_ND.contiguous(), incoming, outgoing, group=group)
    return row_MD


class Rows(torch.autograd.Function):
    """Every row's token: (T, D) -> (N, D). A token's gradient is the sum over its rows, without atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        ctx.n_tokens = len(x_TD)
        return x_TD[token_N]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (token_N,) = ctx.saved_tensors
        order_N = token_N.argsort(stable=True)
        return _by_token(gradients[0], order_N, token_N[order_N], None, ctx.n_tokens), None


class Sum(torch.autograd.Function):
    """Each token's sum of its rows by weight: (N, D), (N,) -> (T, D); `token_N` ascending."""

    @staticmethod
    def forward(ctx: Any, row_ND: Tensor, weight_N: Tensor, token_N: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(row_ND, weight_N, token_N)
        return _by_token(row_ND, torch.arange(len(row_ND), device=row_ND.device), token_N, weight_N, n_tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        row_ND, weight_N, token_N = ctx.saved_tensors
        gradient_ND = gradients[0][token_N]
        dtype = torch.promote_types(gradient_ND.dtype, torch.float32)
        weight_gradient_N = (gradient_ND.to(dtype) * row_ND.to(dtype)).sum(-1).to(weight_N.dtype)
        return (gradient_ND * weight_N[:, None]).to(row_ND.dtype), weight_gradient_N, None, None


def _by_token(row_ND: Tensor, order_N: Tensor, token_N: Tensor, weight_N: Tensor | None, n_tokens: int) -> Tensor:
    """Each token's sum of its rows `order_N`, whose tokens are ascending, weighted or not: in float32 at least."""
    wide = torch.promote_types(row_ND.dtype, torch.float32)
    start_T = torch.searchsorted(token_N, torch.arange(n_tokens, device=token_N.device))
    weight = None if weight_N is None else weight_N.to(wide)
    if not len(row_ND):
        return row_ND.new_zeros(n_tokens, row_ND.shape[1])
    sum_TD = F.embedding_bag(order_N, row_ND.to(wide), start_T, mode="sum", per_sample_weights=weight)
    return sum_TD.to(row_ND.dtype)
