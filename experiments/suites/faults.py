"""Fault injection: train small models with a known fault, and see which alarms of the doctor say so.

A fault is a setting that is wrong from the beginning, or something that happens to the model or the text at step
`BREAKS`. Every faulty run has a healthy twin of the same seed: an alarm of a kind that the fault should raise, after
the fault began, is right; any alarm of a healthy run is wrong. What a fault does to the loss shows where the running
median of the difference to the twin first stays above what two healthy seeds differ by.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moe.analysis.doctor import Doctor
from moe.config.parse import to_dict
from moe.config.run import Config, build
from moe.data.loader import Batch, Loader
from moe.data.prepare import prepare
from moe.data.shards import Dataset
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.model.transformer import Transformer
from moe.run.machine import set_threads
from moe.run.summary import Alarm, MetricsLine
from moe.train.optimizer import build_optimizer
from moe.train.recorder import fair_loads
from moe.train.state import State
from moe.train.step import take_step

STEPS, BREAKS = 500, 250
LATE = "verse"  # the domain that appears late
SMOOTH = 15  # steps of a running median
BASE = {
    "tokenizer": {"name": "byte"},
    "data": {"max_mb": 0.5},
    "model": {
        "context": 64, "n_layers": 2, "d_model": 48, "n_heads": 2, "d_ff": 96, "init_std": 0.1,
        "moe": {"n_experts": 8, "k": 2, "d_expert": 32},
    },
    "optim": {"lr": 0.006, "warmup": 20},
    "train": {"steps": STEPS, "batch_size": 16, "threads": 1, "precision": "fp32", "device": "cpu"},
    "log": {"every": 5},
    "dispatch": "torch",
}  # fmt: skip
# The healthy runs: routers with what conf/router has them with.
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "switch": {
        "router": {"renormalize": False, "jitter": 0.01}, "balance": {"capacity": 1.25}, "model": {"moe": {"k": 1}}
    },
    "noisy": {"router": {"noisy": True}, "balance": {"aux": 0.0, "z": 0.0, "importance": 0.1, "load": 0.1}},
    "sigmoid": {"router": {"name": "sigmoid"}},
    "sigmoid-bias": {
        "router": {"name": "sigmoid", "renormalize": True, "selection_bias": True},
        "balance": {"aux": 0.0, "z": 0.0, "bias_rate": 0.01},  # 0.001 evens out too slowly for so few steps
    },
}  # fmt: skip


class Hooks(NamedTuple):
    """What happens to a run besides its settings; steps count from 1."""

    before: Callable[[Transformer, int], None] = lambda model, step: None
    after: Callable[[Transformer, int, list[Tensor]], None] = lambda model, step, routers: None  # their weights before
    late: bool = False  # whether LATE has no text until BREAKS


class Fault(NamedTuple):
    """One thing that goes wrong."""

    name: str
    expects: tuple[str, ...]  # kinds of alarms, any of which says so
    router: str = "softmax"
    begins: int = 1  # step
    break_settings: Callable[[Config], None] = lambda cfg: None
    hooks: Hooks = Hooks()


def weights(router: nn.Module) -> nn.Parameter:
    """A linear router's."""
    parameter = router.w_ED
    assert isinstance(parameter, nn.Parameter), type(router)
    return parameter


def poison(model: Transformer, step: int) -> None:
    """At BREAKS, one expert's output becomes 300 times as large."""
    if step == BREAKS:
        mlp = model.blocks[-1].mlp
        assert isinstance(mlp, MoELayer), "the last layer has experts"
        assert isinstance(mlp.experts, Experts), "of one width"
        mlp.experts.w_down_EDF.data[0] *= 300


def faster(model: Transformer, step: int, before: list[Tensor]) -> None:
    """Routers go 30 times as far as the optimiser has them go."""
    for router, weight in zip(model.routers(), before, strict=True):
        weights(router).data += 29 * (weights(router).data - weight)


