"""Align small models on a task whose answers can be verified, and see one reward being hacked.

    python -m experiments.align                                                  # a table, in half an hour
    python -m experiments.align out=experiments/results/align.jsonl              # and the rows: then docs/aligning.md

What each arm is: experiments/suites/alignment.py. Runs lie in `run`; those that are finished are not trained again.
"""

from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli
from experiments.pages import tables
from experiments.suites.alignment import (
    ARMS,
    HEADINGS,
    PAIRS,
    ROUTES,
    START_STEPS,
    STEPS,
    cells,
    measure,
    pair_cells,
    route_cells,
    slug,
)
from moe.errors import BadInput
from moe.run import machine, terminal
from moe.run.command_line import command_line
from moe.run.jsonl import write_lines


@dataclass
class AlignConfig:
    """How many runs, and of how many steps."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of every arm
    # which arms, such as [exact,anywhere] (experiments/suites/alignment.py, with - for what is no letter); empty: all
    arms: list[str] = field(default_factory=list)
    steps: int = STEPS  # of every arm's run
    start_steps: int = START_STEPS  # of the run that they go on from: of fewer it knows no sums
    run: str = "runs/align"  # the folder of the data and the runs
    out: str = ""  # a file of what every run came to, as JSON lines; "": none

    def __post_init__(self) -> None:
        for name in ("steps", "start_steps"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)} is out of range: accepted is at least 1.")
        for name in self.arms:
            if name not in {slug(arm.name) for arm in ARMS}:
                raise BadInput(f"arms has {name!r}: accepted are {', '.join(slug(arm.name) for arm in ARMS)}.")
        if not self.seeds or min(self.seeds) < 0:
            raise BadInput(f"seeds={self.seeds} is out of range: accepted are numbers of at least 0, such as [0,1,2].")


@cli.command("align", AlignConfig, verbatim=("run", "out"))
def main(cfg: AlignConfig) -> None:
    """Train, print, and keep."""
    words = [
        f"{name}={str(value).replace(' ', '')}"
        for name in ("seeds", "arms", "steps", "start_steps")
        if (value := getattr(cfg, name)) != getattr(AlignConfig(), name)
    ]
    facts = {
        "command": command_line("align", *words, f"out={cfg.out}"),
        "device": machine.device_name(machine.choose_device("auto")),
        **machine.git_state()._asdict(),
    }
    rows = measure(Path(cfg.run), cfg.seeds, cfg.steps, cfg.start_steps, terminal.say, cfg.arms)
    tables.print_table(HEADINGS, cells(rows))
    tables.print_table(PAIRS, pair_cells(rows))
    tables.print_table(ROUTES, route_cells(rows))
    if cfg.out:
        write_lines(Path(cfg.out), (row._asdict() | facts for row in rows))
        terminal.say(f"rows: {cfg.out}")


if __name__ == "__main__":
    main()
