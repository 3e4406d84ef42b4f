"""Routers that decide token by token, with random weights, and states for them: for their tests."""

import torch

from moe.config.model import MoEConfig
from moe.routing.build import build_router
from moe.routing.contract import Context

EXACT = dict(rtol=1e-12, atol=1e-12)
E, D, K = 5, 6, 3


def make_router(cfg, k=K, n_experts=E, d=D, dtype=torch.float64, **where):
    """A router with random weights."""
    router = build_router(cfg, d, MoEConfig(n_experts=n_experts, k=k), **where)
    generator = torch.Generator().manual_seed(0)
    for weight in router.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, generator=generator)
    return router.to(dtype)


def states(n_tokens=40, d=D, dtype=torch.float64, seed=1):
    return torch.randn(n_tokens, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def route(router, x_TD, seed=0):
    """The decision for states (T, D), with the same random numbers in every call."""
    torch.manual_seed(seed)
    return router(x_TD, "reference", Context())
