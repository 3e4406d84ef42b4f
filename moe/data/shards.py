"""Prepared corpora on disk: packed, memory-mapped, verified.

A folder has, for each split, `train-00000.bin`: token ids (uint16, or uint32 when V > 65,536), documents back to back,
each followed by the end-of-text token; and `train-00000.documents.npy`, (documents, 2) int64: where each document
starts in its shard, and its domain's id. Of conversations there is `train-00000.learnt.npy` too, a bit for every token
(numpy.packbits): 1 where it is the assistant's, which a model learns to say. `manifest.json` has the vocabulary, the
domains, what each split holds, how the text was cleaned, and every file's size and sha256; `manifest.json.sha256` its
own. The tokenizer lies beside them.

A folder is built under a temporary name and renamed when complete: what exists is whole, whoever else was building. A
damaged one is refused on opening: one flipped bit in a shard would otherwise train in silence.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.chat import Rendered, Tokens, tokenize
from moe.data.owner import temporary
from moe.data.sources import Document
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput

FORMAT = 1  # of the folder; raise it when the layout, the split or the order of documents changes
SHARD_TOKENS = 2**26
ENCODE_CHARACTERS = 2**21  # text tokenized at a time
MANIFEST, CHECKSUM = "manifest.json", "manifest.json.sha256"
SPLITS = ("train", "val")


def publish(folder: Path, splits: dict[str, list[Document]], tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Build beside `folder`, then rename. Where another process was first, its folder (of the same content) stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=".building-", suffix=temporary(Path("x")).suffix, ignore_cleanup_errors=True
    ) as beside:
        building = Path(beside) / "dataset"
        building.mkdir()
        _write(building, splits, tokenizer, record)
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():
                raise


def _write(folder: Path, splits: dict[str, list[Document]], tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    domains = sorted({document.domain for documents in splits.values() for document in documents})
    dtype = _dtype(tokenizer.vocab_size)
    manifest = record | {
        "format": FORMAT,
        "domains": domains,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "dtype": dtype.name,
        "splits": {},
    }
    # The shards of each split, and what they hold.
    for name, documents in splits.items():
        shards: list[str] = []
        tokens_by_domain = np.zeros(len(domains), np.int64)
        for tokens, table, learnt in _shards(documents, tokenizer, domains, dtype):
            shards.append(f"{name}-{len(shards):05d}")
            (folder / f"{shards[-1]}.bin").write_bytes(tokens.data)
            np.save(folder / f"{shards[-1]}.documents.npy", table, allow_pickle=False)
            if not learnt.all():
                np.save(folder / f"{shards[-1]}.learnt.npy", np.packbits(learnt), allow_pickle=False)
            np.add.at(tokens_by_domain, table[:, 1], np.diff(table[:, 0], append=len(tokens)))
        manifest["splits"][name] = _count(documents, domains, tokens_by_domain) | {"shards": shards}
    # Checksums of all that, and one of the checksums.
    tokenizer.save(folder)
    manifest["files"] = {
        path.name: {"size": path.stat().st_size, "sha256": _file_sha256(path)} for path in sorted(folder.iterdir())
    }
    content = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(content)
    (folder / CHECKSUM).write_text(
        f"{hashlib.sha256(content.encode()).hexdigest()}  {MANIFEST}\n"
    )  # as sha256sum writes and checks it


def _shards(
    documents: list[Document], tokenizer: Tokenizer, domains: list[str], dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, (documents, 2) table, which tokens are learnt) of each shard. A document is never cut; one longer than a
    shard has its own."""
    pieces: list[np.ndarray] = []
    learnt: list[np.ndarray] = []
    table: list[tuple[int, int]] = []
    domain_id = {domain: i for i, domain in enumerate(domains)}
    length = 0
    for group in _groups(documents):
        for document, tokens in zip(group, _encode(group, tokenizer), strict=True):
            if pieces and length + len(tokens.ids) > SHARD_TOKENS:
                yield np.concatenate(pieces), np.array(table, np.int64), np.concatenate(learnt)
                pieces, table, learnt, length = [], [], [], 0
            table.append((length, domain_id[document.domain]))
            pieces.append(np.array(tokens.ids, dtype))
            learnt.append(np.array(tokens.learnt, bool))
            length += len(tokens.ids)
    yield np.concatenate(pieces), np.array(table, np.int64), np.concatenate(learnt)


