"""Put published claims about Mixture-of-Experts models to the test.

    python -m experiments.claims                    # tier=cpu: the runs that no line is of, and the page
    python -m experiments.claims workers=2          # two at a time
    python -m experiments.claims tier=gpu           # the same claims and two more, at the size of one GPU
    python -m experiments.claims train=false        # the page alone, from the runs that are there

Trains what is missing, and writes docs/claims.md. The studies are conf/experiment/claims.yaml and claims-gpu.yaml; what
is kept of each run is a line of experiments/results/claims.jsonl, and a run that has its line is not trained again.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments import cli
from experiments.pages import claims_page
from experiments.stats import verdict
from experiments.stats.ledger import Row
from experiments.study import pool
from experiments.study.compose import compose_jobs, plan, text_of
from experiments.study.manifest import Job, config_of, finished, run_of
from moe.analysis.decisions import agreement
from moe.analysis.specialisation import information
from moe.config.run import Config
from moe.data.loader import validation_windows
from moe.data.prepare import prepare
from moe.data.shards import Dataset
from moe.errors import BadInput
from moe.eval.evaluate import causal_leak
from moe.model.transformer import Transformer
from moe.run import terminal
from moe.run.command_line import command_line
from moe.run.jsonl import read_records, write_atomically, write_lines
from moe.run.load import load_run
from moe.run.summary import Summary, read_metrics

EXPERIMENTS = {"cpu": "claims", "gpu": "claims-gpu"}
WINDOWS = 16  # of validation text, on which two checkpoints' routing is compared


@dataclass
class ClaimsConfig:
    """Which claims are tried, and where what is found of them is kept."""

    tier: str = "cpu"  # cpu | gpu
    run: str = "runs/claims"  # the studies' folder; runs lie beside it
    train: bool = True  # false: only write the page, from the runs that have a line
    workers: int = 1  # processes that train at a time
    results: str = "experiments/results"  # the folder of claims.jsonl and claims-gpu.jsonl
    page: str = "docs/claims.md"  # the page that is written

    def __post_init__(self) -> None:
        if self.tier not in EXPERIMENTS:
            raise BadInput(f"tier={self.tier} is not one of {', '.join(EXPERIMENTS)}.")
        if self.workers < 1:
            raise BadInput(f"workers={self.workers} is out of range: accepted is at least 1.")


@cli.command("claims", ClaimsConfig)
def main(cfg: ClaimsConfig) -> None:
    """Train what is missing, keep a line of each run, write the page."""
    path = file_of(cfg, cfg.tier)
    rows = read_rows(path)
    if cfg.train:
        jobs = jobs_of(cfg)
        known = {row.id for row in rows}
        missing = [job for job in jobs if job.id not in known]
        terminal.say(f"claims: {len(jobs) - len(missing)} of {len(jobs)} runs are recorded, {len(missing)} are missing")
        command, failed = command_line("claims", f"tier={cfg.tier}"), 0
        if missing:
            study = Path(cfg.run), EXPERIMENTS[cfg.tier], command, missing
            failed = pool.train_missing(*study, cfg.workers, claims_page.MARGIN)
        rows = keep(path, rows, jobs, recorded(cfg, missing))
    page = claims_page.page(read_rows(file_of(cfg, "cpu")), read_rows(file_of(cfg, "gpu")))
    write_atomically(Path(cfg.page), page)
    terminal.say(f"page: {cfg.page}, of {len(rows)} runs")
    if cfg.train and failed:
        raise BadInput("some runs failed: what they failed of stands above, and the page is of the others.")


def file_of(cfg: ClaimsConfig, tier: str) -> Path:
    """Where a tier's lines are kept."""
    return Path(cfg.results, f"{EXPERIMENTS[tier]}.jsonl")


def read_rows(path: Path) -> list[Row]:
    """The lines of a file, of a run the last; none where there is no file. Raises `BadInput` for any other line."""
    return list({row.id: row for row in read_records(Row, path)}.values())


