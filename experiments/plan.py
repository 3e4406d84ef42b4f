"""Say what a training run will take before it is launched: parameters, FLOPs, memory, devices, time and money.

    python -m experiments.plan                                              # the defaults of training, on this machine
    python -m experiments.plan model=cpu-tiny measure=true                  # with the speed of a few steps taken here
    python -m experiments.plan model=olmoe-1b-7b gpu=h100 devices=8 mfu=0.4 price=2.5 tokens=1e12
    python -m experiments.plan model=llama3-405b gpu=h100 devices=16384 mfu=0.4 tokens=15.6e12
    python -m experiments.plan model=olmoe-1b-7b machine=h100 parallel.shard=64 parallel.ep=8 tokens=1e12
    python -m experiments.plan model=mixtral-8x7b trace=1e5 rate=2e10        # instead, a trace made layer by layer

With a machine of conf/machine the time of many GPUs is simulated, with what they send each other
(docs/scale-out-plans.md).

Memory is found by walking a step's forward and backward on tensors without data: no weight is allocated. How well that
agrees with steps that were taken is in docs/planning.md.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil

from experiments import cli
from experiments.pages import tables
from experiments.stats.cluster import MachineConfig, layout_of
from experiments.stats.planner import (
    GPUS,
    Ask,
    Device,
    Plan,
    Rates,
    duration,
    fit_rates,
    gigabytes,
    plan,
    predicted_step,
    work_of,
)
from experiments.stats.scale_out import even_step
from experiments.stats.step_time import Ask as StepAsk
from experiments.stats.step_time import same_experts
from experiments.stats.step_time import work_of as work_of_model
from experiments.stats.streaming import streamed
from experiments.suites import cases
from experiments.suites.memory import step_seconds
from moe.config.parallel import ParallelConfig
from moe.config.parse import ANY, Between, nearest
from moe.config.run import Config
from moe.errors import BadInput
from moe.model.cost import flops
from moe.run import terminal


@dataclass
class PlanConfig(Config):
    """A training run's settings, and what to plan it for."""

    gpu: str = ""  # a device of the table in experiments/stats/planner.py; "": this machine's processor
    memory: Annotated[float, Between(0, ANY)] = 0.0  # bytes of one device; 0: the gpu's, the machine's, or this one's
    devices: Annotated[int, Between(1, ANY)] = 1  # that share weights, gradients and optimiser state evenly
    mfu: Annotated[float, Between(0, 1)] = 0.0  # the share of the gpu's peak that training reaches; 0: time is not told
    measure: bool = False  # take a few steps here, and tell time by them
    rates: str = ""  # what `bench suite=memory` wrote on this machine: tell time by those steps; "": do not
    tokens: Annotated[float, Between(0, ANY)] = 0.0  # to train on; 0: what train.steps take
    budget: Annotated[float, Between(0, ANY)] = 0.0  # training FLOPs to spend, instead of tokens; 0: none
    # instead of training: so many tokens traced one layer at a time (experiments.trace hf=... stream=true)
    trace: Annotated[float, Between(0, ANY)] = 0.0
    rate: Annotated[float, Between(0, ANY)] = 0.0  # trace: FLOPs per second; 0: time is not told
    price: Annotated[float, Between(0, ANY)] = 0.0  # of one device for an hour, in any currency
    machine: MachineConfig | None = None  # instead of gpu, devices and mfu: GPUs whose steps are simulated

    def __post_init__(self) -> None:
        if self.gpu and self.gpu not in GPUS:
            raise BadInput(f"gpu={self.gpu} is not one of {', '.join(GPUS)}; {nearest(self.gpu, list(GPUS))}.")
        if self.mfu and not self.gpu:
            raise BadInput("mfu is a share of a GPU's peak: say which with gpu=..., or measure=true for this machine.")
        if self.gpu and (self.measure or self.rates):
            here = "measure=true" if self.measure else f"rates={self.rates}"
            raise BadInput(f"{here} is of this machine, and gpu={self.gpu} is another: give mfu=... instead.")
        if self.machine is None and self.parallel != ParallelConfig():
            raise BadInput(
                "parallel is of GPUs that are simulated: say which with machine=NAME, a file of conf/machine."
            )
        given = [name for name in ("gpu", "mfu", "measure", "rates") if getattr(self, name)]
        given += ["devices"] if self.devices > 1 else []
        if self.machine and given:
            name = given[0]
            raise BadInput(f"{name}={getattr(self, name)} and machine={self.machine.name} both say on what: give one.")
        if self.tokens and self.budget:
            raise BadInput("tokens and budget both say how long to train: give one.")
        if self.rate and not self.trace:
            raise BadInput(
                "rate is of a trace: give trace=..., how many tokens; for training give mfu=... or rates=...."
            )


