"""Whose a half-written file is: its name says so, and what a dead process left is told from what a live one writes.

A temporary name ends in `.tmp-<place>-<pid>-<start>`. The place stands for the machine, its boot and its process
namespace, within which a process is known by its number and the moment it began: numbers are given again, to other
processes. Folders may be shared by several machines; of a process elsewhere no more can be said than how old its files
are.
"""

import functools
import hashlib
import os
import re
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ABANDONED = 86400.0  # seconds without a change, after which what a process elsewhere was writing counts as left behind
_SUFFIX = re.compile(r"\.tmp-([0-9a-f]{8})-(\d+)-(\d+)")


@dataclass(frozen=True)
class Owner:
    """A process, on whatever machine."""

    place: str  # eight hex digits: machine, boot, process namespace
    pid: int
    start: int  # when it began, as its system counts

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None for one elsewhere, of which this machine cannot know."""
        if self.place != this_place():
            return None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:  # it exists and belongs to someone else
            pass
        return _began(self.pid) in (self.start, None)


def this_process() -> Owner:
    """The process that asks."""
    return Owner(this_place(), os.getpid(), _began(os.getpid()) or 0)


@functools.cache
def this_place() -> str:
    """The place of this process."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [socket.gethostname(), boot.read_text() if boot.exists() else ""]
    known.append(os.readlink(namespace) if namespace.is_symlink() else "")
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]


def _began(pid: int) -> int | None:
    """When process `pid` of this machine began, as the system counts; −1 if it is dead and only waits for its parent to
    notice, None if that cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError):
        pass
    try:
        process = psutil.Process(pid)
        return -1 if process.status() == psutil.STATUS_ZOMBIE else round(100 * process.create_time())
    except psutil.Error:
        return None


def temporary(path: Path) -> Path:
    """The name beside `path` under which this process writes it."""
    owner = this_process()
    return path.with_name(f"{path.name}.tmp-{owner.place}-{owner.pid}-{owner.start}")


def remove_leftovers(folder: Path, ours: bool = False) -> None:
    """Remove what dead processes left half written in `folder`, and with `ours` what this one did."""
    for path in _entries(folder):
        named = _SUFFIX.search(path.name)
        if not named or named.end() < len(path.name):
            continue
        owner = Owner(named[1], int(named[2]), int(named[3]))
        alive = owner.is_alive()
        if alive is False or (alive is None and _age(path) > ABANDONED) or (ours and owner == this_process()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _age(path: Path) -> float:
    """Seconds since anything in `path` changed."""
    times = []
    for entry in (path, *path.rglob("*")):
        try:
            times.append(entry.lstat().st_mtime)
        except OSError:  # it is being written or removed
            return 0.0
    return time.time() - max(times)
