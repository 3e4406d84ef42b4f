"""Train small models with known faults and say which of the doctor's alarms tell of them, and how early.

    python -m experiments.alarms                                               # tables, in ten minutes
    python -m experiments.alarms out=experiments/results/alarms.jsonl          # and the rows: then docs/alarms.md

What each fault is: experiments/suites/faults.py. Healthy runs of five routers are trained besides.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli
from experiments.pages import tables
from experiments.suites.alarm_table import BY_ALARM, BY_FAULT, alarm_rows, fault_rows
from experiments.suites.faults import STEPS, measure
from moe.errors import BadInput
from moe.run import machine, terminal
from moe.run.command_line import command_line
from moe.run.jsonl import write_lines


@dataclass
class AlarmsConfig:
    """How many runs of each kind."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3])  # of every fault and of every healthy router
    steps: int = STEPS  # of every run; of fewer than 150 nothing can be said
    out: str = ""  # a file of what every run was told, as JSON lines; "": none

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadInput(f"steps={self.steps} is out of range: accepted is at least 1.")
        if not self.seeds or min(self.seeds) < 0:
            raise BadInput(
                f"seeds={self.seeds} is out of range: accepted are numbers of at least 0, such as [0,1,2,3]."
            )


@cli.command("alarms", AlarmsConfig, verbatim=("out",))
def main(cfg: AlarmsConfig) -> None:
    """Train, print, and keep."""
    words = [
        f"{name}={str(value).replace(' ', '')}"
        for name in ("seeds", "steps")
        if (value := getattr(cfg, name)) != getattr(AlarmsConfig(), name)
    ]
    facts = {"command": command_line("alarms", *words, f"out={cfg.out}"), **machine.git_state()._asdict()}
    rows = measure(cfg.seeds, terminal.say, cfg.steps)
    tables.print_table(BY_FAULT, fault_rows(rows))
    tables.print_table(BY_ALARM, alarm_rows(rows))
    if cfg.out:
        as_dict = lambda row: row._asdict() | {"alarms": [dataclasses.asdict(alarm) for alarm in row.alarms]}
        write_lines(Path(cfg.out), (as_dict(row) | facts for row in rows))
        terminal.say(f"rows: {cfg.out}")


if __name__ == "__main__":
    main()
