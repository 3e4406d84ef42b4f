"""Where text comes from: raw documents, each labelled with a domain, in an order that does not change.

Three kinds of source, chosen by `data.name`: `blend` (blend.py), `text` (a file, a folder or a glob of .txt, .md,
.html and .jsonl, also compressed) and `huggingface` (whatever `datasets` can load). Documents of the first two come in
the order of the hash of their names, so that a size limit takes a sample spread over the whole source.
"""

import codecs
import glob
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from moe.config.data import BLEND_DOMAINS, DataConfig
from moe.data import blend
from moe.errors import BadInput

VERSION = (
    1  # of what is read here, in the key of every prepared corpus: raise it when the same source gives other documents
)
SUFFIXES = (".txt", ".md", ".html", ".htm", ".jsonl")
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
BLOCK = 1 << 20  # bytes read at a time
WHOLE = 32_000  # characters: a plain text up to this long stays one document


@dataclass(frozen=True, slots=True)
class Document:
    """One text, its domain, and where it came from (for messages; a name ending in .html or .htm marks HTML)."""

    text: str
    domain: str
    name: str


def documents(cfg: DataConfig, cache: Path) -> Iterator[Document]:
    """Raw documents of the source that `cfg` names, before cleaning, always in the same order.

    At most `cfg.max_mb` decimal megabytes of UTF-8 per domain (0: all); the document that crosses the limit is cut
    there. `cache` keeps what had to be fetched. Raises `BadInput` for a source that is missing, unreachable, empty or
    unreadable."""
    limit = round(cfg.max_mb * 1e6)
    full: set[str] = set()  # domains that have reached the limit: the sources look here to stop reading early
    source: Iterator[Document]
    match cfg.name:
        case "blend":
            source = _blend(_domains(cfg), cache, full)
        case "text":
            source = _text(cfg, full, limit)
        case _:
            source = _huggingface(cfg, full)
    size: Counter[str] = Counter()
    blank = True
    for document in source:
        if document.domain in full:
            continue
        text, data = document.text, document.text.encode()
        room = limit - size[document.domain]
        if limit and len(data) >= room:
            full.add(document.domain)
            text = data[:room].decode(errors="ignore")
        size[document.domain] += len(data)
        blank = blank and not text.strip()
        yield Document(text, document.domain, document.name)
    if blank:
        raise BadInput(f"data.path={cfg.path} is empty: it holds no text.")


def source_fingerprint(cfg: DataConfig, cache: Path, readers: Sequence[int | str] = (VERSION, blend.VERSION)) -> str:
    """A hex hash of what the corpus is made from: versions, names, sizes and times of files, settings.

    `readers` are the versions of the code here and in blend.py. Cheap: it reads no text, and nothing in `cache`, whose
    files are pinned by their hash. It does not cover cleaning, nor changes behind the name of a dataset on a hub.
    Raises `BadInput` where a path or a package is missing."""
    facts: list[Any] = [*readers, cfg.name, cfg.max_mb]
    match cfg.name:
        case "blend":
            facts += [_domains(cfg), sys.version, blend.SDIST_SHA256]
            if "math" in _domains(cfg):
                for package in ("sympy", "mpmath"):
                    blend.package_folder(package)
                    facts.append(importlib.metadata.version(package))
        case "text":
            root, files = _files(cfg.path)
            facts += [root.resolve().name, cfg.text_field, cfg.domain_field, _stamps(root, files)]
        case _:
            local = Path(cfg.path).expanduser()
            files = [path for path in [local, *local.rglob("*")] if path.is_file()]
            facts += [cfg.path, cfg.subset, cfg.split, cfg.streaming, cfg.text_field, cfg.domain_field]
            facts.append(_stamps(local, files))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _domains(cfg: DataConfig) -> list[str]:
    return list(dict.fromkeys(cfg.domains or BLEND_DOMAINS))


def _blend(domains: list[str], cache: Path, full: set[str]) -> Iterator[Document]:
    for domain in domains:
        for name, text in blend.texts(domain, domains, cache):
            yield Document(text, domain, name)
            if domain in full:
                break


# ---------------------------------------------------------------- text


