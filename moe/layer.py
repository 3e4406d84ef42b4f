"""The MoE layer: route, dispatch to the experts, combine; losses and counts are returned, never kept."""

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from moe import balance, dispatch
from moe.config import ModelConfig, MoEConfig, RouterConfig
from moe.experts import MLP, Experts
from moe.router import build_router


class LayerRouting(NamedTuple):
    """What one MoE layer did with one batch."""

    aux: Tensor  # load-balancing loss, scalar, unweighted
    z: Tensor  # router z-loss, scalar, unweighted
    count_E: Tensor  # routed rows per expert, int64
    dropped: Tensor  # rows that no expert took, int64 scalar
    expert: Tensor  # (T, K), or (N,) for ragged routers
    weight: Tensor
    token_N: Tensor | None


class MoELayer(nn.Module):
    """x (B, S, D) -> (y (B, S, D), LayerRouting). With no shared expert y is the routed sum alone."""

    def __init__(self, cfg: ModelConfig, moe: MoEConfig, router: RouterConfig) -> None:
        super().__init__()
        self.router = build_router(router, cfg.d_model, moe)
        self.experts = Experts(cfg, moe)
        # n shared experts of width F, summed, are one MLP of width n·F.
        self.shared = MLP(cfg, moe.n_shared * moe.d_expert) if moe.n_shared else None

    def forward(self, x_BSD: Tensor, backend: str) -> tuple[Tensor, LayerRouting]:
        x_TD = rearrange(x_BSD, "b s d -> (b s) d")
        routing = self.router(x_TD, backend)
        y_TD, count_E = dispatch.apply(self.experts, x_TD, routing, backend)
        y_BSD = y_TD.view(x_BSD.shape)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        return y_BSD, LayerRouting(
            aux=balance.load_balancing_loss(routing.prob_E, count_E, len(x_TD)),
            z=balance.z_loss(routing.lse_T),
            count_E=count_E,
            dropped=routing.expert.numel() - count_E.sum(),
            expert=routing.expert,
            weight=routing.weight.detach(),
            token_N=routing.token_N,
        )
