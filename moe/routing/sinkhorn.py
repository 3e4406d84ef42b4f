"""The Sinkhorn router: the top K of scores that are balanced over the batch.

A batch decides in training, so a token depends on later ones; in evaluation every token takes the top K of its own
logits. Logits, scores and weights are float32 (float64 for float64 input) whatever the autocast dtype.
"""

import math

import torch
from torch import Tensor

from moe.routing.contract import Context, Routing
from moe.routing.linear import PlainRouter, bounded, decision


def sinkhorn(logits_TE: Tensor, iterations: int) -> Tensor:
    """log of a_t exp(logit_te) b_e with a and b such that rows sum to 1 and columns to T / E: (T, E) -> (T, E).

    Rows and columns in turn, rows first (Sinkhorn 1964), so that columns are exact and rows as good as `iterations`
    make them. In logarithms, so that nothing overflows; finite for any logits."""
    log_TE = bounded(logits_TE)
    if log_TE.numel() == 0:
        return log_TE
    share = math.log(log_TE.shape[0] / log_TE.shape[1])
    for _ in range(iterations):
        log_TE = log_TE - log_TE.logsumexp(1, keepdim=True)
        log_TE = log_TE - log_TE.logsumexp(0, keepdim=True) + share
    return log_TE


class SinkhornRouter(PlainRouter):
    """Token-choice by balanced scores (Clark et al. 2202.01169; Megatron's `sinkhorn`).

    Training: the K experts of token t are the largest of a_t exp(x_t W^T) b, with a and b from `cfg.iterations`
    normalisations of the batch (`sinkhorn`; no gradient passes through them); ties go to the lower expert. Weights are
    softmax(x W^T) of the chosen, divided by their sum when `renormalize`, times `scale`. Not causal: b depends on every
    token. Evaluation: the K largest of x W^T, causal and token by token; loads are then even only as far as training
    made them so.

    (T, D) -> expert (T, K), weight (T, K). With K = 1 and `renormalize` the weight would be the constant `scale` and
    the router would get no gradient from the model: `moe.config.router` refuses it."""

    causal = False

    def forward(self, x_TD: Tensor, backend: str, context: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            rank_TE = logits_TE.detach()
            if self.training:
                ranks = context.step.ranks
                rank_TE = ranks.share(sinkhorn(ranks.gathered(rank_TE), self.cfg.iterations))
            expert_TK = rank_TE.sort(dim=-1, descending=True, stable=True).indices[:, : self.k]
            weight_TK = logits_TE.softmax(-1).gather(-1, expert_TK)
            if self.cfg.renormalize:
                tiny = torch.finfo(weight_TK.dtype).tiny
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(tiny)
            return decision(logits_TE, expert_TK, weight_TK * self.cfg.scale, "softmax")
