"""Benchmarks, as ratios within one run.

    python -m experiments.bench suite=train_step                          # the MoE against its own dense twin
    python -m experiments.bench suite=train_step peers=[transformers]     # and against transformers' models
    python -m experiments.bench suite=train_step model=gpu-50m model.vocab_size=4096 rounds=2
    python -m experiments.bench suite=routing                             # gate, plan and combine, on any machine
    python -m experiments.bench suite=host                                # what the Triton experts cost the host
    python -m experiments.bench suite=memory                              # a step's memory, planned and measured
    python -m experiments.bench suite=tracing                             # a trace's memory, and one under a limit
    python -m experiments.bench suite=watching                            # what log.doctor costs a step
    python -m experiments.bench suite=page                                # how soon the inspector's page answers
    python -m experiments.bench suite=generation                          # run.c's tokens per second against torch's
    python -m experiments.bench suite=families                            # transformers' models against those read here
    python -m experiments.bench suite=equalities                          # several ranks against one process
    python -m experiments.bench suite=survival                            # a run of two ranks, and what ends them
    python -m experiments.bench suite=ranks                               # two ranks against two threads
    python -m experiments.bench suite=kernels                             # on a GPU: microseconds against floors
    python -m experiments.bench suite=layer peers=[torch,grouped_mm]      # on a GPU: TF/s against peers
    python -m experiments.bench suite=tune                                # on a GPU: tiles for kernels/tuning.jsonl
    python -m experiments.bench suite=tune modelled=true arch=sm_90       # anywhere: tiles ranked by a model

Prints a table and writes a JSON line per row, with device, versions and commit, to `out`: by default below runs/bench,
and with out=experiments/results/SUITE.jsonl where `python -m experiments.readme` reads it. Contestants take turns, so
that a slow spell of the machine falls on all of them. `sizes=smoke` makes everything tiny: with TRITON_INTERPRET=1 the
suites for a GPU then run on a CPU, where their times mean nothing.
"""

import dataclasses
import hashlib
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments import cli
from experiments.pages import tables
from experiments.suites import (
    equalities,
    facts,
    families,
    generation,
    host,
    kernels,
    layer,
    memory,
    page,
    peers,
    ranks,
    routing,
    shapes,
    survival,
    tile_model,
    timing,
    tracing,
    tune,
    watching,
)
from experiments.suites import train_step as train_step_suite
from experiments.suites.cases import Rows, run
from experiments.sweeps import check_each
from kernels import tuning
from moe.config.model import ModelConfig
from moe.config.parse import OneOf, accepted
from moe.config.run import Config, validate
from moe.config.train import TrainConfig
from moe.errors import BadInput
from moe.run import machine, terminal
from moe.run.jsonl import write_lines

SUITES = (
    "train_step", "routing", "host", "memory", "tracing", "watching", "page", "families", "generation", "equalities",
    "survival", "ranks", "kernels", "layer", "tune",
)  # fmt: skip
INSTEAD = (
    "suite=routing, host, memory, tracing, watching, page, families, generation, equalities, survival, ranks and "
    "train_step run on a CPU, and sizes=smoke of the others in Triton's interpreter."
)


@dataclass
class BenchConfig:
    """Settings of a benchmark. Behind one that a single suite reads stands which."""

    # train_step | routing | host | memory | tracing | watching | page | families | generation | equalities | survival |
    # ranks | kernels | layer | tune
    suite: str = "train_step"
    sizes: str = "full"  # full | smoke: tiny, to see that it runs (not train_step, whose model says its size)
    peers: list[str] = field(default_factory=list)  # train_step: transformers; layer: its contestants, or all
    model: ModelConfig = field(default_factory=train_step_suite.bench_model)  # train_step; model=NAME takes a preset
    dispatch: str = "auto"  # train_step
    backends: list[str] = field(default_factory=list)  # train_step: instead of dispatch, our MoE on each
    compiled: bool = False  # train_step: our models once more under torch.compile
    compiler: str = "inductor"  # train_step: torch.compile's backend
    batch_size: int = 8  # train_step
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])  # train_step
    rounds: int = 5  # times that every contestant has its turn
    steps: int = 3  # train_step: timed steps per contestant and round, after one untimed
    loads: list[str] = field(default_factory=lambda: list(layer.LOADS))  # layer
    counts: str = ""  # layer: routing/counts.jsonl of a run, for the recorded load
    modelled: bool = False  # tune: rank tiles by a model of their clocks, on any machine, instead of timing them
    arch: str = "sm_90"  # tune, modelled: a GPU as kernels/tuning.jsonl names it
    shape: str = ""  # tune: sizes of the layer, by name; "": olmoe
    width: int = 256  # routing: D
    d_expert: int = 128  # routing: F of the layer that routing is a share of
    budget: float = 0.0  # seconds after which no new row is started; 0: no limit (not train_step)
    resume: bool = False  # keep the rows of the same code that `out` has (not train_step)
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int = 0  # CPU threads; 0: torch's default
    out: str = ""  # the file of rows; "": runs/bench/<suite>-<hash of the settings>.jsonl


