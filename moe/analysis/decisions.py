"""How decided a router is, token by token: from probabilities (T, E) whose rows sum to 1, or from the K it took.

Every number is a mean over the tokens of the window that is given. Sums are in float64. Letters as in the glossary.
"""

import torch
from torch import Tensor


def token_entropy(prob_TE: Tensor) -> float:
    """mean_t −sum_i p_ti ln p_ti, in nats: 0 when every token is sure, ln E when none prefers an expert."""
    return _entropy(prob_TE.double()).mean().item() if len(prob_TE) else 0.0


def top_k_mass(prob_TE: Tensor, k: int) -> float:
    """mean_t of the K largest probabilities' sum: 1 when nothing is left for the others, K / E when none is
    preferred."""
    return prob_TE.double().topk(k).values.sum(-1).mean().item() if len(prob_TE) else 0.0


def margin(prob_TE: Tensor, k: int) -> float:
    """mean_t p_(K) − p_(K+1): what the last expert that is taken is ahead of the first that is not. 0 for K = E, where
    none is left out. Small margins are choices that another dtype or batch may turn (2510.11370)."""
    if k >= prob_TE.shape[1] or not len(prob_TE):
        return 0.0
    top_TK = prob_TE.double().topk(k + 1).values
    return (top_TK[:, k - 1] - top_TK[:, k]).mean().item()


def router_information(prob_TE: Tensor) -> float:
    """H(mean_t p_t) − mean_t H(p_t), in nats: how much a token's probabilities differ from all tokens' mean. 0 when
    every token has the same, ln E when tokens are sure and spread evenly: high is balanced *and* decided."""
    if not len(prob_TE):
        return 0.0
    prob_TE = prob_TE.double()
    return (_entropy(prob_TE.mean(0, keepdim=True))[0] - _entropy(prob_TE).mean()).item()


def flipped(expert_TK: Tensor, other_TK: Tensor) -> Tensor:
    """Which tokens' set of experts is another in a second choice, (T,) bool. The order within a token does not count; a
    negative expert is none."""
    return (expert_TK.sort(-1).values != other_TK.sort(-1).values).any(-1)


def route_flips(expert_TK: Tensor, other_TK: Tensor) -> float:
    """Share of the tokens that are `flipped` in a second pass (of another dtype, backend or batch; 2510.11370)."""
    return flipped(expert_TK, other_TK).double().mean().item() if len(expert_TK) else 0.0


def kept(expert_TK: Tensor, other_TK: Tensor) -> Tensor:
    """|S_t ∩ S'_t| / |S_t| of two choices of the same tokens, (T,) float64; NaN for a token without an expert."""
    shared_TK = ((expert_TK[:, :, None] == other_TK[:, None, :]) & (expert_TK >= 0)[:, :, None]).any(-1)
    return shared_TK.sum(-1).double() / (expert_TK >= 0).sum(-1)


def agreement(expert_TK: Tensor, other_TK: Tensor) -> float:
    """The mean over tokens of what is `kept`; tokens without an expert are left out. Two random choices of K of E have
    K / E. Of a checkpoint and the last one it is the router's *saturation* (OLMoE, 2409.02060); of two checkpoints in a
    row 1 − agreement is *churn*; of a layer's choice and the one that its router makes of the layer's before states,
    *lookahead*."""
    return kept(expert_TK, other_TK).nanmean().item()


def _entropy(prob_TE: Tensor) -> Tensor:
    return torch.special.entr(prob_TE).sum(-1)
