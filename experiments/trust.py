"""Try the metrics of what experts are for on routers whose experts' purpose is known: which may be believed, and when.

python -m experiments.trust                                                   # a table, in three minutes
python -m experiments.trust draws=20 out=experiments/results/trust.jsonl      # and its rows
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from experiments import cli
from experiments.pages import tables
from experiments.pages.trust_table import HEADINGS, LEFT, NAMES_HEADINGS, name_rows, rows
from experiments.stats.recovery import SETTINGS, simulate
from moe.errors import BadInput
from moe.run import machine, terminal
from moe.run.command_line import command_line
from moe.run.jsonl import write_lines


@dataclass
class TrustConfig:
    """How many corpora."""

    draws: int = 20  # of every setting: another corpus, other routers
    seed: int = 0  # of the first
    out: str = ""  # a file of what was found, as JSON lines; "": none

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise BadInput(f"draws={self.draws} is out of range: accepted is at least 1.")
        if self.seed < 0:
            raise BadInput(f"seed={self.seed} is out of range: accepted is at least 0.")


@cli.command("trust", TrustConfig, verbatim=("out",))
def main(cfg: TrustConfig) -> None:
    """Try, print, and keep."""
    lines = list(simulate(cfg.draws, cfg.seed, SETTINGS))
    tables.print_table(HEADINGS, rows(lines), LEFT)
    tables.print_table(NAMES_HEADINGS, name_rows(lines), 2)
    if cfg.out:
        words = [f"draws={cfg.draws}", *([f"seed={cfg.seed}"] if cfg.seed else [])]
        facts = {"command": command_line("trust", *words, f"out={cfg.out}"), **machine.git_state()._asdict()}
        write_lines(Path(cfg.out), (dataclasses.asdict(line) | facts for line in lines))
        terminal.say(f"rows: {cfg.out}")


if __name__ == "__main__":
    main()