def default_out(cfg: BenchConfig) -> Path:
    """runs/bench/<suite>-<hash of the settings>.jsonl: other settings leave it alone."""
    asked = dataclasses.replace(cfg, out="", resume=False, budget=0.0)
    return Path("runs", "bench", f"{cfg.suite}-{hashlib.sha256(repr(asked).encode()).hexdigest()[:8]}.jsonl")


def place_in_sweep(cfg: BenchConfig, sweep: str, job: str) -> tuple[BenchConfig, Path]:
    """The settings of a sweep's job, with the file of its rows."""
    out = Path(cfg.out) if cfg.out else default_out(cfg)
    return dataclasses.replace(cfg, out=str(out)), out


def check_jobs(jobs: list[cli.Job]) -> None:
    """Refuse a job that cannot be done, before others are. Raises `BadInput`."""
    check_each(jobs, check)


@cli.command("bench", BenchConfig, place=place_in_sweep, before=check_jobs)
def main(cfg: BenchConfig) -> None:
    """Run a suite, print its table, write its rows."""
    check(cfg)
    device = timing.find_device(cfg.device, "device")
    machine.set_threads(TrainConfig(threads=cfg.threads))
    machine.keep_freed_memory()  # for every contestant alike
    cfg.out = cfg.out or str(default_out(cfg))
    if cfg.suite == "train_step":
        train_step(cfg, device)
    elif cfg.modelled:
        ranked(cfg)
    else:
        by_rows(cfg, device)
    terminal.say(f"rows: {cfg.out}")


def check(cfg: BenchConfig) -> None:
    """Refuse what no suite can do, or not on this machine. Raises `BadInput`."""
    # Whatever the suite.
    for name, valid in (("suite", SUITES), ("sizes", ("full", "smoke"))):
        OneOf(*valid).check(name, getattr(cfg, name))
    for name, low in (("rounds", 1), ("steps", 1), ("batch_size", 1), ("width", 1), ("d_expert", 1), ("threads", 0)):
        if getattr(cfg, name) < low:
            raise BadInput(f"{name}={getattr(cfg, name)} is out of range: accepted is at least {low}.")
    if not cfg.budget >= 0:
        raise BadInput(f"budget={cfg.budget:g} is out of range: accepted is at least 0 seconds.")
    if cfg.out and Path(cfg.out).is_dir():
        raise BadInput(f"out={cfg.out} is a folder: name a file in it, like {Path(cfg.out, cfg.suite)}.jsonl.")

    # Of one suite.
    if cfg.suite == "layer":
        known("peers", cfg.peers, peers.PEERS)
        some("loads", cfg.loads, layer.LOADS)
        if cfg.counts and not Path(cfg.counts).is_file():
            raise BadInput(f"counts={cfg.counts} is no file: accepted is the routing/counts.jsonl of a run.")
    elif cfg.suite == "train_step":
        check_train_step(cfg)
    elif cfg.peers:
        raise BadInput(f"peers={cfg.peers} means nothing to suite={cfg.suite}: train_step and layer have some.")

    if cfg.shape:
        known("shape", [cfg.shape], shapes.SHAPES)
    if cfg.modelled:
        if cfg.suite != "tune":
            raise BadInput(f"modelled=true means nothing to suite={cfg.suite}: tune has a model.")
        tile_model.machine(cfg.arch)

    # The machine.
    device = timing.find_device(cfg.device, "device")
    if cfg.suite in ("kernels", "layer", "tune") and not cfg.modelled:
        timing.check_kernels(f"suite={cfg.suite}", device, cfg.sizes == "full", INSTEAD)


