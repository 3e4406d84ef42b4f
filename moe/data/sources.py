"""Where text comes from: raw documents, each labelled with a domain, in an order that does not change.

Four kinds of source, chosen by `data.name`: `blend` (blend.py), `text` (a file, a folder or a glob of .txt, .md, .html
and .jsonl, also compressed), `chat` (.jsonl of conversations, chat.py) and `huggingface` (whatever `datasets` can
load). Documents of the first three come in the order of the hash of their names, so that a size limit takes a sample
spread over the whole source.
"""

import hashlib
import importlib.metadata
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.config.data import BLEND_DOMAINS, DataConfig
from moe.data import answers, blend, files
from moe.data.chat import Template, messages_of
from moe.data.unreadable import BadDocument, Unreadable, check_unicode
from moe.errors import BadInput

VERSION = (
    1  # of what is read here, in the key of every prepared corpus: raise it when the same source gives other documents
)
PLAIN = (".txt", ".md")
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
WHOLE = 32_000  # characters: a plain text up to this long stays one document
MOST_DOMAINS = 4096  # each has scores of its own in every evaluation


@dataclass(frozen=True, slots=True)
class Document:
    """One text, its domain, and where it came from (for messages; a name ending in .html or .htm marks HTML)."""

    text: str
    domain: str
    name: str
    spans: tuple[tuple[int, int], ...] | None = None  # [from, to) of the characters that are learnt; None: all


def documents(
    cfg: DataConfig, cache: Path, unreadable: Unreadable | None = None, template: Template | None = None
) -> Iterator[Document]:
    """Raw documents of the source that `cfg` names, before cleaning, always in the same order.

    At most `cfg.max_mb` decimal megabytes of UTF-8 per domain (0: all); the document that crosses the limit is cut
    there (a conversation is left out). `cache` keeps what had to be fetched; `unreadable` counts what cannot be read;
    `template` spells conversations. Raises `BadInput` for a source that is missing, unreachable or empty, for too many
    domains, and at the end for what cannot be read, unless it is to be skipped."""
    unreadable = Unreadable(cfg.on_error) if unreadable is None else unreadable
    limit = round(cfg.max_mb * 1e6)
    full: set[str] = set()  # domains that have reached the limit: the sources look here to stop reading early
    source: Iterator[Document | BadDocument]
    match cfg.name:
        case "blend":
            source = _blend(_domains(cfg), cache, full)
        case "text":
            source = _text(cfg, full, limit)
        case "chat":
            assert template is not None, "conversations need a template"
            source = _chat(cfg, full, template)
        case "preferences" | "prompts":
            source = _answers(cfg)
        case _:
            source = _huggingface(cfg, full)
    size: Counter[str] = Counter()
    met: set[str] = set()  # all domains, the chosen ones among them
    blank = True
    for document in source:
        if isinstance(document, BadDocument):
            unreadable.add(document)
            continue
        met.add(document.domain)
        if document.domain in full or (cfg.domains and document.domain not in cfg.domains):
            continue
        text, data = document.text, document.text.encode()
        room = limit - size[document.domain]
        if limit and len(data) >= room:
            full.add(document.domain)
            text = data[:room].decode(errors="ignore")
            if document.spans is not None and len(data) > room:
                continue
        size[document.domain] += len(data)
        if len(size) > MOST_DOMAINS:
            raise BadInput(
                f"data has more than {MOST_DOMAINS:,} domains ({document.name} is of one too many): choose a coarser "
                f"data.domain_field than {cfg.domain_field!r}, or put the files into fewer folders."
            )
        blank = blank and not text.strip()
        yield Document(text, document.domain, document.name, document.spans)
    unreadable.check()
    for domain in cfg.domains:
        if domain not in met:
            there = ", ".join(sorted(met)) or "none"
            raise BadInput(
                f"data.domains has {domain!r}; the domains of data.path={files.readable(cfg.path)}: {there}."
            )
    if blank:
        left_out = f", and {unreadable}" if unreadable.counts else ""
        raise BadInput(f"data.path={files.readable(cfg.path)} is empty: it holds no text{left_out}.")


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
        case "text" | "chat":
            root, paths, faults = _files(cfg.path)
            facts += [files.readable(root.resolve().name), cfg.text_field, cfg.domain_field, _stamps(root, paths)]
            facts += [sorted(map(str, faults))] if faults else []
        case "preferences" | "prompts":
            root, paths, _ = _files(cfg.path)
            facts += [files.readable(root.resolve().name), _stamps(root, paths)]
        case _:
            local = files.expand(cfg.path)
            paths = [path for path in [local, *files.walk(local, [])] if path.is_file()]
            facts += [cfg.path, cfg.subset, cfg.split, cfg.streaming, cfg.text_field, cfg.domain_field]
            facts.append(_stamps(local, paths))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _domains(cfg: DataConfig) -> list[str]:
    return list(dict.fromkeys(cfg.domains or BLEND_DOMAINS))


