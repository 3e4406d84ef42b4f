"""Routers that decide over a batch, with random weights, and their decisions as tables: for their tests."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.routing.assignment import BaseRouter
from moe.routing.contract import Context
from moe.routing.expert_choice import ExpertChoiceRouter
from moe.routing.sinkhorn import SinkhornRouter
from moe.routing.soft import SoftRouter

D, E = 6, 5
CASES = ["sinkhorn", "base", "expert-choice", "expert-choice-threshold", "expert-choice-predictor"]
CAUSAL_IN_EVAL = ["sinkhorn", "base", "expert-choice-threshold", "expert-choice-predictor"]


def make_router(case, k=2, n_experts=E, d=D, dtype=torch.float64, **settings):
    """A router with random weights."""
    moe = MoEConfig(n_experts=n_experts, k=1 if case == "base" else k)
    if case.startswith("expert-choice"):
        settings["causal"] = case.removeprefix("expert-choice").removeprefix("-") or "none"
        router = ExpertChoiceRouter(RouterConfig(name="expert-choice", **settings), d, moe)
    else:
        kind = {"sinkhorn": SinkhornRouter, "base": BaseRouter, "soft": SoftRouter}[case]
        router = kind(RouterConfig(name=case, **settings), d, moe)
    generator = torch.Generator().manual_seed(0)
    for weight in router.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, generator=generator)
    return router.to(dtype)


def states(n_tokens=40, dtype=torch.float64, seed=1):
    return torch.randn(n_tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def route(router, x_TD, n_sequences=1):
    return router(x_TD, "reference", Context(n_sequences=n_sequences))


def weight_table(router, x_TD):
    """The decision as a table: the weight of every token at every expert, 0 where it does not go."""
    token_N, expert_N, weight_N = route(router, x_TD).rows()
    table_TE = torch.zeros(len(x_TD), router.n_experts, dtype=weight_N.dtype)
    used = expert_N >= 0
    assert len(set(zip(token_N[used].tolist(), expert_N[used].tolist(), strict=True))) == int(used.sum())
    return table_TE.index_put((token_N[used], expert_N[used]), weight_N[used])


def best_total(score_TE):
    """The most that an even assignment can collect, by scipy: places as columns, and in every place beyond the
    floor(T/E) first ones of an expert a token or one of the rows that stand for nobody."""
    n_tokens, n_experts = score_TE.shape
    floor, rest = divmod(n_tokens, n_experts)
    value = np.repeat(score_TE, floor, axis=1)
    if rest:
        nobody = np.full((n_experts - rest, (floor + 1) * n_experts), -1e12)
        nobody[:, floor * n_experts :] = 0
        value = np.concatenate([np.concatenate([value, score_TE], axis=1), nobody])
    row, column = linear_sum_assignment(value, maximize=True)
    return value[row, column].sum()


def total(score_TE, expert_T):
    return score_TE.double().gather(1, expert_T[:, None]).sum().item()


def even(expert_T, n_tokens, n_experts):
    count = torch.bincount(expert_T, minlength=n_experts)
    return (
        len(expert_T) == n_tokens and count.min() >= n_tokens // n_experts and count.max() <= -(-n_tokens // n_experts)
    )
