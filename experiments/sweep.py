"""Train every run of a study: planned once, worked through by any number of workers, killed and gone on with at will.

    python -m experiments.sweep run=runs/first-study experiment=first-study workers=2    # a file of conf/experiment
    python -m experiments.sweep run=runs/routers experiment=routers router=softmax,hash seed=0,1,2
    python -m experiments.sweep run=runs/first-study                # go on, or join in from another machine
    python -m experiments.sweep run=runs/first-study again=true     # try what failed again
    python -m experiments.sweep run=runs/first-study workers=16 slurm.executor=slurm slurm.gpus=1    # a job array

Writes into `run` the plan (study.json). The runs lie beside it, each called by the hash of its settings: studies in one
folder share those they have in common. How far each is: python -m experiments.status run=runs/first-study
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import torch

from experiments import cli
from experiments.refusals import CONF, read_arguments
from experiments.study import cluster
from experiments.study.claims import claimed, forget_failures, turn
from experiments.study.compose import COMMAND, Planned, SweepConfig, compose_jobs, plan, text_of
from experiments.study.manifest import FILE, Study, check_same_plan, config_of, read_study, run_of, runs_of, write_study
from experiments.study.pool import Pool, cores
from experiments.study.search import is_wanting
from experiments.study.worker import is_settled
from moe.config.run import Config, build
from moe.data.prepare import prepare
from moe.errors import BadInput
from moe.run import machine, terminal
from moe.run.command_line import command_line
from moe.run.precision import choose_precision
from moe.run.trust import check_router

# What may be given for a study that is there, without saying again what it is.
TO_GO_ON = ("run", "workers", "again", "trust", "slurm")


def main() -> None:
    """Plan or go on with a study, and work until it is done."""
    terminal.begin()
    cli.register(COMMAND, SweepConfig)
    words = cli.refuse(read_words)
    if words is not None:
        status = cli.refuse(sweep, words)
        if status:
            raise SystemExit(status)


def read_words() -> list[str] | None:
    """The settings on the command line; None where only help was asked for, and printed. Raises `BadInput`."""
    arguments = read_arguments()
    if arguments.help:
        cli.show_help(__doc__, COMMAND, SweepConfig, arguments.overrides, True)
        return None
    if arguments.multirun or arguments.cfg or arguments.info:
        raise BadInput("a study is no multirun: give the settings alone, those with several values like seed=0,1,2.")
    return list(arguments.overrides)


def sweep(words: list[str]) -> int:
    """Work on the study of a command line. Returns the exit status. Raises `BadInput`."""
    # What is asked for, all of it checked before anything is prepared.
    asked, cfg = None, going_on(words)
    if cfg is None:
        asked = compose_jobs(words)
        cfg = asked.cfg
    folder = folder_of(cfg, asked)

    # One process at a time prepares the data and plans; whoever comes later finds both.
    with turn(runs_of(folder), "plan"):
        study = plan_anew(folder, asked, words) if asked else as_planned(folder, cfg)
    if cfg.again:
        for job in study.jobs:
            with claimed(runs_of(folder), job.id) as ours:
                if ours:
                    forget_failures(runs_of(folder), job.id)

    # All that is left is work.
    if cfg.slurm.executor:
        return cluster.submit(folder, study, cfg.workers, cfg.slurm)
    return Pool(folder, study, cfg.workers).run()


def going_on(words: list[str]) -> SweepConfig | None:
    """The settings of a command line that only says which study to go on with, and how; None for any other."""
    if not words or not {key.partition(".")[0] for key in cli.keys_of(words)} <= set(TO_GO_ON):
        return None
    cli.check_overrides(COMMAND, SweepConfig, words, False)
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        cfg = cli.typed(cli.compose(COMMAND, SweepConfig, words), SweepConfig)
    return cfg if cfg.run else None


def folder_of(cfg: SweepConfig, asked: Planned | None) -> Path:
    """The study's folder: as given, or called by its experiment. Raises `BadInput` where there is neither."""
    name = cfg.run or (f"runs/{asked.name}" if asked and asked.name else "")
    if not name:
        raise BadInput("run= is needed for a study that is no file of conf/experiment: name a folder, like runs/mine.")
    return Path(name)


