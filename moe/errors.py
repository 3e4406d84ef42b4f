"""The one exception for input that a person can correct, and what of the machine's refusals a person can correct."""

import errno
import re

SMALLER = "make the batch, the context or the model smaller"
LONGEST_NAME = 60  # characters of a path that is shown for its length

_ADVICE = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EROFS: "it can only be read there; choose another place, or have it made writable",
    errno.EACCES: "have yourself permitted to, or choose another place",
    errno.EPERM: "have yourself permitted to, or choose another place",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or lower data.workers",
    errno.ENFILE: "close other programs, or lower data.workers",
    errno.ENAMETOOLONG: "a name may have up to 255 bytes; choose a shorter one",
    errno.EISDIR: "it is a folder; choose another name",
    errno.ENOTDIR: "a part of it is no folder; choose another name",
}
_MEMORY = re.compile(r"out of memory|allocate memory|Unable to allocate|ALLOC_FAILED|std::bad_alloc", re.IGNORECASE)
_SHARED = re.compile(r"shared memory|</torch_|ancdata|torch_shm_manager|bus error", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is )?(.*?)\.? *(?:Details|$)")


class BadInput(ValueError):
    """Input that a person can correct. The message is one sentence; commands print it and exit non-zero."""


def of_the_machine(error: BaseException, smaller: str = SMALLER) -> BadInput | None:
    """What the machine refused (memory, shared memory, files, a worker process) in a sentence with what to mend;
    `smaller`: what needs less memory. None for any other error: a mistake in the code, whose traceback is needed."""
    words = _words(error)
    if isinstance(error, RuntimeError) and _SHARED.search(words):
        return BadInput(
            f"there is no shared memory for the loader's workers ({words}): make /dev/shm larger, raise the limit on "
            "open files (ulimit -n), or set data.workers=0."
        )
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if no_memory or isinstance(error, MemoryError) or _MEMORY.search(words):
        wanted = re.search(r"allocate ([\d.,]+ ?[A-Za-z]+)", words)
        asked = f" ({wanted[1]} were asked for)" if wanted else ""
        return BadInput(f"there is not enough memory{asked}: {smaller}, or close other programs.")
    if isinstance(error, RuntimeError) and (worker := _WORKER.search(words)):
        return BadInput(
            f"the loader's worker process {worker[1]} ended ({worker[2]}), as it does where memory is short: lower "
            "data.workers (0 reads without them), and go on with resume=true."
        )
    if isinstance(error, OSError):
        reason = error.strerror or words
        advice = _ADVICE.get(error.errno or 0)
        return BadInput(f"{_place(error)}{reason}{f': {advice}' if advice else ''}.")
    return None


def _words(error: BaseException) -> str:
    """An error's message in a line: of one that a worker process passed on, what was raised there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "Original Traceback" in str(error) else lines[0]


def _place(error: OSError) -> str:
    """The file it is about, where it says which."""
    if not isinstance(error.filename, str | bytes):
        return ""
    name = error.filename if isinstance(error.filename, str) else error.filename.decode(errors="replace")
    if error.errno == errno.ENAMETOOLONG and len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}… ({len(name)} characters)"
    return f"{name}: "
