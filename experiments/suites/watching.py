"""Suite watching: what it costs a training step that a doctor looks on (log.doctor), as a share of the step.

Steps with it and without take turns in groups of `log.every`, so that every group with it has one in which the
experts' gradients are measured too, and writes what the run's files would have. A row's number is the median over pairs
of groups of their ratio, less 1: of the processor's seconds, which other work on the machine hardly touches, or on a
GPU of the clock's.

    python -m experiments.bench suite=watching out=experiments/results/watching.jsonl
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.suites.cases import Case, describe
from experiments.suites.memory import Shape
from moe.config.run import Config
from moe.data.loader import Batch
from moe.model import dispatch
from moe.model.transformer import Transformer
from moe.run.lock import Lock
from moe.train.optimizer import build_optimizer
from moe.train.recorder import Recorder
from moe.train.state import State
from moe.train.step import take_step

HEADINGS = ("shape", "step", "watched", "quartiles", "pairs")
SHAPES = (
    Shape(64, 2, 8, 2, 64, 1024, 128, 8),
    Shape(128, 4, 16, 2, 128, 2048, 128, 8),
    Shape(256, 4, 16, 4, 128, 4096, 256, 8),
    Shape(256, 4, 64, 8, 64, 4096, 256, 8),
)
WARM = 2  # steps of a group that are not timed
SMOKE = (Shape(64, 1, 4, 2, 32, 64, 16, 1),)


class Asked(NamedTuple):
    """What is measured."""

    device: torch.device
    shapes: tuple[Shape, ...]
    pairs: int  # groups of steps with and without, at least
    seconds: float  # a shape has as many as fit into this


def settings(device: torch.device, full: bool, rounds: int) -> Asked:
    """Half a minute for `rounds`, or one tiny pair."""
    return Asked(device, SHAPES, 8, 30.0 * rounds) if full else Asked(device, SMOKE, 1, 0.0)


def cases(asked: Asked) -> Iterator[Case]:
    """A case per shape."""
    for shape in asked.shapes:
        yield Case({"suite": "watching", **shape._asdict()}, functools.partial(measured, shape, asked))


def measured(shape: Shape, asked: Asked) -> dict[str, Any]:
    """A row's numbers: seconds of the median unwatched step, and of the ratios less 1 the median and quartiles."""
    cfg = shape.config()
    cfg.dispatch, _ = dispatch.choose("auto", asked.device)
    torch.manual_seed(0)
    model = Transformer(cfg.model, cfg.router, cfg.balance).initialize(0).to(asked.device)
    state = State(model, build_optimizer(model, cfg.optim), loader=None)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab, (shape.batch * shape.micro, shape.context + 1), generator=generator)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:]))
    with tempfile.TemporaryDirectory() as folder:
        group = functools.partial(seconds_of_group, state, batch, cfg, Path(folder))
        group(True), group(False)
        ratios: list[float] = []
        plain: list[float] = []
        begin = time.perf_counter()
        while len(ratios) < asked.pairs or time.perf_counter() - begin < asked.seconds:
            order = (True, False) if len(ratios) % 2 else (False, True)  # neither always comes second
            seconds = {watched: group(watched) for watched in order}
            ratios.append(seconds[True] / seconds[False] - 1)
            plain.append(seconds[False] / cfg.log.every)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "step_seconds": statistics.median(plain),
        "overhead": middle,
        "low": low,
        "high": high,
        "pairs": len(ratios),
    }


def seconds_of_group(state: State, batch: Batch, cfg: Config, folder: Path, watched: bool) -> float:
    """Take `log.every` steps, with what a run's recorder writes of them; those before are not timed, in which caches
    and memory get used to what comes. In a folder of its own: no group reads what others wrote."""
    cfg.log.doctor = watched
    cfg.train.steps = state.step + 10 * cfg.log.every  # never at its end
    place = Path(tempfile.mkdtemp(dir=folder))
    with Lock(place) as lock, Recorder(cfg, lock, state.step) as recorder:
        recorder.watch.step = lambda line, counts: None  # type: ignore[method-assign]
        clock = time.process_time if next(state.model.parameters()).device.type == "cpu" else time.perf_counter
        start = clock()
        for i in range(WARM + cfg.log.every):
            start = clock() if i == WARM else start
            line, gradients = take_step(state, batch, cfg, place)
            recorder.record(line, gradients.routing)
        return clock() - start


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    spread = f"{row['low']:+.2%} to {row['high']:+.2%}"
    shape = describe({name: row[name] for name in Shape._fields if row[name] not in (0, False)})
    return shape, f"{row['step_seconds'] * 1e3:.1f} ms", f"{row['overhead']:+.2%}", spread, str(row["pairs"])