def rounded(model: Transformer, step: int, before: list[Tensor]) -> None:
    """Routers' weights are kept in bf16: what is smaller than a step of it is lost."""
    for router in model.routers():
        weights(router).data.copy_(weights(router).data.bfloat16())


def setting(group: str, **values: float) -> Callable[[Config], None]:
    """Set what no validated config would."""

    def assign(cfg: Config) -> None:
        for name, value in values.items():
            setattr(getattr(cfg, group), name, value)

    return assign


UNEVEN = ("dead experts", "starved experts", "uneven load", "an expert hardly learns")
FAULTS = (
    Fault("no balance loss", UNEVEN, break_settings=setting("balance", aux=0.0, z=0.0)),
    Fault("balance of the wrong sign", UNEVEN, break_settings=setting("balance", aux=-0.01)),
    Fault(
        "router's learning rate x 30", (*UNEVEN, "router without doubt", "logits grow"), hooks=Hooks(after=faster)
    ),
    Fault("a poisoned expert", ("loss spike", *UNEVEN), begins=BREAKS, hooks=Hooks(before=poison)),
    Fault("a router in bf16", UNEVEN, hooks=Hooks(after=rounded)),
    Fault(
        "a domain that appears late", ("loss spike", "uneven load"), router="switch",
        begins=BREAKS, hooks=Hooks(late=True),
    ),
    Fault(
        "bias rate x 30", ("bias runs away", *UNEVEN), router="sigmoid-bias",
        break_settings=setting("balance", bias_rate=0.3),
    ),
    Fault("no z-loss, large initial router", ("logits grow", "router without doubt"),
          break_settings=setting("balance", z=0.0), hooks=Hooks(before=lambda model, step: enlarge(model, step))),
)  # fmt: skip


def enlarge(model: Transformer, step: int) -> None:
    """At the first step, routers' weights become 20 times as large."""
    if step == 1:
        for router in model.routers():
            weights(router).data *= 20


def config(router: str, seed: int, steps: int = STEPS) -> Config:
    """The settings of a healthy run of so many steps."""
    tree: dict[str, Any] = copy.deepcopy(BASE)
    tree["train"]["steps"] = steps
    tree["optim"]["warmup"] = min(tree["optim"]["warmup"], steps)
    for group, values in ROUTERS[router].items():
        for name, value in values.items():
            place = tree.setdefault(group, {})
            place[name] = place.get(name, {}) | value if isinstance(value, dict) else value
    return build(tree | {"seed": seed})


def train(cfg: Config, dataset: Dataset, hooks: Hooks = Hooks()) -> list[MetricsLine]:  # noqa: B008 — immutable
    """Train in memory; the lines that metrics.jsonl would have."""
    cfg = build(to_dict(cfg)) if cfg.balance.aux >= 0 else cfg  # a copy, where it can be one
    cfg.model.vocab_size = dataset.tokenizer.vocab_size
    set_threads(cfg.train)
    torch.manual_seed(cfg.seed)
    model = Transformer(cfg.model, cfg.router, cfg.balance).initialize(cfg.seed)
    loader = Loader(dataset.split("train"), cfg.train.batch_size, cfg.model.context, cfg.seed)
    state = State(model, build_optimizer(model, cfg.optim), loader)
    lines = []
    for step, batch in enumerate(batches(cfg, dataset, hooks.late), 1):
        hooks.before(model, step)
        before = [weights(router).data.clone() for router in model.routers()]
        lines.append(take_step(state, batch, cfg, Path("none"))[0])
        hooks.after(model, step, before)
    return lines


def alarms_of(cfg: Config, lines: list[MetricsLine]) -> list[Alarm]:
    """What the doctor says of them."""
    doctor = Doctor(fair_loads(cfg))
    return [alarm for line in lines for alarm in doctor.read(line)]


def losses_of(lines: list[MetricsLine]) -> np.ndarray:
    """Of the text, by step."""
    return np.array([line.lm_loss for line in lines])


