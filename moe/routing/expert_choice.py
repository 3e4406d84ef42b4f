"""Expert choice: every expert takes its C best tokens of the batch; in evaluation also token by token (cfg.causal).

A choice by the batch leaks the future: a token depends on later ones. Logits, scores and weights are float32 (float64
for float64 input) whatever the autocast dtype.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moe.config.balance import BalanceConfig
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.parallel.collectives import Ranks
from moe.routing.contract import UNUSED, Context, Routing
from moe.routing.linear import PlainRouter, decision, linear_logits


def best_tokens(score_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The C = min(T, ceil(k · T / E)) tokens with the highest score of every expert, best first, ties to the lower
    token: (T, E) -> token (C, E), score (C, E)."""
    n_tokens, n_experts = score_TE.shape
    capacity = min(n_tokens, -(-k * n_tokens // n_experts))
    best = score_TE.sort(dim=0, descending=True, stable=True)
    return best.indices[:capacity], best.values[:capacity]


class ExpertChoiceRouter(PlainRouter):
    """Experts choose tokens (Zhou et al. 2202.09368).

    p = softmax(x W^T); every expert takes its C = min(T, ceil(K · T / E)) tokens with the largest p_te, and the weight
    of the row is p_te · scale. A token gets 0 to E experts, K on average. Not causal: whether a token is among the best
    depends on later ones. (T, D) -> N = E · C rows (token_N, expert_N, weight_N), by token, then by expert.

    Evaluation by `cfg.causal`; the two that decide token by token give (T, E), `UNUSED` where not taken:
    - none: the same choice, over whatever batch there is. Neither causal nor token by token: a text generated token by
      token is routed otherwise than the same text at once.
    - threshold: e takes t when p_te >= c_e, c_e the running mean of e's C-th best score in training,
      c <- decay · c + (1 - decay) · mean over the step's batches. The first step sets c; until then it is 1 / E, an
      even share.
    - predictor: e takes t when x_t v_e + b_e >= 0. v and b learn the training choice by binary cross-entropy on x
      without gradient to it (Raposo et al. 2404.02258): `losses["predictor"]`, the mean over T · E."""

    causal = False
    fixed_k = False
    cutoff_E: Tensor
    seen: Tensor

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig, **where: int) -> None:
        super().__init__(cfg, d_model, moe, **where)
        assert cfg.causal in ("none", "threshold", "predictor"), f"router.causal={cfg.causal!r}"
        self.causal_in_eval = self.per_token = cfg.causal != "none"
        if cfg.causal == "threshold":
            self.register_buffer("cutoff_E", torch.full((self.n_experts,), 1 / self.n_experts))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # steps that c has learnt from
        if cfg.causal == "predictor":
            self.w_predict_ED = nn.Parameter(torch.empty(self.n_experts, d_model))
            self.predict_bias_E = nn.Parameter(torch.zeros(self.n_experts))

    def guess(self, x_TD: Tensor) -> Tensor:
        """The predictor's logits that an expert takes a token: (T, D) -> (T, E)."""
        guess_TE = linear_logits(x_TD, self.w_predict_ED)
        return guess_TE + self.predict_bias_E.to(guess_TE.dtype)

    def forward(self, x_TD: Tensor, backend: str, context: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            score_TE = logits_TE.softmax(-1)
            if self.training or self.cfg.causal == "none":
                ranks = context.step.ranks if self.training else Ranks()
                return self.by_expert(x_TD, logits_TE, score_TE, ranks)
            if self.cfg.causal == "threshold":
                taken_TE = score_TE >= self.cutoff_E.to(score_TE.dtype)
            else:
                taken_TE = self.guess(x_TD) >= 0
            expert_E = torch.arange(self.n_experts, device=x_TD.device)
            expert_TE = torch.where(taken_TE, expert_E, UNUSED)
            weight_TE = torch.where(taken_TE, score_TE * self.cfg.scale, 0.0)
            return decision(logits_TE, expert_TE, weight_TE, "softmax")

    def by_expert(self, x_TD: Tensor, logits_TE: Tensor, score_TE: Tensor, ranks: Ranks) -> Routing:
        """The choice of the experts over the batch, which these ranks share, and in training what its causal stand-in
        learns from."""
        token_CE, best_CE = best_tokens(ranks.gathered(score_TE.detach()), self.k)
        # One number per row, token first: sorted, the rows are by token, then by expert.
        row_N = token_CE * self.n_experts + torch.arange(self.n_experts, device=x_TD.device)
        row_N = rearrange(row_N, "c e -> (c e)").sort().values
        if ranks.n > 1:  # of the whole batch's rows, those of this rank's tokens
            first = ranks.rank * score_TE.numel()
            row_N = row_N[(row_N >= first) & (row_N < first + score_TE.numel())] - first
        weight_N = rearrange(score_TE, "t e -> (t e)")[row_N] * self.cfg.scale
        routing = decision(logits_TE, row_N % self.n_experts, weight_N, "softmax")
        routing = routing._replace(token_N=row_N // self.n_experts)
        if self.training and self.cfg.causal == "threshold":
            cutoff_E = best_CE[-1] if len(best_CE) else score_TE.new_zeros(self.n_experts)
            batches = torch.full((), min(len(best_CE), 1), dtype=torch.int64, device=x_TD.device)
            return routing._replace(observed={"cutoff_E": cutoff_E, "batches": batches})
        if self.training and self.cfg.causal == "predictor":
            guess_TE = self.guess(x_TD.detach())
            wanted_N = torch.ones_like(row_N, dtype=guess_TE.dtype)
            taken_TE = torch.zeros_like(guess_TE).flatten().scatter(0, row_N, wanted_N).view_as(guess_TE)
            loss = F.binary_cross_entropy_with_logits(guess_TE, taken_TE, reduction="sum") / max(guess_TE.numel(), 1)
            return routing._replace(losses={"predictor": loss})
        return routing

    @torch.no_grad()
    def update(self, balance: BalanceConfig, rate: float, count_E: Tensor, observed: dict[str, Tensor]) -> None:
        """The running mean of the cut-offs, from the step's sum over micro-batches and their number; unchanged by a
        step without tokens."""
        if self.cfg.causal != "threshold":
            return
        batches = observed["batches"]
        mean_E = observed["cutoff_E"] / batches.clamp_min(1)
        running_E = self.cfg.decay * self.cutoff_E + (1 - self.cfg.decay) * mean_E
        learnt_E = torch.where(self.seen == 0, mean_E, running_E)
        self.cutoff_E.copy_(torch.where(batches > 0, learnt_E, self.cutoff_E))
        self.seen += batches > 0
