"""Fit scaling laws: train families of sizes at equal FLOPs, fit the papers' forms, predict the largest.

    python -m experiments.scaling                                  # train what no line is of, fit, write the page
    python -m experiments.scaling train=false                      # the fits alone, of the lines that are there
    python -m experiments.scaling records=mine.jsonl page=mine.md  # of runs of one's own

What the runs have in common is conf/experiment/scaling.yaml. A line of each is kept in
experiments/results/scaling.jsonl, and a run that has one is not trained again. Writes docs/scaling.md and, with
matplotlib, a picture beside the lines.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli
from experiments.pages import scaling_page
from experiments.stats.scaling import FORMS, Record
from experiments.study import pool
from experiments.study.compose import compose_jobs
from experiments.study.manifest import Job, config_of, finished, job_of, run_of
from moe.config.run import Config
from moe.data.prepare import prepare
from moe.errors import BadInput
from moe.model import cost
from moe.run import terminal
from moe.run.command_line import command_line
from moe.run.jsonl import read_records, write_atomically, write_lines

EXPERIMENT = "scaling"
PAGE = "docs/scaling.md"
SHORTEST, LONGEST = 250, 20_000  # steps of a run that is worth training: warm-up must not be most of it


@dataclass
class ScalingConfig:
    """Which runs, and where what is found of them is kept."""

    widths: list[int] = field(default_factory=lambda: [16, 32, 48, 64, 96])  # D; an expert is as wide, an MLP twice
    budgets: list[float] = field(default_factory=lambda: [3e11, 1e12])  # FLOPs of a run's training
    experts: list[int] = field(default_factory=lambda: [4, 16, 32])  # E besides 8, at the middle width
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    run: str = "runs/scaling"  # the study's folder; runs lie beside it
    train: bool = True  # false: only fit, the runs that have a line
    workers: int = 1  # processes that train at a time
    records: str = ""  # a file of lines to fit instead, with a page of its own; "": experiments/results/scaling.jsonl
    page: str = PAGE  # the page that is written
    picture: str = ""  # the picture; "": beside the lines

    def __post_init__(self) -> None:
        for name in ("widths", "budgets", "seeds"):
            if not getattr(self, name) or min(getattr(self, name)) < (0 if name == "seeds" else 1):
                raise BadInput(f"{name}={getattr(self, name)} must be a list of numbers above 0, such as [32,64].")
        if any(width % 16 for width in self.widths):
            raise BadInput(f"widths={self.widths} must be multiples of 16, of which a head has two or more.")
        if self.records and self.page == PAGE:
            raise BadInput(f"records={self.records} would overwrite {PAGE}: give a page of its own, page=<file.md>.")
        if self.workers < 1:
            raise BadInput(f"workers={self.workers} is out of range: accepted is at least 1.")


@cli.command("scaling", ScalingConfig, verbatim=("run", "records", "page", "picture"))
def main(cfg: ScalingConfig) -> None:
    """Train what is missing, keep a line of each run, fit, and write the page."""
    path = Path(cfg.records or "experiments/results/scaling.jsonl")
    lines = read_rows(path)
    if cfg.train and not cfg.records:
        jobs = family(cfg)
        missing = [job for job in jobs if job.id not in {line.id for line in lines}]
        terminal.say(
            f"scaling: {len(jobs) - len(missing)} of {len(jobs)} runs are recorded, {len(missing)} are missing"
        )
        study = Path(cfg.run), EXPERIMENT, command_line("scaling"), missing
        status = pool.train_missing(*study, cfg.workers) if missing else 0
        lines = keep(path, lines, jobs, [row for job in missing if (row := row_of(cfg, job))])
        if status:
            terminal.say("scaling: some runs failed, and the fits are of the others")
    # Then the fits, of what there is.
    if not lines:
        raise BadInput(f"{path} has no runs to fit: train some with python -m experiments.scaling.")
    records = [line.record() for line in lines]
    reasons = scaling_page.not_fitted(records)
    if cfg.records and len(reasons) == len(FORMS):
        raise BadInput(f"{path} has runs that no form can be fitted to: {next(iter(reasons.values()))}")
    commits = ", ".join(sorted({line.commit[:10] for line in lines if line.commit}))
    devices = " and ".join(sorted({line.device for line in lines if line.device})) or "an unknown machine"
    png = Path(cfg.picture) if cfg.picture else path.with_suffix(".png")
    write_atomically(Path(cfg.page), scaling_page.page(records, commits, devices, png))
    terminal.say(f"page: {cfg.page}, of {len(lines)} runs")
    if scaling_page.picture(records, png):
        terminal.say(f"picture: {png}")


@dataclass(frozen=True)
class Row:
    """A line of the file: a run's record, and what it leads back to."""

    arm: str
    seed: int
    active: int
    total: int
    experts: int
    granularity: float
    tokens: int
    flops: float
    loss: float
    id: str = ""  # the job's, a hash of its settings; none of records of one's own
    commit: str | None = None
    device: str = ""
    torch: str = ""

    def record(self) -> Record:
        """What the fits read of it."""
        return Record(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Record)})


