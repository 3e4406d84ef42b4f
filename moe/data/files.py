"""Files to text: which there are, and their bytes decompressed, decoded and cut into lines, none more than is bounded.

What is wrong with one file or line is a `BadDocument`, so that the others can be read. No more memory is taken than
`BLOCK`s and the longest document that is accepted: a small file may hold a very large one.
"""

import codecs
import fnmatch
import glob
import gzip
import itertools
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from moe.data.unreadable import BadDocument
from moe.errors import BadInput

SUFFIXES = (".txt", ".md", ".html", ".htm", ".jsonl")
BLOCK = 1 << 20  # bytes read at a time
PIECE = 1 << 10  # compressed bytes given to zstandard at a time: 32 MB of text at most, 128 KB for each 4 of them
EXPANSION, HARMLESS = 200, 64_000_000  # text is compressed at most so many times; fewer bytes than these do no harm
KINDS = {stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISDIR: "a folder"}


def readable(path: Path | str) -> str:
    r"""A path as text that can be printed and stored: bytes that are not UTF-8 stand as \xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def expand(path: str) -> Path:
    """A path as it is given in a setting, ~ replaced. Raises `BadInput` for one that no system would open."""
    try:
        given = Path(path).expanduser()
        os.stat(given)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise BadInput(f"data.path={readable(path)[:200]} cannot be read: {reason}.") from error
    return given


def unpacked(file: Path) -> Path:
    """A file's name without the suffix of its compression."""
    return file.with_suffix("") if file.suffix.lower() in (".gz", ".zst") else file


def suffix(file: Path) -> str:
    """What kind of text a file's name says it is, whatever it is compressed with: ".txt"."""
    return unpacked(file).suffix.lower()


# ---------------------------------------------------------------- which there are


def is_there(path: str) -> bool:
    """Whether there is anything at a path, or it is a glob, which may match something."""
    given = expand(path)
    return given.exists() or given.is_symlink() or glob.has_magic(path)


def text_files(path: str) -> tuple[Path, list[Path], list[BadDocument]]:
    """The root that names are relative to, the files below it that are text by their names and not hidden, in the order
    of their names, and what of these names cannot be read. For a glob the root is what comes before its first wildcard.

    Raises `BadInput` where there is nothing of the kind."""
    given = expand(path)
    faults: list[BadDocument] = []
    if given.is_dir():
        root, names = given, walk(given, faults)
    elif glob.has_magic(path) and not given.exists():
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
        names = _matching(given, root, faults)
    elif given.exists() or given.is_symlink():
        root, names = given.parent, iter([given])
    else:
        raise BadInput(f"data.path={readable(path)} does not exist; accepted is a file, a folder or a glob.")
    files = []
    for file in sorted(names):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if suffix(file) in SUFFIXES and not hidden:
            fault = _fault(file)
            if fault is None:
                files.append(file)
            elif not file.is_dir():
                faults.append(fault)
    if not files and not faults:
        kinds = f"{', '.join(SUFFIXES)}, each also with .gz or .zst"
        raise BadInput(f"data.path={readable(path)} matches no file of an accepted kind: {kinds}.")
    return root, files, faults


