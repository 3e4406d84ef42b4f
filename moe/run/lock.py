"""One process trains a run: a lock in its folder, which also holds between machines that share the folder.

The lock is the file `lock-N` with the highest N: it says who trains, or that nobody does. To take it, a process creates
`lock-(N+1)`, which the file system grants to one alone, and removes those below; given back, a file stays as long as
the run is not finished, so that a number is given once. Its holder touches it every few seconds. It may be taken from
a holder that is dead: a process of this machine that no longer runs, or one elsewhere that has not touched it for long,
by the file system's clock. A holder that finds it taken stops before it writes anything more.
"""

import json
import os
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from moe.data.owner import Owner, temporary, this_process
from moe.errors import BadInput

BEAT = 5.0  # seconds between two touches
STALE = 120.0  # seconds without one, after which a holder elsewhere counts as dead
FREE = "free"  # what a lock says that nobody holds
_NAME = re.compile(r"lock-([1-9]\d*)")


@dataclass(frozen=True)
class Holder:
    """What a lock says."""

    owner: Owner | None  # None: it cannot be read
    words: str  # the same for people

    def is_dead(self, age: float) -> bool:
        """Whether the lock may be taken from it; `age`: seconds since it last touched it."""
        alive = self.owner.is_alive() if self.owner else None
        return age > STALE if alive is None else not alive


class Lock:
    """Use as a context manager. Raises `BadInput` when another process holds the folder's lock, naming it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ended = threading.Event()

    def __enter__(self) -> "Lock":
        try:
            self.number = self._take()
        except OSError as error:
            raise BadInput(f"run={self.folder} cannot be written ({error.strerror or error}).") from error
        threading.Thread(target=self._beat, daemon=True, name=f"lock of {self.folder}").start()
        return self

    def _take(self) -> int:
        """The number of the lock, once it is this process'."""
        while True:
            last = max(_numbers(self.folder), default=0)
            if held := holding(self.folder):
                raise BadInput(f"run={self.folder} is being trained by {held}: let it end, or end it, and try again.")
            with suppress(FileExistsError):  # another process was quicker
                with open(_path(self.folder, last + 1), "x") as file:
                    about = {**asdict(this_process()), "host": socket.gethostname(), "since": time.strftime("%F %T %z")}
                    file.write(json.dumps(about))
                for number in _numbers(self.folder):
                    if number <= last:
                        _path(self.folder, number).unlink(missing_ok=True)
                if max(_numbers(self.folder)) == last + 1:
                    return last + 1
                _path(self.folder, last + 1).unlink(missing_ok=True)  # it was given before, and has been taken since

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            with suppress(OSError):
                os.utime(_path(self.folder, self.number))

    def check(self) -> None:
        """Raise `BadInput` if the lock, or the whole folder, is no longer this process': it must not write there."""
        if self._is_ours():
            return
        if not self.folder.is_dir():
            raise BadInput(f"run={self.folder} was deleted while it was training: there is nothing to go on with.")
        if held := holding(self.folder):
            raise BadInput(f"run={self.folder} was taken over by {held}: this process stops, and leaves it alone.")
        raise BadInput(
            f"run={self.folder}: the file lock-{self.number} was deleted while the run was training, which stops here: "
            "go on from its last checkpoint with resume=true."
        )

    def _is_ours(self) -> bool:
        return _path(self.folder, self.number).exists() and not _path(self.folder, self.number + 1).exists()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        with suppress(OSError):
            if not self._is_ours():
                return
            if (self.folder / "summary.json").exists():  # nobody trains it again
                _path(self.folder, self.number).unlink()
            else:
                with open(_path(self.folder, self.number), "r+") as file:
                    file.write(FREE)
                    file.truncate()


def holding(folder: Path) -> str:
    """Which live process trains the run in `folder`, in words; "" for none."""
    last = max(_numbers(folder), default=0)
    try:
        with open(_path(folder, last)) as file:
            touched, text = os.fstat(file.fileno()).st_mtime, file.read()
    except (FileNotFoundError, NotADirectoryError):  # there is none, or it was taken this moment
        return ""
    if text == FREE:
        return ""
    holder, age = _read(text), _now(folder) - touched
    return "" if holder.is_dead(age) else f"{holder.words} (last sign of life {max(0, age):.0f} s ago)"


def _read(text: str) -> Holder:
    try:
        about = json.loads(text)
        words = f"process {about['pid']} on {about['host']} since {about['since']}"
        return Holder(Owner(about["place"], int(about["pid"]), int(about["start"])), words)
    except (ValueError, TypeError, KeyError):
        return Holder(None, "a process whose lock cannot be read")


def _now(folder: Path) -> float:
    """The time by the clock that the folder's files are dated with."""
    probe = temporary(folder / "lock")
    try:
        with open(probe, "w") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # not ours to write in
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _path(folder: Path, number: int) -> Path:
    return folder / f"lock-{number}"


def _numbers(folder: Path) -> list[int]:
    """Of the lock's files in `folder`; none where there is no folder. Raises `BadInput` for one that cannot be read."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BadInput(f"run={folder} cannot be read ({error.strerror or error}).") from error
    return [int(named[1]) for name in names if (named := _NAME.fullmatch(name))]
