"""Suite memory: what a training step takes, planned and measured, over shapes.

Three numbers a shape: what `moe.model.memory.walk` says, what torch's allocator was asked for in a step that was taken
(its profiler's record: an account of its own), and by how much the process grew, which is what the system sees of it.
On the CPU; each shape in a process of its own.

    python -m experiments.bench suite=memory out=experiments/results/memory.jsonl
"""

import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from experiments.suites.cases import Case, describe
from moe.config.model import ModelConfig, MoEConfig
from moe.config.run import Config
from moe.config.train import OptimConfig, TrainConfig
from moe.data.loader import Batch
from moe.model import cost, dispatch
from moe.model.memory import walk
from moe.model.transformer import Transformer
from moe.run import machine
from moe.train.optimizer import build_optimizer
from moe.train.step import compute_gradients

HEADINGS = ("shape", "parameters", "planned", "asked for", "planned is", "process grew by", "step")
TIMED = 5  # steps


class Shape(NamedTuple):
    """A model and how it is trained; sizes by the glossary's letters."""

    d: int
    layers: int
    experts: int  # 0: dense
    k: int
    f: int
    vocab: int
    context: int
    batch: int
    micro: int = 1
    checkpointed: bool = False
    precision: str = "fp32"

    def config(self) -> Config:
        """A run's settings of this shape."""
        moe = MoEConfig(n_experts=self.experts, k=self.k, d_expert=self.f) if self.experts else None
        model = ModelConfig(
            "shape", self.vocab, self.context, self.layers, self.d, n_heads=max(1, self.d // 64), d_ff=self.f, moe=moe
        )
        train = TrainConfig(
            batch_size=self.batch * self.micro, accumulate=self.micro, precision=self.precision, device="cpu",
            checkpoint_activations=self.checkpointed,
        )  # fmt: skip
        return Config(model=model, train=train, optim=OptimConfig())


SHAPES = (
    Shape(64, 2, 8, 2, 64, 2048, 128, 8),
    Shape(64, 2, 0, 0, 128, 2048, 128, 8),
    Shape(128, 4, 16, 4, 64, 4096, 128, 8),
    Shape(256, 4, 16, 4, 128, 4096, 256, 8),
    Shape(256, 4, 16, 4, 128, 4096, 256, 8, checkpointed=True),
    Shape(256, 4, 16, 4, 128, 4096, 256, 8, precision="bf16"),
    Shape(256, 4, 16, 4, 128, 4096, 256, 4, micro=2),
    Shape(256, 4, 0, 0, 512, 4096, 256, 8),
    Shape(256, 4, 64, 8, 64, 4096, 256, 8),
    Shape(256, 4, 8, 1, 512, 4096, 256, 8),
    Shape(256, 8, 16, 2, 256, 4096, 512, 4),
    Shape(384, 6, 16, 4, 192, 16384, 256, 4),
    Shape(384, 6, 16, 4, 192, 16384, 256, 4, checkpointed=True),
    Shape(512, 4, 8, 2, 512, 8192, 512, 4),
    Shape(512, 8, 0, 0, 1408, 8192, 512, 2),
    Shape(512, 2, 128, 8, 128, 8192, 256, 4),
)
SMOKE = (Shape(64, 1, 4, 2, 32, 64, 16, 1), Shape(64, 1, 0, 0, 32, 64, 16, 1))


def settings(device: torch.device, full: bool, rounds: int) -> tuple[Shape, ...]:
    """The shapes of a run of the suite."""
    return SHAPES if full else SMOKE


def cases(shapes: tuple[Shape, ...]) -> Iterator[Case]:
    """A case per shape."""
    for shape in shapes:
        yield Case({"suite": "memory", **shape._asdict()}, functools.partial(_in_own_process, shape))


def _in_own_process(shape: Shape) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.suites.memory", json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(shape: Shape) -> dict[str, Any]:
    """A row's numbers. Bytes; `seconds` of the median step."""
    cfg = shape.config()
    machine.keep_freed_memory()
    State(SMOKE[0].config()).step()  # libraries take memory of their own when they are first used
    before = psutil.Process().memory_info().rss
    device = torch.device("cpu")
    machine.reset_peak_memory(device)
    state = State(cfg)
    seconds = statistics.median(state.timed() for _ in range(TIMED))
    grew = machine.peak_memory(device) - before
    asked = state.asked_for()
    planned = walk(
        cfg.model, cfg.router, cfg.balance, shape.batch, n_micro=shape.micro, precision=shape.precision,
        checkpoint_activations=shape.checkpointed,
    )  # fmt: skip
    return {
        "parameters": cost.size(cfg.model).total, "planned": planned.peak, "asked": asked, "grew": grew,
        "flops": cost.flops(cfg.model).training * shape.batch * shape.micro * shape.context,
        "written": planned.written * shape.micro, "operations": planned.operations * shape.micro,
        "seconds_per_step": seconds, "error": planned.peak / asked - 1,
    }  # fmt: skip


class State:
    """A model in training on tokens that mean nothing."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = dataclasses.replace(cfg, dispatch=dispatch.choose(cfg.dispatch, torch.device("cpu"))[0])
        self.model = Transformer(cfg.model, cfg.router, cfg.balance).initialize(0).train()
        self.optimizer = build_optimizer(self.model, cfg.optim)
        shape = (cfg.train.batch_size, cfg.model.context + 1)
        tokens_BS = torch.randint(cfg.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        self.batch = Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], torch.zeros_like(tokens_BS[:, 1:]))
        self.step()  # optimiser state is made in the first

    def step(self) -> None:
        """Forward, backward, update."""
        compute_gradients(self.model, self.batch, self.cfg)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def asked_for(self) -> int:
        """Bytes allocated at a step's peak: by the profiler's record, on top of weights and optimiser state."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step()
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        record = [event for event in events if event.name() == "[memory]"]
        live = peak = 0
        for event in sorted(record, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        kept = list(self.model.parameters())
        kept += [value for state in self.optimizer.state.values() for value in state.values()]
        return peak + sum(tensor.numel() * tensor.element_size() for tensor in kept)


def step_seconds(cfg: Config) -> float:
    """Seconds of the median training step of `cfg` on this machine's processor."""
    machine.set_threads(cfg.train)
    machine.keep_freed_memory()
    precision = "bf16" if cfg.train.precision == "bf16" else "fp32"
    train = dataclasses.replace(cfg.train, precision=precision, device="cpu")
    state = State(dataclasses.replace(cfg, train=train))
    return statistics.median(state.timed() for _ in range(TIMED))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    shape = describe({name: row[name] for name in Shape._fields if row[name] not in (0, False)})
    if row["status"] != "measured":
        return (shape, row.get("error", row["status"]), *[""] * (len(HEADINGS) - 2))
    megabytes = lambda n_bytes: f"{n_bytes / 1e6:,.1f} MB"
    return (
        shape,
        f"{row['parameters']:,}",
        megabytes(row["planned"]),
        megabytes(row["asked"]),
        f"{row['error']:+.2%}",
        f"{megabytes(row['grew'])} ({row['grew'] / row['planned']:.2f}×)",
        f"{row['seconds_per_step'] * 1e3:,.0f} ms",
    )


if __name__ == "__main__":
    print(json.dumps(measured(Shape(*json.loads(sys.argv[1])))))
