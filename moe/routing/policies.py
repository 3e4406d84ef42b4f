"""Policies between router and plan, in training: limits on an expert's rows, and experts imposed from outside.

Each takes a `Routing` and returns one, with static shapes and without a look at a value on the host: sorting, running
sums and scatters, so that they compile into the layer. A row that loses its expert becomes `DROPPED`. What the router
computed from its scores (logits, lse, prob_E, rest_TE, losses) stays as it was: the balancing losses keep seeing what
the router wanted.

Letters beyond the glossary: A rows that rounding to tiles can add to an expert · T1 one column · E1, K1 one more column
than there are experts or choices, for rows that have none.
"""

import math

import torch
from torch import Tensor

from kernels import reference
from moe.parallel.collectives import Ranks
from moe.routing.contract import DROPPED, UNUSED, Routing


def capacity(factor: float, n_rows: int, n_experts: int) -> int:
    """C = ceil(factor · n_rows / E), at least 1 (GShard, 2006.16668; Switch, 2101.03961). n_rows = T·K for a fixed K.

    An infinite factor gives n_rows: no limit. A factor is taken for the decimal it was written as: 1.1 · 100 / 10 is
    11, although the float product lies above 11."""
    assert factor > 0, f"factor={factor} is not above 0"
    if math.isinf(factor):
        return max(1, n_rows)
    return max(1, math.ceil(factor * n_rows / n_experts * (1 - 1e-12)))


def limit(
    routing: Routing,
    n_experts: int,
    factor: float,
    priority: str,
    overflow: str,
    fair: int | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 — immutable
) -> Routing:
    """An expert keeps at most C = capacity(factor, fair, E) rows; the other rows are refused.

    `fair`: the rows that are to be shared out, K·T of a layer; None: as many as the routing has slots, whether they
    have an expert or not. Rows without an expert stay as they are and take no room. A dropped row keeps its weight,
    which nothing reads. `ranks`: who shares the batch; an expert's room is then what the whole batch gives it, and who
    stays is decided over the whole of it; the routing has a fixed number of rows per token.

    priority: who stays. "position": rows in the order of the routing, token after token and within a token choice after
    choice, so that what happens to a token depends on no later token. (GShard serves all first choices before any
    second one: there a later token's first choice takes the place of an earlier token's second.) "score": the largest
    weights, ties to the earlier row; a later token can push an earlier one out (after V-MoE, 2106.05974).

    overflow: what becomes of a refused row. "residual": it is dropped. "next": its token's next best expert takes it.
    With "position" this is one pass over the tokens in order: a token keeps those of its experts that have room, and
    its refused rows, first to last, go to the best experts by logits that it did not choose and that have room. With
    "score" the largest weights are settled first, and the same pass hands out the room that is left. A row for which
    no expert is left is dropped. The next best are sought among all experts, whatever groups or bias the choice obeyed.
    A moved row's weight is w · p_new / p_old, differentiable. The pass is exact and costs up to E rounds over (T, E).

    "next" needs a (T, K) routing with logits and the experts of a token distinct; ValueError otherwise."""
    mine, routing = routing, whole_batch(routing, ranks)
    _, expert_N, weight_N = routing.rows()
    room = capacity(factor, len(expert_N) if fair is None else fair * ranks.n, n_experts)
    match priority:
        case "position":
            place_N = _place(expert_N, n_experts)
        case "score":
            place_N = _place(expert_N, n_experts, weight_N)
        case _:
            raise ValueError(f"priority={priority!r} is not one of position, score")
    kept_N = (place_N < room) & (expert_N >= 0)
    match overflow:
        case "residual":
            expert_N = torch.where(kept_N | (expert_N < 0), expert_N, DROPPED)
            return mine._replace(expert=ranks.share(expert_N.view_as(routing.expert)))
        case "next":
            if routing.token_N is not None or routing.logits_TE is None:
                raise ValueError("overflow='next' needs a router with a fixed K and with scores; 'residual' takes any")
            kept_TK = kept_N.view_as(routing.expert)
            settled_TK = kept_TK if priority == "score" else torch.zeros_like(kept_TK)
            return _reweighed(mine, *map(ranks.share, _move(routing, settled_TK, room)))
    raise ValueError(f"overflow={overflow!r} is not one of residual, next")


