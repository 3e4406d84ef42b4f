"""How settled a routing is: what a router would have said a layer earlier, and what it said at other checkpoints.

All are `decisions.agreement` of two choices of the same tokens, of which chance has K / E.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe.analysis.decisions import agreement
from moe.analysis.interventions import Window
from moe.analysis.trace import padded
from moe.analysis.tracing import What, windows_of_run
from moe.config.model import moe_layers
from moe.config.router import facts
from moe.errors import BadInput
from moe.model.layer import LayerRouting, MoELayer
from moe.model.transformer import Transformer
from moe.routing.contract import Context, Routing
from moe.run.load import load_run


class Lookahead(NamedTuple):
    """A layer's router, asked one MoE layer early."""

    layer: int  # among all layers
    agreement: float  # with what it decides in its place
    chance: float


class Settled(NamedTuple):
    """One checkpoint of a run; by MoE layer."""

    step: int
    saturation: list[float]  # agreement with the last checkpoint
    churn: list[float]  # 1 − agreement of the checkpoint before with this one; NaN for the first


@dataclass(frozen=True)
class OverTime:
    """Checkpoints of a run on the same text, the earliest first."""

    layers: list[int]  # the MoE layers, among all layers
    chance: list[float]  # the saturation that two random choices have, by layer
    sampling: str
    checkpoints: list[Settled]


@torch.inference_mode()
def routes(model: Transformer, windows: Iterable[Window]) -> list[Tensor]:
    """The experts of all tokens in every MoE layer: (T, K) int16 each, K being E for routers without a fixed one;
    negative for none. Raises `BadInput` for a dense model and a soft router."""
    check(model)
    device, parts = next(model.parameters()).device, []
    for read_BS1, *_ in windows:
        routing = model(torch.from_numpy(read_BS1[:, :-1]).to(device)).routing
        parts.append([experts_of(report, read_BS1[:, 1:].size) for report in routing])
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


@torch.inference_mode()
def lookahead(model: Transformer, windows: Iterable[Window]) -> list[Lookahead]:
    """Every router but the first, asked about the residual stream as it enters the MoE of the MoE layer before, under
    the norm of the router's own layer: what a prefetch of experts can know a layer ahead (2312.17238). Layers are left
    out that some tokens pass by (Mixture-of-Depths), or before which some do. Raises as `routes`."""
    check(model)
    numbers, routers = moe_layers(model.cfg), model.routers()
    device = next(model.parameters()).device
    streams: list[Tensor] = []  # of one pass, what enters each MoE, before its norm where that is what it reads
    entering = [block.mlp_norm if block.norm_first else block.mlp for block in (model.blocks[n] for n in numbers)]
    hooks = [
        module.register_forward_pre_hook(lambda module, given: streams.append(given[0]))  # type: ignore[union-attr, operator]
        for module in entering
    ]
    kept = [i for i in range(1, len(numbers)) if model.depths()[i] is model.depths()[i - 1] is None]
    early: dict[int, list[Tensor]] = {i: [] for i in kept}
    actual: dict[int, list[Tensor]] = {i: [] for i in kept}
    try:
        for read_BS1, *_ in windows:
            streams.clear()
            tokens_BS = torch.from_numpy(read_BS1[:, :-1]).to(device)
            report = model(tokens_BS).routing
            before = list(streams)
            for i in kept:
                block = model.blocks[numbers[i]]
                layer: MoELayer = block.mlp  # type: ignore[assignment]
                # A router that reads the layer before anyway is given what it reads.
                state_TD = report[i - 1].state_TD if layer.reads_previous else None
                if state_TD is None:
                    state_TD = (block.mlp_norm(before[i - 1]) if block.norm_first else before[i - 1]).flatten(0, 1)  # type: ignore[operator]
                decided = routers[i](state_TD, "torch", Context(tokens_BS.flatten(), len(tokens_BS)))
                actual[i].append(experts_of(report[i], tokens_BS.numel()))
                early[i].append(experts_of(decided, tokens_BS.numel(), routers[i].n_experts))
    finally:
        for hook in hooks:
            hook.remove()
    told = []
    for i in kept:
        actual_TK, early_TK = torch.cat(actual[i]), torch.cat(early[i])
        told.append(Lookahead(numbers[i], agreement(actual_TK, early_TK), chance(early_TK, routers[i].n_experts)))
    return told


def over_checkpoints(run: Path, what: What, names: Sequence[str], trust: bool = False) -> OverTime:
    """Checkpoints of a run, `step-N` in rising order, over the same text: per MoE layer the saturation against the last
    (OLMoE, 2409.02060) and the churn between neighbours. One model is in memory at a time. Raises `BadInput` for fewer
    than two, and as `load_run`, `Windows` and `routes` do."""
    if len(names) < 2:
        raise BadInput(f"{run} has {len(names)} checkpoint to compare: two are needed; checkpoint.keep=9 keeps nine.")
    model, tokenizer, run_cfg = load_run(run, names[-1], trust)
    windows = windows_of_run(what, run_cfg, tokenizer)
    batches = list(windows)
    last, before, told = routes(model, batches), None, []
    for name in names:
        now = routes(load_run(run, name, trust)[0], batches) if name != names[-1] else last
        saturation = [agreement(*pair) for pair in zip(now, last, strict=True)]
        churn = [torch.nan] * len(now)
        if before is not None:
            churn = [1 - agreement(*pair) for pair in zip(before, now, strict=True)]
        told.append(Settled(int(name.removeprefix("step-")), saturation, churn))
        before = now
    expected = [chance(last_TK, router.n_experts) for last_TK, router in zip(last, model.routers(), strict=True)]
    return OverTime(moe_layers(model.cfg), expected, windows.sampling, told)


def chance(expert_TK: Tensor, n_experts: int) -> float:
    """The agreement that any choice has with a random one of as many experts as here: mean_t |S_t| / E."""
    return (expert_TK >= 0).sum(-1).double().mean().item() / n_experts


def check(model: Transformer) -> None:
    """Raise `BadInput` for a model without routes: a dense one, or one with a soft router."""
    if model.cfg.moe is None:
        raise BadInput("the model is dense: it has no routing to compare.")
    if facts(model.router).choices == "mixture":
        raise BadInput("the router is soft: every token goes to every expert, and there is nothing to compare.")


def experts_of(routing: LayerRouting | Routing, n_tokens: int, n_experts: int = 0) -> Tensor:
    """A layer's or a router's choice by token, (T, K) int16 on the CPU; K is E for ragged rows."""
    expert, token_N = routing.expert.cpu(), routing.token_N
    if token_N is None:
        return expert.short()
    width = n_experts or len(routing.count_E)  # type: ignore[union-attr]
    report = routing._replace(expert=expert, weight=routing.weight.cpu(), token_N=token_N.cpu())
    return padded(report, n_tokens, width)[0].short()  # type: ignore[arg-type]
