"""Ways of routing on more and more GPUs, and which constants of the simulator matter."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.stats.cluster import MachineConfig, check_layout
from experiments.stats.step_time import Ask, Step, Work, step
from experiments.stats.traffic import Traffic, draw, dropped, traffic
from moe.config.parallel import Layout
from moe.errors import BadInput

K_GROUPS = 4  # nodes of a token in node-limited routing, as DeepSeek-V3
CHANGE = 0.2  # of a constant, in the table of what matters


class Loads(NamedTuple):
    """Where routes come from: every way of routing gets them from here."""

    name: str
    zipf: float = 0.0  # drawn: see `experiments.stats.traffic.draw`
    expert_TLK: np.ndarray | None = None  # recorded


class Line(NamedTuple):
    """A way of routing on so many GPUs."""

    gpus: int
    replicate: int
    shard: int
    ep: int
    routing: str
    loads: str
    nodes: float  # that a token's row goes to, its own included
    imbalance: float  # rows of the most loaded rank over their mean
    dropped: float  # share of rows
    exchange: float  # share of the step's seconds, if nothing were hidden
    seconds: float
    forward: float
    tokens_per_second: float  # of one GPU
    tflops: float
    memory: float
    fits: bool  # one GPU holds that
    slower: float  # seconds over those of plain routing with even loads, less 1


class Effect(NamedTuple):
    """What a step does when a constant changes, as a share of its seconds."""

    what: str
    lower: float
    higher: float


def layout(gpus: int, n_experts: int, machine: MachineConfig, most_ep: int = 64, most_shard: int = 512) -> Layout:
    """Ranks for so many GPUs: experts over as many as there are, up to `most_ep`, weights up to `most_shard`, copies
    beyond. Raises `BadInput` where they do not divide."""
    shard = min(gpus, most_shard)
    fits = lambda ep: not shard % ep and not n_experts % ep and not max(ep, machine.gpus) % min(ep, machine.gpus)
    ep = max(ep for ep in range(1, min(shard, most_ep, n_experts or 1) + 1) if fits(ep))
    if gpus % shard:
        raise BadInput(f"gpus={gpus} is not divisible by the {shard} that hold a copy between them.")
    return Layout(gpus // shard, shard, ep)


def routes_of(loads: Loads, n_tokens: int, n_experts: int, k: int, groups: int = 1, seed: int = 0) -> list[np.ndarray]:
    """Routes (T, K) of every layer that is told apart: of a recording all of its layers, else one that is drawn."""
    if loads.expert_TLK is not None:
        return list(loads.expert_TLK[:n_tokens].swapaxes(0, 1))
    return [draw(n_tokens, n_experts, k, loads.zipf, groups, min(K_GROUPS, groups), seed=seed)]


def even_step(work: Work, machine: MachineConfig, parallel: Layout, ask: Ask, k: int = 0, sample: int = 1024) -> Step:
    """A step of a model of `k` choices whose routes are drawn evenly, or of a dense one (0)."""
    moved, n_experts = [], max(layer.n_experts for layer in work.layers)
    check_layout(parallel, machine, n_experts)
    if n_experts:
        moved = [moved_by(machine, parallel, draw(sample * parallel.ep, n_experts, k), n_experts)]
    return step(work, machine, parallel, moved, sample, ask)


def compare(
    work: Work, machine: MachineConfig, parallel: Layout, ask: Ask, k: int, all_loads: Sequence[Loads],
    capacity: float, sample: int,
) -> list[Line]:  # fmt: skip
    """Plain routing, node-limited routing and a capacity factor, each with every kind of loads. A recording has no
    scores, and so no node-limited routes. `sample`: tokens of a rank that routes are drawn of, or taken from it. Raises
    `BadInput` for a recording that is shorter than there are ranks."""
    n_experts = max(layer.n_experts for layer in work.layers)
    check_layout(parallel, machine, n_experts)
    nodes = max(1, parallel.ep // machine.gpus)
    lines: list[Line] = []
    for loads in all_loads:
        sampled = sample
        if loads.expert_TLK is not None:
            sampled = min(sample, len(loads.expert_TLK) // parallel.ep)
            if not sampled:
                raise BadInput(
                    f"the trace has {len(loads.expert_TLK)} tokens, and parallel.ep={parallel.ep} needs one each."
                )
        # Every way of routing the same tokens.
        plain = routes_of(loads, sampled * parallel.ep, n_experts, k)
        ways = {"top-k": plain}
        if nodes > K_GROUPS and loads.expert_TLK is None:
            ways[f"{K_GROUPS} nodes"] = routes_of(loads, sampled * parallel.ep, n_experts, k, nodes)
        if capacity:
            ways[f"capacity {capacity:g}"] = [dropped(expert_TK, n_experts, capacity) for expert_TK in plain]
        for routing, layers in ways.items():
            moved = [moved_by(machine, parallel, expert_TK, n_experts) for expert_TK in layers]
            taken = step(work, machine, parallel, moved, sampled, ask)
            first = lines[0].seconds if lines else taken.seconds
            lines.append(line(machine, routing, loads.name, parallel, ask, layers, moved, sampled, taken, first))
    return lines


def moved_by(machine: MachineConfig, parallel: Layout, expert_TK: np.ndarray, n_experts: int) -> Traffic:
    """The traffic of routes in one expert group."""
    return traffic(expert_TK, n_experts, parallel.ep, min(parallel.ep, machine.gpus))


def line(
    machine: MachineConfig, routing: str, loads: str, parallel: Layout, ask: Ask, layers: Sequence[np.ndarray],
    moved: Sequence[Traffic], sampled: int, taken: Step, first: float,
) -> Line:  # fmt: skip
    """What came of a way of routing."""
    return Line(
        parallel.ranks(), parallel.replicate, parallel.shard, parallel.ep, routing, loads,
        nodes=float(np.mean([part.logical for part in moved])) / sampled,
        imbalance=taken.imbalance,
        dropped=float(np.mean([(expert_TK < 0).mean() for expert_TK in layers])) if "capacity" in routing else 0.0,
        exchange=taken.exchange / taken.seconds,
        seconds=taken.seconds,
        forward=taken.forward,
        tokens_per_second=ask.tokens * ask.micro / taken.seconds,
        tflops=taken.tflops,
        memory=taken.memory,
        fits=bool(taken.memory <= machine.memory),
        slower=taken.seconds / first - 1,
    )  # fmt: skip


def sensitivity(
    work: Work, machine: MachineConfig, parallel: Layout, ask: Ask, moved: Sequence[Traffic], sampled: int
) -> list[Effect]:
    """What a step does when a constant is a fifth lower, and a fifth higher; fractions of overlap, 0.2."""
    base = step(work, machine, parallel, moved, sampled, ask).seconds

    # A constant's change, by a factor, as the machine and the step that have it.
    def links(name: str) -> Callable[[float], tuple[MachineConfig, Ask]]:
        link = getattr(machine, name)
        change = lambda by: dataclasses.replace(link, bandwidth=link.bandwidth * by)
        return lambda by: (dataclasses.replace(machine, **{name: change(by)}), ask)

    def constants(*names: str) -> Callable[[float], tuple[MachineConfig, Ask]]:
        return lambda by: (dataclasses.replace(machine, **{name: getattr(machine, name) * by for name in names}), ask)

    def overlap(name: str) -> Callable[[float], tuple[MachineConfig, Ask]]:
        bounded = lambda by: min(1.0, max(0.0, getattr(ask, name) + by - 1))
        return lambda by: (machine, dataclasses.replace(ask, **{name: bounded(by)}))

    changes = {
        "network: bandwidth or efficiency": links("network"),
        "NVLink: bandwidth or efficiency": links("nvlink"),
        "matmuls: peak or efficiency, dense": constants(f"dense_{ask.matmul}"),
        "matmuls: peak or efficiency, experts": constants(f"experts_{ask.matmul}"),
        "memory: bandwidth": constants("hbm"),
        "launch of an all-to-all": constants("launch"),
        "overlap of all-to-alls": overlap("overlap_experts"),
        "overlap of shards": overlap("overlap_shards"),
    }
    # What the step takes with each, everything else as it was.
    effects = []
    for what, change in changes.items():
        changed = [change(by) for by in (1 - CHANGE, 1 + CHANGE)]
        taken = [step(work, other, parallel, moved, sampled, asked).seconds for other, asked in changed]
        effects.append(Effect(what, *(seconds / base - 1 for seconds in taken)))
    return effects
