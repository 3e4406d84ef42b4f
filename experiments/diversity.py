"""Fine-tune on questions of more and more kinds of task, and ask about tasks that were not learnt.

    python -m experiments.diversity                                            # a table, in minutes
    python -m experiments.diversity out=experiments/results/diversity.jsonl    # and the rows: then docs/fine-tuning.md

What is learnt and asked: experiments/suites/diversity.py. Runs lie in `run`; those that are finished are not trained
again.
"""

from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli
from experiments.pages import tables
from experiments.pages.diversity_table import HEADINGS, cells
from experiments.suites.diversity import measure
from moe.errors import BadInput
from moe.run import machine, terminal
from moe.run.command_line import command_line
from moe.run.jsonl import write_lines


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


if __name__ == "__main__":
    main()