def walk(root: Path, faults: list[BadDocument], follow: bool = False) -> Iterator[Path]:
    """Whatever is no folder below `root`. `follow` links to folders too, each folder once: links may go round in
    circles. A folder that cannot be listed goes to `faults`."""

    def unlisted(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # a glob's root that is not there, or gone meanwhile
            return
        faults.append(BadDocument(readable(error.filename), f"cannot be listed: {error.strerror}", "unreadable path"))

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=unlisted, followlinks=follow):
        if follow and (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        elif follow:
            seen.add(real)
        subfolders.sort()
        yield from (Path(folder, name) for name in names)


def _matching(pattern: Path, root: Path, faults: list[BadDocument]) -> Iterator[Path]:
    """Files that match a glob. `**` is any number of folders; glob's own would follow a circle of links for ever."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    wanted = pattern.parts[len(root.parts) :]
    yield from (file for file in walk(root, faults, follow=True) if _matches(file.relative_to(root).parts, wanted))


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not parts or not pattern:
        return not parts and not pattern
    if pattern[0] == "**":
        return len(pattern) == 1 or any(_matches(parts[i:], pattern[1:]) for i in range(len(parts)))
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _fault(file: Path) -> BadDocument | None:
    """Why a path cannot be read as a file, told without reading it: a pipe would wait for ever."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        link = "is a link to what is not there" if isinstance(error, FileNotFoundError) and file.is_symlink() else ""
        return BadDocument(readable(file), link or f"cannot be read: {error.strerror}", "unreadable path")
    if not stat.S_ISREG(mode):
        kind = next((kind for test, kind in KINDS.items() if test(mode)), "a device")
        return BadDocument(readable(file), f"is {kind}, not a file", "unreadable path")
    if not os.access(file, os.R_OK):
        return BadDocument(readable(file), "cannot be read: Permission denied", "unreadable path")
    return None


# ---------------------------------------------------------------- text, lines, bytes


def decode(file: Path, limit: int, longest: int = 0) -> str:
    """The text of a file, a byte-order mark removed; no more than a block past `limit` bytes (0: all) is read. Raises
    `BadDocument` for what is not text, and for more than `longest` bytes (0: any number)."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts, done = [], 0
    for block in itertools.chain(blocks(file), [b""]):  # the empty one is the end: half a character is refused there
        if b"\0" in block:
            at = done + block.index(b"\0")
            raise BadDocument(readable(file), f"is binary, not UTF-8 text: byte {at} is NUL", "with NUL bytes")
        held = len(decoder.getstate()[0])
        try:
            parts.append(decoder.decode(block, final=not block))
        except UnicodeDecodeError as error:
            offset = done - held + error.start
            raise BadDocument(readable(file), f"is not UTF-8 at byte {offset}: convert it", "not UTF-8") from error
        done += len(block)
        if longest and done > longest:
            raise too_large(readable(file), longest)
        if limit and done > limit:
            break
    return "".join(parts).removeprefix("\ufeff")


def too_large(where: str, longest: int) -> BadDocument:
    """What is wrong with a document of more than `longest` bytes."""
    return BadDocument(where, f"is larger than data.max_document_mb={longest / 1e6:g}", "too large")


def lines(file: Path, longest: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """Lines that are not blank, numbered from 1; None for one of more than `longest` bytes (0: any number), of which no
    more is held. Raises `BadDocument` where the file breaks off."""
    number, size = 1, 0  # of the line that is being read
    held: list[bytes] = []
    for block in blocks(file):
        *ends, rest = block.split(b"\n")
        for end in ends:
            size += len(end)
            line = None if longest and size > longest else b"".join([*held, end])
            if line is None or line.strip():
                yield number, line
            number, size = number + 1, 0
            held.clear()
        size += len(rest)
        held.append(rest)
        if longest and size > longest:
            held.clear()
    if longest and size > longest:
        yield number, None
    elif (line := b"".join(held)).strip():
        yield number, line


def blocks(file: Path) -> Iterator[bytes]:
    """A file's bytes, decompressed, in blocks that are not empty. Raises `BadDocument` for damage, and for a file that
    expands as no text does."""
    where, size = readable(file), 0
    try:
        most = max(HARMLESS, EXPANSION * file.stat().st_size)
        for block in _decompressed(file):
            size += len(block)
            if size > most:
                what = f"expands to more than {EXPANSION} times its size, as no text does: decompress it if it is one"
                raise BadDocument(where, what, "too large")
            if block:
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        what = f"is truncated or damaged: it cannot be decompressed ({error})"
        raise BadDocument(where, what, "truncated or damaged") from error
    except OSError as error:
        raise BadDocument(where, f"cannot be read: {error.strerror or error}", "unreadable path") from error


def _decompressed(file: Path) -> Iterator[bytes]:
    if file.name.lower().endswith(".gz"):
        with gzip.open(file) as stream:
            while block := stream.read1(BLOCK):  # not `read`: it keeps back what is before a break
                yield block
        return
    with file.open("rb") as raw:
        if not file.name.lower().endswith(".zst"):
            while block := raw.read(BLOCK):
                yield block
            return
        frame = zstandard.ZstdDecompressor().decompressobj()
        while data := raw.read(PIECE):
            while data:
                if frame.eof:  # another frame follows
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
        if not frame.eof:
            raise EOFError("the last frame does not end")


def parsed(line: bytes, where: str) -> Any:
    """What a line of JSON says. Raises `BadDocument` for one that is not JSON, or that Python does not read."""
    if b"\0" in line:
        raise BadDocument(where, f"is binary, not JSON: byte {line.index(0)} of the line is NUL", "with NUL bytes")
    try:
        return json.loads(line.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise BadDocument(where, f"is not UTF-8 at byte {error.start} of the line", "not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadDocument(where, f"is not JSON: {error.msg} at column {error.colno}", "not JSON") from error
    except RecursionError as error:
        raise BadDocument(where, "is nested too deeply to be read", "nested too deeply") from error
    except ValueError as error:  # Python converts no more than 4,300 digits
        raise BadDocument(where, "has a number of too many digits to be read", "with too long a number") from error
