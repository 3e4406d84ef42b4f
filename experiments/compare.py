"""Train a Mixture-of-Experts model and its dense twin on the same batches; say which is better, and by how much.

    python -m experiments.compare                                   # minutes on two CPU cores
    python -m experiments.compare model=cpu-nano train.steps=50     # seconds, too short to mean anything
    python -m experiments.compare seeds=[0,1,2] match=flops         # a verdict over seeds, matched in FLOPs
    python -m experiments.compare seeds=[0,1,2] margin=0.01         # and whether the two are equivalent within 0.01
    python -m experiments.compare seeds=[0,1,2] seed_data=0         # over initial weights alone: the same batches
    python -m experiments.compare resume=true                       # go on: finished runs are reused
    python -m experiments.compare -m experiment=routers router=softmax,hash,soft seed=0,1,2    # one table of them all

Writes into `run` (default runs/compare-<hash of the settings>): moe-seed0, dense-seed0, ... (a run's folder each),
declared.json (before training: the margin and the seeds), compare.json (every number), table.md, and index.html, a page
that needs nothing else. A sweep has a folder of its own,
runs/<experiment or sweep>-<what is swept>-<hash>, and in it table.md, a folder per comparison, called by its own values
of what is swept, and the dense twins, which they share.
"""

import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from experiments import cli
from experiments.pages import compare_page, sweep_table, tables
from experiments.stats import sentences, verdict
from experiments.stats.speedup import mean_speedup
from experiments.sweeps import check_each
from moe.config import run as run_config
from moe.config.balance import BalanceConfig
from moe.config.model import ModelConfig
from moe.config.parse import ANY, Between, nearest, to_dict
from moe.config.router import RouterConfig
from moe.config.run import Config
from moe.data.loader import validation_windows
from moe.data.prepare import prepare
from moe.data.shards import Dataset
from moe.errors import BadInput
from moe.eval.evaluate import causal_leak
from moe.model import cost
from moe.run import machine, terminal
from moe.run.command_line import command_line
from moe.run.folder import read_config
from moe.run.jsonl import write_atomically, write_json
from moe.run.load import load_run
from moe.run.summary import read_metrics, read_summary
from moe.train import beforehand
from moe.train.loop import train

DECLARED = "declared.json"  # in a comparison's folder: what was said before training


@dataclass
class CompareConfig(Config):
    """A training run's settings, for both models."""

    match: str = "active_params"  # active_params | flops | total_params: what the dense twin has in common
    # for match=flops where a router takes as many experts as it likes: `rows` of a finished run's summary.json; 0: none
    rows: Annotated[float, Between(0, ANY)] = 0.0
    seeds: list[int] = field(default_factory=list)  # a pair of runs for each; empty: only `seed`
    # nats per token: the difference of validation loss that is called none, declared before training; 0: not declared
    margin: Annotated[float, Between(0, ANY)] = 0.0
    twins: str = ""  # where dense twins are kept for other comparisons to reuse; "": in `run`, in a sweep beside it
    baseline: str = sweep_table.BASELINE  # a sweep's line, such as a router, that its table compares the others with

    def __post_init__(self) -> None:
        if self.match not in verdict.LABELS:
            valid = sorted(verdict.LABELS)
            raise BadInput(f"match={self.match} is not one of {', '.join(valid)}; {nearest(self.match, valid)}.")
        if len(set(self.seeds)) < len(self.seeds):
            raise BadInput(f"seeds={self.seeds} names a seed twice: each must be there once.")
        if any(seed < 0 for seed in self.seeds):
            raise BadInput(f"seeds={self.seeds} has a negative one: accepted is at least 0.")


def place_in_sweep(cfg: CompareConfig, sweep: str, job: str) -> tuple[CompareConfig, Path]:
    """The settings of a sweep's job: with a folder of its own in the sweep's, and twins beside it."""
    run = Path(cfg.run or f"runs/{sweep}/{job}-{fingerprint(cfg)}")
    return dataclasses.replace(cfg, run=str(run), twins=cfg.twins or str(run.parent / "twins")), run


def check_jobs(jobs: list[cli.Job]) -> None:
    """Refuse a baseline that is no line of the table, and a comparison that names what is not there. Raises
    `BadInput`."""
    check_baseline(jobs)
    check_each(jobs, check_moe)


def check_moe(cfg: CompareConfig) -> None:
    """Refuse what can be known to fail before the text is read. Raises `BadInput`."""
    if cfg.model.moe is None:
        raise BadInput("model.moe=null leaves nothing to compare: choose a Mixture-of-Experts model.")
    for seed in cfg.seeds or [cfg.seed]:
        beforehand.check(dataclasses.replace(cfg, seed=seed, run=f"{folder_of(cfg)}/moe-seed{seed}"))


