"""The commands people run; the only place that knows Hydra."""

import os
import signal
import sys
from typing import Any


def _end(number: int, frame: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


# `python -m` imports this first (argv[0] is "-m" meanwhile), and a command's own imports take seconds in which there is
# nothing to save: an exception there would end in a traceback, or be taken for a module that is missing.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
