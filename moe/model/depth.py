"""Mixture-of-Depths: which tokens of a sequence enter a block at all; the others pass it by, attention included.

Letters beyond the glossary: I tokens that enter a block, of all sequences · J that enter of each one, in training.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config.model import MoEConfig, entering
from moe.model.layer import LayerInput, LayerRouting
from moe.routing.contract import UNUSED

DECAY = 0.99  # of the running mean of the cut-offs


class Entry(NamedTuple):
    """Who enters a block: I of the T = B·S tokens, sequence after sequence and in order within each."""

    token_I: Tensor  # int64, ascending
    weight_I: Tensor  # what their way through the block weighs, in (0, 1)
    losses: dict[str, Tensor]  # scalars
    observed: dict[str, Tensor]  # for `DepthRouter.update`, to be summed over micro-batches

    def take(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (I, D), those that enter."""
        return x_BSD.flatten(0, 1).index_select(0, self.token_I)

    def put(self, x_BSD: Tensor, y_ID: Tensor) -> Tensor:
        """x with the block's outputs y mixed in where a token entered: x_t + w_t · (y_t − x_t)."""
        mixed_ID = torch.lerp(self.take(x_BSD), y_ID.to(x_BSD.dtype), self.weight_I[:, None].to(x_BSD.dtype))
        return x_BSD.flatten(0, 1).index_copy(0, self.token_I, mixed_ID).view(x_BSD.shape)

    def narrow(self, layer_input: LayerInput) -> LayerInput:
        """What the MoE layer is given, for the tokens that enter alone."""
        tokens_T, recorded_TK = layer_input.tokens_T, layer_input.recorded_TK
        return layer_input._replace(
            tokens_T=None if tokens_T is None else tokens_T[self.token_I],
            recorded_TK=None if recorded_TK is None else recorded_TK[self.token_I],
        )

    def report(self, routing: LayerRouting, n_tokens: int) -> LayerRouting:
        """What the MoE layer did with the I tokens, told of all T: the others are skipped and have no expert."""
        expert, weight, token_N = routing.expert, routing.weight, routing.token_N
        if token_N is None:
            expert = expert.new_full((n_tokens, expert.shape[1]), UNUSED).index_copy(0, self.token_I, expert)
            weight = weight.new_zeros(expert.shape).index_copy(0, self.token_I, weight)
        else:
            token_N = self.token_I[token_N]
        return routing._replace(
            losses=routing.losses | self.losses,
            observed=routing.observed | self.observed,
            skipped=routing.skipped + n_tokens - len(self.token_I),
            expert=expert,
            weight=weight,
            token_N=token_N,
        )


class DepthRouter(nn.Module):
    """Which tokens enter a block (Mixture-of-Depths, Raposo et al. 2404.02258): x (B, S, D) -> `Entry`.

    r_t = w · x_t / rms(x_t), and a token that enters comes out as x_t + sigmoid(r_t) · (block(x)_t − x_t), where the
    block sees those tokens alone. (The paper multiplies by r itself.)

    Training: of every sequence the J = max(1, ceil(depth · S)) tokens with the largest r enter, ties to the earlier.
    Not causal: a later token can take an earlier one's place. Evaluation: every token decides alone and causally, and
    as many enter as do. By `moe.depth_causal`:
    - threshold: t enters when r_t >= c, c the running mean of the J-th largest r of training's sequences,
      c <- 0.99 c + 0.01 · mean over the step's sequences; the first step sets it, and until then it is 0.
    - predictor: t enters when v · x_t / rms(x_t) + b >= 0. v and b learn the training choice by binary cross-entropy
      without gradient to x, as in the paper: `losses["depth"]`, the mean over tokens."""

    cutoff: Tensor
    seen: Tensor

    def __init__(self, d_model: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.score = nn.Linear(d_model, 1, bias=False)
        self.predict = nn.Linear(d_model, 1) if moe.depth_causal == "predictor" else None
        if self.predict is None:
            self.register_buffer("cutoff", torch.zeros(()))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # steps that c has learnt from

    def forward(self, x_BSD: Tensor) -> Entry:
        (b, s, d), n_entering = x_BSD.shape, entering(self.moe, x_BSD.shape[1])
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        with torch.autocast(x_BSD.device.type, enabled=False):
            # Scores, and by how much a token that decides alone would enter.
            x_BSD = F.rms_norm(x_BSD.to(dtype), (d,))
            score_BS = F.linear(x_BSD, self.score.weight.to(dtype)).squeeze(-1)
            if self.predict is None:
                margin_BS = score_BS - self.cutoff.to(dtype)
            else:
                weight, bias = self.predict.weight.to(dtype), self.predict.bias.to(dtype)
                margin_BS = F.linear(x_BSD.detach(), weight, bias).squeeze(-1)
            # Evaluation: every token by its own margin.
            if not self.training:
                token_I = torch.nonzero(margin_BS.flatten() >= 0).squeeze(-1)
                return Entry(token_I, score_BS.flatten()[token_I].sigmoid(), {}, {})
            # Training: the best of every sequence, and what the causal choice learns from them.
            best = score_BS.detach().sort(dim=-1, descending=True, stable=True)
            index_BJ = best.indices[:, :n_entering].sort(dim=-1).values
            token_I = (index_BJ + torch.arange(b, device=x_BSD.device)[:, None] * s).flatten()
            losses, observed = {}, {}
            if self.predict is None:
                observed["depth_cutoff"] = best.values[:, n_entering - 1].sum()
                observed["depth_sequences"] = torch.full((), b, dtype=torch.int64, device=x_BSD.device)
            else:
                enters_BS = torch.zeros_like(margin_BS).scatter(-1, index_BJ, 1.0)
                losses["depth"] = F.binary_cross_entropy_with_logits(margin_BS, enters_BS)
            return Entry(token_I, score_BS.flatten()[token_I].sigmoid(), losses, observed)

    @torch.no_grad()
    def update(self, observed: dict[str, Tensor]) -> None:
        """Once after every optimiser step: the running mean of the cut-offs, from the sum over its sequences."""
        if self.predict is None:
            mean = observed["depth_cutoff"] / observed["depth_sequences"]
            self.cutoff.copy_(torch.where(self.seen == 0, mean, torch.lerp(mean, self.cutoff.to(mean), DECAY)))
            self.seen += 1