def _encode(group: list[Document], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Every document's tokens with the end-of-text token, which is learnt where what is before it is."""
    whole = iter(tokenizer.encode_batch([document.text for document in group if document.spans is None]))
    for document in group:
        if document.spans is None:
            tokens = Tokens(ids := next(whole), [True] * len(ids))
        else:
            tokens = tokenize(Rendered(document.text, document.spans), tokenizer)
        ends_learnt = not tokens.learnt or tokens.learnt[-1]
        yield Tokens([*tokens.ids, tokenizer.eot], [*tokens.learnt, ends_learnt])


def _groups(documents: list[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= ENCODE_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _count(documents: list[Document], domains: list[str], tokens_by_domain: np.ndarray) -> dict[str, Any]:
    """Documents, UTF-8 bytes and tokens (end-of-text tokens included), in total and by domain."""
    by_domain = {
        name: {"documents": 0, "bytes": 0, "tokens": int(tokens)}
        for name, tokens in zip(domains, tokens_by_domain, strict=True)
    }
    for document in documents:
        by_domain[document.domain]["documents"] += 1
        by_domain[document.domain]["bytes"] += len(document.text.encode())
    total = {key: sum(counts[key] for counts in by_domain.values()) for key in ("documents", "bytes", "tokens")}
    return total | {"domains": by_domain}


class Dataset:
    """A prepared corpus, verified on opening.

    folder, manifest
    sha256     of the manifest, hence of everything in the folder
    domains    names, in order of their ids
    tokenizer
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`: every file's size and sha256, document tables in order and in range, token ids below V.

        Raises `BadInput` naming the file, where in it, and what to do."""
        self.folder = folder
        self.manifest, self.sha256 = _read_manifest(folder)
        self.domains: list[str] = self.manifest["domains"]
        files = self.manifest["files"]
        name_of = {entry["sha256"]: name for name, entry in files.items()}
        for name, entry in files.items():
            _verify(folder / name, entry, name_of)
        self.tokenizer = Tokenizer.load(folder)
        vocab_size = self.manifest["vocab_size"]
        if (self.tokenizer.fingerprint, self.tokenizer.vocab_size) != (self.manifest["tokenizer"], vocab_size):
            raise _damaged(folder / "tokenizer.json", "it is not the tokenizer that the manifest names")
        if self.manifest["dtype"] != _dtype(vocab_size).name:
            raise _damaged(
                folder / MANIFEST,
                f"dtype {self.manifest['dtype']} is not the {_dtype(vocab_size).name} of V={vocab_size}",
            )
        self._splits = {name: self._open(name) for name in SPLITS}

    def split(self, name: str) -> "Split":
        """The split `train` or `val`."""
        return self._splits[name]

    def _open(self, name: str) -> "Split":
        dtype = _dtype(self.manifest["vocab_size"])
        paths = [self.folder / f"{shard}.bin" for shard in self.manifest["splits"][name]["shards"]]
        tables, learnt = [], []
        for path in paths:
            if path.stat().st_size % dtype.itemsize:
                raise _damaged(path, f"its {path.stat().st_size} bytes are not whole {dtype.name} tokens")
            tokens = np.memmap(path, dtype, "r")
            bad = np.flatnonzero(tokens >= self.manifest["vocab_size"])
            if len(bad):
                where = f"token {bad[0]} (byte {bad[0] * dtype.itemsize}) is id {tokens[bad[0]]}"
                raise _damaged(path, f"{where}, and the vocabulary has V={self.manifest['vocab_size']}")
            tables.append(
                _read_table(path.with_suffix(".documents.npy"), tokens, self.tokenizer.eot, len(self.domains))
            )
            bits = path.with_suffix(".learnt.npy")
            learnt.append(_read_learnt(bits, len(tokens)) if bits.name in self.manifest["files"] else None)
        split = Split(name, self.sha256, paths, dtype, tables, learnt)
        if split.n_tokens != self.manifest["splits"][name]["tokens"]:
            raise _damaged(
                self.folder / MANIFEST, f"the {name} shards hold {split.n_tokens} tokens, not as many as it says"
            )
        return split


class Split:
    """The tokens of one split, memory-mapped, as if its shards were one array of `n_tokens`."""

    def __init__(
        self,
        name: str,
        dataset: str,
        paths: list[Path],
        dtype: np.dtype,
        tables: list[np.ndarray],
        learnt: list[np.ndarray | None] | None = None,
    ) -> None:
        """`dataset`: sha256 of the manifest. `tables`: each shard's (documents, 2) start and domain id. `learnt`: a bit
        for each of its tokens, None where all are learnt."""
        self._arguments = (name, dataset, paths, dtype, tables, learnt)
        self.name = name
        self.dataset = dataset
        self._shards = [np.memmap(path, dtype, "r") for path in paths]
        self._offsets = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self._starts = np.concatenate([t[:, 0] + offset for t, offset in zip(tables, self._offsets, strict=False)])
        domains = np.concatenate([table[:, 1] for table in tables])
        self._domains = domains.astype(np.uint8 if domains.max() < 256 else np.int32)
        self.n_tokens = int(self._offsets[-1])
        self._learnt = learnt if learnt and any(bits is not None for bits in learnt) else None

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map is a copy of its content; a worker that does not fork opens the files itself.
        return Split, self._arguments

    def n_windows(self, context: int) -> int:
        """How many windows of S+1 tokens at stride S there are."""
        return max(0, self.n_tokens - 1) // context

    def read(self, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, S+1) int64 from each of `starts` (n,), and the domain id (n, S) of each target, i.e. of tokens
        1 to S: uint8 where 256 are enough, else int32. The end-of-text token after a document counts as its own."""
        tokens = np.stack([self._slice(int(start), int(start) + context + 1) for start in starts])
        targets = np.asarray(starts)[:, None] + np.arange(1, context + 1)
        return tokens, self._domains[np.searchsorted(self._starts, targets, side="right") - 1]

    def learnt(self, starts: np.ndarray, context: int) -> np.ndarray | None:
        """Which of the targets of `read` are learnt, (n, S) bool; None where all of the split's tokens are."""
        if self._learnt is None:
            return None
        return np.stack([self._bits(int(start) + 1, int(start) + context + 1) for start in starts])

    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end-of-text token included, in order."""
        return np.diff(self._starts, append=self.n_tokens)

    def places(self, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
        """The number of the document that each token is in, and its position there, from 0: (n, S) each, of the S
        tokens from each of `starts` (n,)."""
        token = np.asarray(starts)[:, None] + np.arange(context)
        document = np.searchsorted(self._starts, token, side="right") - 1
        return document, token - self._starts[document]

    def documents(self, every: int = 1) -> Iterator[np.ndarray]:
        """The tokens of every so many of the documents, in order, without the end-of-text token."""
        for start, length in zip(self._starts[::every], self.lengths()[::every], strict=True):
            yield self._slice(int(start), int(start + length))[:-1]

    def _slice(self, start: int, stop: int) -> np.ndarray:
        pieces = [self._shards[i][first:last] for i, first, last in self._within(start, stop)]
        return np.concatenate(pieces, dtype=np.int64)

    def _bits(self, start: int, stop: int) -> np.ndarray:
        assert self._learnt is not None
        pieces = []
        for i, first, last in self._within(start, stop):
            bits, byte = self._learnt[i], first // 8
            if bits is None:
                pieces.append(np.ones(last - first, bool))
            else:
                pieces.append(
                    np.unpackbits(bits[byte : -(-last // 8)])[first - 8 * byte : last - 8 * byte].astype(bool)
                )
        return np.concatenate(pieces)

    def _within(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards that these tokens lie in, and where in each: its number, from, to."""
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        for i in range(first, last):
            offset = int(self._offsets[i])
            yield i, max(0, start - offset), min(stop - offset, len(self._shards[i]))


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    content, checksum = (_read_bytes(folder / name) for name in (MANIFEST, CHECKSUM))
    sha256 = hashlib.sha256(content).hexdigest()
    if checksum != f"{sha256}  {MANIFEST}\n".encode():
        raise _damaged(folder / MANIFEST, f"its sha256 is not the one in {CHECKSUM}")
    manifest = json.loads(content)
    if manifest["format"] != FORMAT:
        raise _damaged(folder / MANIFEST, f"its format is {manifest['format']} and {FORMAT} is expected")
    return manifest, sha256


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from error


def _verify(path: Path, entry: dict[str, Any], name_of: dict[str, str]) -> None:
    """Size and sha256 of one file against its entry in the manifest."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from error
    if size == 0:
        raise _damaged(path, f"it is empty and should have {entry['size']} bytes")
    if size != entry["size"]:
        what = f"truncated at byte {size}" if size < entry["size"] else f"{size} bytes long"
        raise _damaged(path, f"it is {what} and should have {entry['size']} bytes")
    sha256 = _file_sha256(path)
    if sha256 == entry["sha256"]:
        return
    if sha256 in name_of:
        raise _damaged(path, f"it has the content of {name_of[sha256]}")
    raise _damaged(path, f"it was altered: its sha256 is {sha256[:16]}... and should be {entry['sha256'][:16]}...")


def _read_table(path: Path, tokens: np.ndarray, eot: int, n_domains: int) -> np.ndarray:
    """A shard's document table, checked against the shard's tokens."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"it is not a table of documents ({error})") from error
    if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != 2 or not len(table):
        raise _damaged(path, f"it is {table.dtype} of shape {table.shape} and should be int64 of shape (documents, 2)")
    starts, domains = table.T
    bounds = np.append(starts, len(tokens))
    wrong = (np.diff(bounds) <= 0) | (domains < 0) | (domains >= n_domains)
    wrong[0] |= starts[0] != 0
    if wrong.any():
        row = int(np.argmax(wrong))
        raise _damaged(path, f"row {row} (start {starts[row]}, domain {domains[row]}) is out of order or range")
    unended = np.flatnonzero(tokens[bounds[1:] - 1] != eot)
    if len(unended):
        raise _damaged(path, f"document {unended[0]} does not end with the end-of-text token {eot}")
    return table


def _read_learnt(path: Path, n_tokens: int) -> np.ndarray:
    """A shard's bits, checked against its number of tokens."""
    try:
        bits = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"it is not a row of bits ({error})") from error
    if bits.dtype != np.uint8 or bits.shape != (-(-n_tokens // 8),):
        raise _damaged(
            path, f"it is {bits.dtype} of shape {bits.shape} and should have a bit for each of {n_tokens} tokens"
        )
    return bits


def _damaged(path: Path, what: str) -> BadInput:
    return BadInput(f"{path} is damaged: {what}; delete the folder {path.parent} and it will be prepared again.")


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
