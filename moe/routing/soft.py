"""Soft MoE: slots are mixtures of a sequence's tokens, so every token depends on later ones, in evaluation too.

Scores and weights are float32 (float64 for float64 input) whatever the autocast dtype.
Letters beyond the glossary: P slots of an expert in every sequence.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from moe.config.model import MoEConfig
from moe.config.router import RouterConfig, soft_slots
from moe.routing.contract import Context, Mixture, Router
from moe.routing.linear import wide


class SoftRouter(Router):
    """Experts read mixtures of tokens, tokens read mixtures of what they made of them (Soft MoE, Puigcerver et al.
    2308.00951).

    Per sequence, with P slots per expert: l_sep = gain · x_s/|x_s| · phi_ep/|phi_ep|; slot (e, p) reads
    sum_s softmax_s(l) x_s, and token s gets sum_ep softmax_ep(l) of the slots' outputs. `gain` is learned. Neither
    causal nor token by token, in evaluation either: every slot reads the whole sequence, so nothing can be generated
    with it token by token. No rows, no scores to balance: loads are even by construction.

    P is the size of a parameter and cannot follow the length of a sequence: `cfg.slots`, or when that is 0 the
    ceil(K·S/E), at least 1, whose experts at the model's context S cost what K experts per token cost; mixing is on top
    (`moe.model.cost.flops`). (T, D) -> dispatch and combine (B, S, E, P), B sequences of S = T / B tokens."""

    causal = causal_in_eval = per_token = fixed_k = False

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig, *, context: int = 0, **where: int) -> None:
        super().__init__(cfg, d_model, moe, context=context, **where)
        self.w_phi = nn.Parameter(torch.empty(self.n_experts, soft_slots(cfg, moe, context), d_model))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x_TD: Tensor, backend: str, context: Context) -> Mixture:
        n = context.n_sequences
        assert n > 0, "a soft router mixes the tokens of a sequence, and there is no sequence"
        assert len(x_TD) % n == 0, f"{len(x_TD)} tokens are not {n} sequences of one length"
        with torch.autocast(x_TD.device.type, enabled=False):
            x_BSD = F.normalize(rearrange(wide(x_TD), "(b s) d -> b s d", b=n), dim=-1)
            phi_EPD = self.gain.to(x_BSD.dtype) * F.normalize(self.w_phi.to(x_BSD.dtype), dim=-1)
            logits_BSEP = einsum(x_BSD, phi_EPD, "b s d, e p d -> b s e p")
            combine_BSEP = logits_BSEP.flatten(2).softmax(-1).view_as(logits_BSEP)
            return Mixture(logits_BSEP.softmax(1), combine_BSEP)
