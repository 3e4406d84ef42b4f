"""Simulate studies of known truth and say how often intervals hold it and words are wrong.

python -m experiments.coverage                                                # a table, in seconds
python -m experiments.coverage studies=20000 out=experiments/results/coverage.jsonl
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from experiments import cli
from experiments.pages import tables
from experiments.pages.coverage_table import HEADINGS, rows
from experiments.stats.simulation import simulate
from moe.errors import BadInput
from moe.run import machine, terminal
from moe.run.command_line import command_line
from moe.run.jsonl import write_lines


@dataclass
class CoverageConfig:
    """How many studies, of how many seeds."""

    studies: int = 2000  # simulated, of each kind
    seeds: str = "3,5,10"  # numbers of seeds, with commas
    seed: int = 0  # of the simulation
    out: str = ""  # a file of the shares, as JSON lines; "": none

    def __post_init__(self) -> None:
        if self.studies < 1:
            raise BadInput(f"studies={self.studies} is out of range: accepted is at least 1.")
        if not self.numbers() or min(self.numbers()) < 2:
            raise BadInput(f"seeds={self.seeds} must be numbers of at least 2 with commas, such as 3,5,10.")

    def numbers(self) -> list[int]:
        """The numbers of seeds; none where they are not numbers."""
        words = self.seeds.split(",")
        return [int(word) for word in words] if all(word.strip().isdecimal() for word in words) else []


@cli.command("coverage", CoverageConfig, verbatim=("seeds", "out"))
def main(cfg: CoverageConfig) -> None:
    """Simulate, print, and keep."""
    lines = simulate(cfg.studies, cfg.numbers(), cfg.seed)
    tables.print_table(HEADINGS, rows(lines))
    if cfg.out:
        words = [f"studies={cfg.studies}"] if cfg.studies != CoverageConfig.studies else []
        facts = {"command": command_line("coverage", *words, f"out={cfg.out}"), **machine.git_state()._asdict()}
        write_lines(Path(cfg.out), (dataclasses.asdict(line) | facts for line in lines))
        terminal.say(f"rows: {cfg.out}")


if __name__ == "__main__":
    main()
