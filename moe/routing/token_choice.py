"""Token-choice routers: a token decides alone, from its own state or its own id. All are causal, in training too."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import reference
from moe.config.balance import BalanceConfig
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig, facts
from moe.parallel.collectives import Ranks
from moe.routing import balance
from moe.routing.contract import UNUSED, Context, Router, Routing, probabilities
from moe.routing.linear import LinearRouter, wide


class TopKRouter(LinearRouter):
    """softmax, sigmoid, sqrt_softplus: every token takes its K best-scored experts.

    p = softmax(z) (Shazeer 2017, 1701.06538), sigmoid(z) (DeepSeek-V3, 2412.19437) or sqrt(ln(1 + e^z)) (DeepSeek-V4);
    the K largest of p + b are chosen, b the selection bias (2408.15664; absent unless configured); weights are p of the
    chosen, divided by their sum, or by `norm_min` where that is larger, when `renormalize`, times `scale`. With
    groups > 1 a token first chooses its k_groups best groups of experts (DeepSeek-V2, 2405.04434; V3's node limit is
    this with a group per node).

    noisy: in training z gets N(0, 1) · softplus(x W_noise^T) added (Shazeer 2017). second=random: in training the
    second expert is taken with probability min(1, 2 w_2 / (w_1 + w_2)) (GShard, 2006.16668). At inference a token
    needs nothing but itself. What reaches the router's weights is set by `gradient`:

    exact             the derivative of the weights
    straight-through  every weight is scale / K, and has the derivative of the weight it has with exact
    sparsemixer       experts are sampled in training, see `sparsemixer` (2310.00811; GRIN, 2409.12136)
    default-vector    the experts that were not taken add p_e · v_e, v_e a vector that is fitted to expert e's output,
                      by least squares, so that every score has a gradient (2504.12463, with a running mean for v)"""

    bias_E: Tensor | None

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig, **where: int) -> None:
        super().__init__(cfg, d_model, moe, **where)
        self.w_noise_ED: nn.Parameter | None = None
        if cfg.noisy:
            self.w_noise_ED = nn.Parameter(torch.empty(self.n_experts, d_model), requires_grad=not cfg.frozen)
        self.register_buffer("bias_E", torch.zeros(self.n_experts) if cfg.selection_bias else None)
        self.fixed_k, self.score = True, facts(cfg).score
        self.smooth = cfg.gradient == "exact"

    def forward(self, x_TD: Tensor, backend: str, context: Context = Context()) -> Routing:  # noqa: B008 — immutable
        cfg = self.cfg
        with torch.autocast(x_TD.device.type, enabled=False):
            # Scores, in training with noise.
            ranks = context.step.ranks
            read_TE = self.logits(x_TD, ranks)
            clean_TE = logits_TE = wide(read_TE)
            smooth_E = None
            if self.training and self.w_noise_ED is not None:
                noise_TE = F.softplus(F.linear(x_TD.to(clean_TE.dtype), self.w_noise_ED.to(clean_TE.dtype)))
                logits_TE = read_TE = clean_TE + ranks.drawn(torch.randn_like, clean_TE) * noise_TE
                smooth_E = balance.smooth_load(clean_TE, logits_TE, noise_TE, self.k)
            # The K best, and which gradient their weights have.
            expert_TK, weight_TK, lse_T, prob_E = self.gate(
                backend, read_TE, self.k, self.score, self.bias_E, cfg.renormalize and not cfg.norm_min, cfg.scale,
                cfg.groups, cfg.k_groups, cfg.group_top,
            )  # fmt: skip
            if cfg.norm_min:
                weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) / cfg.scale).clamp_min(cfg.norm_min)
            rest_TE = None
            if cfg.gradient == "sparsemixer":
                expert_TK, weight_TK = sparsemixer(logits_TE, self.k, self.training, ranks)
                weight_TK = weight_TK * cfg.scale
            elif cfg.gradient == "straight-through":
                weight_TK = weight_TK + (cfg.scale / self.k - weight_TK).detach()
            elif cfg.gradient == "default-vector":
                rest_TE = reference.scores(logits_TE, self.score).scatter(-1, expert_TK, 0) * cfg.scale
            # The second expert by chance.
            if self.training and cfg.second == "random":
                share_T = weight_TK[:, 1].detach() / weight_TK.detach().sum(-1).clamp_min(torch.finfo(lse_T.dtype).tiny)
                taken_T = ranks.drawn(torch.rand_like, share_T) < 2 * share_T
                second_T = torch.where(taken_T, expert_TK[:, 1], UNUSED)
                expert_TK = torch.stack((expert_TK[:, 0], second_T), -1)
        return Routing(expert_TK, weight_TK, None, logits_TE, lse_T, prob_E, self.score, rest_TE, smooth_E=smooth_E)

    @torch.no_grad()
    def update(self, cfg: BalanceConfig, rate: float, count_E: Tensor, observed: dict[str, Tensor]) -> None:
        """Move the selection bias towards the experts with little load."""
        if self.bias_E is not None and rate:
            balance.update_bias(self.bias_E, count_E, rate, step=cfg.bias_step)


MIXER_EPS = 0.1  # an expert further than 2 · this · max(|its logit|, the best) below the best is never sampled


def sparsemixer(
    logits_TE: Tensor,
    k: int,
    training: bool,
    ranks: Ranks = Ranks(),  # noqa: B008 — immutable
) -> tuple[Tensor, Tensor]:
    """K experts by sampling, with a gradient estimator for the choice: (T, E) -> expert (T, K), weight (T, K).

    One after the other, without replacement: of the logits within a relative margin of the largest, an expert is
    sampled by softmax in training (the largest is taken in evaluation), and its weight is its probability pi. Where the
    sample is not the largest, one time in four aside, the weight's value is a third of pi while its derivative remains
    that of pi: Heun's third-order estimate of the gradient through the sample (SparseMixer, 2310.00811; v2 in GRIN,
    2409.12136)."""
    taken_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    experts, weights = [], []
    for _ in range(k):
        left_TE = logits_TE.masked_fill(taken_TE, -torch.inf)
        best_T1 = left_TE.amax(-1, keepdim=True).detach()
        size_TE = torch.maximum(logits_TE.detach().abs(), best_T1)
        far_TE = (best_T1 - logits_TE.detach()) > 2 * MIXER_EPS * size_TE.abs()
        near_TE = left_TE.masked_fill(far_TE, -torch.inf)
        prob_TE = near_TE.softmax(-1)
        expert_T1 = best = near_TE.argmax(-1, keepdim=True)
        if training:
            u_TE = ranks.drawn(torch.rand_like, logits_TE).clamp_min(
                torch.finfo(logits_TE.dtype).tiny
            )  # the noise stays finite
            gumbel_TE = -(-u_TE.log()).log()
            expert_T1 = (near_TE.detach() + gumbel_TE).argmax(-1, keepdim=True)
        weight_T1 = prob_TE.gather(-1, expert_T1)
        if training:
            full = (expert_T1 == best) | (ranks.drawn(torch.rand_like, weight_T1) > 0.75)
            weight_T1 = weight_T1 - torch.where(full, 0.0, weight_T1 * (2 / 3)).detach()
        experts.append(expert_T1)
        weights.append(weight_T1)
        taken_TE = taken_TE.scatter(-1, expert_T1, True)
    return torch.cat(experts, -1), torch.cat(weights, -1)


class ThresholdRouter(LinearRouter):
    """threshold: a token takes as many experts as its scores ask for, at least one.

    p = softmax(z), sorted; every expert with p >= threshold / E (DynMoE, 2405.14297, learns one). At most k_max of
    them; weights are p of the taken, divided by their sum when `renormalize`, times `scale`. K itself is not read. At
    inference a token needs nothing but itself."""

    fixed_k = False

    def asked(self, p_TK: Tensor) -> Tensor:
        """Which of its experts, best first, a token's probabilities ask for."""
        return p_TK >= self.cfg.threshold / self.n_experts

    def forward(self, x_TD: Tensor, backend: str, context: Context = Context()) -> Routing:  # noqa: B008
        cfg, e = self.cfg, self.n_experts
        most = min(cfg.k_max or e, e)
        with torch.autocast(x_TD.device.type, enabled=False):
            read_TE = self.logits(x_TD, context.step.ranks)
            logits_TE = wide(read_TE)
            expert_TK, p_TK, lse_T, prob_E = self.gate(backend, read_TE, most, "softmax", None, False, 1.0)
            taken_TK = self.asked(p_TK.detach()) | (torch.arange(most, device=x_TD.device) == 0)
            weight_TK = torch.where(taken_TK, p_TK, 0.0)
            if cfg.renormalize:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        expert_TK = torch.where(taken_TK, expert_TK, UNUSED)
        return Routing(expert_TK, weight_TK * cfg.scale, None, logits_TE, lse_T, prob_E)