def read_rows(path: Path) -> list[Row]:
    """The lines of a file, of an id the last; none where there is no file. Raises `BadInput` for any other line."""
    return list({row.id or f"{row.arm} {row.seed}": row for row in read_records(Row, path)}.values())


def family(cfg: ScalingConfig) -> list[Job]:
    """Every run: sizes at equal FLOPs for each budget, and numbers of experts at the middle width."""
    # What the runs have in common; a study has two seeds or more, and here the first of them is taken.
    (_, base), *_ = compose_jobs([f"experiment={EXPERIMENT}", "seed=0,1"]).jobs
    vocab_size = prepare(base.data, base.tokenizer, terminal.say).tokenizer.vocab_size
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, vocab_size=vocab_size))
    planned = [(name, dataclasses.replace(run_cfg, seed=s)) for name, run_cfg in sizes(cfg, base) for s in cfg.seeds]
    return [job_of(name, [], run_cfg) for name, run_cfg in planned]


def sizes(cfg: ScalingConfig, base: Config) -> Iterator[tuple[str, Config]]:
    """(arm, settings) of every size and budget whose number of steps is worth training."""
    assert base.model.moe is not None, "the family is of Mixtures of Experts"
    middle = sorted(cfg.widths)[len(cfg.widths) // 2]
    usual = base.model.moe.n_experts
    shapes = [(width, usual) for width in cfg.widths] + [(middle, e) for e in cfg.experts if e != usual]
    for width, n_experts in shapes:
        moe = dataclasses.replace(base.model.moe, n_experts=n_experts, d_expert=width)
        model = dataclasses.replace(base.model, d_model=width, d_ff=2 * width, n_heads=max(1, width // 32), moe=moe)
        per_step = cost.flops(model, base.router).training * base.train.batch_size * model.context
        for budget in cfg.budgets:
            steps = round(budget / per_step)
            if SHORTEST <= steps <= LONGEST:
                train = dataclasses.replace(base.train, steps=steps)
                yield f"D{width}-E{n_experts}-{budget:.0e}", dataclasses.replace(base, model=model, train=train)


def row_of(cfg: ScalingConfig, job: Job) -> Row | None:
    """The line of a job; None as long as its run is not finished."""
    run, job_cfg = run_of(Path(cfg.run), job), config_of(job)
    summary, model = finished(run, job_cfg), job_cfg.model
    if not summary:
        return None
    return Row(
        id=job.id,
        arm=job.arm,
        seed=job.seed,
        active=summary.params.active,
        total=summary.params.total,
        experts=model.moe.n_experts if model.moe else 1,
        granularity=model.d_ff / model.moe.d_expert if model.moe else 1.0,
        tokens=summary.tokens,
        flops=float(summary.flops.training * summary.tokens),
        loss=summary.val.loss,
        commit=summary.commit,
        device=summary.device,
        torch=summary.versions.get("torch", ""),
    )


def keep(path: Path, lines: list[Row], jobs: list[Job], new: list[Row]) -> list[Row]:
    """Write the lines, this family's first and in its order, other families' after them. Returns this family's."""
    by_id = {line.id: line for line in [*lines, *new]}
    kept = [by_id.pop(job.id) for job in jobs if job.id in by_id]
    write_lines(path, map(dataclasses.asdict, [*kept, *by_id.values()]))
    return kept


if __name__ == "__main__":
    main()
