"""Routers: who goes where and with what weight, and nothing else.

Every router is `router(x_TD, backend) -> Routing`. Logits, scores and weights are float32 (float64 for float64 input)
whatever the autocast dtype: in bf16 two experts' scores tie too often.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels import reference
from moe.config import MoEConfig, RouterConfig


class Routing(NamedTuple):
    """A router's decision, in routed rows, in token order.

    With a fixed number of choices, expert and weight are (T, K) and `token_N` is None: row t·K + j is token t's. Ragged
    families give rows (N,) and the token of each. Expert -1 means no expert: the row is dropped, and counted."""

    expert: Tensor  # (T, K) or (N,) int64
    weight: Tensor  # same shape, float
    token_N: Tensor | None  # (N,) int64, ascending
    logits_TE: Tensor
    lse_T: Tensor  # log-sum-exp of a token's logits
    prob_E: Tensor  # probabilities (scores that sum to 1 for every token), summed over the tokens

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token_N, expert_N, weight_N), whatever the family."""
        return rows(self.token_N, self.expert, self.weight)


def rows(token_N: Tensor | None, expert: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Routed rows (token_N, expert_N, weight_N) from either form of a routing."""
    if token_N is not None:
        return token_N, expert, weight
    n_tokens, k = expert.shape
    token_N = torch.arange(n_tokens, device=expert.device).repeat_interleave(k)
    return token_N, rearrange(expert, "t k -> (t k)"), rearrange(weight, "t k -> (t k)")


class TopKRouter(nn.Module):
    """Token-choice: every token takes its K best-scored experts. Causal.

    p = softmax(x W^T) (Shazeer 2017, 1701.06538) or sigmoid(x W^T) (DeepSeek-V3, 2412.19437); the K largest of p + b
    are chosen, b the selection bias (2408.15664; absent unless configured); weights are p of the chosen, divided by
    their sum when `renormalize`, times `scale`. With groups > 1 a token first chooses its k_groups best groups of
    experts (DeepSeek-V2, 2405.04434; V3)."""

    bias_E: Tensor | None

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig) -> None:
        super().__init__()
        self.cfg, self.k = cfg, moe.k
        self.w_ED = nn.Parameter(torch.empty(moe.n_experts, d_model))
        self.register_buffer("bias_E", torch.zeros(moe.n_experts) if cfg.selection_bias else None)

    def forward(self, x_TD: Tensor, backend: str) -> Routing:
        cfg, gate = self.cfg, reference.gate
        if backend == "triton":
            from kernels import gate as fused  # here, because Triton is not everywhere

            gate = fused.gate
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = F.linear(x_TD.to(dtype), self.w_ED.to(dtype))
            expert_TK, weight_TK, lse_T, prob_E = gate(
                logits_TE, self.k, cfg.name, self.bias_E, cfg.renormalize, cfg.scale,
                cfg.groups, cfg.k_groups, cfg.group_top,
            )  # fmt: skip
        return Routing(expert_TK, weight_TK, None, logits_TE, lse_T, prob_E)


def build_router(cfg: RouterConfig, d_model: int, moe: MoEConfig) -> nn.Module:
    """The router `cfg.name` names."""
    match cfg.name:
        case "softmax" | "sigmoid":
            return TopKRouter(cfg, d_model, moe)
    raise ValueError(f"router.name={cfg.name!r}")