@cli.command("plan", PlanConfig)
def main(cfg: PlanConfig) -> None:
    """Print the plan."""
    cfg.model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or cfg.tokenizer.vocab_size)
    if cfg.trace:
        show_trace(cfg)
        return
    ask = ask_of(cfg)
    show(cfg, ask, plan(cfg, ask))


def ask_of(cfg: PlanConfig) -> Ask:
    """What the settings ask for, with the rate of this machine where it is to be measured."""
    train, training = cfg.train, flops(cfg.model, cfg.router).training
    device = GPUS.get(cfg.gpu) or Device(float(psutil.virtual_memory().total), 0.0)
    tokens = cfg.tokens or cfg.budget / training or float(train.steps * train.batch_size * cfg.model.context)
    if cfg.machine:
        return simulated(cfg, cfg.machine, tokens)
    rate = cfg.mfu * device.peak
    if cfg.measure:
        terminal.say("plan: taking a few steps")
        rate = training * train.batch_size * cfg.model.context / step_seconds(cfg)
    elif cfg.rates:
        rate = training * train.batch_size * cfg.model.context / predicted_step(cfg, read_rates(Path(cfg.rates)))
    return Ask(tokens, cfg.devices, memory=cfg.memory or device.memory, rate=rate, price=cfg.price)


def simulated(cfg: PlanConfig, machine: MachineConfig, tokens: float) -> Ask:
    """What the settings ask for on GPUs that are simulated, each with a batch of its own, routes drawn evenly. Raises
    `BadInput` for float32, for products in fp8, and for layers whose experts differ."""
    train, parallel, model = cfg.train, layout_of(cfg.parallel), cfg.model
    if train.precision == "fp32":
        raise BadInput(f"train.precision=fp32 is not simulated on machine={machine.name}: accepted is bf16.")
    if model.moe and model.moe.precision != "same":
        raise BadInput(
            f"model.moe.precision={model.moe.precision} is not simulated on machine={machine.name}: accepted is same."
        )
    ask = StepAsk(
        tokens=train.batch_size // train.accumulate * model.context,
        micro=train.accumulate,
        recompute=train.checkpoint_activations,
    )
    k = same_experts(model).k if model.moe else 0
    rate = even_step(work_of_model(model, cfg.router), machine, parallel, ask, k).tflops * 1e12
    tokens *= 1 if cfg.tokens or cfg.budget else parallel.ranks()
    return Ask(
        tokens, parallel.ranks(), parallel.replicate, parallel.ranks(), cfg.memory or machine.memory, rate, cfg.price
    )


def read_rates(path: Path) -> Rates:
    """The rates of the steps that a file of rows measured. Raises `BadInput` for one without enough of them."""
    if not path.is_file():
        raise BadInput(f"rates={path} is no file: make it with python -m experiments.bench suite=memory out={path}.")
    rows = [row for row in cases.read(path) if row.get("suite") == "memory" and row.get("status") == "measured"]
    if len(rows) <= len(Rates._fields):
        raise BadInput(f"rates={path} has {len(rows)} measured steps: three rates need at least four.")
    return fit_rates(*work_of(rows))


