"""The BASE router: the assignment of tokens to experts with even loads and the best total score, by auction.

A batch decides in training, so a token depends on later ones; in evaluation every token takes its best expert. Logits,
scores and weights are float32 (float64 for float64 input) whatever the autocast dtype.
Letters beyond the glossary: E1 the experts and one node more, the right to a token more than the others have.
"""

import itertools
import math

import torch
from torch import Tensor

from kernels import reference
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.routing.contract import Context, Routing
from moe.routing.linear import PlainRouter, bounded, decision

EPSILON = 1e-4  # what BASE may lose per token, in units of the logits


ROUNDS = 64  # of bidding with one epsilon, or 2 E if that is more; who has no place then waits for the next


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
        target_T = torch.where(expert_T < 0, best_T, expert_T)
        bid_T = score_TE.gather(1, target_T[:, None]).squeeze(1)  # less the second best profit, plus epsilon:
        bid_T = bid_T - profit_TE.scatter(1, target_T[:, None], -math.inf).amax(-1) + epsilon
        # Of a former, larger epsilon: no longer near its best, so it bids for its best in the next round.
        expert_T = torch.where(bid_T < price_E[target_T], -1, target_T)
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
    price_E1 = torch.cat([price_E, price_E.max()[None]])
    uses_right = [False] * n_experts
    count = reference.count(expert_T, n_experts).tolist()
    waiting = torch.nonzero(expert_T < 0).flatten().tolist()
    loss_E1E1 = score_TE.new_full((n_experts + 1, n_experts + 1), math.inf)  # least loss of score over a move's tokens
    mover_E1E1 = torch.full_like(loss_E1E1, -1, dtype=torch.int64)
    changed = set(range(n_experts))
    for token in waiting:
        # Edges of the experts whose tokens have changed.
        for e in changed:
            loss_E1E1[e, :right], mover_E1E1[e, :right] = cheapest_moves(score_TE, expert_T, e)
            loss_E1E1[e, right] = 0 if rights and not uses_right[e] else math.inf
            loss_E1E1[right, e] = 0 if uses_right[e] else math.inf
        # From the token to the nearest node that has room, at the prices so far.
        length_E1E1 = (loss_E1E1 - price_E1[:, None] + price_E1).clamp_min(0)
        profit_E = score_TE[token] - price_E1[:right]
        start_E1 = torch.cat([profit_E.max() - profit_E, profit_E.new_full((1,), math.inf)])
        distance_E1, before_E1 = shortest_paths(start_E1, length_E1E1)
        ends = [e for e in range(n_experts) if count[e] < places]
        ends += [right] if sum(uses_right) < rights else []
        distance, before = distance_E1.tolist(), before_E1.tolist()
        end = min(ends, key=distance.__getitem__)
        price_E1 = price_E1 + (distance[end] - distance_E1).clamp_min(0)
        path = [end]
        while before[path[-1]] >= 0:
            path.append(before[path[-1]])
        path.reverse()
        # Every node of the path hands a token, or the right, on to the next; the first takes the one that waited.
        for node, next_node in itertools.pairwise(path):  # a node's mover is still the one it had before this path
            if next_node == right:
                uses_right[node] = True
            elif node == right:
                uses_right[next_node] = False
            else:
                expert_T[mover_E1E1[node, next_node]] = next_node
        expert_T[token] = path[0]
        if end != right:
            count[end] += 1
        changed = set(path) - {right}
    return expert_T


def cheapest_moves(score_TE: Tensor, expert_T: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """For every other expert, the least that a token of `expert` loses by moving there, and that token: (E,), (E,).
    An expert without tokens loses infinitely much, by token -1."""
    tokens = torch.nonzero(expert_T == expert).flatten()
    if not len(tokens):
        loss_E = score_TE.new_full((score_TE.shape[1],), math.inf)
        return loss_E, torch.full_like(loss_E, -1, dtype=torch.int64)
    least = (score_TE[tokens, expert, None] - score_TE[tokens]).min(0)
    return least.values, tokens[least.indices]


def shortest_paths(start_E1: Tensor, length_E1E1: Tensor) -> tuple[Tensor, Tensor]:
    """Every node's distance, and the node before it on its path, -1 where it is entered at the start: (E + 1,) twice.

    Bellman and Ford: ends after E + 1 rounds at most, lengths being at least 0."""
    distance_E1, before_E1 = start_E1, torch.full_like(start_E1, -1, dtype=torch.int64)
    while True:
        through = (distance_E1[:, None] + length_E1E1).min(0)
        shorter_E1 = through.values < distance_E1
        if not shorter_E1.any():
            return distance_E1, before_E1
        before_E1 = torch.where(shorter_E1, through.indices, before_E1)
        distance_E1 = torch.where(shorter_E1, through.values, distance_E1)


class BaseRouter(PlainRouter):
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

    def forward(self, x_TD: Tensor, backend: str, context: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            plain_TE = logits_TE.detach()
            if self.training:
                ranks = context.step.ranks
                expert_T = ranks.share(balanced_assignment(ranks.gathered(plain_TE)))
            else:
                expert_T = plain_TE.sort(dim=-1, descending=True, stable=True).indices[:, 0]  # ties: the lower expert
            weight_T1 = logits_TE.gather(-1, expert_T[:, None]).sigmoid()
            return decision(logits_TE, expert_T[:, None], weight_T1, "sigmoid")