def folder_of(cfg: CompareConfig) -> Path:
    """Where a comparison is written."""
    return Path(cfg.run or f"runs/compare-{fingerprint(cfg)}")


def check_baseline(jobs: Sequence[cli.Job]) -> None:
    """Refuse a baseline that no line of the sweep's table is called by, but for the default one. Raises `BadInput`."""
    called = sorted(set(sweep_table.labels([job.overrides for job in jobs])))
    for job in jobs:
        if job.cfg.baseline not in (*called, sweep_table.BASELINE):
            raise BadInput(
                f"baseline={job.cfg.baseline} is no line of this sweep's table; {nearest(job.cfg.baseline, called)}."
            )


@cli.command(
    "compare",
    CompareConfig,
    verbatim=("baseline",),
    place=place_in_sweep,
    before=check_jobs,
    after=sweep_table.report,
)
def main(cfg: CompareConfig) -> sweep_table.Job:
    """Compare, then print the table and the verdict."""
    if cfg.margin and len(cfg.seeds or [cfg.seed]) < 2 and HydraConfig.get().mode != RunMode.MULTIRUN:
        raise BadInput(
            f"margin={cfg.margin:g} asks for a test of equivalence, which one seed cannot give: name two or more, such "
            "as seeds=[0,1,2], or leave margin 0."
        )
    result = compare(cfg, overrides=sys.argv[1:])
    print()
    tables.print_table(verdict.HEADINGS, result.table)
    for sentence in result.sentences:
        terminal.say(sentence)
    terminal.say(f"page: {Path(result.folder, 'index.html')}")
    return sweep_table.Job(list(HydraConfig.get().overrides.task), result)


def fingerprint(cfg: CompareConfig) -> str:
    """Eight hex digits of what decides the comparison's result."""
    same = dataclasses.replace(cfg, twins="", baseline=sweep_table.BASELINE)
    return run_config.fingerprint(same, younger=("rows", "baseline", "margin"))


def compare(
    cfg: CompareConfig, say: Callable[[str], None] = terminal.say, overrides: Sequence[str] = ()
) -> verdict.Comparison:
    """Train a pair of models per seed and write the comparison: what `compare.json` holds.

    `overrides` is the command line to repeat it with. With `cfg.resume` finished runs are reused and others continued.
    Raises `BadInput` for a model without experts, a twin that cannot match, or a folder that exists."""
    # What cannot be compared is refused before anything is trained.
    folder = folder_of(cfg)
    if folder.exists() and not cfg.resume:
        raise BadInput(f"run={folder} exists: continue it with resume=true, or choose another folder.")
    check_moe(cfg)
    dataset = prepare(cfg.data, cfg.tokenizer, say)
    vocab_size = cfg.model.vocab_size or dataset.tokenizer.vocab_size
    model = dataclasses.replace(cfg.model, vocab_size=vocab_size)
    settings = dict(zip(("moe", "dense"), settings_of_the_two(cfg, model), strict=True))

    # What is called no difference stands on the disk before anything is known.
    declare(cfg, folder)

    # Two runs per seed, all in the precision of the first: measured again, a twin's might come out another.
    pairs: list[verdict.Pair] = []
    for seed in cfg.seeds or [cfg.seed]:
        runs: list[verdict.Run] = []
        for kind in ("moe", "dense"):
            run_cfg = dataclasses.replace(settings[kind], seed=seed, run=str(folder / f"{kind}-seed{seed}"))
            if cfg.twins and kind == "dense":
                run_cfg.run, run_cfg.resume = str(Path(cfg.twins, f"dense-{run_config.fingerprint(run_cfg)}")), True
            say(f"compare: {kind}, seed {seed}")
            try:
                train(run_cfg, say)
            except BaseException as end:
                withdraw(folder)
                if isinstance(end, SystemExit):
                    say(f"The comparison is not finished. Go on with it: {repeat(overrides)} resume=true")
                raise
            run = read_run(Path(run_cfg.run))
            verdict.check_comparable([*itertools.chain(*pairs), *runs, run])
            train_cfg = dataclasses.replace(run_cfg.train, precision=run.summary.precision)
            settings = {name: dataclasses.replace(of_kind, train=train_cfg) for name, of_kind in settings.items()}
            leak = measure_leak(run_cfg, dataset)
            runs.append(run._replace(folder=os.path.relpath(run_cfg.run, folder), leak=leak))
        pairs.append(verdict.Pair(*runs))

    # What they say, for people and for machines.
    twin = run_config.fingerprint(dataclasses.replace(settings["dense"], seed=0))
    result = describe(cfg, folder, pairs, repeat(overrides), twin)
    write_atomically(folder / "table.md", tables.markdown(verdict.HEADINGS, result.table))
    write_atomically(folder / "index.html", compare_page.render(pairs, result))
    write_json(folder / "compare.json", dataclasses.asdict(result))
    return result


