"""Fine-tune on questions of more and more kinds of task, and ask about tasks that were not learnt.

    python -m experiments.diversity                                            # a table, in minutes
    python -m experiments.diversity out=experiments/results/diversity.jsonl    # and the rows: then docs/fine-tuning.md

What is learnt and asked: experiments/suites/diversity.py. Runs lie in `run`; those that are finished are not trained
again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli
from experiments.pages import tables
from experiments.stats.statistics import Interval, t_interval
from experiments.suites.diversity import KINDS, Row, measure
from moe.errors import BadInput
from moe.run import machine, terminal
from moe.run.command_line import command_line
from moe.run.jsonl import write_lines

HEADINGS = ("kinds of task", "other kinds, nats", "less than with one", "its own eight kinds, nats")


@dataclass
class DiversityConfig:
    """How many runs, and of how many steps."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # each draws which kinds of task, and in what order
    steps: int = 300  # of every run's fine-tuning
    base_steps: int = 900  # of the run that all go on from
    run: str = "runs/diversity"  # the folder of the questions and the runs
    out: str = ""  # a file of what every run came to, as JSON lines; "": none

    def __post_init__(self) -> None:
        for name in ("steps", "base_steps"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)} is out of range: accepted is at least 1.")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise BadInput(f"seeds={self.seeds} must be different numbers of at least 0, such as [0,1,2].")


@cli.command("diversity", DiversityConfig, verbatim=("run", "out"))
def main(cfg: DiversityConfig) -> None:
    """Train, print, and keep."""
    words = [f"{name}={str(getattr(cfg, name)).replace(' ', '')}" for name in ("seeds", "steps", "base_steps")]
    rows = measure(Path(cfg.run), cfg.seeds, cfg.steps, cfg.base_steps, terminal.say)
    tables.print_table(HEADINGS, cells(rows))
    if cfg.out:
        about = {
            "command": command_line("diversity", *words, f"out={cfg.out}"),
            "device": machine.device_name(machine.choose_device("cpu")),
            **machine.git_state()._asdict(),
        }
        write_lines(Path(cfg.out), (row._asdict() | about for row in rows))
        terminal.say(f"lines: {cfg.out}")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each number of kinds: means over the seeds with t intervals, differences by seed."""
    table: list[tuple[str, ...]] = []
    by_kinds = {kinds: [row for row in rows if row.kinds == kinds] for kinds in (0, *KINDS)}
    for kinds, runs in by_kinds.items():
        if not runs:
            continue
        others, learnt = (t_interval([getattr(row, name) for row in runs]) for name in ("others", "learnt"))
        less = ""
        if kinds > 1:
            one = {row.seed: row.others for row in by_kinds[1]}
            less = shown(t_interval([one[row.seed] - row.others for row in runs]))
        if kinds == 0:  # one model, whatever the seed
            others, learnt = (interval._replace(low=interval.mean, high=interval.mean) for interval in (others, learnt))
        table.append((str(kinds) if kinds else "none", shown(others), less, shown(learnt)))
    return table


def shown(interval: Interval) -> str:
    """A mean and its interval."""
    mean, low, high = interval
    return f"{mean:.3f}" if low == high else f"{mean:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