def _files(path: str) -> tuple[Path, list[Path]]:
    """The root that names are relative to, and the files below it that are not hidden, in the order of the hash of
    their names. For a glob the root is what comes before its first wildcard."""
    given = Path(path).expanduser()
    if given.is_file():
        root, paths = given.parent, [given]
    elif given.is_dir():
        root, paths = given, list(given.rglob("*"))
    elif glob.has_magic(path):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), given.parts)
        root, paths = Path(*fixed), [Path(name) for name in glob.glob(str(given), recursive=True)]
    else:
        raise BadInput(f"data.path={path} does not exist; accepted is a file, a folder or a glob.")
    kinds = f"{', '.join(SUFFIXES)}, each also with .gz or .zst"
    files = [file for file in paths if file.is_file() and _kind(file) in SUFFIXES]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not files:
        raise BadInput(f"data.path={path} matches no file of an accepted kind: {kinds}.")
    return root, sorted(files, key=lambda file: blend.hash_order(file.relative_to(root).as_posix()))


def _plain(file: Path) -> Path:
    """A file's name without the suffix of its compression."""
    return file.with_suffix("") if file.suffix.lower() in (".gz", ".zst") else file


def _kind(file: Path) -> str:
    return _plain(file).suffix.lower()


def _stamps(root: Path, files: list[Path]) -> list[tuple[str, int, int]]:
    stats = sorted((path.relative_to(root).as_posix(), path.stat()) for path in files)
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _text(cfg: DataConfig, full: set[str], limit: int) -> Iterator[Document]:
    """Documents of `data=text`. A plain text longer than `WHOLE` is several, so that part of a book can be held out."""
    root, files = _files(cfg.path)
    for file in files:
        below = file.relative_to(root)
        name, kind = below.as_posix(), _kind(file)
        if Path(cfg.path).expanduser().is_file():
            domain = _plain(file).stem
        else:
            domain = below.parts[0] if len(below.parts) > 1 else root.resolve().name
        if kind == ".jsonl":
            yield from _json_lines(cfg, file, name, domain, full)
        elif domain not in full:
            text = _decode(file, limit)
            parts = blend.pieces(text) if kind in (".txt", ".md") and len(text) > WHOLE else [text]
            yield from (Document(part, domain, f"{name}#{i}" if i else name) for i, part in enumerate(parts))


def _json_lines(cfg: DataConfig, file: Path, name: str, domain: str, full: set[str]) -> Iterator[Document]:
    """One document per line. Where the file is of one domain, reading stops when that is full."""
    for number, line in _lines(file):
        if domain in full and not cfg.domain_field:
            return
        where = f"{file}, line {number}"
        try:
            row = json.loads(line.decode().removeprefix("\ufeff"))
        except UnicodeDecodeError as error:
            raise BadInput(f"{where} is not UTF-8 at byte {error.start} of the line.") from error
        except json.JSONDecodeError as error:
            raise BadInput(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
        if not isinstance(row, dict):
            raise BadInput(
                f"{where} must be a JSON object with the field {cfg.text_field!r}, not {type(row).__name__}."
            )
        yield _row(cfg, row, where, domain, f"{name}:{number}")


def _row(cfg: DataConfig, row: dict[str, Any], where: str, domain: str, name: str) -> Document:
    """A document from a row's fields. Raises `BadInput` for a field that is missing, or no string of valid Unicode."""

    def field(setting: str, key: str) -> str:
        if key not in row:
            raise BadInput(f"{where} has no field {key!r} (data.{setting}); its fields are {', '.join(map(str, row))}.")
        if not isinstance(row[key], str):
            kind = type(row[key]).__name__
            raise BadInput(f"{where}: the field {key!r} (data.{setting}) must be a string, and is of type {kind}.")
        try:
            row[key].encode()
        except UnicodeEncodeError as error:
            raise BadInput(
                f"{where}: the field {key!r} holds half a surrogate pair at character {error.start}."
            ) from error
        return row[key]

    if cfg.domain_field:
        domain = field("domain_field", cfg.domain_field)
    return Document(field("text_field", cfg.text_field), domain, name)


def _decode(file: Path, limit: int) -> str:
    """The text of a file, a byte-order mark removed; no more than a block past `limit` bytes (0: all) is read."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts, done = [], 0
    for block in itertools.chain(_blocks(file), [b""]):  # the empty one is the end: half a character is refused there
        held = len(decoder.getstate()[0])
        try:
            parts.append(decoder.decode(block, final=not block))
        except UnicodeDecodeError as error:
            offset = done - held + error.start
            raise BadInput(f"{file} is not UTF-8 at byte {offset}: convert it to UTF-8.") from error
        done += len(block)
        if limit and done > limit:
            break
    return "".join(parts).removeprefix("\ufeff")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1."""
    number, rest = 0, b""
    for block in _blocks(file):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():
                yield number, line
    if rest.strip():
        yield number + 1, rest


def _blocks(file: Path) -> Iterator[bytes]:
    """A file's bytes, decompressed, in blocks that are not empty. Raises `BadInput` for damage and for binary data."""
    offset = 0
    try:
        for block in _decompressed(file):
            if b"\0" in block:
                at = offset + block.index(b"\0")
                raise BadInput(f"{file} is binary, not UTF-8 text: byte {at} is NUL.")
            offset += len(block)
            if block:
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise BadInput(f"{file} is truncated or damaged: it cannot be decompressed ({error}).") from error
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror or error}.") from error