def as_planned(folder: Path, cfg: SweepConfig) -> Study:
    """The study that is there, with its data prepared if any run is left to train. Raises `BadInput`."""
    study = read_study(folder)
    jobs = [(job, config_of(job)) for job in study.jobs]
    to_come: list[Config] = (
        [build(tree) for tree in study.search.settings] if study.search and is_wanting(study) else []
    )
    for job_cfg in [*(job_cfg for _, job_cfg in jobs), *to_come]:
        check_router(folder, job_cfg.router.name, cfg.trust)
    texts_of([*to_come, *(job_cfg for job, job_cfg in jobs if not is_settled(folder, job, study.retries))])
    return study


def plan_anew(folder: Path, asked: Planned, words: list[str]) -> Study:
    """The study that a command line asks for, written down; if it is there already, it must be the same. Raises
    `BadInput`."""
    old = read_study(folder) if (folder / FILE).exists() else None
    if old is None and (folder / "config.yaml").exists():
        raise BadInput(f"run={folder} is a run's folder: choose another for the study, like {folder.parent}/mine.")
    settings = [cfg for _, cfg in asked.jobs]
    vocab_sizes = texts_of(settings)
    command, commit = command_line(COMMAND, *words), machine.git_state().commit
    planned = lambda precision: plan(asked, vocab_sizes, precision, command, commit)
    precision = old.precision if old else precision_of_runs(folder, planned)
    study = planned(precision or precision_of(settings, vocab_sizes, asked.cfg.workers))
    if old:
        check_same_plan(old, study, folder)
        study = dataclasses.replace(study, commit=old.commit, command=old.command)
        if old.search and study.search:
            asked_for = dataclasses.replace(study.search, asked=old.search.asked)
            study = dataclasses.replace(study, jobs=old.jobs, search=asked_for)
    if study != old:
        write_study(folder, study)
    return study


def texts_of(settings: Sequence[Config]) -> dict[str, int]:
    """Have every text that these runs read prepared. Returns the size of its vocabulary, by `text_of` a run."""
    texts = {text_of(cfg): cfg for cfg in settings}
    return {text: prepare(cfg.data, cfg.tokenizer, terminal.say).tokenizer.vocab_size for text, cfg in texts.items()}


def precision_of_runs(folder: Path, planned: Callable[[str], Study]) -> str:
    """The precision in which more of the planned runs are there already, other studies' ones: measured anew it might
    come out another, and they would be trained twice. "" where neither is."""
    n_there = {name: sum(run_of(folder, job).exists() for job in planned(name).jobs) for name in ("fp32", "bf16")}
    if n_there["fp32"] == n_there["bf16"]:
        return ""
    precision = max(n_there, key=n_there.__getitem__)
    terminal.say(f"precision: {precision} for the whole study, as in {n_there[precision]} of its runs that are there")
    return precision


def precision_of(settings: Sequence[Config], vocab_sizes: dict[str, int], workers: int) -> str:
    """What runs whose precision is open are trained in: decided once, on the threads that a worker will have, since
    measured anew each might come out in another. "" where none is open."""
    cfg = next((cfg for cfg in settings if cfg.train.precision == "auto"), None)
    if cfg is None:
        return ""
    torch.set_num_threads(cfg.train.threads or max(1, cores() // workers))
    vocab_size = cfg.model.vocab_size or vocab_sizes[text_of(cfg)]
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))
    precision, why = choose_precision(cfg, machine.choose_device(cfg.train.device))
    terminal.say(f"precision: {precision} for the whole study, because {why}")
    return precision


if __name__ == "__main__":
    main()
