"""What reaches a person: text that cannot move the cursor, through outputs that do not fail.

A reader that goes away, a full disk and a terminal that is closed are no reason to lose work: after `protect` what is
written to standard output or error goes as far as it can, and characters that the terminal cannot show are replaced.
"""

import contextlib
import errno
import io
import os
import signal
import sys
from typing import Any, TextIO

from moe.errors import BadInput

# Control characters would move a terminal's cursor or switch its character set: their pictures are shown instead. So
# would, in one way or another, what turns the direction of text, ends a line, or is half a character.
_UNSHOWN = [*range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_LINE = {code: 0x2400 + code for code in range(32)} | {0x7F: 0x2421} | dict.fromkeys(_UNSHOWN, 0xFFFD)
_TEXT = {code: picture for code, picture in _LINE.items() if chr(code) not in "\t\n"}


def printable(text: str, lines: bool = False) -> str:
    """Text of unknown origin with a picture for every control character; with `lines` tabs and line breaks stay."""
    return text.translate(_TEXT if lines else _LINE)


def say(line: str) -> None:
    """Print a line, with whatever names it has in it, at once."""
    print(printable(line), flush=True)


class Outlet(io.FileIO):
    """A descriptor to write to. The first error is kept in `lost`, and all that comes after it is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write as much as the system takes; returns how many bytes count as written."""
        try:
            if self.lost is None:
                return super().write(data)
        except OSError as error:
            self.lost = error
        return len(data)


def outlet(descriptor: int, like: TextIO | None = None) -> TextIO:
    """A text stream onto a descriptor that never fails; encoding and buffering are those of `like`."""
    return io.TextIOWrapper(
        io.BufferedWriter(Outlet(descriptor)),
        encoding=like.encoding if like else "utf-8",
        errors="replace",
        line_buffering=bool(getattr(like, "line_buffering", True)),
        write_through=bool(getattr(like, "write_through", False)),
    )


def begin() -> None:
    """What a command does first. From here on Ctrl-C raises, as there may be something to put in order, and no output
    fails."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    protect()


def protect() -> None:
    """Replace this process's standard output and error by outlets, unless somebody else has replaced them already. One
    that was closed before the process began is lost from the start, and no file gets its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
        setattr(sys, name, outlet(descriptor, stream))
        if stream is None:
            getattr(sys, name).buffer.raw.lost = OSError(errno.EBADF, "it is closed")


def lost() -> OSError | None:
    """Why standard output takes no more text; None while it does."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, Outlet) else None


def check() -> None:
    """Raise `BadInput` where standard output took no more text, unless it was its reader who had enough."""
    sys.stdout.flush()
    error = lost()
    if error and error.errno != errno.EPIPE:
        raise BadInput(f"standard output cannot be written ({error.strerror}): give it another place to go.")
