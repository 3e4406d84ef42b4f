"""Logits that are linear in the state, or in its direction: what most routers start from."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import reference
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.parallel.collectives import Ranks
from moe.routing.contract import Router, Routing, probabilities


class PlainRouter(Router):
    """Logits x W^T in float32 at least. No router by itself."""

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig, **where: int) -> None:
        super().__init__(cfg, d_model, moe, **where)
        self.w_ED = nn.Parameter(torch.empty(self.n_experts, d_model))

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, E). Call it outside of autocast."""
        return linear_logits(x_TD, self.w_ED)


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of logits; fp32: float32, or the state's float64
COSINE_TEMPERATURE = 0.3  # of cosine logits before anything is learned (X-MoE, 2204.09179)


class LinearRouter(Router):
    """Logits that are linear in the state, and the gate of a backend. No router by itself.

    linear: z = x W^T. cosine: z = gain · cos(x, w_e) / 0.3, the gain learned (X-MoE, 2204.09179, which projects x to a
    lower dimension first). With `bias` a learned number is added to every expert's logit. In training x is first
    multiplied by u ~ U[1 − jitter, 1 + jitter], element by element (Switch, 2101.03961). Logits are float32 at
    least, whatever the autocast dtype: in bf16 two experts' scores tie too often. With `precision` bf16 or fp16 state
    and weights are rounded to it, and so are the logits, in half the memory; fp16 ends at 65,504."""

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig, **where: int) -> None:
        super().__init__(cfg, d_model, moe, **where)
        self.w_ED = nn.Parameter(torch.empty(self.n_experts, d_model), requires_grad=not cfg.frozen)
        self.logit_bias = nn.Parameter(torch.empty(self.n_experts), requires_grad=not cfg.frozen) if cfg.bias else None
        self.gain = nn.Parameter(torch.ones(1), requires_grad=not cfg.frozen) if cfg.logits == "cosine" else None

    def logits(self, x_TD: Tensor, ranks: Ranks = Ranks()) -> Tensor:  # noqa: B008 — immutable
        """(T, D) -> (T, E), in `precision`: whoever but a gate reads them asks for `wide`. Call it outside of autocast.
        `ranks`: who shares the batch, and so its noise."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        kept = PRECISIONS.get(self.cfg.precision, dtype)
        x_TD, w_ED = self.jittered(x_TD.to(dtype), ranks), self.w_ED.to(dtype)
        bias_E = None if self.logit_bias is None else self.logit_bias.to(kept)
        if self.gain is None:
            return F.linear(x_TD.to(kept), w_ED.to(kept), bias_E)
        cosine_TE = F.linear(F.normalize(x_TD, dim=-1).to(kept), F.normalize(w_ED, dim=-1).to(kept))
        cosine_TE = cosine_TE * self.gain.to(kept) / COSINE_TEMPERATURE
        return cosine_TE if bias_E is None else cosine_TE + bias_E

    def jittered(self, x_TD: Tensor, ranks: Ranks = Ranks()) -> Tensor:  # noqa: B008
        """x times its noise in training, x itself otherwise."""
        jitter = self.cfg.jitter
        if not (self.training and jitter):
            return x_TD
        return x_TD * ranks.drawn(lambda like_TD: torch.empty_like(like_TD).uniform_(1 - jitter, 1 + jitter), x_TD)

    @staticmethod
    def gate(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`reference.gate`, by the kernel of `backend`."""
        if backend == "triton":
            from kernels import gate as fused  # here, because Triton is not everywhere

            return fused.gate(*arguments)
        return reference.gate(*arguments)


FAR = 1e6  # a logit further than this below its token's best counts as this far: infinities become numbers


def wide(x: Tensor) -> Tensor:
    """float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """x W^T in float32 at least: (T, D), (E, D) -> (T, E)."""
    x_TD = wide(x_TD)
    return F.linear(x_TD, w_ED.to(x_TD.dtype))


def bounded(logits_TE: Tensor) -> Tensor:
    """Every token's logits less its largest, within [-FAR, 0]: (T, E) -> (T, E), finite whatever is given.

    +inf is the largest there is (several are equal), -inf and NaN the smallest. Neither Sinkhorn's normalisation nor
    the best assignment changes when a constant is added to all logits of a token."""
    top = torch.finfo(logits_TE.dtype).max
    finite_TE = logits_TE.nan_to_num(nan=-top, posinf=top, neginf=-top)
    return (finite_TE - finite_TE.amax(-1, keepdim=True)).clamp_min(-FAR)


def decision(logits_TE: Tensor, expert_TK: Tensor, weight_TK: Tensor, score: str) -> Routing:
    """K rows per token, and of the plain logits what the balancing losses read."""
    prob_E = probabilities(logits_TE, score).sum(0)
    return Routing(expert_TK, weight_TK, None, logits_TE, logits_TE.logsumexp(-1), prob_E, score)
