"""Say what a training step and a forward pass take on machines that are not here: time, all-to-alls, memory.

    python -m experiments.simulate                                             # DeepSeek-V3 on 8 to 4,096 GPUs
    python -m experiments.simulate check=true                                  # and published numbers, with errors
    python -m experiments.simulate model=olmoe-1b-7b machine=h100 trace=runs/trace    # by the routes of a trace
    python -m experiments.simulate machine=gb200 parallel.replicate=4 parallel.shard=64 parallel.ep=64

Every way of routing (top-k, node-limited, with a capacity) is put beside every kind of loads: even, by Zipf's law, and
recorded (`experiments.trace`). What is computed how, and how well that agrees with what others measured, is in
docs/scale-out-plans.md; machines are in conf/machine, each constant with its source.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml

from experiments import cli
from experiments.pages import simulate_table, tables
from experiments.refusals import CONF
from experiments.stats import published
from experiments.stats.cluster import MachineConfig, check_layout, layout_of
from experiments.stats.scale_out import Line, Loads, compare, layout, moved_by, routes_of, sensitivity
from experiments.stats.step_time import Ask, Work, same_experts, work_of
from moe.analysis.trace import Trace
from moe.config import model as model_config
from moe.config.model import ModelConfig, moe_layers
from moe.config.parallel import Layout, ParallelConfig
from moe.config.parse import ANY, MANY, Between, OneOf, check_values, parse
from moe.errors import BadInput
from moe.run import machine, terminal
from moe.run.command_line import command_line
from moe.run.jsonl import write_lines


@dataclass
class SimulateConfig:
    """A model, a machine, and how a step is computed on it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # not given: a layout for each number of `gpus`
    gpus: list[int] = field(default_factory=lambda: [8, 64, 512, 4096])  # that are compared
    tokens: Annotated[int, Between(1, MANY)] = 8192  # of one GPU in a micro-batch
    micro: Annotated[int, Between(1, MANY)] = 4  # micro-batches of a step
    matmul: Annotated[str, OneOf("bf16", "fp8")] = "fp8"
    rows: Annotated[str, OneOf("bf16", "fp8")] = "fp8"  # of tokens on their way to experts; back they are bf16
    overlap_experts: Annotated[float, Between(0, 1)] = 0.5  # the fraction of all-to-alls that matmuls may hide
    overlap_shards: Annotated[float, Between(0, 1)] = 0.9  # the same of gathering weights and reducing gradients
    recompute: bool = True  # every layer's forward pass once more in the backward pass
    zipf: Annotated[float, Between(0, ANY)] = 0.5  # the exponent of uneven loads that are drawn
    capacity: Annotated[float, Between(0, ANY)] = 1.25  # times the mean rows of an expert; 0: not tried
    trace: str = ""  # a folder that experiments.trace wrote, of a model with as many experts and choices; "": none
    sample: Annotated[int, Between(1, MANY)] = 1024  # tokens of a rank whose routes are drawn, or read
    check: bool = False  # also predict what others published
    out: str = ""  # a file of the rows, as JSON lines; "": none

    def __post_init__(self) -> None:
        check_values(self)
        if not self.gpus or min(self.gpus) < 1:
            raise BadInput(f"gpus={self.gpus} must be numbers of at least 1.")
        if self.matmul == "fp8" and not self.machine.peak_fp8:
            raise BadInput(f"matmul=fp8 needs a machine that has it, and machine={self.machine.name} has peak_fp8=0.")


@cli.command("simulate", SimulateConfig, verbatim=("out", "trace"))
def main(cfg: SimulateConfig) -> None:
    """Simulate, print, and keep."""
    # What cannot be is refused before anything is simulated.
    model_config.validate(cfg.model)
    if cfg.model.moe is None or not cfg.model.vocab_size:
        why = "is dense" if cfg.model.moe is None else "has no vocabulary: set model.vocab_size"
        raise BadInput(f"model={cfg.model.name} {why}; routing is compared for models with experts.")
    if cfg.model.moe.precision != "same":
        raise BadInput(
            f"model.moe.precision={cfg.model.moe.precision} is not what is simulated: matmul=bf16 and matmul=fp8 say "
            "in what all products are; accepted is same."
        )
    # Say it, and keep it.
    lines = routing(cfg)
    tables.print_table(simulate_table.HEADINGS, simulate_table.cells(lines), simulate_table.LEFT)
    effects = what_matters(cfg)
    tables.print_table(simulate_table.EFFECTS, simulate_table.effect_cells(effects))
    checked = published.rows(machines(), models()) if cfg.check else []
    if checked:
        rows = simulate_table.check_cells(checked)
        tables.print_table(simulate_table.CHECKS, rows, simulate_table.CHECKS_LEFT)
        terminal.say(simulate_table.summary(checked))
    if cfg.out:
        facts = {
            "command": command_line("simulate", *sys.argv[1:]),
            "model": cfg.model.name,
            "machine": cfg.machine.name,
        }
        facts |= machine.git_state()._asdict()
        kinds: list[tuple[str, Any]] = [("routing", line) for line in lines]
        kinds += [("effect", effect) for effect in effects] + [("check", row) for row in checked]
        write_lines(Path(cfg.out), ({"kind": kind} | facts | row._asdict() for kind, row in kinds))
        terminal.say(f"rows: {cfg.out}")