def whole_batch(routing: Routing, ranks: Ranks) -> Routing:
    """What decides of the rows of all `ranks`, in the order of the whole batch and without gradients: experts, weights
    and logits. Raises ValueError for a ragged routing, of which ranks do not have equal parts."""
    if ranks.n == 1:
        return routing
    if routing.token_N is not None:
        raise ValueError("ragged rows cannot be limited over several ranks")
    logits_TE = None if routing.logits_TE is None else ranks.gathered(routing.logits_TE)
    return Routing(ranks.gathered(routing.expert), ranks.gathered(routing.weight), None, logits_TE, score=routing.score)


def round_to_tile(routing: Routing, n_experts: int, tile: int) -> Routing:
    """Token rounding (SonicMoE, 2512.14080): every expert's rows become a multiple of `tile`, so that no tile of the
    grouped matmul is part empty. With scores only, and not causal: a token's fate depends on the whole batch.

    A count goes to the nearest multiple, half a tile up; where fewer tokens are left than rounding up needs, down.
    Down: the rows of the lowest weight are dropped, of equal ones the later. Up: of the tokens that did not choose the
    expert, those of the highest probability for it are added, of equal ones the earlier. An added row weighs
    p · (sum of the token's weights) / (sum of their p), the scale of the token's own rows; p itself if it has none.

    (T, K) or (N,) rows -> (N + A·E,) rows with their tokens, A = min(tile // 2, T) being the most an expert can gain;
    the slots that it does not gain are UNUSED and weigh 0. Without logits: ValueError."""
    if routing.logits_TE is None:
        raise ValueError("rounding to tiles adds the best-scored tokens: it needs a router with scores")
    token_N, wanted_N, weight_N = routing.rows()
    prob_TE = routing.prob_TE()
    n_tokens, live_N = len(prob_TE), wanted_N >= 0
    expert_E = torch.arange(n_experts, device=wanted_N.device)

    # The multiple of the tile that every expert comes to, and the rows that are too many.
    chosen_TE = _dense(live_N, token_N, wanted_N, n_tokens, n_experts)
    count_E = reference.count(wanted_N, n_experts)
    nearest_E = (count_E + tile // 2) // tile * tile
    enough_E = nearest_E - count_E <= (~chosen_TE).sum(0)
    target_E = torch.where(enough_E, nearest_E, count_E // tile * tile)
    kept_N = _place(wanted_N, n_experts, weight_N) < target_E[wanted_N.clamp_min(0)]
    expert_N = torch.where(kept_N | ~live_N, wanted_N, DROPPED)

    # The rows that are too few: every expert's best tokens among those that did not choose it.
    n_more = min(tile // 2, n_tokens)  # A
    rank_TE = prob_TE.detach().masked_fill(chosen_TE, -1.0).argsort(dim=0, descending=True, stable=True)
    more_AE = rank_TE[:n_more]  # tokens; an unused slot names one too, and so unused slots are spread
    added_AE = torch.arange(n_more, device=more_AE.device)[:, None] < target_E - count_E
    mass_T = _dense(weight_N, token_N, wanted_N, n_tokens, n_experts).sum(-1)
    scale_T = _ratio(mass_T, (prob_TE * chosen_TE).sum(-1), otherwise=1.0)
    more_weight_AE = (prob_TE * scale_T[:, None]).to(weight_N.dtype).gather(0, more_AE) * added_AE
    more_expert_AE = torch.where(added_AE, expert_E, UNUSED)

    # Both, in token order.
    token_N = torch.cat([token_N, more_AE.flatten()])
    order_N = token_N.argsort(stable=True)
    return routing._replace(
        token_N=token_N[order_N],
        expert=torch.cat([expert_N, more_expert_AE.flatten()])[order_N],
        weight=torch.cat([weight_N, more_weight_AE.flatten()])[order_N],
    )


def balanced(
    routing: Routing,
    n_experts: int | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 — immutable
) -> Routing:
    """Forced balance, for debugging and benchmarks: the n-th row goes to expert n mod E, whatever the scores; so row
    t·K + j of a (T, K) routing to (t·K + j) mod E. It is the n-th of the batch that `ranks` share. Rows without an
    expert are skipped and stay as they are.

    A token's experts are distinct while it has no more than E. Its weights are its probabilities of them, times what
    makes their sum that of its old weights: gradients flow. Without logits weights stay; n_experts must be given."""
    if n_experts is None:
        if routing.logits_TE is None:
            raise ValueError("a routing without scores does not say how many experts there are: give n_experts")
        n_experts = routing.logits_TE.shape[1]
    live_N = (routing.expert >= 0).flatten()
    turn_N = ranks.share(ranks.gathered(live_N).cumsum(0) - 1).remainder(n_experts)
    return _reassign(routing, torch.where(live_N, turn_N, routing.expert.flatten()).view_as(routing.expert))


def recorded(routing: Routing, expert_TK: Tensor) -> Routing:
    """Routing replay (2507.18071, 2510.11370): the experts of an earlier pass instead of the router's choice.

    expert_TK: (T, K) int64, distinct within a token; negative entries stay and weigh 0. A token's weights are this
    routing's probabilities of these experts, times what makes their sum that of its own weights; its own weights where
    the experts are its own but for rows dropped since, so that replaying a pass changes nothing, whatever capacity took
    from it. Without logits weights stay.
    A shape other than the routing's own, or a ragged routing: ValueError."""
    if routing.token_N is not None:
        raise ValueError("experts can be replayed on routers with a fixed K only; this one gives ragged rows")
    if routing.expert.shape != expert_TK.shape:
        raise ValueError(f"recorded experts are {tuple(expert_TK.shape)}, the routing is {tuple(routing.expert.shape)}")
    replayed = _reassign(routing, expert_TK)
    same_T1 = ((expert_TK == routing.expert) | (expert_TK == DROPPED)).all(-1, keepdim=True)
    weight_TK = torch.where(expert_TK < 0, 0.0, routing.weight)
    return replayed._replace(weight=torch.where(same_T1, weight_TK, replayed.weight))


def _place(expert_N: Tensor, n_experts: int, weight_N: Tensor | None = None) -> Tensor:
    """Every row's place among its expert's rows, from 0, (N,): in row order, or by falling weight, then row order."""
    if weight_N is None:
        first_N = torch.arange(len(expert_N), device=expert_N.device)
    else:
        first_N = weight_N.detach().argsort(descending=True, stable=True)
    expert_N = expert_N[first_N]
    _, slot_N, offset_E1 = reference.plan(expert_N, n_experts)
    place_N = slot_N - offset_E1[torch.where(expert_N < 0, n_experts, expert_N)]
    return torch.zeros_like(place_N).scatter(0, first_N, place_N)


def _move(routing: Routing, settled_TK: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Experts after `limit`'s pass over the tokens, (T, K), and which rows it refused, (T, K) bool.

    Rows that are not settled take, token after token, the first experts with room in their token's order of preference:
    its own choice, then the others by logits.

    All tokens at once, in rounds: while an expert is taken for open too long, the others only fill later than they
    will. So each round finds at least one more of the moments at which an expert fills, earliest first; and of the N
    rows at most N // C experts can be filled."""
    expert_TK, logits_TE = routing.expert, routing.logits_TE
    assert logits_TE is not None
    (n_tokens, k), n_experts = expert_TK.shape, logits_TE.shape[1]
    live_TK = expert_TK >= 0

    def marked(row_TK: Tensor) -> Tensor:
        """(T, E): whether one of these rows of the token has that expert."""
        column_TK = torch.where(row_TK & live_TK, expert_TK, n_experts)
        blank_TE1 = torch.zeros(n_tokens, n_experts + 1, dtype=torch.bool, device=expert_TK.device)
        return blank_TE1.scatter(1, column_TK, True)[:, :n_experts]

    # What every token wants, which experts have room for it, and its order of preference.
    chosen_TE, settled_TE = marked(live_TK), marked(settled_TK)
    want_T1 = (live_TK & ~settled_TK).sum(1, keepdim=True)
    room_E = room - settled_TE.sum(0)
    order_TE = logits_TE.detach().argsort(dim=1, descending=True, stable=True)
    chosen_first_TE = (~chosen_TE).to(torch.uint8).gather(1, order_TE).argsort(dim=1, stable=True)
    prefer_TE = order_TE.gather(1, chosen_first_TE)

    def take(open_TE: Tensor) -> Tensor:
        """(T, E), in order of preference: the first experts open to the token, as many as it wants."""
        open_TE = open_TE.gather(1, prefer_TE)
        return open_TE & (open_TE.cumsum(1, dtype=torch.int32) <= want_T1)

    # The pass over the tokens, in rounds.
    open_TE = ~settled_TE
    for _ in range(min(n_experts, n_tokens * k // room)):
        taken_TE = torch.zeros_like(open_TE).scatter(1, prefer_TE, take(open_TE))
        before_TE = taken_TE.cumsum(0, dtype=torch.int32) - taken_TE.to(torch.int32)  # rows it has from earlier tokens
        open_TE = ~settled_TE & (before_TE < room_E)
    taken_TE = take(open_TE)  # in order of preference

    # Refused rows of a token get its new experts, first to first.
    at_chosen_TE = torch.zeros_like(open_TE).scatter(1, prefer_TE, taken_TE) | settled_TE
    refused_TK = live_TK & ~at_chosen_TE.gather(1, expert_TK.clamp_min(0))
    new_TE = taken_TE & ~chosen_TE.gather(1, prefer_TE)
    column_TE = torch.where(new_TE, new_TE.cumsum(1) - 1, k)  # the token's first new expert, its second, ...
    expert_TE = torch.where(new_TE, prefer_TE, DROPPED)
    new_TK1 = torch.full((n_tokens, k + 1), DROPPED, device=expert_TK.device).scatter(1, column_TE, expert_TE)
    new_TK = new_TK1.gather(1, (refused_TK.cumsum(1) - 1).clamp_min(0))

    return torch.where(refused_TK, new_TK, expert_TK), refused_TK


def _reweighed(routing: Routing, new_TK: Tensor, refused_TK: Tensor) -> Routing:
    """The routing with new experts; a refused row that found one weighs w · p_new / p_old."""
    expert_TK, moved_TK = routing.expert, refused_TK & (new_TK >= 0)
    prob_TE = routing.prob_TE()
    old_prob_TK = prob_TE.gather(1, expert_TK.clamp_min(0))
    new_prob_TK = prob_TE.gather(1, new_TK.clamp_min(0))
    weight_TK = _ratio(routing.weight, torch.where(moved_TK, old_prob_TK, 1.0), otherwise=0.0) * new_prob_TK
    return routing._replace(
        expert=new_TK,
        weight=torch.where(moved_TK, weight_TK.to(routing.weight.dtype), routing.weight),
    )


def _reassign(routing: Routing, expert: Tensor) -> Routing:
    """The same rows at other experts. A token's weights: its probabilities of them, scaled to its old weights' sum."""
    token_N, old_N, weight_N = routing.rows()
    expert_N = expert.flatten()
    if routing.logits_TE is None:
        weight_N = torch.where(expert_N < 0, 0.0, weight_N)
    else:
        prob_TE = routing.prob_TE()
        mass_T = _dense(weight_N, token_N, old_N, *prob_TE.shape).sum(-1)
        prob_TE = prob_TE * _dense(expert_N >= 0, token_N, expert_N, *prob_TE.shape)
        prob_TE = prob_TE * _ratio(mass_T, prob_TE.sum(-1), otherwise=0.0)[:, None]
        place_N = token_N * prob_TE.shape[1] + expert_N.clamp_min(0)
        new_N = prob_TE.flatten().gather(0, place_N).to(weight_N.dtype)
        weight_N = torch.where(expert_N < 0, 0.0, new_N)
    return routing._replace(expert=expert, weight=weight_N.view_as(routing.weight))


def _dense(value_N: Tensor, token_N: Tensor, expert_N: Tensor, n_tokens: int, n_experts: int) -> Tensor:
    """Rows' values at (token, expert), zero elsewhere: (N,) -> (T, E). No pair of token and expert may come twice."""
    live_N = expert_N >= 0
    place_N = token_N * (n_experts + 1) + torch.where(live_N, expert_N, n_experts)
    value_N = torch.where(live_N, value_N, torch.zeros_like(value_N))
    flat = torch.zeros(n_tokens * (n_experts + 1), dtype=value_N.dtype, device=value_N.device)
    return flat.scatter(0, place_N, value_N).view(n_tokens, n_experts + 1)[:, :n_experts]


def _ratio(value: Tensor, over: Tensor, otherwise: float) -> Tensor:
    """value / over, and `otherwise` where `over` has underflowed to nothing, with finite gradients there."""
    divisible = over > torch.finfo(over.dtype).tiny
    return torch.where(divisible, value / torch.where(divisible, over, 1.0), otherwise)
