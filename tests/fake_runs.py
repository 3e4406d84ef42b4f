"""Finished runs that nobody trained, for the tests of what is made of finished runs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.stats.verdict import Pair, Run
from moe.run.jsonl import record, to_text
from moe.run.summary import LayerMetrics, Summary, line_from_json, line_to_json, write_summary

DOMAINS = ("drama", "verse", "code")


def fake_run(
    name="moe-seed0",
    seed=0,
    final=3.2,  # validation loss at the end, nats per token
    speed=5000.0,  # tokens per second
    steps=600,
    windows=None,  # mean loss of each validation window
    domains=DOMAINS,
    layers=(1, 3),  # MoE layers; () for a dense model
    n_experts=16,
    eval_every=100,
) -> Run:
    """A run whose validation loss falls as final + 5·exp(−step/40) − 5·exp(−steps/40), 2,048 tokens a step."""
    rng = np.random.default_rng(seed)
    loss = lambda step: final + 5 * math.exp(-step / 40) - 5 * math.exp(-steps / 40)
    bpb = lambda value: value / math.log(2) / 3.1
    score = lambda value: {"loss": value, "bpb": bpb(value)}
    val = lambda step: (
        score(loss(step))
        | {"domains": {each: score(loss(step) + 0.1 * i) | {"tokens": 1000} for i, each in enumerate(domains)}}
    )
    seconds = lambda step: step * 2048 / speed
    metrics = [{"step": 0, "seconds": 0.0, "val": val(0)}]
    for step in range(1, steps + 1):
        line = {"step": step, "lm_loss": loss(step) + rng.normal(0, 0.1), "seconds": seconds(step), "layers": []}
        metrics.append(line | ({"val": val(step)} if step % eval_every == 0 or step == steps else {}))
    # Domain d prefers the experts i with i % len(domains) == d, three times over.
    counts = [
        [
            [int(300 * (3 if i % len(domains) == d else 1) * rng.uniform(0.4, 1.6)) for i in range(n_experts)]
            for d in range(len(domains))
        ]
        for _ in layers
    ]
    total = 3_000_000 if layers else 1_000_000
    summary = {
        "name": name,
        "seed": seed,
        "model": {"name": "cpu-small", "moe": {"n_experts": n_experts, "k": 4} if layers else None},
        "params": {"total": total, "active": 1_000_000},
        "flops": {"forward": 2_100_000 if layers else 2_000_000, "training": 6_000_000},
        "steps": steps,
        "tokens": steps * 2048,
        "seconds": seconds(steps),
        "tokens_per_s": speed,
        "peak_memory_bytes": 512 * 2**20,
        "val": val(steps),
        "val_windows": [float(each) for each in windows] if windows is not None else [final] * 64,
        "load": {"layers": list(layers), "domains": list(domains), "counts": counts} if layers else None,
        "dataset": "5eed",
        "tokenizer": "70cea",
        "precision": "bf16",
        "device": "a processor",
        "threads": 2,
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "commit": "0123abc",
        "dirty": False,
        "dispatch": "torch",
        "skipped": 0,
    }
    lines = [line_from_json(line) for line in metrics]
    return Run(name, record(Summary, summary, name), lines)


def fake_pair(difference=-0.08, noise=0.02, seed=0, moe_speed=3000.0, n_windows=64, **both) -> Pair:
    """An MoE that ends `difference` nats from its twin; windows differ by that, give or take `noise`."""
    rng = np.random.default_rng(seed)
    dense = 3.3 + rng.normal(0, 0.3, n_windows)
    wobble = rng.normal(0, noise, n_windows)
    moe = dense + difference + wobble - wobble.mean()
    dense_run = {**both, "layers": (), "speed": 5000.0}
    return Pair(
        fake_run(f"moe-seed{seed}", seed, float(moe.mean()), moe_speed, windows=moe, **both),
        fake_run(f"dense-seed{seed}", seed, float(dense.mean()), windows=dense, **dense_run),
    )


def with_routing(run: Run, max_vio: tuple[float, ...], effective_experts: float, skipped: float) -> None:
    """Give the run's MoE layers, one per `max_vio`, what the last validation says of routing."""
    run.summary.load.routing[:] = [
        LayerMetrics(i, value, 0.5, effective_experts, 0, 0.0, skipped) for i, value in enumerate(max_vio)
    ]


def with_dropped(run: Run, shares: Callable[[int], Sequence[float]]) -> None:
    """Give every step of the run MoE layers with these shares of dropped rows."""
    for i, line in enumerate(run.metrics[1:], 1):
        layers = [LayerMetrics(j, 0.0, 1.0, 1.0, 0, share, 0.0) for j, share in enumerate(shares(line.step))]
        run.metrics[i] = dataclasses.replace(line, layers=layers)


def write_run(run: Run, folder: Path) -> None:
    """The files of a run that a comparison reads."""
    folder.mkdir(parents=True)
    write_summary(folder, run.summary)
    (folder / "metrics.jsonl").write_text("".join(to_text(line_to_json(line)) + "\n" for line in run.metrics))
