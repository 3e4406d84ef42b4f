"""Write what a study found: one page whose first sentence is a verdict, a table, and every figure by itself.

    python -m experiments.report run=runs/first-study

Writes into the study's folder index.html (nothing is loaded from the network), table.md, figures/*.svg and
tables/*.csv. Works while the study is still trained: what is not finished is named, and the rest reported.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments import cli
from experiments.pages import study_page
from experiments.stats.outcome import outcome, sentences
from experiments.study.manifest import read_study
from experiments.study.states import states_of
from moe.errors import BadInput
from moe.run import terminal


@dataclass
class ReportConfig:
    """Of which study."""

    run: str = ""  # the study's folder

    def __post_init__(self) -> None:
        if not self.run:
            raise BadInput("run= is needed: the folder of a study, like run=runs/first-study.")


@cli.command("report", ReportConfig, verbatim=("run",))
def main(cfg: ReportConfig) -> None:
    """Write the report, and say its first sentences."""
    folder = Path(cfg.run)
    study = read_study(folder)
    result = outcome(folder, study, states_of(folder, study))
    if not result.arms:
        raise BadInput(f"run={folder} has no finished run to report: python -m experiments.status run={folder}.")
    study_page.write(folder, result)
    for sentence in sentences(result):
        terminal.say(sentence)
    terminal.say(f"page: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
