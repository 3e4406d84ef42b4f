"""Text to tokens: a corpus is prepared once into a verified folder.

    sources.documents -> clean.clean -> split by hash -> tokenizer -> packed shards    `prepare`, into a folder
    folder -> verified `Dataset` -> `Split` -> windows in a shuffled order            `Loader`, out of it

**Split.** A document is in `val` when the first 8 bytes of its text's sha256, read as a fraction, are below
`val_fraction`. So no text is in both splits, and adding documents moves none. The tokenizer learns from `train` alone.

**Folder** (shards.py). Its name is the hash of everything that decides its content, so that a changed setting or source
makes a new one. Documents lie in order of their hash, which mixes the domains.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from moe.config.data import DataConfig, TokenizerConfig
from moe.config.parse import to_dict
from moe.data import clean, sources
from moe.data.chat import Template, template_of
from moe.data.owner import remove_leftovers
from moe.data.shards import FORMAT, MANIFEST, SPLITS, Dataset, publish
from moe.data.sources import Document
from moe.data.tokenizer import train
from moe.data.unreadable import Unreadable
from moe.errors import BadInput

# sha256 of the files whose version 1 is the same code; see `_older`.
UNVERSIONED = {
    "clean": "e11bb1888b36ef683a758bd72241d5cd3b15ca5a6f993ef4061d7fe547b17e01",
    "corpus": "ac0c8170a7c8f92e015d5e1582e661b029212867570164adb4d18ca7b5ba3004",
    "blend": "cf28260939987cf260b847934f6e46a80f231332647709a814281c31e3ab3122",
}

LEARNED = ", learned from the train split alone"
SHOWN = 12  # domains that are named in a line


def cache_root(cfg: DataConfig) -> Path:
    """Where downloads and prepared corpora are kept: `cfg.cache`, else $SWITCHYARD_CACHE, else ~/.cache/switchyard."""
    return Path(cfg.cache or os.environ.get("SWITCHYARD_CACHE") or "~/.cache/switchyard").expanduser()


def prepare(data: DataConfig, tokenizer: TokenizerConfig, say: Callable[[str], None] = print) -> Dataset:
    """The prepared corpus of these settings: opened and verified if its folder exists, else built first.

    `say` gets plain lines of progress. Raises `BadInput` for a corpus that is empty, too small for its tokenizer or
    leaves a split without a document, for a folder that cannot be written, and for a damaged one."""
    root = cache_root(data)
    remove_leftovers(root / "prepared")
    settings = _settings(data, tokenizer, root)
    folder = _folder(root, settings)
    if not folder.exists():
        folder = next((older for older in _older(data, tokenizer, root) if _has_no_html(older)), folder)
    if folder.exists():
        say(f"data: opening {folder}")
    else:
        say(f"data: reading, cleaning and tokenizing into {folder} (once)")
        _build(data, tokenizer, root, folder, settings, say)
    dataset = Dataset(folder)
    unreadable = Unreadable.of(dataset.manifest, data.on_error)
    unreadable.check()
    unreadable.say(say)
    _describe(dataset, say)
    return dataset


def _build(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    root: Path,
    folder: Path,
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Read, clean, split and tokenize into `folder`, which appears when it is whole. Raises as `prepare`."""
    unreadable, template = Unreadable(data.on_error), _template(data, tokenizer) if data.name == "chat" else None
    read = sources.documents(data, root, unreadable, template)
    # A conversation is said as it is.
    documents, steps = (list(read), []) if template else clean.clean(read, data.clean, unreadable)
    for step in steps:
        say(
            f"clean: {step.name}: {step.documents_in:,} -> {step.documents_out:,} documents, "
            f"{step.bytes_in / 1e6:.2f} -> {step.bytes_out / 1e6:.2f} MB"
        )
    splits = split_documents(documents, data.val_fraction)
    record = {"settings": settings, "cleaning": [asdict(step) for step in steps]} | unreadable.record()
    learned = train(tokenizer, (document.text for document in splits["train"]), say)
    if template:
        learned.template = template.source
    try:
        publish(folder, splits, learned, record)
    except OSError as error:
        free = f", {shutil.disk_usage(root).free / 1e6:,.1f} MB free" if root.is_dir() else ""
        raise BadInput(
            f"the prepared corpus cannot be written under {root} ({error.strerror or error}{free}): "
            "set data.cache or SWITCHYARD_CACHE to a folder with room and write access."
        ) from error


def _template(data: DataConfig, tokenizer: TokenizerConfig) -> Template:
    """How conversations are spelt: what the tokenizer would learn from them is not known yet."""
    return template_of(data.template, None if tokenizer.name in ("bpe", "char") else train(tokenizer, []))


def _settings(data: DataConfig, tokenizer: TokenizerConfig, root: Path) -> dict[str, Any]:
    """Everything that decides a prepared corpus' content."""
    settings: dict[str, Any] = {"data": to_dict(data), "tokenizer": to_dict(tokenizer), "format": FORMAT}
    # What a skipping preparation left out is in its manifest.
    for where_or_how in ("cache", "workers", "on_error", "documents", "template"):
        del settings["data"][where_or_how]
    if data.name == "chat":
        settings["data"]["template"] = _template(data, tokenizer).source
    if data.max_document_mb == DataConfig.max_document_mb:  # so were all corpora that are older than the setting
        del settings["data"]["max_document_mb"]
    settings |= {"source": sources.source_fingerprint(data, root), "clean": clean.fingerprint()}
    match tokenizer.name:
        case "bpe":
            settings["tokenizer"]["trainer"] = f"rustbpe {importlib.metadata.version('rustbpe')}"
        case "saved":  # wherever it lies
            settings["tokenizer"]["fingerprint"] = train(tokenizer, []).fingerprint
    for no_part in ("path",) if tokenizer.name == "bpe" else ("path", "vocab_size"):
        del settings["tokenizer"][no_part]
    return settings


