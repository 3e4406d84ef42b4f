"""Watch a run while it trains: loss, balance and load of every MoE layer, alarms, in a terminal.

    python -m experiments.watch run=runs/demo/moe-seed0                 # until the run ends, or Ctrl-C
    python -m experiments.watch run=runs/demo/moe-seed0 once=true       # one look

Reads the run's files and nothing else: the run neither waits for it nor knows of it. In a pipe it prints a line every
log.every steps.
"""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.live import Live

from experiments import cli
from experiments.pages.watch_view import Seen, alarms_of, frame, state_sentence
from moe.config.parse import Between
from moe.errors import BadInput
from moe.run import jsonl, terminal
from moe.run.folder import read_settings
from moe.run.lock import holding
from moe.run.summary import MetricsLine, StepCounts, line_from_json
from moe.train.progress import plain_line

PAUSE = Between(0.1, 3600)


@dataclass
class WatchConfig:
    """What to watch."""

    run: str = ""  # a run's folder
    once: bool = False  # look once, instead of until the run ends
    seconds: Annotated[float, PAUSE] = 1.0  # between two looks

    def __post_init__(self) -> None:
        if not self.run:
            raise BadInput("run= is needed: the folder of a run, like run=runs/demo/moe-seed0.")
        PAUSE.check("seconds", self.seconds)


class Watched:
    """A run's files as they grow."""

    def __init__(self, run: Path) -> None:
        """Raises `BadInput` for a folder that is not a run's."""
        self.run, self.name = run, run.absolute().name
        self.cfg = read_settings(run)
        self.metrics, self.counts = (jsonl.Growing(run / name) for name in ("metrics.jsonl", "routing/counts.jsonl"))
        self.seen, self.word, self.ended = Seen(), "", False

    def look(self) -> list[MetricsLine]:
        """Read what is new; returns the lines. Raises `BadInput` for a damaged file."""
        # Whether it goes on is asked first: of a run that has ended the files are whole. One that nobody trains may
        # just be beginning, or being given from one process to the next: it has ended when it is found so twice.
        before, self.word = self.word, self.state()
        self.ended = self.word == "finished" or (self.word != "training" and self.word == before)

        # A resumed run writes its lines anew, and may have other settings.
        if self.metrics.is_another():
            self.seen, self.cfg = Seen(counts=self.seen.counts), read_settings(self.run)
        lines = []
        for tree in self.metrics.new():
            line = line_from_json(tree, f"{self.metrics.path}, line {self.metrics.n_lines}")
            self.seen.add(line)
            lines.append(line)
        if self.counts.is_another():
            self.seen.counts = None
        for tree in self.counts.new():
            where = f"{self.counts.path}, line {self.counts.n_lines}"
            self.seen.counts = jsonl.record(StepCounts, tree, where)
        return lines

    def state(self) -> str:
        """training | finished | interrupted | waiting."""
        if (self.run / "summary.json").exists():
            return "finished"
        if holding(self.run):
            return "training"
        return "interrupted" if self.seen.last or self.metrics.path.exists() else "waiting"


@cli.command("watch", WatchConfig, verbatim=("run",))
def main(cfg: WatchConfig) -> None:
    """Show the run, once or until it ends."""
    watched, console = Watched(Path(cfg.run)), Console()
    if cfg.once:
        watched.look()
        console.print(frame(watched.seen, watched.word, watched.name, watched.cfg, console.width))
        return
    with suppress(KeyboardInterrupt):
        (on_terminal if sys.stdout.isatty() else in_pipe)(watched, cfg.seconds, console)


def on_terminal(watched: Watched, seconds: float, console: Console) -> None:
    """A view that changes in its place, and stays when the run ends."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            watched.look()
            view = frame(watched.seen, watched.word, watched.name, watched.cfg, console.width, console.height)
            live.update(view, refresh=True)
            if watched.ended or terminal.lost():
                return
            time.sleep(seconds)


def in_pipe(watched: Watched, seconds: float, console: Console) -> None:
    """Plain lines as training prints them, those of the past first, and at the end how it ended."""
    while True:
        lines, steps = watched.look(), watched.cfg.train.steps
        for line in lines:
            if line.val or line.step % watched.cfg.log.every == 0 or line.step == steps:
                terminal.say(plain_line(line, steps))
            for alarm in alarms_of(line):
                terminal.say(f"alarm: {alarm.sentence()}")
        if watched.ended or terminal.lost():
            terminal.say(state_sentence(watched.seen, watched.word, watched.name, steps))
            return
        time.sleep(seconds)


if __name__ == "__main__":
    main()
