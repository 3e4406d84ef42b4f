"""The router family: which class a name means, and what it is handed. The contract is in contract.py."""

import importlib

from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.routing.assignment import BaseRouter
from moe.routing.contract import Router
from moe.routing.expert_choice import ExpertChoiceRouter
from moe.routing.sinkhorn import SinkhornRouter
from moe.routing.soft import SoftRouter
from moe.routing.token_choice import HashRouter, ReluRouter, ThresholdRouter, TopKRouter, TopPRouter


def router_class(name: str) -> type[Router]:
    """The class that `router.name` names; `module:Class` is one of your own, a subclass of
    `moe.routing.contract.Router`.

    Raises `BadInput` for one of your own that cannot be imported or is no router."""
    match name:
        case "softmax" | "sigmoid" | "sqrt_softplus":
            return TopKRouter
        case "threshold":
            return ThresholdRouter
        case "top-p":
            return TopPRouter
        case "relu":
            return ReluRouter
        case "hash":
            return HashRouter
        case "sinkhorn":
            return SinkhornRouter
        case "base":
            return BaseRouter
        case "expert-choice":
            return ExpertChoiceRouter
        case "soft":
            return SoftRouter

    # One of your own.
    module, _, attribute = name.partition(":")
    try:
        chosen = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a file of your own raises
        why = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise BadInput(f"router.name={name} cannot be imported: {why}.") from error
    if not (isinstance(chosen, type) and issubclass(chosen, Router)):
        raise BadInput(f"router.name={name} is no subclass of moe.routing.contract.Router.")
    return chosen


def build_router(cfg: RouterConfig, d_model: int, moe: MoEConfig, **where: int) -> Router:
    """The router of one MoE layer; `where`: layer, vocab_size and context, as in `Router`. Raises as `router_class`."""
    return router_class(cfg.name)(cfg, d_model, moe, **where)