def _older(data: DataConfig, tokenizer: TokenizerConfig, root: Path) -> list[Path]:
    """Where these settings' corpus was kept when cleaning was at version 1, which differs in pages of HTML alone."""
    first = _settings(data, tokenizer, root)
    first["clean"]["version"] = 1
    return [_folder(root, first), _folder(root, _settings_unversioned(data, tokenizer, root))]


def _has_no_html(folder: Path) -> bool:
    """Whether a corpus is there that had no page of HTML to convert, so that it is opened as it is, and its runs go on.
    Where it cannot be read, `Dataset` says so."""
    if not folder.exists():
        return False
    try:
        cleaning = json.loads((folder / MANIFEST).read_bytes())["cleaning"]
        return all(step["bytes_in"] == step["bytes_out"] for step in cleaning if step["name"] == "html")
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _settings_unversioned(data: DataConfig, tokenizer: TokenizerConfig, root: Path) -> dict[str, Any]:
    """The same from when hashes of the source files stood for their versions."""
    settings = _settings(data, tokenizer, root) | {"clean": UNVERSIONED["clean"]}
    settings["tokenizer"].pop("trainer", None)
    settings["source"] = sources.source_fingerprint(data, root, (UNVERSIONED["corpus"], UNVERSIONED["blend"]))
    return settings


def _folder(root: Path, settings: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return root / "prepared" / f"{settings['data']['name']}-{settings['tokenizer']['name']}-{key}"


def split_documents(documents: list[Document], val_fraction: float) -> dict[str, list[Document]]:
    """{"train": [...], "val": [...]}, each in order of the sha256 of its documents' text.

    Raises `BadInput` if a split is left without a document."""
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    hashed = [(_text_sha256(document), document) for document in documents]
    for digest, document in sorted(hashed, key=lambda pair: (pair[0], pair[1].domain, pair[1].name)):
        splits["val" if _is_low(digest, val_fraction) else "train"].append(document)
    for name in SPLITS:
        if not splits[name]:
            raise BadInput(
                f"data: the {name} split got none of the {len(documents)} documents left after cleaning with "
                f"data.val_fraction={val_fraction:g}; {_another_fraction(sorted(digest for digest, _ in hashed))}."
            )
    return splits


def held_out(text: str, val_fraction: float) -> bool:
    """Whether a document of this text is in the validation split."""
    return _is_low(hashlib.sha256(text.encode()).digest(), val_fraction)


def _is_low(digest: bytes, val_fraction: float) -> bool:
    return int.from_bytes(digest[:8]) < val_fraction * 2**64


def _another_fraction(digests: list[bytes]) -> str:
    """What to set, if anything, so that documents of these hashes (ascending) are in both splits."""
    advice = "add documents (data.max_mb, data.path), or loosen data.clean"
    if len(set(digests)) < 2:
        text = ", because a document is in one split as a whole: divide the text into several files or JSONL lines"
        return f"a validation split needs a second document{text}, {advice}"
    lowest, highest = (int.from_bytes(digest[:8]) / 2**64 for digest in (digests[0], digests[-1]))
    bounds = next(hint.high for hint in get_type_hints(DataConfig, include_extras=True)["val_fraction"].__metadata__)
    fraction = math.ceil(lowest * 10_000 + 1) / 10_000
    fits = lowest < fraction <= min(highest, bounds)
    return f"set data.val_fraction={fraction:g}, {advice}" if fits else advice


def _text_sha256(document: Document) -> bytes:
    try:
        return hashlib.sha256(document.text.encode()).digest()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{document.name} holds half of a surrogate pair at character {error.start}, which is not text; "
            "clean it with data.clean.unicode=NFC."
        ) from error


def _describe(dataset: Dataset, say: Callable[[str], None]) -> None:
    tokenizer = dataset.tokenizer
    kind = dataset.manifest["settings"]["tokenizer"]["name"]
    learned = {"saved": ", of a run", "bpe": LEARNED, "char": LEARNED}.get(kind, "")
    say(f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens{learned}")
    for name in SPLITS:
        counts = dataset.manifest["splits"][name]
        domains = counts["domains"]
        largest = sorted(domains, key=lambda domain: -domains[domain]["tokens"])[:SHOWN]
        shares = [f"{d} {domains[d]['tokens'] / counts['tokens']:.0%}" for d in domains if d in largest]
        shares += [f"{len(domains) - SHOWN:,} smaller"] if len(domains) > SHOWN else []
        say(
            f"{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes'] / 1e6:.2f} MB, "
            f"{counts['bytes'] / counts['tokens']:.2f} bytes per token ({', '.join(shares)})"
        )
        if missing := [domain for domain in domains if not domains[domain]["documents"]]:
            more = f" and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
            which = f"{', '.join(missing[:SHOWN])}{more}"
            say(f"{name}: no document of domain {which} fell into this split; add text or raise data.val_fraction")
