"""The MoE layer: route, limit, dispatch to the experts, combine; losses and counts are returned, never kept.

Letters beyond the glossary: P slots that a soft router gives an expert in every sequence.
"""

from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from kernels import reference
from moe.config.balance import BalanceConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.model import dispatch
from moe.model.experts import MLP, CheapExperts, Experts, MixedExperts
from moe.parallel.collectives import Ranks
from moe.routing import balance, policies
from moe.routing.build import build_router
from moe.routing.contract import DROPPED, UNUSED, Context, Mixture, Router, Routing, Step, check_names


class LayerInput(NamedTuple):
    """What an MoE layer is given beside its states (B, S, D). T = B·S tokens, sequence after sequence."""

    tokens_T: Tensor | None = None  # int64 ids, for routers that read them
    previous_TD: Tensor | None = None  # the previous MoE layer's states, for routers that read those
    router: Router | None = None  # the one that layers share, for a layer without its own
    step: Step = Step()  # the whole optimiser step, for balance.scope=global
    recorded_TK: Tensor | None = None  # int64 experts to take instead of the router's choice
    watched: bool = False  # whether to say how decided the router is (`LayerRouting.seen`)


class LayerRouting(NamedTuple):
    """What one MoE layer did with one batch. E counts null, copy and constant experts too."""

    # scalars, unweighted: the balance's by the name of their coefficient, aux and z always there; the router's own
    losses: dict[str, Tensor]
    count_E: Tensor  # routed rows per expert, int64
    wanted_E: Tensor  # the same before capacity, which is what the balance works on
    dropped: Tensor  # rows that found no room, int64 scalar
    skipped: Tensor  # tokens that no expert took, for whatever reason, int64 scalar
    expert: Tensor  # (T, K), or (N,) for ragged routers
    weight: Tensor
    token_N: Tensor | None
    observed: dict[str, Tensor]  # for `Router.update` and `Step.total`, to be summed over micro-batches
    state_TD: Tensor | None  # the layer's input, where a router one layer on reads it
    # Where it is watched and has scores, sums over its tokens: "prob" (E,) of their probabilities, "entropy" of theirs
    seen: dict[str, Tensor] | None = None

    @property
    def aux(self) -> Tensor:
        """Load-balancing loss; 0 for a router without scores."""
        return self.losses["aux"]

    @property
    def z(self) -> Tensor:
        """Router z-loss; 0 for a router without scores."""
        return self.losses["z"]


