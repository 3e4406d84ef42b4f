"""The MoE layer: route, limit, dispatch to the experts, combine; losses and counts are returned, never kept."""

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
from moe.routing import balance, policies
from moe.routing.build import build_router
from moe.routing.contract import DROPPED, UNUSED, Context, Mixture, Router, Routing


class LayerRouting(NamedTuple):
    """What one MoE layer did with one batch. E counts null, copy and constant experts too."""

    losses: dict[str, Tensor]  # scalars, unweighted, by the name of their coefficient; aux and z are always there
    count_E: Tensor  # routed rows per expert, int64
    wanted_E: Tensor  # the same before capacity, which is what the balance works on
    dropped: Tensor  # rows that found no room, int64 scalar
    skipped: Tensor  # tokens that no expert took, for whatever reason, int64 scalar
    expert: Tensor  # (T, K), or (N,) for ragged routers
    weight: Tensor
    token_N: Tensor | None
    observed: dict[str, Tensor]  # for `Router.update`, to be summed over micro-batches
    state_TD: Tensor | None  # the layer's input, where a router one layer on reads it

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
        self.balance, self.n_experts, self.k = balance or BalanceConfig(), moe.n_experts, moe.k
        self.reads_previous = router.input == "previous"
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
        *,
        tokens_BS: Tensor | None = None,
        previous_TD: Tensor | None = None,
        router: Router | None = None,
        load_E: Tensor | None = None,
        recorded: Tensor | None = None,
    ) -> tuple[Tensor, LayerRouting]:
        """tokens_BS: ids, for routers that read them. previous_TD: the previous MoE layer's input. router:
        a shared one. load_E: the whole optimiser step's rows wanted of every expert, for balance.scope=global.
        recorded: experts (T, K) to take instead of the router's choice."""
        x_TD = rearrange(x_BSD, "b s d -> (b s) d")
        state_TD = previous_TD if self.reads_previous and previous_TD is not None else x_TD
        router = router or self.router
        assert router is not None, "a layer without a router of its own must be handed one"
        tokens_T = None if tokens_BS is None else tokens_BS.flatten()
        routing = router(state_TD, backend, Context(tokens_T, len(x_BSD)))
        if isinstance(routing, Mixture):
            if recorded is not None:
                raise ValueError("a soft router has no experts to replay")
            y_BSD, report = self.mix(x_BSD, routing, backend)
        else:
            y_BSD, report = self.send(x_BSD, routing, backend, router.n_experts, load_E, recorded)
        if self.shared is not None:
            shared_BSD = self.shared(x_BSD)
            y_BSD = y_BSD + (shared_BSD if self.shared_gate is None else self.shared_gate(x_BSD).sigmoid() * shared_BSD)
        return y_BSD, report

    def send(
        self,
        x_BSD: Tensor,
        routing: Routing,
        backend: str,
        n_experts: int,
        load_E: Tensor | None,
        recorded: Tensor | None,
    ) -> tuple[Tensor, LayerRouting]:
        """Rows to experts and back. `n_experts` counts the cheap ones."""
        x_TD = rearrange(x_BSD, "b s d -> (b s) d")
        wanted, routing = routing, self.limited(routing, n_experts, len(x_TD), recorded)
        real = routing
        if self.cheap is not None:
            real = routing._replace(expert=torch.where(routing.expert < self.n_experts, routing.expert, UNUSED))
        y_TD, count_E = dispatch.apply(self.experts, x_TD, real, backend)
        token_N, expert_N, weight_N = routing.rows()
        if self.cheap is not None:
            y_TD, count_E = y_TD + self.cheap(x_TD, routing), reference.count(expert_N, n_experts)
        wanted_E = count_E if routing is wanted else reference.count(wanted.rows()[1], n_experts)
        losses = self.losses(wanted, wanted_E if load_E is None else load_E, len(x_BSD), n_experts)
        if self.default_ED is not None and routing.rest_TE is not None:
            rest_TE, default_ED = routing.rest_TE.to(y_TD.dtype), self.default_ED
            fitted_TD = torch.zeros_like(routing.rest_TE).index_put(
                (token_N, expert_N.clamp_min(0)), torch.where(expert_N < 0, 0, weight_N.detach()), accumulate=True
            )
            with torch.autocast(x_TD.device.type, enabled=False):
                error_TD = y_TD.detach().to(default_ED.dtype) - fitted_TD.to(default_ED.dtype) @ default_ED
            losses["default"] = error_TD.square().sum() / max(1, error_TD.numel())
            y_TD = y_TD + rest_TE @ default_ED.detach().to(y_TD.dtype)
        if routing.token_N is None:
            served_T = (routing.expert >= 0).any(-1)
        else:
            served_T = torch.zeros(len(x_TD), dtype=torch.int64, device=x_TD.device)
            served_T = served_T.scatter_add(0, token_N, (expert_N >= 0).long()) > 0
        return y_TD.view(x_BSD.shape), LayerRouting(
            losses=losses,
            count_E=count_E,
            wanted_E=wanted_E,
            dropped=(expert_N == DROPPED).sum(),
            skipped=(~served_T).sum(),
            expert=routing.expert,
            weight=routing.weight.detach(),
            token_N=routing.token_N,
            observed=routing.observed or {},
            state_TD=x_TD if self.reads_previous else None,
        )

    def losses(self, routing: Routing, load_E: Tensor, n_sequences: int, n_experts: int) -> dict[str, Tensor]:
        """The balancing losses that have a coefficient, aux and z in any case, and the router's own."""
        cfg, own = self.balance, routing.losses or {}
        if routing.prob_E is None or routing.lse_T is None:
            zero = torch.zeros((), device=routing.weight.device)
            return {"aux": zero, "z": zero, **own}
        prob_E, n_tokens = routing.prob_E, len(routing.lse_T)
        if cfg.scope == "sequence":
            aux = balance.sequence_balancing_loss(routing.prob_TE(), routing.expert, routing.token_N, n_sequences)
        else:
            aux = balance.load_balancing_loss(prob_E, load_E, n_tokens)
        found = {"aux": aux, "z": balance.z_loss(routing.lse_T)}
        if cfg.importance:
            found["importance"] = balance.importance_loss(*routing.rows()[:0:-1], n_experts)
        if cfg.entropy:
            found["entropy"] = balance.token_entropy(routing.prob_TE())
        if cfg.spread:
            found["spread"] = balance.spread_loss(prob_E, n_tokens)
        if cfg.bandpass:
            found["bandpass"] = balance.bandpass_loss(prob_E, n_tokens, cfg.band)
        return found | own

    def limited(self, routing: Routing, n_experts: int, n_tokens: int, recorded: Tensor | None) -> Routing:
        """The routing after what overrides or limits it: recorded experts, forced balance, capacity, token rounding."""
        cfg = self.balance
        if recorded is not None:
            return policies.recorded(routing, recorded)
        if cfg.force == "balanced":
            return policies.balanced(routing, n_experts)
        if self.training and cfg.capacity:
            return policies.limit(routing, n_experts, cfg.capacity, cfg.priority, cfg.overflow, n_tokens * self.k)
        if self.training and cfg.tile:
            return policies.round_to_tile(routing, n_experts, cfg.tile)
        return routing

    def mix(self, x_BSD: Tensor, mixture: Mixture, backend: str) -> tuple[Tensor, LayerRouting]:
        """Slots to experts and back. It is reported as every token at every expert, by its share of the weight."""
        b, s, e, p = mixture.dispatch_BSEP.shape
        dispatch_BSEP, combine_BSEP = (each.to(x_BSD.dtype) for each in mixture)
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
