"""Fill a tracker from a finished run's metrics, after the fact. It gets what log.tensorboard, log.wandb and log.trackio
would have sent while the run trained.

    python -m experiments.track run=runs/demo/moe-seed0 tensorboard=true    # into the run's own folder
    python -m experiments.track run=runs/mine wandb=PROJECT
    python -m experiments.track run=runs/mine trackio=PROJECT

Each is an extra (pip install 'moe-switchyard[tensorboard]'). Filled again, TensorBoard has every step once.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from experiments import cli
from moe.config.train import LogConfig
from moe.errors import BadInput, of_the_machine
from moe.run import jsonl, terminal
from moe.run.folder import read_settings
from moe.run.summary import StepCounts, read_metrics, read_summary
from moe.train.trackers import Trackers, check


@dataclass
class TrackConfig:
    """Which run, and which trackers."""

    run: str = ""  # a finished run's folder
    tensorboard: bool = False  # TensorBoard's files, into the run's folder
    wandb: str = ""  # project name; "": off
    trackio: str = ""  # project name; "": off


@cli.command("track", TrackConfig, verbatim=("wandb", "trackio"))
def main(cfg: TrackConfig) -> None:
    """Send every line of the run's metrics."""
    # What cannot be sent is refused before a tracker is asked for anything.
    if not cfg.run:
        raise BadInput("run= is needed: the folder of a finished run, like run=runs/demo/moe-seed0.")
    if not (cfg.tensorboard or cfg.wandb or cfg.trackio):
        raise BadInput("no tracker is named: give tensorboard=true, wandb=PROJECT or trackio=PROJECT.")
    run = Path(cfg.run).absolute()
    log = LogConfig(tensorboard=cfg.tensorboard, wandb=cfg.wandb, trackio=cfg.trackio)
    settings = dataclasses.replace(read_settings(Path(cfg.run)), log=log)
    check(settings, prefix="")
    read_summary(Path(cfg.run))
    lines = read_metrics(Path(cfg.run))
    records = jsonl.read_records(StepCounts, Path(cfg.run) / "routing" / "counts.jsonl")
    counts = {record.step: record.counts for record in records}

    # Nothing that a tracker holds of this run counts any more: -1 is before its first line, of step 0.
    try:
        trackers = Trackers(settings, run, -1)
        for line in lines:
            trackers.log(line, counts.get(line.step, []))
        trackers.close()
    except OSError as error:
        raise of_the_machine(error) or error from error
    named = [name for name in ("tensorboard", "wandb", "trackio") if getattr(cfg, name)]
    terminal.say(f"{cfg.run}: {len(lines):,} lines sent to {', '.join(named)}")


if __name__ == "__main__":
    main()