def jobs_of(cfg: ClaimsConfig) -> list[Job]:
    """Every run of a tier's study, with its texts prepared."""
    asked = compose_jobs([f"experiment={EXPERIMENTS[cfg.tier]}"])
    sizes = {}
    for _, run_cfg in asked.jobs:
        if text_of(run_cfg) not in sizes:
            dataset = prepare(run_cfg.data, run_cfg.tokenizer, terminal.say)
            sizes[text_of(run_cfg)] = dataset.tokenizer.vocab_size
    return plan(asked, sizes, "", "", None).jobs


def recorded(cfg: ClaimsConfig, jobs: list[Job]) -> list[Row]:
    """A row for each of these runs that is finished."""
    rows = []
    for job in jobs:
        run, job_cfg = run_of(Path(cfg.run), job), config_of(job)
        try:
            summary = finished(run, job_cfg)
        except BadInput as bad:
            terminal.say(f"claims: {job.title} is left out: {bad}")
            continue
        if summary:
            rows.append(measure(job, run, job_cfg, summary))
    return rows


def keep(path: Path, rows: list[Row], jobs: list[Job], new: list[Row]) -> list[Row]:
    """Write the lines: of this study's runs alone, in its order. Returns them."""
    by_id = {row.id: row for row in [*rows, *new]}
    kept = [by_id[job.id] for job in jobs if job.id in by_id]
    write_lines(path, map(dataclasses.asdict, kept))
    return kept


def measure(job: Job, run: Path, cfg: Config, summary: Summary) -> Row:
    """The row of a finished run: what its summary has, and what its models are asked besides."""
    # What the run says of itself.
    curve = verdict.validation_curve(verdict.Run(run.name, summary, read_metrics(run)))
    # What its model is asked: on the same text, which is there.
    dataset, last = prepare(cfg.data, cfg.tokenizer, lambda line: None), load_run(run, "last")[0]
    load = summary.load
    mean = lambda values: float(np.mean(list(values)))
    return Row(
        id=job.id,
        arm=job.arm,
        seed=job.seed,
        loss=summary.val.loss,
        bpb=summary.val.bpb,
        steps=summary.steps,
        tokens=summary.tokens,
        active=summary.params.active,
        total=summary.params.total,
        flops=float(summary.flops.training * summary.tokens),
        curve=[list(point) for point in zip(curve.steps, curve.seconds, curve.loss, strict=True)],
        max_vio=mean(layer.max_vio for layer in load.routing) if load else None,
        dead=mean(layer.dead for layer in load.routing) if load else None,
        specialisation=mean(information(torch.tensor(by_domain)) for by_domain in load.counts) if load else None,
        leak=causal_leak(last, windows(dataset, last.cfg.context, 2)[:, :-1]),
        settled=settled(run, last, summary.steps, dataset) if load and cfg.checkpoint.every else None,
        commit=summary.commit,
        device=summary.device,
        precision=summary.precision,
        versions=summary.versions,
    )


def windows(dataset: Dataset, context: int, n: int) -> torch.Tensor:
    """(n, context + 1) tokens of the validation text, spread over it."""
    split = dataset.split("val")
    read_BS1, _ = split.read(validation_windows(split, context, n * context).start_W, context)
    return torch.from_numpy(read_BS1)


@torch.no_grad()
def settled(run: Path, last: Transformer, steps: int, dataset: Dataset) -> float:
    """How far the last model's choices of experts are those of the model of a tenth of the steps
    (`moe.analysis.decisions.agreement`), the mean of the MoE layers. By chance it would be K / E."""
    early = load_run(run, f"step-{steps // 10}")[0]
    tokens_BS = windows(dataset, last.cfg.context, WINDOWS)[:, :-1]
    layers = zip(choices(last, tokens_BS), choices(early, tokens_BS), strict=True)
    return float(np.mean([agreement(*layer) for layer in layers]))


def choices(model: Transformer, tokens_BS: torch.Tensor) -> list[torch.Tensor]:
    """The experts (T, K) that each MoE layer chooses."""
    return [routing.expert for routing in model(tokens_BS).routing]


if __name__ == "__main__":
    main()