class TopPRouter(ThresholdRouter):
    """top-p: a token takes its best experts until their p sum to at least top_p (2403.07652, which adds balance.entropy
    to keep them few). The rest is as in `ThresholdRouter`."""

    def asked(self, p_TK: Tensor) -> Tensor:
        """Which of its experts, best first, a token's probabilities ask for."""
        return p_TK.cumsum(-1) - p_TK < self.cfg.top_p


L1_RANGE = (1e-20, 1e20)  # far from where float32 would no longer move by a factor


class ReluRouter(LinearRouter):
    """relu: w_e = relu(z_e) · scale, and a token takes the experts with w_e > 0: none, some or all (ReMoE, 2412.14711).

    An L1 loss keeps them few: l1 · sum_e f_e · mean_t relu(z_te), f_e = E/(K·T) times the rows of expert e, so that the
    busy ones are pressed more (balance.scope=global: rows and T of the whole step). After every step l1 is multiplied
    by l1_factor where tokens took more than K experts on average, divided by it where fewer, between 1e-20 and 1e20.
    Every router has its own l1 and comes to K by itself; the paper's is one for all layers, which may then differ. The
    weight is continuous in z where an expert comes and goes. At inference a token needs nothing but itself."""

    fixed_k = False
    l1: Tensor

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig, **where: int) -> None:
        super().__init__(cfg, d_model, moe, **where)
        self.register_buffer("l1", torch.tensor([cfg.l1]))

    def forward(self, x_TD: Tensor, backend: str, context: Context = Context()) -> Routing:  # noqa: B008
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = wide(self.logits(x_TD, context.step.ranks))
            score_TE = F.relu(logits_TE)
            n_tokens = max(1, len(x_TD))
            active_TE = logits_TE.detach() > 0
            count_E = context.step.total("count", active_TE.sum(0))
            share_E = count_E.to(score_TE.dtype) * self.n_experts / (self.k * context.step.tokens(n_tokens))
            l1 = self.l1.to(score_TE.dtype)[0] * (share_E * score_TE.sum(0) / n_tokens).sum()
            prob_TE = probabilities(logits_TE, "relu")
        expert_TE = torch.where(active_TE, torch.arange(self.n_experts, device=x_TD.device), UNUSED)
        tokens = torch.full((), len(x_TD), dtype=torch.int64, device=x_TD.device)
        return Routing(
            expert_TE, score_TE * self.cfg.scale, None, logits_TE, logits_TE.logsumexp(-1), prob_TE.sum(0), "relu",
            losses={"l1": l1}, observed={"tokens": tokens},
        )  # fmt: skip

    @torch.no_grad()
    def update(self, cfg: BalanceConfig, rate: float, count_E: Tensor, observed: dict[str, Tensor]) -> None:
        """Adapt the L1 coefficient."""
        excess = count_E.sum().double() / observed["tokens"].clamp_min(1) - self.k
        self.l1 *= self.cfg.l1_factor ** torch.sign(excess).to(self.l1.dtype)
        self.l1.clamp_(*L1_RANGE)


class HashRouter(Router):
    """hash: K experts drawn for every token id, once and for all, weight scale / K each (Hash Layers, 2106.04426).

    The table (V, K) depends on the vocabulary, the layer and E alone; nothing is learned. It is part of a checkpoint.
    At inference a token needs its id."""

    table_VK: Tensor

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig, *, vocab_size: int = 0, **where: int) -> None:
        super().__init__(cfg, d_model, moe, vocab_size=vocab_size, **where)
        rng = np.random.default_rng([self.layer, vocab_size, self.n_experts])
        table_VK = np.stack([rng.permutation(self.n_experts)[: self.k] for _ in range(vocab_size)])
        self.register_buffer("table_VK", torch.from_numpy(table_VK))

    def forward(self, x_TD: Tensor, backend: str, context: Context = Context()) -> Routing:  # noqa: B008
        assert context.tokens_T is not None, "router.name=hash reads token ids, and the context has none"
        expert_TK = self.table_VK[context.tokens_T]
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return Routing(
            expert_TK, torch.full(expert_TK.shape, self.cfg.scale / self.k, dtype=dtype, device=x_TD.device), None
        )