def _blend(domains: list[str], cache: Path, full: set[str]) -> Iterator[Document | BadDocument]:
    for domain in domains:
        for name, text in blend.texts(domain, domains, cache):
            yield Document(text, domain, name)
            if domain in full:
                break


# ---------------------------------------------------------------- text


def _files(path: str) -> tuple[Path, list[Path], list[BadDocument]]:
    """`files.text_files`, in the order of the hash of their names."""
    root, paths, faults = files.text_files(path)
    return root, sorted(paths, key=lambda file: blend.hash_order(_name(root, file))), faults


def _name(root: Path, file: Path) -> str:
    return files.readable(file.relative_to(root).as_posix())


def _stamps(root: Path, paths: list[Path]) -> list[tuple[str, int, int]]:
    stats = sorted((_name(root, path), path.stat()) for path in paths)
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _text(cfg: DataConfig, full: set[str], limit: int) -> Iterator[Document | BadDocument]:
    """Documents of `data=text`. A plain text longer than `WHOLE` is several, so that part of a book can be held out."""
    root, paths, faults = _files(cfg.path)
    yield from faults
    for file in paths:
        name, kind = _name(root, file), files.suffix(file)
        folder, below, _ = name.partition("/")
        if Path(cfg.path).expanduser().is_file():
            domain = files.readable(files.unpacked(file).stem)
        else:
            domain = folder if below else files.readable(root.resolve().name)
        try:
            if kind == ".jsonl":
                yield from _json_lines(cfg, file, name, domain, full)
            elif domain not in full:
                text = files.decode(file, limit, longest=0 if kind in PLAIN else _longest(cfg))
                parts = blend.pieces(text) if kind in PLAIN and len(text) > WHOLE else [text]
                yield from (Document(part, domain, f"{name}#{i}" if i else name) for i, part in enumerate(parts))
        except BadDocument as fault:
            yield fault


def _chat(cfg: DataConfig, full: set[str], template: Template) -> Iterator[Document | BadDocument]:
    """Documents of `data=chat`: a conversation in every line of JSONL."""
    root, paths, faults = _files(cfg.path)
    yield from faults
    for file in paths:
        name = _name(root, file)
        if files.suffix(file) != ".jsonl":
            yield BadDocument(files.readable(file), "is no .jsonl, as conversations are", "of another kind")
            continue
        domain = files.readable(files.unpacked(file).stem)
        for number, line in files.lines(file, _longest(cfg)):
            where = f"{files.readable(file)}, line {number}"
            try:
                if line is None:
                    raise files.too_large(where, _longest(cfg))
                row = files.parsed(line, where)
                of_row = _field(row, "domain_field", cfg.domain_field, where) if cfg.domain_field else domain
                if of_row not in full:
                    yield _conversation(row, of_row, where, f"{name}:{number}", template)
            except BadDocument as fault:
                yield fault


def _conversation(row: Any, domain: str, where: str, name: str, template: Template) -> Document:
    """A document from a conversation. Raises `BadDocument`."""
    messages = messages_of(row, where, template.specials)
    try:
        text, spans = template.render(messages)
    except BadInput as error:
        raise BadDocument(where, f": {str(error).rstrip('.')}", "that the template does not take") from error
    return Document(text, domain, name, spans)


def _answers(cfg: DataConfig) -> Iterator[Document | BadDocument]:
    """Prompts with their chosen or right answers."""
    for row in answers.read_rows(cfg):
        yield row if isinstance(row, BadDocument) else Document(row.text(), row.domain, row.where)


