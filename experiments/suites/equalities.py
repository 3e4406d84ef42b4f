"""Suite equalities: training on several ranks against one process, layout by layout, router by router.

Tiny models in float64 (float32 in Triton's interpreter) take the same steps on the same tokens, alone and on 2 or 4
local ranks. A row's numbers are the largest relative errors: of the losses (absolute below 1), of every named gradient
of the first step (Frobenius), of the gradients' norm, of the parameters after the last step; and whether counts were
equal at every step.

    python -m experiments.bench suite=equalities out=experiments/results/equalities.jsonl
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra

from experiments import cli
from experiments.suites.cases import Case, Wrong
from experiments.suites.local_ranks import LocalRanks
from experiments.suites.timing import relative_error
from moe.config.parallel import Layout, ParallelConfig
from moe.config.run import Config
from moe.data.loader import Batch, rows_of_rank
from moe.model.transformer import Transformer
from moe.parallel.collectives import this_rank
from moe.parallel.gradients import whole
from moe.parallel.mesh import build_meshes
from moe.train.optimizer import build_optimizer, set_learning_rates
from moe.train.step import clip, compute_gradients, update_routers

HEADINGS = ("router", "backend", "ranks", "replicate x shard, ep", "loss", "gradients", "norm", "parameters", "counts")
LAYOUTS = (
    Layout(1, 2, 1), Layout(1, 2, 2), Layout(2, 1, 1),
    Layout(1, 4, 1), Layout(1, 4, 2), Layout(1, 4, 4), Layout(2, 2, 1), Layout(2, 2, 2), Layout(4, 1, 1),
)  # fmt: skip
SMALL = [
    "model=cpu-nano", "model.vocab_size=61", "model.d_model=16", "model.n_layers=2", "model.n_heads=2",
    "model.n_kv_heads=2", "model.d_ff=24", "model.context=16", "train.batch_size=8", "train.steps=20",
    "optim.warmup=2", "optim.lr=0.003", "train.precision=fp32", "train.device=cpu", "log.doctor=true",
]  # fmt: skip
TOLERANCE = {"reference": 1e-12, "torch": 1e-12, "triton": 1e-5}


class Settings(NamedTuple):
    """What is compared."""

    device: torch.device
    routers: tuple[str, ...]
    backends: tuple[str, ...]
    layouts: tuple[Layout, ...]
    steps: int


@dataclass
class Trace:
    """What some steps did, in whole tensors."""

    losses: list[dict[str, float]]
    norms: list[float]
    gradients: dict[str, torch.Tensor]  # of the first step
    parameters: dict[str, torch.Tensor]  # and buffers, after the last
    counts: list[list[torch.Tensor]]  # by step and MoE layer


def settings(device: torch.device, full: bool, rounds: int) -> Settings:
    """Every router on the torch backend in every layout, and on the reference where experts are shared out over two
    copies; in small some of them."""
    routers = tuple(sorted(path.stem for path in (cli.CONF / "router").glob("*.yaml")))
    if not full:
        return Settings(device, ("softmax", "sinkhorn"), ("torch",), (Layout(1, 2, 2),), 2)
    return Settings(device, routers, ("torch", "reference"), LAYOUTS, 20)


def cases(asked: Settings) -> Iterator[Case]:
    """A case for each router, backend and layout."""
    for router in asked.routers:
        for backend in asked.backends:
            for layout in asked.layouts if backend == "torch" else asked.layouts[-2:-1]:
                key = {"suite": "equalities", "router": router, "backend": backend, **layout._asdict()}
                yield Case(key, functools.partial(measured, router, backend, layout, asked.steps))


@functools.cache
def config(router: str, backend: str, *changes: str, words: tuple[str, ...] = tuple(SMALL)) -> Config:
    """Small settings (`words`) with a router of conf/router and the balance it comes with."""
    cli.register("train", Config)
    running = GlobalHydra.instance().is_initialized()  # as it is inside a command
    overrides = [f"router={router}", *words, f"dispatch={backend}", *changes]
    if running:
        return cli.typed(cli.compose("train", Config, overrides), Config)
    with hydra.initialize_config_dir(str(cli.CONF), version_base=None):
        return cli.typed(cli.compose("train", Config, overrides), Config)


@functools.cache
def local_ranks(n: int) -> LocalRanks:
    """The ranks of all cases with so many."""
    return LocalRanks(n)


def measured(router: str, backend: str, layout: Layout, steps: int) -> dict[str, Any]:
    """One row."""
    cfg = config(router, backend)
    n = layout.replicate * layout.shard
    row = compared(alone(router, backend, steps), local_ranks(n).call(trained, cfg, layout, steps)[0])
    worst = max(row["loss"], row["gradients"], row["parameters"])
    if not (worst <= TOLERANCE[backend] and row["counts"]):
        raise Wrong(f"{row}")
    return row


@functools.cache
def alone(router: str, backend: str, steps: int) -> Trace:
    """The steps in this process."""
    return trained(config(router, backend), Layout(), steps)


def trained(cfg: Config, layout: Layout, steps: int) -> Trace:
    """Take steps of a tiny model on tokens that the step alone decides, on all ranks that there are."""
    ranks, torch_state = this_rank(), torch.get_rng_state()
    torch.manual_seed(5)
    model = model_of(cfg, layout, torch.float32 if cfg.dispatch == "triton" else torch.float64)
    optimizer = build_optimizer(model, cfg.optim)
    trace = Trace([], [], {}, {}, [])
    for step in range(steps):
        batch = of_rank(batch_of(cfg, step), ranks.rank, ranks.n, cfg.train.accumulate)
        set_learning_rates(optimizer, cfg.optim, step + 1, cfg.train.steps)
        gradients = compute_gradients(model, batch, cfg, step / cfg.train.steps, measured=True)
        if step == 0:
            trace.gradients = {
                name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None
            }
        if cfg.optim.clip:
            clip(model, gradients.norm, cfg.optim.clip)
        optimizer.step()
        update_routers(model, gradients.routing, cfg.balance, step / cfg.train.steps)
        optimizer.zero_grad(set_to_none=True)
        trace.losses.append({"total": gradients.total, "lm": gradients.lm_loss, **gradients.losses})
        trace.norms.append(gradients.norm)
        trace.counts.append([layer.count_E.clone() for layer in gradients.routing])
    trace.parameters = {name: whole(value).clone() for name, value in model.state_dict().items()}
    torch.set_rng_state(torch_state)
    return trace


def model_of(cfg: Config, layout: Layout, dtype: torch.dtype) -> Transformer:
    """An initial model, on the ranks that there are."""
    model = Transformer(cfg.model, cfg.router, cfg.balance).initialize(3).to(dtype)
    if this_rank().n > 1:
        from moe.train.parallelize import parallelize  # here, because a process of its own need not import FSDP

        parallelize(model, build_meshes(layout, "cpu"), ParallelConfig(*layout), cfg.train.compile)
    return model


def batch_of(cfg: Config, step: int) -> Batch:
    """A step's whole batch."""
    shape = cfg.train.batch_size, cfg.model.context + 1
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, cfg.model.vocab_size, shape, generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(tokens.shape, dtype=torch.uint8))


