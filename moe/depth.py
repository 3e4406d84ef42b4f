"""Mixture-of-Depths: which tokens of a sequence enter a block at all; the others pass it by, attention included."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layer import LayerRouting
from moe.routing import UNUSED
from moe.routing_config import MoEConfig, entering


class Entry(NamedTuple):
    """Who enters a block. N tokens of T = B·S do, sequence after sequence and in order within each."""

    token_N: Tensor  # int64, ascending
    weight_N: Tensor  # what their way through the block weighs, in (0, 1)
    losses: dict[str, Tensor]  # scalars; "depth" in training

    def take(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (N, D), those that enter."""
        return x_BSD.flatten(0, 1).index_select(0, self.token_N)

    def put(self, x_BSD: Tensor, y_ND: Tensor) -> Tensor:
        """x with the block's outputs y mixed in where a token entered: x_t + w_t · (y_t − x_t)."""
        mixed_ND = torch.lerp(self.take(x_BSD), y_ND.to(x_BSD.dtype), self.weight_N[:, None].to(x_BSD.dtype))
        return x_BSD.flatten(0, 1).index_copy(0, self.token_N, mixed_ND).view(x_BSD.shape)

    def routing(self, given: dict[str, Any]) -> dict[str, Any]:
        """What `MoELayer.forward` is given, for the N tokens alone."""
        tokens_BS, recorded = given.get("tokens_BS"), given.get("recorded")
        return given | {
            "tokens_BS": None if tokens_BS is None else tokens_BS.flatten()[self.token_N][None],
            "recorded": None if recorded is None else recorded[self.token_N],
        }

    def report(self, routing: LayerRouting, n_tokens: int) -> LayerRouting:
        """What the MoE layer did with the N tokens, told of all T: the others are skipped and have no expert."""
        expert, weight, token_N = routing.expert, routing.weight, routing.token_N
        if token_N is None:
            expert = expert.new_full((n_tokens, expert.shape[1]), UNUSED).index_copy(0, self.token_N, expert)
            weight = weight.new_zeros(expert.shape).index_copy(0, self.token_N, weight)
        else:
            token_N = self.token_N[token_N]
        return routing._replace(
            losses=routing.losses | self.losses,
            skipped=routing.skipped + n_tokens - len(self.token_N),
            expert=expert,
            weight=weight,
            token_N=token_N,
        )


class DepthRouter(nn.Module):
    """Which tokens enter a block (Mixture-of-Depths, Raposo et al. 2404.02258): x (B, S, D) -> `Entry`.

    r_t = w · x_t / rms(x_t), and a token that enters comes out as x_t + sigmoid(r_t) · (block(x)_t − x_t), where the
    block sees those tokens alone. (The paper multiplies by r itself.)

    Training: of every sequence the C = max(1, ceil(depth · S)) tokens with the largest r enter, ties to the earlier.
    Not causal: a later token can take an earlier one's place. Evaluation: a token enters if v · x_t / rms(x_t) + c is
    at least 0, alone and causally, however many do. v and c learn the training choice by binary cross-entropy without
    gradient to x: `losses["depth"]`, the mean over tokens."""

    def __init__(self, d_model: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.score = nn.Linear(d_model, 1, bias=False)
        self.predict = nn.Linear(d_model, 1)

    def forward(self, x_BSD: Tensor) -> Entry:
        (b, s, d), capacity = x_BSD.shape, entering(self.moe, x_BSD.shape[1])
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        with torch.autocast(x_BSD.device.type, enabled=False):
            x_BSD = F.rms_norm(x_BSD.to(dtype), (d,))
            score_BS = F.linear(x_BSD, self.score.weight.to(dtype)).squeeze(-1)
            weight, bias = self.predict.weight.to(dtype), self.predict.bias.to(dtype)
            predict_BS = F.linear(x_BSD.detach(), weight, bias).squeeze(-1)
            if self.training:
                index_BC = score_BS.detach().sort(dim=-1, descending=True, stable=True).indices[:, :capacity]
                first_B1 = torch.arange(b, device=x_BSD.device)[:, None] * s
                token_N = (index_BC.sort(dim=-1).values + first_B1).flatten()
                enters_BS = torch.zeros_like(predict_BS).scatter(-1, index_BC, 1.0)
                losses = {"depth": F.binary_cross_entropy_with_logits(predict_BS, enters_BS)}
            else:
                token_N, losses = torch.nonzero(predict_BS.flatten() >= 0).squeeze(-1), {}
            return Entry(token_N, score_BS.flatten()[token_N].sigmoid(), losses)