def routing(cfg: SimulateConfig) -> list[Line]:
    """Every way of routing at every size."""
    work, ask, moe = work_of(cfg.model), ask_of(cfg), same_experts(cfg.model)
    all_loads = [Loads("even"), Loads(f"Zipf {cfg.zipf:g}", cfg.zipf)]
    if cfg.trace:
        all_loads.append(Loads("recorded", expert_TLK=recorded(cfg)))
    lines = []
    for parallel in layouts(cfg, work):
        terminal.say(f"simulate: {parallel.ranks():,} GPUs")
        lines += compare(work, cfg.machine, parallel, ask, moe.k, all_loads, cfg.capacity, cfg.sample)
    return lines


def layouts(cfg: SimulateConfig, work: Work) -> list[Layout]:
    """The one that was given, or one for each number of GPUs."""
    n_experts = max(layer.n_experts for layer in work.layers)
    if cfg.parallel != ParallelConfig():
        parallel = layout_of(cfg.parallel)
        check_layout(parallel, cfg.machine, n_experts)
        return [parallel]
    return [layout(gpus, n_experts, cfg.machine) for gpus in cfg.gpus]


def what_matters(cfg: SimulateConfig) -> list[Any]:
    """The effects of constants at the largest size, with even loads."""
    work, moe = work_of(cfg.model), same_experts(cfg.model)
    parallel = max(layouts(cfg, work), key=Layout.ranks)
    (expert_TK,) = routes_of(Loads("even"), cfg.sample * parallel.ep, moe.n_experts, moe.k)
    moved = moved_by(cfg.machine, parallel, expert_TK, moe.n_experts)
    return sensitivity(work, cfg.machine, parallel, ask_of(cfg), [moved], cfg.sample)


def ask_of(cfg: SimulateConfig) -> Ask:
    """What a step is."""
    return Ask(**{name.name: getattr(cfg, name.name) for name in dataclasses.fields(Ask)})


def recorded(cfg: SimulateConfig) -> np.ndarray:
    """(T, L, K): the routes of a trace. Raises `BadInput` for one of another shape."""
    trace, moe = Trace(Path(cfg.trace)), same_experts(cfg.model)
    theirs = sorted({*trace.about.n_experts})
    if theirs != [moe.n_experts] or trace.about.k != moe.k:
        raise BadInput(
            f"trace={cfg.trace} is of layers with {theirs} experts and K={trace.about.k}, and model={cfg.model.name} "
            f"has {moe.n_experts} and K={moe.k}: record a model of that shape."
        )
    n_layers = len(moe_layers(cfg.model))
    if len(trace.about.layers) != n_layers:
        terminal.say(f"simulate: the trace's {len(trace.about.layers)} layers are taken in turn for {n_layers}")
    return trace.experts()


def machines() -> dict[str, MachineConfig]:
    """Every file of conf/machine by its name."""
    paths = sorted((CONF / "machine").glob("*.yaml"))
    return {path.stem: parse(MachineConfig, yaml.safe_load(path.read_text()), "machine.") for path in paths}


def models() -> dict[str, ModelConfig]:
    """Every file of conf/model by its name, and Qwen3-235B-A22B (2505.09388)."""
    paths = sorted((CONF / "model").glob("*.yaml"))
    named = {path.stem: parse(ModelConfig, yaml.safe_load(path.read_text()), "model.") for path in paths}
    small = named["qwen3-30b-a3b"]
    assert small.moe is not None
    moe = dataclasses.replace(small.moe, d_expert=1536)
    named["qwen3-235b-a22b"] = dataclasses.replace(
        small, name="qwen3-235b-a22b", n_layers=94, d_model=4096, n_heads=64, d_ff=12288, moe=moe
    )
    return named


if __name__ == "__main__":
    main()
