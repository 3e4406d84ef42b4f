"""What a run's model itself has to be asked: what its experts are worth, which are alike, and how they came about."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe.analysis.decisions import router_information, top_k_mass
from moe.analysis.effects import Effect, Variant, effects, every_expert, keep, measure
from moe.analysis.interventions import Window, check
from moe.analysis.redundancy import Redundancy, redundancy
from moe.analysis.stability import Lookahead, OverTime, lookahead, over_checkpoints
from moe.analysis.trace import Recorder
from moe.analysis.tracing import What, windows_of_run
from moe.config.model import moe_layers
from moe.config.router import facts
from moe.errors import BadInput
from moe.model.transformer import Transformer
from moe.run.load import find_checkpoint, load_run

SHARES = (0.25, 0.125)  # of the experts, that are kept


class Decided(NamedTuple):
    """How decided a layer's router is, over all tokens; a router without scores has none."""

    layer: int  # among all layers
    information: float  # `decisions.router_information`, in nats
    top_k_mass: float  # `decisions.top_k_mass`
    n_experts: int


@dataclass(frozen=True)
class Probed:
    """The answers, all of the same text."""

    sampling: str
    importance: dict[tuple[int, int], Effect]  # every expert masked in turn, by (layer among all layers, expert)
    kept: dict[float, list[Effect]]  # by the share of the experts: by use, by each domain's use, and at random
    alike: list[Redundancy]  # by MoE layer
    lookahead: list[Lookahead]
    decided: list[Decided]
    over_time: OverTime | None  # None where the run has a single checkpoint


def allowed(model: Transformer, variant: Variant) -> bool:
    """Whether the model can be run so."""
    try:
        check(model, variant.changes)
    except BadInput:
        return False
    return True


def keep_few(model: Transformer, windows: Sequence[Window], domains: list[str]) -> dict[float, list[Effect]]:
    """The effects of keeping each of SHARES, where the router can do with so few."""
    told = {}
    for share in SHARES:
        with contextlib.suppress(BadInput):
            told[share] = keep(model, windows, domains, share)
    return told


@torch.inference_mode()
def decided(model: Transformer, windows: Iterable[Window]) -> list[Decided]:
    """Of every MoE layer what its tokens' probabilities say. Memory holds them: a float32 per token and expert, as
    masking every expert has for the losses."""
    layers, routers = moe_layers(model.cfg), model.routers()
    probs: dict[int, list[Tensor]] = {}
    with Recorder(model, 1) as recorder:
        for read_BS1, *_ in windows:
            recorder.decided.clear()
            model(torch.from_numpy(read_BS1[:, :-1]).to(next(model.parameters()).device))
            for layer, routing in zip(layers, recorder.decided, strict=True):
                if routing.logits_TE is not None:
                    probs.setdefault(layer, []).append(routing.prob_TE().float().cpu())
    told = []
    for layer, parts in probs.items():
        prob_TE, k = torch.cat(parts), min(routers[layers.index(layer)].k, parts[0].shape[1])
        told.append(Decided(layer, router_information(prob_TE), top_k_mass(prob_TE, k), prob_TE.shape[1]))
    return told


def probe(run: Path, which: str, what: What, trust: bool = False) -> Probed:
    """Ask the run's model at the checkpoint `which`. Masking every expert takes L · E passes over the text, each from
    the masked layer on. What a router cannot do without is not masked, and one that keeps no fixed number of experts is
    not asked about keeping few of them. Raises `BadInput` as `load_run` does, and for a dense model or a soft
    router."""
    model, tokenizer, cfg = load_run(run, which, trust)
    windows = windows_of_run(what, cfg, tokenizer)
    batches, domains = list(windows), windows.domains
    variants = [variant for variant in every_expert(model) if allowed(model, variant)]
    told = effects(measure(model, batches, domains, variants), variants) if variants else []
    importance = {(effect.changes[0].layer, effect.changes[0].experts[0]): effect for effect in told}
    maskable = facts(cfg.router).scored and all(router.fixed_k for router in model.routers())
    checkpoint = find_checkpoint(run / "checkpoints", which).name
    names = sorted((path.name for path in (run / "checkpoints").glob("step-*")), key=lambda name: int(name[5:]))
    names = names[: names.index(checkpoint) + 1]
    return Probed(
        windows.sampling,
        importance,
        keep_few(model, batches, domains) if maskable else {},
        redundancy(model, batches),
        lookahead(model, batches),
        decided(model, batches),
        over_checkpoints(run, what, names, trust) if len(names) > 1 else None,
    )
