"""Routers that decide over a whole batch at once, so that every expert gets its share: Sinkhorn, BASE, expert choice
and Soft MoE.

    router         in training                                    in evaluation
    Sinkhorn       top K of balanced scores                       top K of the logits, token by token
    BASE           the best assignment with even loads            the best expert, token by token
    expert choice  every expert takes its C best tokens           the same, or token by token (cfg.causal)
    soft           slots are mixtures of a sequence's tokens      the same

What a batch decides leaks the future: a token's experts depend on later tokens. Each class says what of that is left in
evaluation. Logits, scores and weights are float32 (float64 for float64 input) whatever the autocast dtype.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from kernels import reference
from moe.config.balance import BalanceConfig
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.routing import UNUSED, Context, Mixture, Router, Routing, probabilities

FAR = 1e6  # a logit further than this below its token's best counts as this far: infinities become numbers
EPSILON = 1e-4  # what BASE may lose per token, in units of the logits
ROUNDS = 64  # of bidding with one epsilon, or 2 E if that is more; who has no place then waits for the next


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


# --- Sinkhorn ---------------------------------------------------------------------------------------------------------


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


class SinkhornRouter(Router):
    """Token-choice by balanced scores (Clark et al. 2202.01169; Megatron's `sinkhorn`).

    Training: the K experts of token t are the largest of a_t exp(x_t W^T) b, with a and b from `cfg.iterations`
    normalisations of the batch (`sinkhorn`; no gradient passes through them); ties go to the lower expert. Weights are
    softmax(x W^T) of the chosen, divided by their sum when `renormalize`, times `scale`. Not causal: b depends on every
    token. Evaluation: the K largest of x W^T, causal and token by token; loads are then even only as far as training
    made them so.

    (T, D) -> expert (T, K), weight (T, K). With K = 1 and `renormalize` the weight would be the constant `scale` and
    the router would get no gradient from the model: `moe.config.router` refuses it."""

    causal = False

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig, **where: int) -> None:
        super().__init__(cfg, d_model, moe, **where)
        self.w_ED = nn.Parameter(torch.empty(self.n_experts, d_model))

    def forward(self, x_TD: Tensor, backend: str, context: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = linear_logits(x_TD, self.w_ED)
            rank_TE = sinkhorn(logits_TE.detach(), self.cfg.iterations) if self.training else logits_TE.detach()
            expert_TK = rank_TE.sort(dim=-1, descending=True, stable=True).indices[:, : self.k]
            weight_TK = logits_TE.softmax(-1).gather(-1, expert_TK)
            if self.cfg.renormalize:
                tiny = torch.finfo(weight_TK.dtype).tiny
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(tiny)
            return decision(logits_TE, expert_TK, weight_TK * self.cfg.scale, "softmax")


# --- BASE -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("switchyard::balanced_assignment", mutates_args=())
def balanced_assignment(score_TE: Tensor, epsilon: float = EPSILON) -> Tensor:
    """One expert per token such that every expert gets floor(T/E) or ceil(T/E) tokens and the summed scores are within
    T · epsilon of the most that is possible: (T, E) -> (T,) int64.

    In prices p_E: an assignment in which every token sits at an expert within epsilon of its best s_te - p_e loses at
    most epsilon per token. An auction (Bertsekas 1979; with equal places, Bertsekas and Castañon 1989) raises the
    prices of experts that too many want, for a falling sequence of epsilons. Auctions end in price wars, a few tokens
    raising prices by epsilon at a time; so none is fought to its end, and the tokens that are left without a place are
    given one along shortest paths (`place`). That always ends, and keeps every other token within epsilon of its best.

    In float64, on `bounded` scores; ties are broken by position, so the same scores give the same result. An opaque
    operator, so that `torch.compile` need not trace its loops. Scores without order (NaN) count as the smallest."""
    n_tokens, n_experts = score_TE.shape
    expert_T = torch.full((n_tokens,), -1, dtype=torch.int64, device=score_TE.device)
    if n_tokens == 0 or n_experts == 1:
        return torch.zeros_like(expert_T)
    score_TE = bounded(score_TE.double())
    price_E = score_TE.new_zeros(n_experts)
    step = epsilon
    if n_tokens >= n_experts:  # else every expert has at most one place, and `place` does it all
        step = max(epsilon, -score_TE.min().item() / 2)
        while True:
            last = step <= epsilon
            expert_T, price_E = auction(score_TE, expert_T, price_E, step, 2 if last else n_tokens // 64)
            if last:
                break
            step = max(epsilon, step / 4)
    return place(score_TE, expert_T, price_E)


@balanced_assignment.register_fake
def _(score_TE: Tensor, epsilon: float = EPSILON) -> Tensor:
    return score_TE.new_empty(len(score_TE), dtype=torch.int64)


def auction(score_TE: Tensor, expert_T: Tensor, price_E: Tensor, epsilon: float, enough: int) -> tuple[Tensor, Tensor]:
    """Rounds of bids for floor(T/E) places at every expert: (expert_T, price_E) -> the same, later; -1 is no place.

    Every token bids for its expert, or for its best if it has none, the price at which another would be better by
    epsilon. An expert keeps its highest bids; when it is full its price is the lowest it keeps. Afterwards whoever has
    a place is within epsilon of its best. Ends when at most `enough` places are free."""
    n_tokens, n_experts = score_TE.shape
    places = n_tokens // n_experts
    for _ in range(max(ROUNDS, 2 * n_experts)):
        profit_TE = score_TE - price_E
        best_T = profit_TE.argmax(-1)
        own_T = torch.where(expert_T < 0, best_T, expert_T)
        bid_T = score_TE.gather(1, own_T[:, None]).squeeze(1)  # less the second best profit, plus epsilon:
        bid_T = bid_T - profit_TE.scatter(1, own_T[:, None], -math.inf).amax(-1) + epsilon
        # Of a former, larger epsilon: no longer near its best, so it bids for its best in the next round.
        expert_T = torch.where(bid_T < price_E[own_T], -1, own_T)
        key_T = torch.where(expert_T < 0, n_experts, expert_T)
        order_T = bid_T.argsort(descending=True, stable=True)
        order_T = order_T[key_T[order_T].argsort(stable=True)]  # by expert, highest bid first
        count_E = reference.count(expert_T, n_experts)
        first_E = count_E.cumsum(0) - count_E
        lowest_E = bid_T[order_T[(first_E + places - 1).clamp_max(n_tokens - 1)]]
        price_E = torch.where(count_E >= places, lowest_E, price_E)
        key_T = key_T[order_T]
        rank_T = torch.arange(n_tokens, device=price_E.device) - torch.cat([first_E, count_E.sum()[None]])[key_T]
        expert_T = expert_T.index_fill(0, order_T[(rank_T >= places) | (key_T == n_experts)], -1)
        if (expert_T >= 0).sum() >= places * n_experts - enough:
            break
    return expert_T, price_E


def place(score_TE: Tensor, expert_T: Tensor, price_E: Tensor) -> Tensor:
    """A place for every token that has none, moving others along shortest paths (the Hungarian method on a graph whose
    nodes are the experts): (T,) with -1 -> (T,) without.

    An edge from e to f is as long as what the token of e loses that loses least by moving to f, at prices p_E. Of
    T mod E experts that may take one token more than floor(T/E), the right to it is one more node, with a price of its
    own: an expert uses it only if its price is at least that, and does without only if it is at most that."""
    n_tokens, n_experts = score_TE.shape
    places, rights = divmod(n_tokens, n_experts)
    right = n_experts  # the number of that node
    price_N = torch.cat([price_E, price_E.max()[None]])
    used = [False] * n_experts  # who uses a right
    count = reference.count(expert_T, n_experts).tolist()
    waiting = torch.nonzero(expert_T < 0).flatten().tolist()
    loss_NN = score_TE.new_full((n_experts + 1, n_experts + 1), math.inf)  # least loss of score over a move's tokens
    mover_NN = torch.full_like(loss_NN, -1, dtype=torch.int64)
    changed = set(range(n_experts))
    for token in waiting:
        for e in changed:
            held_C = torch.nonzero(expert_T == e).flatten()
            if len(held_C):
                lost = (score_TE[held_C, e, None] - score_TE[held_C]).min(0)
                loss_NN[e, :right], mover_NN[e, :right] = lost.values, held_C[lost.indices]
            else:
                loss_NN[e, :right] = math.inf
            loss_NN[e, right] = 0 if rights and not used[e] else math.inf
            loss_NN[right, e] = 0 if used[e] else math.inf
        length_NN = (loss_NN - price_N[:, None] + price_N).clamp_min(0)
        profit_E = score_TE[token] - price_N[:right]
        far_N = torch.cat([profit_E.max() - profit_E, profit_E.new_full((1,), math.inf)])
        before_N = torch.full_like(far_N, -1, dtype=torch.int64)
        while True:  # Bellman and Ford: ends after n_experts + 1 rounds at most, lengths being at least 0
            through_N = (far_N[:, None] + length_NN).min(0)
            shorter_N = through_N.values < far_N
            if not shorter_N.any():
                break
            before_N = torch.where(shorter_N, through_N.indices, before_N)
            far_N = torch.where(shorter_N, through_N.values, far_N)
        ends = [e for e in range(n_experts) if count[e] < places]
        ends += [right] if sum(used) < rights else []
        far, before = far_N.tolist(), before_N.tolist()
        end = min(ends, key=far.__getitem__)
        price_N = price_N + (far[end] - far_N).clamp_min(0)
        path = [end]
        while before[path[-1]] >= 0:
            path.append(before[path[-1]])
        path.reverse()
        for here, there in itertools.pairwise(path):  # each from the node before it, not yet changed
            if there == right:
                used[here] = True
            elif here == right:
                used[there] = False
            else:
                expert_T[mover_NN[here, there]] = there
        expert_T[token] = path[0]
        if end != right:
            count[end] += 1
        changed = set(path) - {right}
    return expert_T


class BaseRouter(Router):
    """Token-choice by the best even assignment (BASE layers, Lewis et al. 2103.16716). K = 1.

    Training: the experts e_t that maximise sum_t x_t w_(e_t) while every expert gets floor(T/E) or ceil(T/E) tokens, up
    to `EPSILON` per token (`balanced_assignment`); the weight is sigmoid(x_t w_(e_t)). Not causal: a token's expert
    depends on every other token. Evaluation: the expert with the largest logit, causal and token by token; loads are
    then even only as far as training made them so.

    (T, D) -> expert (T, 1), weight (T, 1)."""

    causal = False

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig, **where: int) -> None:
        super().__init__(cfg, d_model, moe, **where)
        assert self.k == 1, f"K={self.k}: BASE gives every token one expert"
        self.w_ED = nn.Parameter(torch.empty(self.n_experts, d_model))

    def forward(self, x_TD: Tensor, backend: str, context: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = linear_logits(x_TD, self.w_ED)
            plain_TE = logits_TE.detach()
            if self.training:
                expert_T = balanced_assignment(plain_TE)
            else:
                expert_T = plain_TE.sort(dim=-1, descending=True, stable=True).indices[:, 0]  # ties: the lower expert
            weight_T1 = logits_TE.gather(-1, expert_T[:, None]).sigmoid()
            return decision(logits_TE, expert_T[:, None], weight_T1, "sigmoid")


# --- Expert choice ----------------------------------------------------------------------------------------------------


def best_tokens(score_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The C = min(T, ceil(k · T / E)) tokens with the highest score of every expert, best first, ties to the lower
    token: (T, E) -> token (C, E), score (C, E)."""
    n_tokens, n_experts = score_TE.shape
    capacity = min(n_tokens, -(-k * n_tokens // n_experts))
    best = score_TE.sort(dim=0, descending=True, stable=True)
    return best.indices[:capacity], best.values[:capacity]


class ExpertChoiceRouter(Router):
    """Experts choose tokens (Zhou et al. 2202.09368).

    S = softmax(x W^T); every expert takes its C = min(T, ceil(K · T / E)) tokens with the largest S_te, and the weight
    of the row is S_te · scale. A token gets 0 to E experts, K on average. Not causal: whether a token is among the best
    depends on later ones. (T, D) -> N = E · C rows (token_N, expert_N, weight_N), by token, then by expert.

    Evaluation by `cfg.causal`; the two that decide token by token give (T, E), `UNUSED` where not taken:
    - none: the same choice, over whatever batch there is. Neither causal nor token by token: a text generated token by
      token is routed otherwise than the same text at once.
    - threshold: e takes t when S_te >= c_e, c_e the running mean of e's C-th best score in training,
      c <- decay · c + (1 - decay) · mean over the step's batches. The first step sets c; until then it is 1 / E, an
      even share.
    - predictor: e takes t when x_t v_e + b_e >= 0. V and b learn the training choice by binary cross-entropy on x
      without gradient to it (Raposo et al. 2404.02258): `losses["predictor"]`, the mean over T · E."""

    causal = False
    fixed_k = False
    cutoff_E: Tensor
    seen: Tensor

    def __init__(self, cfg: RouterConfig, d_model: int, moe: MoEConfig, **where: int) -> None:
        super().__init__(cfg, d_model, moe, **where)
        assert cfg.causal in ("none", "threshold", "predictor"), f"router.causal={cfg.causal!r}"
        self.causal_in_eval = self.per_token = cfg.causal != "none"
        self.w_ED = nn.Parameter(torch.empty(self.n_experts, d_model))
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
            logits_TE = linear_logits(x_TD, self.w_ED)
            score_TE = logits_TE.softmax(-1)
            if self.training or self.cfg.causal == "none":
                return self.by_expert(x_TD, logits_TE, score_TE)
            if self.cfg.causal == "threshold":
                taken_TE = score_TE >= self.cutoff_E.to(score_TE.dtype)
            else:
                taken_TE = self.guess(x_TD) >= 0
            expert_E = torch.arange(self.n_experts, device=x_TD.device)
            expert_TE = torch.where(taken_TE, expert_E, UNUSED)
            weight_TE = torch.where(taken_TE, score_TE * self.cfg.scale, 0.0)
            return decision(logits_TE, expert_TE, weight_TE, "softmax")

    def by_expert(self, x_TD: Tensor, logits_TE: Tensor, score_TE: Tensor) -> Routing:
        """The choice of the experts over the batch, and in training what its causal stand-in learns from."""
        token_CE, best_CE = best_tokens(score_TE.detach(), self.k)
        # One number per row, token first: sorted, the rows are by token, then by expert.
        row_N = token_CE * self.n_experts + torch.arange(self.n_experts, device=x_TD.device)
        row_N = rearrange(row_N, "c e -> (c e)").sort().values
        weight_N = rearrange(score_TE, "t e -> (t e)")[row_N] * self.cfg.scale
        routing = decision(logits_TE, row_N % self.n_experts, weight_N, "softmax")
        routing = routing._replace(token_N=row_N // self.n_experts)
        if self.training and self.cfg.causal == "threshold":
            cutoff_E = best_CE[-1] if len(best_CE) else score_TE.new_zeros(self.n_experts)
            batches = torch.full((), min(len(best_CE), 1), dtype=torch.int64, device=x_TD.device)
            return routing._replace(observed={"cutoff_E": cutoff_E, "batches": batches})
        if self.training and self.cfg.causal == "predictor":
            guess_TE = self.guess(x_TD.detach())
            taken_TE = torch.zeros_like(guess_TE).scatter(0, token_CE, 1.0)
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


# --- Soft MoE ---------------------------------------------------------------------------------------------------------


def soft_slots(cfg: RouterConfig, moe: MoEConfig, context: int) -> int:
    """P, the slots per expert and sequence of a soft router."""
    return cfg.slots or max(1, -(-moe.k * context // moe.n_experts))


class SoftRouter(Router):
    """Experts read mixtures of tokens, tokens read mixtures of what they made of them (Soft MoE, Puigcerver et al.
    2308.00951).

    Per sequence, with P slots per expert: l_sep = gain · x_s/|x_s| · phi_ep/|phi_ep|; slot (e, p) reads
    sum_s softmax_s(l) x_s, and token s gets sum_ep softmax_ep(l) of the slots' outputs. `gain` is learned. Neither
    causal nor token by token, in evaluation either: every slot reads the whole sequence, so nothing can be generated
    with it token by token. No rows, no scores to balance: loads are even by construction.

    P is the size of a parameter and cannot follow the length of a sequence: `cfg.slots`, or when that is 0 the
    ceil(K·S/E), at least 1, whose experts at the model's context S cost what K experts per token cost; mixing is on top
    (`moe.presets.flops`). (T, D) -> dispatch and
    combine (B, S, E, P), B sequences of S = T / B tokens."""

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
