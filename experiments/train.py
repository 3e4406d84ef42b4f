"""Train one model.

python -m experiments.train                                    # an MoE on the blend, minutes on two CPU cores
python -m experiments.train model=cpu-nano train.steps=50      # seconds
python -m experiments.train model.moe=null                     # a dense model
python -m experiments.train data=text data.path=my/texts       # your own text
python -m experiments.train run=runs/... resume=true           # go on with an interrupted run, its own settings
python -m experiments.train run=runs/... resume=true trust=true   # the same, with the router of your own it names
python -m experiments.train source=runs/... run=runs/NEW optim.lr=1e-4   # a new run from another's weights
python -m experiments.train source=runs/.../checkpoints/step-00000400 source_state=all run=runs/NEW \\
    train.steps=500 optim=wsd optim.decay=0.2                  # all of its state, and a decay from there on
python -m experiments.train -m router=softmax,sigmoid seed=0,1,2 resume=true   # a sweep that can be repeated

From a `source` come, where they are not given, the model, the router, the balance, the tokenizer and data.documents.
Ctrl-C, SIGTERM and a terminal that is closed end it after the step, saved. A reader that goes away (`| head`) does not.
"""

import dataclasses
from pathlib import Path

from experiments import cli
from experiments.sweeps import check_each
from moe.config.run import Config
from moe.run import folder, source
from moe.train import beforehand
from moe.train.loop import train


def place_in_sweep(cfg: Config, sweep: str, job: str) -> tuple[Config, Path]:
    """The settings of a sweep's job: with a folder of its own, whose name says what was swept. One that is repeated
    with more values finds the runs of those it had."""
    run = Path(cfg.run) if cfg.run else folder.default_folder(cfg, job)
    return dataclasses.replace(cfg, run=str(run)), run


def over_its_own(cfg: Config, words: list[str]) -> Config:
    """With `run=... resume=true` every setting that the command line does not give is the run's own; in a new run with
    `source=...` every one that must fit the weights is the source's, where neither it nor its files give it."""
    given, trust = cli.keys_of(words), cfg.trust or cfg.router.name
    if cfg.resume and cfg.run and Path(cfg.run).exists() and "experiment" not in given:
        return cli.overlay(folder.read_config(Path(cfg.run), trust), cfg, given)
    if cfg.source:
        return source.adopt(cfg, *source.read_source(cfg.source, trust), [*cli.keys_of_files(words), *given])
    return cfg


def check_jobs(jobs: list[cli.Job]) -> None:
    """Refuse a job that names what is not there, before others train for hours. Raises `BadInput`."""
    check_each(jobs, beforehand.check)


@cli.command("train", Config, under=over_its_own, place=place_in_sweep, before=check_jobs)
def main(cfg: Config) -> None:
    """Train, or go on with a run."""
    train(cfg)


if __name__ == "__main__":
    main()
