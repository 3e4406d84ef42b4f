"""Suite ranks: training steps of two processes on this machine against one with two threads, as a ratio in one run.

One model takes the same steps alone and in every layout of two ranks, in turns. A row says how many tokens a second,
the ratio to one process (two threads), and the share of a step that rank 0 spends in transfers, waiting for the other
rank included.

    python -m experiments.bench suite=ranks out=experiments/results/ranks.jsonl
"""

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.suites import equalities
from experiments.suites.cases import Case
from experiments.suites.local_ranks import LocalRanks
from moe.config.parallel import Layout
from moe.config.run import Config
from moe.parallel.collectives import this_rank
from moe.train.optimizer import build_optimizer
from moe.train.step import compute_gradients, update_routers

HEADINGS = ("ranks", "layout", "tokens/s", "to one process", "in transfers")
CONTESTANTS = {
    "one process, 2 threads": Layout(),
    "replicated": Layout(2, 1, 1),
    "sharded": Layout(1, 2, 1),
    "experts shared out": Layout(1, 2, 2),
}
MODEL = ("model=cpu-small", "model.vocab_size=4096", "train.batch_size=8")
SMALL = ("model=cpu-nano", "model.vocab_size=512", "train.batch_size=4")
TRANSFER = ("gloo:", "c10d::", "_c10d_functional::wait_tensor", "record_param_comms")


class Settings(NamedTuple):
    """What is timed."""

    words: tuple[str, ...]
    rounds: int
    steps: int


def settings(device: torch.device, full: bool, rounds: int) -> Settings:
    """The small CPU model; in small the smallest."""
    return Settings(MODEL if full else SMALL, rounds, 3 if full else 1)


def cases(asked: Settings) -> Iterator[Case]:
    """A case for each contestant; all are timed in turns with the first of them."""
    for name in CONTESTANTS:
        key = {"suite": "ranks", "contestant": name, "words": " ".join(asked.words)}
        yield Case(key, functools.partial(measured, name, asked))


def measured(name: str, asked: Settings) -> dict[str, Any]:
    """One row."""
    of_each = raced(asked)
    alone, ours = of_each["one process, 2 threads"], of_each[name]
    ratios = [one["seconds"] / many["seconds"] for one, many in zip(alone, ours, strict=True)]
    tokens = [turn["tokens"] / turn["seconds"] for turn in ours]
    return {
        "tokens_per_s": statistics.median(tokens),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "transfers": statistics.median(turn["transfers"] for turn in ours),
        "rounds": len(ratios),
    }


@functools.cache
def raced(asked: Settings) -> dict[str, list[dict[str, float]]]:
    """Every contestant's turns."""
    cfg = equalities.config("softmax", "torch", *asked.words, words=())
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with LocalRanks(1) as one, LocalRanks(2) as two:
        for _ in range(asked.rounds):
            for name, layout in CONTESTANTS.items():
                ranks, threads = (one, 2) if name == "one process, 2 threads" else (two, 1)
                turns[name].append(ranks.call(timed, cfg, layout, asked.steps, threads, timeout=600.0)[0])
    return turns


def timed(cfg: Config, layout: Layout, steps: int, threads: int) -> dict[str, float]:
    """Seconds of a step on this rank, after one that is not timed, and the share of one more that transfers take."""
    torch.set_num_threads(threads)
    ranks, model = this_rank(), equalities.model_of(cfg, layout, torch.float32)
    optimizer = build_optimizer(model, cfg.optim)

    def step(number: int) -> None:
        batch = equalities.of_rank(equalities.batch_of(cfg, number), ranks.rank, ranks.n, cfg.train.accumulate)
        gradients = compute_gradients(model, batch, cfg)
        optimizer.step()
        update_routers(model, gradients.routing, cfg.balance, 0.0)
        optimizer.zero_grad(set_to_none=True)

    step(0)
    start = time.perf_counter()
    for number in range(steps):
        step(1 + number)
    seconds = (time.perf_counter() - start) / steps
    return {
        "seconds": seconds,
        "tokens": cfg.train.batch_size * cfg.model.context,
        "transfers": transfers(functools.partial(step, 1)) if ranks.n > 1 else 0.0,
    }


def transfers(step: Any) -> float:
    """The share of a step in which this process is in a transfer: the time that its intervals cover."""
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        step()
    seconds = time.perf_counter() - start
    spans = sorted(
        (event.time_range.start, event.time_range.end) for event in watched.events() if event.name.startswith(TRANSFER)
    )
    covered, reached = 0.0, 0.0
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered / 1e6 / seconds


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row."""
    layout = CONTESTANTS[row["contestant"]]
    head = str(layout.replicate * layout.shard), row["contestant"]
    if row["status"] != "measured":
        return *head, row["status"], row["error"][:60], ""
    spread = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    return *head, f"{row['tokens_per_s']:,.0f}", spread, f"{row['transfers']:.0%}"
