"""Suite layer: the experts of one MoE layer, forward and backward, ours against everyone else's.

A row is one contestant at one shape under one load, taking turns with our kernels and with a balanced `torch.bmm` of
the same FLOPs. What is timed is plan, experts and combine from given choices; the router is not. Backward is the time
of forward and backward less that of forward, as the peers' own benchmarks have it.

    python -m experiments.bench suite=layer                       # on a GPU -> runs/bench
    python -m experiments.gpu_evidence --out DIR --stage layer    # the same rows -> DIR/gpu-layer.jsonl
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.pages import tables
from experiments.suites import peers, timing
from experiments.suites import shapes as floors
from experiments.suites.cases import Absent, Case, Wrong, absent
from experiments.suites.shapes import Rate, Shape
from experiments.suites.timing import Ceilings

LOADS = ("uniform", "zipf", "recorded")
NO_COUNTS = "no recorded counts were given: counts=RUN/routing/counts.jsonl of a run"
HEADINGS = (
    "shape", "load", "experts of", "forward TF/s", "backward TF/s", "of matmul peak", "of bmm", "ours is",
    "saved B/token", "peak MiB", "error of y, dx, dw", "targets",
)  # fmt: skip


@dataclass
class Settings:
    """What the suite goes through."""

    device: torch.device
    ceilings: Ceilings
    shapes: dict[str, Shape] = field(default_factory=lambda: floors.SHAPES)
    loads: Sequence[str] = LOADS
    counts: Path | None = None  # a run's routing/counts.jsonl, for the recorded load
    names: Sequence[str] = tuple(peers.PEERS)
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 5
    seconds: float = 0.2  # of calls per contestant


def settings(device: torch.device, full: bool, rounds: int = 5, **given: Any) -> Settings:
    """The five shapes, or what the interpreter does in seconds, with what is `given`; the roofs are measured."""
    ceilings = timing.ceilings(device, full=full)
    if full:
        return Settings(device, ceilings, rounds=rounds, **given)
    return Settings(device, ceilings, floors.SMOKE, rounds=1, seconds=0.0, **given)


def cases(settings: Settings) -> Iterator[Case]:
    """What is not here (a peer's packages, recorded counts) in a row each; then our own rows, of every shape; then the
    peers' by shape: a short budget leaves peers out."""
    why = {name: peers.missing(name) for name in settings.names}
    for name in settings.names:
        if why[name]:
            yield absent(_key(settings, "every", "every", name), f"{why[name]} not installed")
    loads = [load for load in settings.loads if load != "recorded" or settings.counts]
    if len(loads) < len(settings.loads):
        yield absent(_key(settings, "every", "recorded", "every"), NO_COUNTS)
    layers = [Layer(settings, name, load) for load in loads for name in settings.shapes]
    ours = [name for name in settings.names if not why[name] and name == peers.OURS]
    others = [name for name in settings.names if not why[name] and name != peers.OURS]
    for names in (ours, others):
        for layer in layers:
            for name in names:
                yield Case(_key(settings, layer.name, layer.load, name), functools.partial(layer.measure, name))
            layer.forget()


def _key(settings: Settings, shape: str, load: str, contestant: str) -> dict[str, Any]:
    dtype = str(settings.dtype).removeprefix("torch.")
    return {"suite": "layer", "shape": shape, "load": load, "contestant": contestant, "dtype": dtype}


class Layer:
    """Inputs of one shape under one load, made when first needed, and what is measured on them."""

    def __init__(self, settings: Settings, name: str, load: str) -> None:
        self.settings, self.name, self.shape, self.load = settings, name, settings.shapes[name], load

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (T, D), w_up (E, 2F, D), w_down (E, D, F), expert (T, K), weight (T, K), dout (T, D): random, of unit
        scale."""
        (t, d, f, e, k), device, dtype = self.shape, self.settings.device, self.settings.dtype
        torch.manual_seed(0)
        draw = lambda *shape, scale=1.0: (torch.randn(*shape, device=device, dtype=dtype) * scale).requires_grad_()
        expert = choices(self.shape, self.load, device, self.settings.counts)
        weight = torch.rand(t, k, device=device).add_(0.1)
        weight = (weight / weight.sum(1, keepdim=True)).requires_grad_()
        x, w_up, w_down = draw(t, d), draw(e, 2 * f, d, scale=d**-0.5), draw(e, d, f, scale=f**-0.5)
        return x, w_up, w_down, expert, weight, torch.randn(t, d, device=device, dtype=dtype)

    @functools.cached_property
    def expected(self) -> peers.Expected:
        """The reference's answer, in float32, or in float64 on a CPU."""
        dtype = torch.float32 if self.settings.device.type == "cuda" else torch.float64
        return peers.expected(*self.inputs, dtype)

    def forget(self) -> None:
        """Free the tensors: the next shape needs the room."""
        self.__dict__.pop("inputs", None)
        self.__dict__.pop("expected", None)

    def measure(self, contestant: str) -> dict[str, Any]:
        """One row. Raises `Wrong` for a contestant whose results are, and `Absent` without recorded counts."""
        # What is not right is not timed.
        peer, device, shape = peers.PEERS[contestant], self.settings.device, self.shape
        x, w_up, w_down, expert, weight, dout = self.inputs
        with torch.no_grad():
            weights = peer.layout(w_up, w_down)
        weights = weights[0].detach().requires_grad_(), weights[1].detach().requires_grad_()
        errors = peers.check(peer.run, weights, (x, expert, weight), dout, self.expected, peer.tolerance)

        # Everything in turns: the contestant, ours beside a peer (or as a graph), and the FLOPs as balanced bmm.
        def pair(run: peers.Experts, weights: tuple[Tensor, Tensor]) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
            forward = lambda: run(x, *weights, expert, weight)
            return forward, lambda: torch.autograd.grad(forward(), (x, *weights, weight), dout)

        forward, forward_backward = pair(peer.run, weights)
        functions: dict[str, Callable[[], Any]] = {"forward": forward, "both": forward_backward}
        if contestant != peers.OURS:
            functions["our forward"], functions["our both"] = pair(peers.PEERS[peers.OURS].run, (w_up, w_down))
        elif device.type == "cuda":
            functions["graph"] = replayed(forward, device)
        functions["bmm forward"], functions["bmm backward"] = balanced_bmm(shape, device, self.settings.dtype)
        median = timing.medians(functions, device, self.settings.rounds, self.settings.seconds)

        # How even the load was, rates against the roofs, and the memory that a call needs and keeps.
        count_E = expert.flatten().bincount(minlength=shape.E)
        row = {
            **shape._asdict(),
            "errors": errors,
            "most_over_mean_load": count_E.max().item() * shape.E / count_E.sum().item(),
            "ceilings": self.settings.ceilings._asdict(),
            "peak_bytes": timing.peak_bytes(forward_backward, device),
            "saved_bytes_per_token": timing.saved_bytes(forward, weights) / shape.T,
            "held_bytes": timing.held_bytes(forward, device),
            **rates(shape, median, self.settings.ceilings),
        }
        return row | {"targets": targets(self.name, contestant, shape, row)}


def rates(shape: Shape, median: dict[str, float], ceilings: Ceilings) -> dict[str, Any]:
    """Seconds, TF/s and shares from the medians of forward, both, bmm forward and bmm backward (and our own)."""
    backward_s = median["both"] - median["forward"]
    forward = floors.forward_flops(shape) / median["forward"]
    backward = floors.backward_flops(shape) / backward_s if backward_s > 0 else math.nan  # less than the clock sees
    bmm_forward = floors.forward_flops(shape) / median["bmm forward"]
    bmm_backward = floors.backward_flops(shape) / median["bmm backward"]
    row = {
        "forward_s": median["forward"], "backward_s": backward_s, "both_s": median["both"],
        "forward_tf": forward / 1e12, "backward_tf": backward / 1e12,
        "bmm_forward_tf": bmm_forward / 1e12, "bmm_backward_tf": bmm_backward / 1e12,
        "forward_of_bmm": forward / bmm_forward, "backward_of_bmm": backward / bmm_backward,
        "forward_of_peak": forward / ceilings.matmul, "backward_of_peak": backward / ceilings.matmul,
        "graph_forward_s": median.get("graph"),
        "graph_forward_tf": floors.forward_flops(shape) / median["graph"] / 1e12 if "graph" in median else None,
    }  # fmt: skip
    if "our both" in median:
        row["our_forward_s"], row["our_both_s"] = median["our forward"], median["our both"]
        row["ours_over_this"] = median["both"] / median["our both"]
    return row


def targets(name: str, contestant: str, shape: Shape, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What a row has to reach, and whether it does. TF/s, shares of bmm and saved bytes are promised of our own rows;
    the speed over a peer is in the peer's. Only the shapes of `floors.SHAPES` have targets."""
    if name not in floors.SHAPES:
        return []
    if contestant in floors.OVER_PEER:
        return [floors.target(f"speed over {contestant}", row["ours_over_this"], floors.OVER_PEER[contestant])]
    if contestant != peers.OURS:
        return []
    saved = row["saved_bytes_per_token"]
    goals = [floors.target("saved bytes per token", saved, floors.saved_bytes(shape), at_most=True)]
    for way in Rate._fields:
        goals.append(floors.target(f"{way} of bmm", row[f"{way}_of_bmm"], getattr(floors.OF_BMM, way)))
        for kind, table in (("promise", floors.PROMISE), ("moonshot", floors.MOONSHOT)):
            goals.append(floors.target(f"{kind} {way} TF/s", row[f"{way}_tf"], getattr(table[name], way)))
    return goals


def choices(shape: Shape, load: str, device: torch.device, counts: Path | None = None) -> Tensor:
    """(T, K) int64: distinct experts for every token, drawn with equal chances, with chances of 1, 1/2, 1/3, ... (zipf)
    or in proportion to the last step of a run's recorded counts. Raises `Absent` when there are none."""
    chance_E = torch.ones(shape.E)
    if load == "zipf":
        chance_E = 1 / torch.arange(1, shape.E + 1)
    elif load == "recorded":
        chance_E = recorded(counts, shape.E)
    # The K largest of log p + Gumbel noise are K draws without replacement.
    noise_TE = -torch.empty(shape.T, shape.E, device=device).exponential_().log()
    return (noise_TE + chance_E.to(device).log()).topk(shape.K).indices


def recorded(counts: Path | None, n_experts: int) -> Tensor:
    """(E,) chances from the last line of a run's routing/counts.jsonl: its last layer's loads, largest first, drawn out
    or thinned to `n_experts`."""
    if counts is None:
        raise Absent(NO_COUNTS)
    try:
        load = json.loads(counts.read_text().splitlines()[-1])["counts"][-1]
    except (OSError, LookupError, ValueError, TypeError) as error:
        raise Absent(f"{counts.name} has no recorded counts ({type(error).__name__})") from None
    sorted_E = torch.tensor(sorted(load, reverse=True), dtype=torch.float32)
    return torch.nn.functional.interpolate(sorted_E[None, None], n_experts, mode="linear")[0, 0] + 1e-3


def balanced_bmm(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward as batched matmuls over experts with equal rows: the same FLOPs without routing, gathers,
    activations or combine. Gate and up lie side by side in one bmm, which is no slower than two."""
    _, d, f, e, _ = shape
    rows = max(1, shape.T * shape.K // e)
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    x, z, h, dy = draw(e, rows, d), draw(e, rows, 2 * f), draw(e, rows, f), draw(e, rows, d)
    w_up, w_down = draw(e, 2 * f, d), draw(e, d, f)
    forward = lambda: (torch.bmm(x, w_up.mT), torch.bmm(h, w_down.mT))
    backward = lambda: (torch.bmm(dy, w_down), torch.bmm(dy.mT, h), torch.bmm(z, w_up), torch.bmm(z.mT, x))
    return forward, backward


def replayed(forward: Callable[[], Tensor], device: torch.device) -> Callable[[], Any]:
    """Our forward without gradients as a CUDA graph. Raises `Wrong` when a replay does not give what the call gives."""
    with torch.no_grad():
        graph, want = timing.captured(forward, device), forward()
    assert graph is not None
    graph.result.fill_(math.nan)
    graph.replay()
    if not torch.equal(graph.result, want):
        raise Wrong("a replay of the captured forward differs from the call")
    return graph.replay


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row."""
    head = row["shape"], row["load"], row["contestant"]
    if row["status"] != "measured":
        return *head, row["status"], *[""] * 7, row["error"][:60]
    two_ways = lambda what, form: ", ".join(tables.number(row[f"{way}_{what}"], form) for way in Rate._fields)
    missed = [target["what"] for target in row["targets"] if not target["met"]]
    return (
        *head,
        tables.number(row["forward_tf"], ",.1f"),
        tables.number(row["backward_tf"], ",.1f"),
        two_ways("of_peak", ".2f"),
        two_ways("of_bmm", ".2f"),
        tables.number(row.get("ours_over_this"), ".2f", "×"),
        f"{row['saved_bytes_per_token']:,.0f}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
        ", ".join(f"{error:.1e}" for error in row["errors"].values()),
        f"missed: {', '.join(missed)}" if missed else "met" if row["targets"] else "",
    )
