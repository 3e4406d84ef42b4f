"""What a person sees while merges are learned, which may take minutes: a line before and after, and on a terminal a bar
between them. The trainer holds the interpreter meanwhile, and says how far it is in its log alone."""

import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LOGGER = "rustbpe"
MERGES = re.compile(r"Progress: \d+% \((\d+)/\d+ merges\)")
SHOWN = 0.1  # seconds after which the bar is drawn anew while texts are read

Say = Callable[[str], None]


class Bar(logging.Handler):
    """A bar of `n_merges`, drawn whenever the trainer's log says how many there are."""

    def __init__(self, n_merges: int) -> None:
        super().__init__(logging.INFO)
        self.progress = Progress(
            TextColumn("tokenizer: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=Console(), auto_refresh=False, transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task("reading", total=n_merges)
        self.drawn = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Draw what a line of the log says; other lines say nothing."""
        if said := MERGES.search(record.getMessage()):
            self.progress.update(self.task, description="merging", completed=int(said[1]), refresh=True)

    def read(self, n_texts: int) -> None:
        """Draw how many texts are read."""
        if time.monotonic() > self.drawn + SHOWN:
            self.drawn = time.monotonic()
            self.progress.update(self.task, description=f"reading, {n_texts:,} texts", refresh=True)


@contextmanager
def learning(n_merges: int, say: Say | None) -> Iterator[Callable[[Iterable[str]], Iterator[str]]]:
    """Meanwhile the trainer's way is shown, and said to `say`, if there is one. Gives a function that hands texts on
    and counts them. Ctrl-C is answered between two texts, or at the end: in the trainer's log it would be lost."""
    logger, began, n_texts = logging.getLogger(LOGGER), time.monotonic(), 0
    logger.setLevel(logging.INFO)  # before its first line: it asks but once
    logger.propagate = False
    bar = Bar(n_merges) if say and sys.stdout.isatty() else None

    with _interrupted_later() as check:

        def counted(texts: Iterable[str]) -> Iterator[str]:
            nonlocal n_texts
            for text in texts:
                check()
                n_texts += 1
                if bar:
                    bar.read(n_texts)
                yield text

        if say:
            say(f"tokenizer: learning {n_merges:,} merges")
        if bar is None:
            yield counted
        else:
            logger.addHandler(bar)
            try:
                with bar.progress:
                    yield counted
            finally:
                logger.removeHandler(bar)
    if say:
        say(f"tokenizer: learned from {n_texts:,} texts in {time.monotonic() - began:.1f} s")


@contextmanager
def _interrupted_later() -> Iterator[Callable[[], None]]:
    """Ctrl-C is remembered, and raised by the function that is given, or at the end."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield lambda: None
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))

    def check() -> None:
        if asked and callable(before):
            number = asked.pop()
            before(number, None)

    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
    check()