def of_rank(batch: Batch, rank: int, n_ranks: int, accumulate: int) -> Batch:
    """A rank's rows of a batch."""
    rows = rows_of_rank(len(batch.tokens_BS), rank, n_ranks, accumulate)
    return Batch(batch.tokens_BS[rows], batch.targets_BS[rows], batch.domain_BS[rows])


def compared(one: Trace, many: Trace) -> dict[str, Any]:
    """The largest relative errors, and whether every expert got the same rows."""
    assert one.gradients.keys() == many.gradients.keys(), "other weights have gradients"
    errors = {name: relative_error(many.gradients[name], one.gradients[name]) for name in one.gradients}
    parameters = {name: relative_error(many.parameters[name], one.parameters[name]) for name in one.parameters}
    losses = [
        abs(of_many[name] - value) / max(abs(value), 1.0)
        for of_one, of_many in zip(one.losses, many.losses, strict=True)
        for name, value in of_one.items()
    ]
    counts = zip(one.counts, many.counts, strict=True)
    return {
        "loss": max(losses),
        "gradients": max(errors.values()),
        "worst": max(errors, key=lambda name: errors[name]),
        "norm": max(abs(b / a - 1) for a, b in zip(one.norms, many.norms, strict=True)),
        "parameters": max(parameters.values()),
        "counts": all(torch.equal(a, b) for of_one, of_many in counts for a, b in zip(of_one, of_many, strict=True)),
        "steps": len(one.losses),
    }


SUMMARY = ("router", "layouts", "on the reference", "losses", "gradients", "norm", "parameters", "counts")


def summary(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each router: the largest of its errors over all layouts."""
    by_router: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_router.setdefault(row["router"], []).append(row)
    lines: list[tuple[str, ...]] = []
    for router, its in by_router.items():
        done = [row for row in its if row["status"] == "measured"]
        if len(done) < len(its):
            lines.append((router, f"{len(done)} of {len(its)}", "", "", "", "", "", ""))
            continue
        numbers = (f"{max(row[name] for row in done):.0e}" for name in ("loss", "gradients", "norm", "parameters"))
        layouts, reference = (sum(row["backend"] == backend for row in done) for backend in ("torch", "reference"))
        equal = "equal" if all(row["counts"] for row in done) else "differ"
        lines.append((router, str(layouts), str(reference), *numbers, equal))
    return lines


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row."""
    sizes = f"{row['replicate']} x {row['shard']}, {row['ep']}"
    head = row["router"], row["backend"], str(row["replicate"] * row["shard"]), sizes
    if row["status"] != "measured":
        return *head, row["status"], "", "", "", row["error"][:40]
    numbers = (f"{row[name]:.0e}" for name in ("loss", "gradients", "norm", "parameters"))
    return *head, *numbers, "equal" if row["counts"] else "differ"