def _longest(cfg: DataConfig) -> int:
    return round(cfg.max_document_mb * 1e6)


def _json_lines(
    cfg: DataConfig, file: Path, name: str, domain: str, full: set[str]
) -> Iterator[Document | BadDocument]:
    """One document per line. Where the file is of one domain, reading stops when that is full."""
    for number, line in files.lines(file, _longest(cfg)):
        if domain in full and not cfg.domain_field:
            return
        where = f"{files.readable(file)}, line {number}"
        try:
            if line is None:
                raise files.too_large(where, _longest(cfg))
            yield _row(cfg, files.parsed(line, where), where, domain, f"{name}:{number}")
        except BadDocument as fault:
            yield fault


def _field(row: Any, setting: str, key: str, where: str) -> str:
    """The string under `key` of a row. Raises `BadDocument` for a row without it."""
    label = f"the field {key!r} (data.{setting})"
    if not isinstance(row, dict) or key not in row:
        names = ", ".join(map(str, itertools.islice(row, 20))) if isinstance(row, dict) else ""
        fields = f"its fields are {names}" if names else "it has none"
        raise BadDocument(where, f"has no field {key!r} (data.{setting}); {fields}", f"without {key!r}")
    value = row[key]
    if not isinstance(value, str):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise BadDocument(where, f": {label} must be a string, and is {kind}", f"with {key!r} {kind}")
    check_unicode(value, where, f": the field {key!r}")
    return value


def _row(cfg: DataConfig, row: Any, where: str, domain: str, name: str) -> Document:
    """A document from a row's fields. Raises `BadDocument` for a row that is no object, for a field that is missing or
    no string of valid Unicode, and for a text that is too large."""

    if not isinstance(row, dict):
        kind = type(row).__name__
        what = f"must be a JSON object with the field {cfg.text_field!r}, not {kind}"
        raise BadDocument(where, what, f"of type {kind} instead of an object")
    if cfg.domain_field:
        domain = _field(row, "domain_field", cfg.domain_field, where)
    text = _field(row, "text_field", cfg.text_field, where)
    if _longest(cfg) and len(text.encode()) > _longest(cfg):
        raise files.too_large(where, _longest(cfg))
    return Document(text, domain, name)


# ---------------------------------------------------------------- huggingface


def _huggingface(cfg: DataConfig, full: set[str]) -> Iterator[Document | BadDocument]:
    """Documents of `data=huggingface`. Reading stops once every domain seen so far is full, when streaming a set of
    unknown length; a set that is not streamed is read to its end, for domains that come late."""
    try:
        import datasets
    except ImportError as error:
        raise BadInput(
            "data.name=huggingface needs the package datasets: pip install 'moe-switchyard[huggingface]'."
        ) from error
    local = files.expand(cfg.path)
    source: dict[str, Any] = {"path": str(local) if local.exists() else cfg.path, "name": cfg.subset or None}
    if local.is_file():
        if files.suffix(local) not in BUILDERS:
            raise BadInput(f"data.path={cfg.path} is not of a kind that datasets reads here: {', '.join(BUILDERS)}.")
        source |= {"path": BUILDERS[files.suffix(local)], "data_files": str(local)}
    elif not local.exists() and (local.is_absolute() or cfg.path.startswith(".") or cfg.path.count("/") > 1):
        raise BadInput(f"data.path={cfg.path} does not exist; accepted is a file, a folder or a dataset's name.")
    domain = files.readable(files.unpacked(local).stem if local.is_file() else local.name)
    seen: set[str] = set()
    try:
        rows = datasets.load_dataset(**source, split=cfg.split, streaming=cfg.streaming)
        for number, row in enumerate(rows):
            try:
                document = _row(cfg, row, f"data.path={cfg.path}, row {number}", domain, f"{cfg.path}:{number}")
            except BadDocument as fault:
                yield fault
                continue
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
        by_line = "; data=text reads it line by line" if files.suffix(local) == ".jsonl" else ""
        raise BadInput(
            f"data.path={cfg.path} with data.subset={cfg.subset!r} and data.split={cfg.split} "
            f"cannot be loaded by datasets: {_first_line(error)}{by_line}."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
