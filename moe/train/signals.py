"""Signals that ask for an end: the step is finished and saved first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moe.parallel import launch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Stop:
    """The signal that asks for an end, 0 while there is none."""

    number: int = 0

    def agreed(self) -> int:
        """The signal that any rank was sent, on all of them, who ask together; 0 while none was."""
        self.number = launch.largest(self.number)
        return self.number


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """While inside, the first SIGINT, SIGTERM or SIGHUP (the terminal is closed; nohup has it ignored, and it stays so)
    only sets `Stop.number`; the second acts as it always did."""
    stop, before = Stop(), {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def handle(number: int, frame: Any) -> None:
        stop.number = number
        for caught, handler in before.items():
            signal.signal(caught, handler)

    try:
        for number in before:
            signal.signal(number, handle)
    except ValueError:  # not the main thread: its owner handles signals
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