def _decompressed(file: Path) -> Iterator[bytes]:
    if file.name.lower().endswith(".gz"):
        with gzip.open(file) as stream:
            while block := stream.read(BLOCK):
                yield block
        return
    with file.open("rb") as raw:
        if not file.name.lower().endswith(".zst"):
            while block := raw.read(BLOCK):
                yield block
            return
        frame = zstandard.ZstdDecompressor().decompressobj()
        while data := raw.read(BLOCK):
            while data:
                if frame.eof:  # another frame follows
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
        if not frame.eof:
            raise EOFError("the last frame does not end")


# ---------------------------------------------------------------- huggingface


def _huggingface(cfg: DataConfig, full: set[str]) -> Iterator[Document]:
    """Documents of `data=huggingface`. Reading stops once every domain seen so far is full, when streaming a set of
    unknown length; a set that is not streamed is read to its end, for domains that come late."""
    try:
        import datasets
    except ImportError as error:
        raise BadInput(
            "data.name=huggingface needs the package datasets: pip install 'moe-switchyard[huggingface]'."
        ) from error
    # A file or folder here, else the name of a set on a hub.
    local = Path(cfg.path).expanduser()
    source: dict[str, Any] = {"path": str(local) if local.exists() else cfg.path, "name": cfg.subset or None}
    if local.is_file():
        if _kind(local) not in BUILDERS:
            raise BadInput(f"data.path={cfg.path} is not of a kind that datasets reads here: {', '.join(BUILDERS)}.")
        source |= {"path": BUILDERS[_kind(local)], "data_files": str(local)}
    elif not local.exists() and (local.is_absolute() or cfg.path.startswith(".") or cfg.path.count("/") > 1):
        raise BadInput(f"data.path={cfg.path} does not exist; accepted is a file, a folder or a dataset's name.")
    # Its rows, one document each.
    domain = _plain(local).stem if local.is_file() else local.name
    seen: set[str] = set()
    try:
        rows = datasets.load_dataset(**source, split=cfg.split, streaming=cfg.streaming)
        for number, row in enumerate(rows):
            document = _row(cfg, row, f"data.path={cfg.path}, row {number}", domain, f"{cfg.path}:{number}")
            seen.add(document.domain)
            yield document
            if seen <= full and (cfg.streaming or not cfg.domain_field):
                return
    except BadInput:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise BadInput(
            f"data.path={cfg.path} cannot be reached: {_first_line(error)}; a local folder works too."
        ) from error
    except Exception as error:  # a library's loaders, each with exceptions of its own
        raise BadInput(
            f"data.path={cfg.path} with data.subset={cfg.subset!r} and data.split={cfg.split} "
            f"cannot be loaded by datasets: {_first_line(error)}."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