class MoELayer(nn.Module):
    """x (B, S, D) -> (y (B, S, D), LayerRouting). With no shared expert y is the routed sum alone.

    `own_router` False: the router is handed over in every call (layer-shared routers)."""

    def __init__(
        self,
        cfg: ModelConfig,
        moe: MoEConfig,
        router: RouterConfig,
        balance: BalanceConfig | None = None,
        layer: int = 0,
        own_router: bool = True,
    ) -> None:
        super().__init__()
        self.balance, self.k = balance or BalanceConfig(), moe.k
        self.n_experts, self.n_with_cheap = moe.n_experts, moe.n_experts + moe.n_cheap
        self.reads_previous, self.router_name = router.input == "previous", router.name
        self.router: Router | None = None
        if own_router:
            where = dict(layer=layer, vocab_size=cfg.vocab_size, context=cfg.context)
            self.router = build_router(router, cfg.d_model, moe, **where)
        self.experts: Experts | MixedExperts = MixedExperts(cfg, moe) if moe.widths else Experts(cfg, moe)
        self.cheap = CheapExperts(cfg, moe) if moe.n_cheap else None
        # n shared experts of width F, summed, are one MLP of width n·F.
        self.shared = MLP(cfg, moe.n_shared * moe.d_expert) if moe.n_shared else None
        self.shared_gate = nn.Linear(cfg.d_model, 1, bias=False) if moe.shared_gate else None
        vectors = router.gradient == "default-vector"
        self.default_ED = nn.Parameter(torch.empty(moe.n_experts, cfg.d_model)) if vectors else None

    def forward(
        self,
        x_BSD: Tensor,
        backend: str,
        layer_input: LayerInput = LayerInput(),  # noqa: B008 — immutable
    ) -> tuple[Tensor, LayerRouting]:
        router = layer_input.router or self.router
        assert router is not None, "a layer without a router of its own must be handed one"
        # Route, by the layer's own states or those of the MoE layer before.
        state_TD, previous_TD = rearrange(x_BSD, "b s d -> (b s) d"), layer_input.previous_TD
        if self.reads_previous and previous_TD is not None:
            state_TD = previous_TD
        routing = router(state_TD, backend, Context(layer_input.tokens_T, len(x_BSD), layer_input.step))
        # Through the routed experts and back: rows, or slots that are mixtures of tokens.
        if isinstance(routing, Mixture):
            if layer_input.recorded_TK is not None:
                raise ValueError("a soft router has no experts to replay")
            y_BSD, report = self.mix(x_BSD, routing, backend)
        else:
            y_BSD, report = self.send(x_BSD, routing, backend, layer_input.step, layer_input.recorded_TK)
            if layer_input.watched:
                report = report._replace(seen=decidedness(routing))
        # The shared experts take every token.
        if self.shared is not None:
            shared_BSD = self.shared(x_BSD)
            y_BSD = y_BSD + (shared_BSD if self.shared_gate is None else self.shared_gate(x_BSD).sigmoid() * shared_BSD)
        return y_BSD, report

    def send(
        self,
        x_BSD: Tensor,
        routing: Routing,
        backend: str,
        step: Step = Step(),  # noqa: B008 — immutable
        recorded_TK: Tensor | None = None,
    ) -> tuple[Tensor, LayerRouting]:
        """Rows to experts and back; `step` and `recorded_TK` as in `LayerInput`."""
        x_TD = rearrange(x_BSD, "b s d -> (b s) d")
        wanted, routing = routing, self.limited(routing, len(x_TD), recorded_TK, step.ranks)
        y_TD, count_E = self.apply_experts(x_TD, routing, backend)
        # The balance works on what the router wanted, in the whole optimiser step where that is known.
        wanted_E = count_E if routing is wanted else reference.count(wanted.expert.flatten(), self.n_with_cheap)
        losses, observed = self.losses(wanted, wanted_E, len(x_BSD), step)
        if self.default_ED is not None and routing.rest_TE is not None:
            rest_TD, losses["default"] = default_vectors(self.default_ED, routing, routing.rest_TE, y_TD)
            y_TD = y_TD + rest_TD
        return y_TD.view(x_BSD.shape), LayerRouting(
            losses=losses,
            count_E=count_E,
            wanted_E=wanted_E,
            dropped=(routing.expert == DROPPED).sum(),
            skipped=(~served(routing, len(x_TD))).sum(),
            expert=routing.expert,
            weight=routing.weight.detach(),
            token_N=routing.token_N,
            observed=observed,
            state_TD=x_TD if self.reads_previous else None,
        )

    def limited(self, routing: Routing, n_tokens: int, recorded_TK: Tensor | None, ranks: Ranks) -> Routing:
        """The routing after what overrides or limits it: recorded experts, forced balance, capacity, token rounding."""
        cfg, n_experts = self.balance, self.n_with_cheap
        if recorded_TK is not None:
            return policies.recorded(routing, recorded_TK)
        if cfg.force == "balanced":
            return policies.balanced(routing, n_experts, ranks)
        if self.training and cfg.capacity:
            fair = n_tokens * self.k
            return policies.limit(routing, n_experts, cfg.capacity, cfg.priority, cfg.overflow, fair, ranks)
        if self.training and cfg.tile:
            return policies.round_to_tile(routing, n_experts, cfg.tile)
        return routing

    def apply_experts(self, x_TD: Tensor, routing: Routing, backend: str) -> tuple[Tensor, Tensor]:
        """Every token's rows through the real experts and the cheap ones, summed by weight: (T, D) -> (T, D), and the
        rows of each, (E,) int64."""
        if self.cheap is None:
            return dispatch.apply(self.experts, x_TD, routing, backend)
        dispatch.check(x_TD, routing, backend)
        real_expert = torch.where(routing.expert < self.n_experts, routing.expert, UNUSED)
        y_TD, _ = dispatch.apply(self.experts, x_TD, routing._replace(expert=real_expert), backend)
        count_E = reference.count(routing.expert.flatten(), self.n_with_cheap)
        return y_TD + self.cheap(x_TD, routing), count_E

    def losses(
        self,
        routing: Routing,
        wanted_E: Tensor,
        n_sequences: int,
        step: Step = Step(),  # noqa: B008 — immutable
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The balancing losses that have a coefficient, aux and z in any case, and the router's own; what they are of
        says `moe.routing.balance`. And what was observed: by the router, and the sums that losses are functions of.
        Raises `BadInput` for one of the router's own that is called like another."""
        cfg, router_losses, observed = self.balance, routing.losses or {}, routing.observed or {}
        check_names(router_losses, observed, self.router_name)
        if routing.prob_E is None or routing.lse_T is None:
            zero = torch.zeros((), device=routing.weight.device)
            return {"aux": zero, "z": zero, **router_losses}, observed
        prob_E, n_tokens = routing.prob_E, len(routing.lse_T)
        # Means over tokens.
        if cfg.scope == "sequence":
            aux = balance.sequence_balancing_loss(routing.prob_TE(), routing.expert, routing.token_N, n_sequences)
        else:
            aux = balance.load_balancing_loss(prob_E, step.total("count", wanted_E), n_tokens)
        losses = {"aux": aux, "z": balance.z_loss(routing.lse_T)}
        if cfg.entropy:
            losses["entropy"] = balance.token_entropy(routing.prob_TE())
        # Functions of sums over tokens, which are the whole step's where it is known.
        if cfg.importance:
            importance_E = balance.importance(routing.weight, routing.expert, self.n_with_cheap)
            losses["importance"] = balance.cv_squared(step.total("importance", importance_E))
            observed = observed | {"importance": importance_E.detach()}
        if cfg.spread or cfg.bandpass:
            step_prob_E, n_step_tokens = step.total("prob", prob_E), step.tokens(n_tokens)
            if cfg.spread:
                losses["spread"] = balance.spread_loss(step_prob_E, n_step_tokens)
            if cfg.bandpass:
                losses["bandpass"] = balance.bandpass_loss(step_prob_E, n_step_tokens, cfg.band)
            observed = observed | {"prob": prob_E.detach()}
        if cfg.load and routing.smooth_E is not None:
            losses["load"] = balance.cv_squared(step.total("smooth", routing.smooth_E))
            observed = observed | {"smooth": routing.smooth_E.detach()}
        return losses | router_losses, observed

    def mix(self, x_BSD: Tensor, mixture: Mixture, backend: str) -> tuple[Tensor, LayerRouting]:
        """Slots to experts and back. It is reported as every token at every expert, by its share of the weight."""
        b, s, e, p = mixture.dispatch_BSEP.shape
        dispatch_BSEP, combine_BSEP = (share_BSEP.to(x_BSD.dtype) for share_BSEP in mixture)
        slot_ND = rearrange(einsum(dispatch_BSEP, x_BSD, "b s e p, b s d -> b e p d"), "b e p d -> (b e p) d")
        expert_N = torch.arange(e, device=x_BSD.device).repeat_interleave(p).repeat(b)[:, None]
        weight_N = torch.ones(expert_N.shape, dtype=mixture.combine_BSEP.dtype, device=x_BSD.device)
        y_ND, count_E = dispatch.apply(self.experts, slot_ND, Routing(expert_N, weight_N, None), backend)
        y_BEPD = rearrange(y_ND, "(b e p) d -> b e p d", b=b, e=e)
        y_BSD = einsum(combine_BSEP.to(y_ND.dtype), y_BEPD, "b s e p, b e p d -> b s d")
        zero = torch.zeros((), dtype=torch.int64, device=x_BSD.device)
        return y_BSD, LayerRouting(
            losses={"aux": zero.float(), "z": zero.float()},
            count_E=count_E,
            wanted_E=count_E,
            dropped=zero,
            skipped=zero,
            expert=torch.arange(e, device=x_BSD.device).expand(b * s, e),
            weight=rearrange(mixture.combine_BSEP.detach().sum(-1), "b s e -> (b s) e"),
            token_N=None,
            observed={},
            state_TD=x_BSD.flatten(0, 1) if self.reads_previous else None,
        )


def default_vectors(default_ED: Tensor, routing: Routing, rest_TE: Tensor, y_TD: Tensor) -> tuple[Tensor, Tensor]:
    """What the experts that a token did not take add by their default vectors, (T, D), and the loss that fits each
    vector to its expert's output: the mean square of what is left of the routed sum y once every row's output is taken
    for the vector of its expert (least squares; 2504.12463 has a running mean)."""
    token_N, expert_N, weight_N = routing.rows()
    taken_TE = torch.zeros_like(rest_TE).index_put(
        (token_N, expert_N.clamp_min(0)), torch.where(expert_N < 0, 0, weight_N.detach()), accumulate=True
    )
    with torch.autocast(y_TD.device.type, enabled=False):
        error_TD = y_TD.detach().to(default_ED.dtype) - taken_TE.to(default_ED.dtype) @ default_ED
    loss = error_TD.square().sum() / max(1, error_TD.numel())
    return rest_TE.to(y_TD.dtype) @ default_ED.detach().to(y_TD.dtype), loss


@torch.no_grad()
def decidedness(routing: Routing) -> dict[str, Tensor]:
    """`LayerRouting.seen` of a routing; nothing where the router has no scores."""
    if routing.prob_E is None or routing.logits_TE is None:
        return {}
    return {"prob": routing.prob_E.detach(), "entropy": torch.special.entr(routing.prob_TE().float()).sum()}


def served(routing: Routing, n_tokens: int) -> Tensor:
    """Which tokens at least one expert takes: (T,) bool."""
    if routing.token_N is None:
        return (routing.expert >= 0).any(-1)
    n_rows_T = torch.zeros(n_tokens, dtype=torch.int64, device=routing.expert.device)
    return n_rows_T.scatter_add(0, routing.token_N, (routing.expert >= 0).long()) > 0