def check_train_step(cfg: BenchConfig) -> None:
    """Refuse what suite=train_step cannot do. Raises `BadInput`."""
    known("peers", cfg.peers, train_step_suite.PEERS)
    some("precisions", cfg.precisions, ("fp32", "bf16"))
    dispatch = accepted(Config)["dispatch"]
    known("backends", cfg.backends, dispatch)
    known("dispatch", [cfg.dispatch], dispatch)
    for peer in cfg.peers:
        if importlib.util.find_spec(peer) is None:
            raise BadInput(f"peers has {peer}, which is not installed: pip install 'moe-switchyard[bench]'.")
    if not cfg.model.moe:
        raise BadInput("model.moe=null: the benchmark compares a Mixture-of-Experts model with its dense twin.")
    if not cfg.model.vocab_size:
        raise BadInput("model.vocab_size=0 leaves it to a tokenizer, and here is none: give one, say 32768.")
    validate(Config(model=cfg.model))
    if cfg.compiled and cfg.compiler not in (valid := torch.compiler.list_backends(exclude_tags=())):
        raise BadInput(f"compiler={cfg.compiler} is not one of {', '.join(valid)}.")


def some(key: str, values: list[str], valid: Any) -> None:
    """Refuse no value at all, and as `known`. Raises `BadInput`."""
    if not values:
        raise BadInput(f"{key}=[] leaves nothing to measure; accepted are {', '.join(valid)}.")
    known(key, values, valid)


def known(key: str, values: list[str], valid: Any) -> None:
    """Refuse a value that is not among the valid ones. Raises `BadInput`."""
    for value in values:
        if value not in valid:
            raise BadInput(f"{key} has {value!r}; accepted are {', '.join(valid)}.")


def by_rows(cfg: BenchConfig, device: torch.device) -> None:
    """A suite whose rows are written as they are made."""
    full, rows = cfg.sizes == "full", Rows(Path(cfg.out), facts.facts(device), cfg.resume)
    suites: dict[str, Any] = dict(
        routing=routing, host=host, memory=memory, tracing=tracing, watching=watching, page=page, families=families,
        generation=generation, equalities=equalities, survival=survival, ranks=ranks, kernels=kernels, layer=layer,
        tune=tune,
    )  # fmt: skip
    suite = suites[cfg.suite]
    # What a suite takes beside the device and its size.
    given: dict[str, Any] = {}
    if cfg.suite == "routing":
        given = {"width": cfg.width, "d_expert": cfg.d_expert}
    elif cfg.suite == "layer":
        given = {"loads": cfg.loads, "counts": Path(cfg.counts) if cfg.counts else None}
        given |= {"names": cfg.peers} if cfg.peers else {}
    elif cfg.suite == "tune":
        given = {"kept": rows.kept}
        given |= {"shapes": tune.loads(shapes.SHAPES[cfg.shape])} if cfg.shape and full else {}
    # Measure, and say it.
    settings = suite.settings(device, full, cfg.rounds, **given)
    measured = run(suite.cases(settings), rows, device, cfg.budget or math.inf, lambda line: print(line, flush=True))
    tables.print_table(suite.HEADINGS, map(suite.cells, measured))
    if cfg.suite == "tune":
        tune.conclude(measured, device, Path(cfg.out).with_name(tune.name(device)))


def ranked(cfg: BenchConfig) -> None:
    """Tiles for 16 bits in the order of a model: nothing is timed."""
    shape = shapes.SHAPES[cfg.shape or "olmoe"]
    rows = [row for use in tuning.USES for row in tile_model.ranking(use, "16bit", shape, cfg.arch)]
    tables.print_table(tile_model.HEADINGS, map(tile_model.cells, tile_model.shown(rows)))
    print("A model: the order and the ratios are what it says; nothing was measured.")
    write_lines(Path(cfg.out), rows)


def train_step(cfg: BenchConfig, device: torch.device) -> None:
    """Tokens per second of whole training steps: ours, our dense twin's, and each peer's on the same shapes."""
    settings = train_step_suite.Settings(
        device, cfg.model, cfg.backends or [cfg.dispatch], cfg.compiled, cfg.compiler, cfg.peers, cfg.precisions,
        cfg.batch_size, cfg.rounds, cfg.steps, timing.ceilings(device) if device.type == "cuda" else None,
    )  # fmt: skip
    common = facts.facts(device) | {"threads": torch.get_num_threads()}
    rows = [row | common for row in train_step_suite.measured(settings)]
    tables.print_table(*train_step_suite.table(rows))
    write_lines(Path(cfg.out), rows)


if __name__ == "__main__":
    main()