def show(cfg: PlanConfig, ask: Ask, result: Plan) -> None:
    """The plan as a table, and what to do where it does not fit."""
    memory, train = result.memory, cfg.train
    micro = f"a micro-batch of {train.batch_size // train.accumulate} × {cfg.model.context} tokens"
    rows = [
        ("parameters", f"{result.size.total:,}, active {result.size.active:,}"),
        ("FLOPs per token", f"{result.flops.training:,} in training, {result.flops.forward:,} forward"),
        ("the run", f"{result.tokens:,.0f} tokens, {result.steps:,.0f} steps, {result.total_flops:.2e} FLOPs"),
        ("weights", f"{gigabytes(memory.weights)} (4 bytes × {result.size.total:,})"),
        ("gradients", gigabytes(memory.gradients)),
        ("optimiser state", gigabytes(memory.optimizer)),
        *([("bf16 copies of the weights", gigabytes(memory.copies))] if memory.copies else []),
        ("activations at their peak", f"{gigabytes(memory.activations)}, {micro}"),
        ("… with train.checkpoint_activations", gigabytes(result.checkpointed.activations)),
        ("logits", gigabytes(memory.logits)),
        ("largest single tensor", f"{gigabytes(memory.largest)}, weights left out"),
        ("peak of a step", f"{gigabytes(memory.peak)}; checkpointed {gigabytes(result.checkpointed.peak)}"),
    ]
    # What depends on how many devices there are, and how fast.
    if ask.devices > 1:
        share = gigabytes(result.state / ask.sharing)
        held = f"{share} of the state and {gigabytes(memory.activations)} of activations"
        rows.append((f"each of {ask.devices:,} devices", held))
    rows.append(("time", time_in_words(cfg, result)))
    if result.money is not None:
        rows.append(("money", f"{result.money:,.0f} at {cfg.price:g} per device and hour"))
    tables.print_table(("", "needs"), rows)
    for sentence in sentences(cfg, ask, result):
        terminal.say(sentence)


def show_trace(cfg: PlanConfig) -> None:
    """What a trace takes as a table. Raises `BadInput` for a model without experts."""
    if cfg.model.moe is None:
        raise BadInput(f"trace={cfg.trace:g}: model={cfg.model.name} is dense and has no experts to trace.")
    cost = streamed(cfg.model, cfg.router, int(cfg.trace))
    seconds = f"{duration(cost.flops / cfg.rate)} at {cfg.rate:.1e} FLOPs per second" if cfg.rate else "give rate=..."
    rows = [
        ("the folder", f"{gigabytes(cost.folder)} in bf16, read once"),
        ("the largest block", f"{gigabytes(cost.block)} in float32"),
        ("memory at the peak", f"{gigabytes(cost.memory)}, beside the libraries' own"),
        ("files between layers", f"{gigabytes(cost.states)} of states, {gigabytes(cost.routes)} of routes"),
        ("FLOPs", f"{cost.flops:.2e}"),
        ("time", seconds),
    ]
    tables.print_table((f"a trace of {cfg.trace:,.0f} tokens", "needs"), rows)


def time_in_words(cfg: PlanConfig, result: Plan) -> str:
    """How long, by which rate."""
    if result.seconds is None:
        return "not told: give measure=true or rates=... for this machine, or gpu=... mfu=..."
    by = f"{cfg.mfu:.0%} of {cfg.gpu}'s peak"
    if cfg.machine:
        by = f"simulated on {layout_of(cfg.parallel).ranks():,} GPUs of {cfg.machine.name}"
    if cfg.measure or cfg.rates:
        by = "measured here" if cfg.measure else f"by the steps in {cfg.rates}"
    return f"{duration(result.seconds)}, {result.tokens / result.seconds:,.0f} tokens/s ({by})"


def sentences(cfg: PlanConfig, ask: Ask, result: Plan) -> list[str]:
    """Whether it fits, and the arithmetic of how many devices it takes."""
    where = cfg.machine.name if cfg.machine else cfg.gpu or "this machine"
    room, beside = gigabytes(ask.memory), gigabytes(result.memory.activations)
    also = " and bf16 copies" if result.memory.copies else ""
    match result.devices_needed:
        case None:
            need = f"No number of devices of {room} holds it: a step's {beside} of activations are not shared."
        case 1:
            need = f"One of {room} holds a step's peak, {gigabytes(result.memory.peak)}."
        case many:
            need = f"{gigabytes(result.state)} of weights, gradients and optimiser state{also}, shared by {many:,} of "
            need += f"{room} each, leave room for {beside} of activations."
    if result.fits:
        return [f"It fits {where}. {need}"]
    many_devices = f"parallel.shard={ask.sharing:,}" if cfg.machine else f"devices={ask.devices:,}"
    return [f"It does not fit {where} with {many_devices}. {need}", *result.advice]


if __name__ == "__main__":
    main()
