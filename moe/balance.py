"""What keeps experts evenly loaded: losses on the router's scores, and a bias on its choice."""

import torch
from torch import Tensor


def load_balancing_loss(prob_E: Tensor, count_E: Tensor, n_tokens: int) -> Tensor:
    """E · sum_i f_i P_i; 1 when uniform (Switch, 2101.03961, eq. 4, generalised to K choices).

    prob_E: probabilities (1 per token) summed over the tokens; P_i is their mean. count_E: routed rows per expert;
    f_i = c_i / sum c, no gradient. A batch with no routed row gives 0."""
    share_E = count_E.to(prob_E.dtype) / count_E.sum().clamp_min(1)
    return count_E.numel() * (share_E * prob_E / max(1, n_tokens)).sum()


def z_loss(lse_T: Tensor) -> Tensor:
    """mean_t (logsumexp_e z_te)²: keeps router logits small (ST-MoE, 2202.08906, eq. 5)."""
    return lse_T.square().sum() / max(1, len(lse_T))


@torch.no_grad()
def update_bias(bias_E: Tensor, count_E: Tensor, rate: float) -> None:
    """Loss-free balancing, in place: b_i += rate · sign(mean c − c_i) (2408.15664, algorithm 1).

    count_E: the routed rows of the whole optimiser step, summed over micro-batches."""
    count = count_E.to(torch.float64)
    bias_E += rate * torch.sign(count.mean() - count).to(bias_E.dtype)