def declare(cfg: CompareConfig, folder: Path) -> None:
    """Write declared.json, or hold the settings to the one that is there. Raises `BadInput` for another margin than was
    declared before training."""
    path = folder / DECLARED
    if path.exists():
        try:
            margin = float(json.loads(path.read_text())["margin"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{path} is damaged: restore it, or compare again in another folder.") from error
    else:
        margin = 0.0 if any(folder.glob("*-seed*")) else cfg.margin  # what began without one declared none
    if cfg.margin != margin:
        raise BadInput(
            f"margin={cfg.margin:g} is not what was declared before training, margin={margin:g}: keep that, or compare "
            "in another folder."
        )
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"margin": cfg.margin, "match": cfg.match, "seeds": cfg.seeds or [cfg.seed]})


def withdraw(folder: Path) -> None:
    """Take back the declaration of a comparison that has no run yet, and its folder."""
    if {path.name for path in folder.iterdir()} == {DECLARED}:
        (folder / DECLARED).unlink()
        folder.rmdir()


def settings_of_the_two(cfg: CompareConfig, model: ModelConfig) -> tuple[Config, Config]:
    """The settings of the MoE's run and of its dense twin's, but for seed and folder. The twin has no router, and none
    of the settings of one, so that it is the twin of every MoE of its size."""
    shared = {setting.name: getattr(cfg, setting.name) for setting in dataclasses.fields(Config)}
    moe = Config(**shared | {"model": model})
    twin = cost.dense_twin(model, cfg.match, cfg.router, cfg.balance, cfg.rows or None)
    return moe, dataclasses.replace(moe, model=twin, router=RouterConfig(), balance=BalanceConfig())


def measure_leak(run_cfg: Config, dataset: Dataset) -> float:
    """`moe.eval.evaluate.causal_leak` of a finished run's last model, on two windows of the validation text."""
    model, _, cfg = load_run(Path(run_cfg.run), "last", run_cfg.trust or run_cfg.router.name)
    context, split = cfg.model.context, dataset.split("val")
    read_BS1, _ = split.read(validation_windows(split, context, 2 * context).start_W, context)
    place = machine.choose_device(run_cfg.train.device)
    return causal_leak(model.to(place), torch.from_numpy(read_BS1[:, :-1]).to(place))


def repeat(overrides: Sequence[str]) -> str:
    """What to type for this comparison, from the start."""
    return command_line("compare", *(word for word in overrides if not word.startswith("resume=")))


def read_run(folder: Path) -> verdict.Run:
    """A finished run from its folder. Raises `BadInput` for one whose validation loss is not finite."""
    summary = read_summary(folder)
    if not math.isfinite(summary.val.loss):
        raise BadInput(
            f"{folder} ended with a validation loss that is not finite, and cannot be compared: lower optim.lr="
            f"{read_config(folder, trust=True).optim.lr}, with another run=..."
        )
    return verdict.Run(folder.name, summary, read_metrics(folder))


def describe(
    cfg: CompareConfig, folder: Path, pairs: list[verdict.Pair], command: str, twin: str = ""
) -> verdict.Comparison:
    """Everything the comparison found. `twin`: the fingerprint of the dense twin's settings, whatever the seed."""
    verdict.check_comparable(itertools.chain(*pairs))
    rows, summary, margin = verdict.table(pairs), pairs[0].moe.summary, cfg.margin or None
    return verdict.Comparison(
        sentences=sentences.sentences(pairs, cfg.match, margin),
        table=[list(verdict.cells(row)) for row in rows],
        numbers=[dataclasses.asdict(row) | {"interval": row.interval and list(row.interval)} for row in rows],
        folder=str(folder),
        runs={"moe": [pair.moe.folder for pair in pairs], "dense": [pair.dense.folder for pair in pairs]},
        command=command,
        commit=summary.commit,
        dirty=summary.dirty,
        config=to_dict(cfg),
        leak=max(pair.moe.leak or 0.0 for pair in pairs),
        by_seed=[
            verdict.SeedResult(moe.summary.seed, verdict.measured(moe), verdict.measured(dense)) for moe, dense in pairs
        ],
        twin=twin,
        device=summary.device,
        versions=summary.versions,
        judgement=verdict.judgement(pairs, margin),
        bits=verdict.judge_bits(pairs),
        speedup={axis: mean_speedup(ratios) for axis, ratios in verdict.speedups(pairs).items()},
        sources=verdict.sources(pairs),
        text=verdict.text_of(pairs[0].moe),
    )


if __name__ == "__main__":
    main()
