"""Say how far every job of a study is: done, running, failed, interrupted, waiting. Works while others train.

python -m experiments.status run=runs/first-study
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from experiments import cli
from experiments.pages import tables
from experiments.study.manifest import Job, read_study
from experiments.study.search import best, refusals
from experiments.study.states import State, counted, states_of
from moe.errors import BadInput
from moe.run import terminal

HEADINGS = ("job", "run", "is", "step", "time left", "val loss")


@dataclass
class StatusConfig:
    """Of which study."""

    run: str = ""  # the study's folder


@cli.command("status", StatusConfig)
def main(cfg: StatusConfig) -> None:
    """Print a row per job, what failed of each, and how many are in which state."""
    if not cfg.run:
        raise BadInput("run= is needed: the folder of a study, like run=runs/first-study.")
    folder = Path(cfg.run)
    study = read_study(folder)
    states = states_of(folder, study)
    tables.print_table(HEADINGS, [cells(*pair) for pair in zip(study.jobs, states, strict=True)], left=3)
    for job, state in zip(study.jobs, states, strict=True):
        if state.error:
            terminal.say(f"{job.title}: {state.error}")
    for line in refusals(study):
        terminal.say(line)
    terminal.say(f"{folder}: {counted(states)}")
    if study.search:
        terminal.say(best(folder, study))


def cells(job: Job, state: State) -> tuple[str, ...]:
    """A row of the table."""
    left = "" if state.seconds_left is None or state.word != "running" else words_of(state.seconds_left)
    what = f"failed ({state.tries}x)" if state.word == "failed" and state.tries > 1 else state.word
    loss = tables.number(state.summary.val.loss if state.summary else None, ".4f")
    return job.title, job.id, what, f"{state.step}/{state.of}", left, loss


def words_of(seconds: float) -> str:
    """A time to wait: 0:02:40."""
    return str(timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    main()
