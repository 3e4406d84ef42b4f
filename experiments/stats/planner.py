"""What a training run will take, before it is launched: memory, devices, time and money.

Memory comes from walking a step (`moe.model.memory`), time from FLOPs and a rate that was measured or is assumed; each
number says which. Nothing here trains.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy

from moe.config.run import Config
from moe.model.cost import Flops, Size, flops, size
from moe.model.memory import Memory, walk
from moe.train.optimizer import build_optimizer


class Device(NamedTuple):
    """What a device is sold as: bytes of memory, and dense bf16 FLOPs per second."""

    memory: float
    peak: float


# Vendors' data sheets; dense, without sparsity.
GPUS = {
    "a100-40": Device(40e9, 312e12),
    "a100-80": Device(80e9, 312e12),
    "h100": Device(80e9, 989e12),
    "h200": Device(141e9, 989e12),
    "b200": Device(180e9, 2250e12),
    "mi300x": Device(192e9, 1307e12),
}


@dataclass(frozen=True)
class Ask:
    """What is to be planned for."""

    tokens: float  # to train on
    devices: int = 1  # that share weights, gradients and optimiser state evenly
    copies: int = 1  # of the model, each shared by devices / copies
    batches: int = 1  # of train.batch_size that a step takes: one, or one for each device
    memory: float = 0.0  # bytes of one device; 0: unknown
    rate: float = 0.0  # FLOPs per second of one device in training; 0: unknown
    price: float = 0.0  # of one device for an hour; 0: unknown

    @property
    def sharing(self) -> int:
        """Devices that hold the state of one copy between them."""
        return self.devices // self.copies


@dataclass(frozen=True)
class Plan:
    """The answer, in bytes where it is memory."""

    size: Size
    flops: Flops
    memory: Memory  # of one device alone
    checkpointed: Memory  # the same with train.checkpoint_activations
    tokens: float
    steps: float
    total_flops: float
    state: int  # weights, their copies, gradients and optimiser state: what devices share
    held: float  # by one device, at its peak
    fits: bool | None  # None: nobody said how much memory there is
    devices_needed: int | None  # that hold the state between them, each with its activations; None where no number does
    seconds: float | None
    money: float | None
    advice: list[str]


def plan(cfg: Config, ask: Ask) -> Plan:
    """The plan of a run of `cfg`, whose vocabulary must be known."""
    train, model = cfg.train, cfg.model
    costs = flops(model, cfg.router)
    stepping = checkpointed = _walk(cfg, train.batch_size // train.accumulate, True)
    if not train.checkpoint_activations:
        stepping = _walk(cfg, train.batch_size // train.accumulate, False)
    total = costs.training * ask.tokens
    seconds = total / (ask.rate * ask.devices) if ask.rate else None
    fits = _held(stepping, ask.sharing) <= ask.memory if ask.memory else None
    return Plan(
        size=size(model, cfg.router),
        flops=costs,
        memory=stepping,
        checkpointed=checkpointed,
        tokens=ask.tokens,
        steps=ask.tokens / (train.batch_size * model.context * ask.batches),
        total_flops=total,
        state=_state(stepping),
        held=_held(stepping, ask.sharing),
        fits=fits,
        devices_needed=_devices(stepping, ask.memory),
        seconds=seconds,
        money=ask.price * ask.devices * seconds / 3600 if seconds and ask.price else None,
        advice=_advice(cfg, ask, checkpointed) if fits is False else [],
    )


def _walk(cfg: Config, batch_size: int, checkpoint_activations: bool, n_micro: int = 0) -> Memory:
    return walk(
        cfg.model,
        cfg.router,
        cfg.balance,
        batch_size,
        n_micro=n_micro or cfg.train.accumulate,
        precision="fp32" if cfg.train.precision == "fp32" else "bf16",
        checkpoint_activations=checkpoint_activations,
        document_end=cfg.data.document_end(0),  # that there is one costs a mask, whichever token it is
        optimizer=partial(build_optimizer, cfg=cfg.optim),
        average=cfg.optim.average > 0,
    )


def _state(memory: Memory) -> int:
    """Bytes that N devices can share."""
    return memory.weights + memory.gradients + memory.optimizer + memory.copies


def _held(memory: Memory, devices: int) -> float:
    """What a device holds at its peak. Alone it has not all gradients yet while it has most activations; one of several
    has its share of the state in any case."""
    return memory.peak if devices == 1 else _state(memory) / devices + memory.activations


def _devices(memory: Memory, room: float) -> int | None:
    """How many devices of so much memory a step needs; None where no number is enough."""
    if memory.peak <= room:
        return 1
    left = room - memory.activations
    return max(2, math.ceil(_state(memory) / left)) if left > 0 else None


def _advice(cfg: Config, ask: Ask, checkpointed: Memory) -> list[str]:
    """What to lower, each with what it leaves to be held by a device."""
    train, advice, smallest = cfg.train, [], checkpointed
    if not train.checkpoint_activations:
        held = gigabytes(_held(checkpointed, ask.sharing))
        advice.append(f"With train.checkpoint_activations=true a device holds {held}.")
    if train.batch_size // train.accumulate > 1:
        smallest = _walk(cfg, 1, True, n_micro=2)
        held, too = gigabytes(_held(smallest, ask.sharing)), "that and " if advice else ""
        micro = f"train.accumulate={train.batch_size} (micro-batches of one sequence)"
        advice.append(f"With {too}{micro} a device holds {held}.")
    needed = _devices(smallest, ask.memory)
    if needed is None:
        advice.append("Lower model.context or model.vocab_size: the activations of one sequence alone are too many.")
    elif needed > ask.sharing:
        advice.append(f"Then devices={needed} hold the state between them, at the least.")
    return advice


class Rates(NamedTuple):
    """Seconds that a machine takes for a FLOP, for a byte that an operation writes, and for an operation at all."""

    flop: float
    byte: float
    operation: float


def fit_rates(work_N3: Sequence[Sequence[float]], seconds_N: Sequence[float]) -> Rates:
    """The rates of steps that took `seconds` for so many FLOPs, bytes and operations: least squares of the relative
    errors, no rate below 0."""
    relative_N3 = np.asarray(work_N3, float) / np.asarray(seconds_N, float)[:, None]
    scale_3 = np.maximum(relative_N3.max(0), np.finfo(float).tiny)
    rates, _ = scipy.optimize.nnls(relative_N3 / scale_3, np.ones(len(relative_N3)))
    return Rates(*(rates / scale_3))


def work_of(rows: Sequence[dict[str, Any]]) -> tuple[list[list[float]], list[float]]:
    """FLOPs, bytes and operations of measured steps, and their seconds."""
    return [[row["flops"], row["written"], row["operations"]] for row in rows], [
        row["seconds_per_step"] for row in rows
    ]


def predicted_step(cfg: Config, rates: Rates) -> float:
    """Seconds of one step of `cfg` by a machine's rates."""
    train = cfg.train
    memory = _walk(cfg, train.batch_size // train.accumulate, train.checkpoint_activations, n_micro=1)
    n_flops = flops(cfg.model, cfg.router).training * train.batch_size * cfg.model.context
    work_3 = (n_flops, memory.written * train.accumulate, memory.operations * train.accumulate)
    return float(np.dot(rates, work_3))


def left_out(work_N3: Sequence[Sequence[float]], seconds_N: Sequence[float]) -> list[float]:
    """What the others' rates say that each step takes, in seconds."""
    rest = lambda values, i: [*values[:i], *values[i + 1 :]]
    predicted = []
    for i, work_3 in enumerate(work_N3):
        predicted.append(float(np.dot(fit_rates(rest(work_N3, i), rest(seconds_N, i)), work_3)))
    return predicted


def gigabytes(n_bytes: float) -> str:
    """Decimal gigabytes, as memory is sold; megabytes below one."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever a person would say."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