def batches(cfg: Config, dataset: Dataset, late: bool) -> Iterator[Batch]:
    """Windows drawn evenly from the training text; with `late` none of LATE before BREAKS."""
    split, context = dataset.split("train"), cfg.model.context
    generator = np.random.default_rng(cfg.seed)
    number = dataset.domains.index(LATE)
    for step in range(1, cfg.train.steps + 1):
        kept: list[np.ndarray] = []
        while sum(len(part) for part in kept) < cfg.train.batch_size:
            starts = generator.integers(0, split.n_tokens - context - 1, 4 * cfg.train.batch_size)
            if late and step < BREAKS:
                starts = starts[(split.read(starts, context)[1] != number).all(1)]
            kept.append(starts)
        tokens_BS1, domain_BS = split.read(np.concatenate(kept)[: cfg.train.batch_size], context)
        tokens = torch.from_numpy(tokens_BS1)
        yield Batch(tokens[:, :-1], tokens[:, 1:], torch.from_numpy(domain_BS))


def running_median(values: np.ndarray) -> np.ndarray:
    """Over the last SMOOTH values, or as many as there are."""
    return np.array([statistics.median(values[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(values))])


def shows_at(losses: np.ndarray, twin: np.ndarray, spread: float) -> int | None:
    """The first step from which the loss stays above the twin's by more than `spread` for SMOOTH steps; None for
    never."""
    above = running_median(losses - twin) > spread
    for step in range(len(above) - SMOOTH + 1):
        if above[step : step + SMOOTH].all():
            return step + 1
    return None


class Row(NamedTuple):
    """What one run with a fault, or a healthy one (fault ""), was said of."""

    fault: str
    router: str
    seed: int
    alarms: list[Alarm]
    rightly: int | None  # step of the first alarm that the fault should raise
    shows: int | None  # step at which the loss shows it
    final: float  # loss of the last SMOOTH steps, less the healthy twin's


def measure(
    seeds: list[int], say: Callable[[str], None], steps: int = STEPS, dataset: Dataset | None = None
) -> list[Row]:
    """Train every router of ROUTERS healthily and every fault, with each of the seeds, for so many steps."""
    dataset = dataset or prepare(config("softmax", 0).data, config("softmax", 0).tokenizer, say)
    rows, healthy = [], {}
    for router in ROUTERS:
        for seed in seeds:
            cfg = config(router, seed, steps)
            lines = train(cfg, dataset)
            healthy[router, seed] = losses_of(lines)
            rows.append(Row("", router, seed, alarms_of(cfg, lines), None, None, 0.0))
            say(f"healthy {router}, seed {seed}: {told(rows[-1].alarms)}")
    for fault in FAULTS:
        for seed in seeds:
            cfg = config(fault.router, seed, steps)
            fault.break_settings(cfg)
            lines = train(cfg, dataset, fault.hooks)
            losses, twin, alarms = losses_of(lines), healthy[fault.router, seed], alarms_of(cfg, lines)
            # What seeds differ by, once all have learnt the first things.
            others = [healthy[fault.router, other] for other in seeds if other != seed]
            gaps = [np.abs(running_median(twin - other))[min(BREAKS, steps) // 2 :].max() for other in others]
            right = [alarm.step for alarm in alarms if alarm.kind in fault.expects and alarm.step >= fault.begins]
            shows = shows_at(losses, twin, max([0.02, *gaps]))
            final = float(np.median(losses[-SMOOTH:]) - np.median(twin[-SMOOTH:]))
            rows.append(Row(fault.name, fault.router, seed, alarms, min(right, default=None), shows, final))
            say(f"{fault.name}, seed {seed}: {told(alarms)}; the loss shows it at {shows}, and ends {final:+.3f}")
    return rows


def told(alarms: list[Alarm]) -> str:
    """Alarms in a line."""
    return ", ".join(f"{alarm.kind} (layer {alarm.layer}, step {alarm.step})" for alarm in alarms) or "no alarm"
