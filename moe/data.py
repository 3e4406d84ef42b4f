"""Text to batches: a corpus is prepared once into a verified folder, and read from there by a deterministic loader.

    corpus.documents -> clean.clean -> split by hash -> tokenizer -> packed shards    `prepare`, into a folder
    folder -> verified `Dataset` -> `Split` -> windows in a shuffled order            `Loader`, out of it

**Split.** A document is in `val` when the first 8 bytes of its text's sha256, read as a fraction, are below
`val_fraction`. So no text is in both splits, and adding documents moves none. The tokenizer learns from `train` alone.

**Folder** (moe/shards.py). Its name is the hash of everything that decides its content, so that a changed setting or
source makes a new one. Documents lie in order of their hash, which mixes the domains.

**Order.** Window i of a split is tokens [i*S, i*S + S + 1). Sample n = step*B + b is window `order[n % windows]` of
epoch n // windows; the order is a permutation drawn from (seed, epoch). A batch is thus a pure function of (seed,
step): the same for any number of workers, and after any interruption.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from moe import clean, corpus
from moe.config.data import DataConfig, TokenizerConfig
from moe.config.parse import to_dict
from moe.corpus import Document
from moe.errors import BadInput
from moe.shards import FORMAT, SPLITS, Dataset, Split, publish
from moe.tokenizer import train

# sha256 of the files whose version 1 is the same code; see `_settings_unversioned`.
UNVERSIONED = {
    "clean": "e11bb1888b36ef683a758bd72241d5cd3b15ca5a6f993ef4061d7fe547b17e01",
    "corpus": "ac0c8170a7c8f92e015d5e1582e661b029212867570164adb4d18ca7b5ba3004",
    "blend": "cf28260939987cf260b847934f6e46a80f231332647709a814281c31e3ab3122",
}


def cache_root(cfg: DataConfig) -> Path:
    """Where downloads and prepared corpora are kept: `cfg.cache`, else $SWITCHYARD_CACHE, else ~/.cache/switchyard."""
    return Path(cfg.cache or os.environ.get("SWITCHYARD_CACHE") or "~/.cache/switchyard").expanduser()


def prepare(data: DataConfig, tokenizer: TokenizerConfig, say: Callable[[str], None] = print) -> Dataset:
    """The prepared corpus of these settings: opened and verified if its folder exists, else built first.

    `say` gets plain lines of progress. Raises `BadInput` for a corpus that is empty, too small for its tokenizer or
    leaves a split without a document, for a folder that cannot be written, and for a damaged one."""
    root = cache_root(data)
    settings = _settings(data, tokenizer, root)
    folder = _folder(root, settings)
    if not folder.exists() and (unversioned := _folder(root, _settings_unversioned(data, tokenizer, root))).exists():
        folder = unversioned
    if folder.exists():
        say(f"data: opening {folder}")
    else:
        say(f"data: reading, cleaning and tokenizing into {folder} (once)")
        documents, steps = clean.clean(corpus.documents(data, root), data.clean)
        for step in steps:
            say(
                f"clean: {step.name}: {step.documents_in:,} -> {step.documents_out:,} documents, "
                f"{step.bytes_in / 1e6:.2f} -> {step.bytes_out / 1e6:.2f} MB"
            )
        splits = split_documents(documents, data.val_fraction)
        record = {"settings": settings, "cleaning": [asdict(step) for step in steps]}
        learned = train(tokenizer, (document.text for document in splits["train"]))
        try:
            publish(folder, splits, learned, record)
        except OSError as error:
            free = f", {shutil.disk_usage(root).free / 1e6:,.1f} MB free" if root.is_dir() else ""
            raise BadInput(
                f"the prepared corpus cannot be written under {root} ({error.strerror or error}{free}): "
                "set data.cache or SWITCHYARD_CACHE to a folder with room and write access."
            ) from error
    dataset = Dataset(folder)
    _describe(dataset, say)
    return dataset


def _settings(data: DataConfig, tokenizer: TokenizerConfig, root: Path) -> dict[str, Any]:
    """Everything that decides a prepared corpus' content."""
    settings: dict[str, Any] = {"data": to_dict(data), "tokenizer": to_dict(tokenizer), "format": FORMAT}
    for where_or_how in ("cache", "workers"):
        del settings["data"][where_or_how]
    settings |= {"source": corpus.source_fingerprint(data, root), "clean": clean.fingerprint()}
    if tokenizer.name == "bpe":
        settings["tokenizer"]["trainer"] = f"rustbpe {importlib.metadata.version('rustbpe')}"
    else:
        del settings["tokenizer"]["vocab_size"]
    return settings


def _settings_unversioned(data: DataConfig, tokenizer: TokenizerConfig, root: Path) -> dict[str, Any]:
    """The same from when hashes of the source files stood for their versions: such a corpus is opened as it is, and its
    runs go on."""
    settings = _settings(data, tokenizer, root) | {"clean": UNVERSIONED["clean"]}
    settings["tokenizer"].pop("trainer", None)
    settings["source"] = corpus.source_fingerprint(data, root, (UNVERSIONED["corpus"], UNVERSIONED["blend"]))
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
        splits["val" if int.from_bytes(digest[:8]) < val_fraction * 2**64 else "train"].append(document)
    for name in SPLITS:
        if not splits[name]:
            raise BadInput(
                f"data: the {name} split got none of the {len(documents)} documents left after cleaning; add documents "
                f"(data.max_mb, data.path), loosen data.clean, or change data.val_fraction={val_fraction:g}."
            )
    return splits


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
    learned = ", learned from the train split alone" if tokenizer.name in ("bpe", "char") else ""
    say(f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens{learned}")
    for name in SPLITS:
        counts = dataset.manifest["splits"][name]
        shares = ", ".join(f"{d} {n['tokens'] / counts['tokens']:.0%}" for d, n in counts["domains"].items())
        say(
            f"{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes'] / 1e6:.2f} MB, "
            f"{counts['bytes'] / counts['tokens']:.2f} bytes per token ({shares})"
        )
        for domain, each in counts["domains"].items():
            if not each["documents"]:
                say(f"{name}: no document of domain {domain} fell into this split; add text or raise data.val_fraction")


@dataclass
class Batch:
    """One step's input, and what it is to predict. The targets are the tokens one place further."""

    tokens_BS: torch.Tensor  # int64
    targets_BS: torch.Tensor  # int64
    domain_BS: torch.Tensor  # uint8, the domain id of each target


class Loader:
    """Batches of B windows of S tokens in a shuffled order, each a pure function of (seed, step)."""

    def __init__(self, split: Split, batch_size: int, context: int, seed: int, workers: int = 0) -> None:
        """B = `batch_size`, S = `context`; `workers` processes read ahead and change nothing else.

        Raises `BadInput` for a split shorter than one window."""
        self.split, self.batch_size, self.context, self.seed, self.workers = split, batch_size, context, seed, workers
        self.n_windows = _windows(split, context)
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, from 0."""
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        windows = [self._order(n // self.n_windows)[n % self.n_windows] for n in samples]
        tokens, domain = self.split.read(np.array(windows) * self.context, self.context)
        inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(domain))

    def iterate(self, from_step: int) -> Generator[Batch, None, None]:
        """Batches of `from_step`, `from_step` + 1, ... without end. Closing the iterator ends the workers."""
        batches: DataLoader[Batch] = DataLoader(
            range(from_step, sys.maxsize),  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=self.batch,  # type: ignore[arg-type]  # a sample is a step
            num_workers=self.workers,
            worker_init_fn=_ignore_interruption,
            generator=torch.Generator(),  # else it draws from the global one, and a resumed run would differ
        )
        yield from batches

    def state(self, step: int) -> dict[str, Any]:
        """Where the loader stands before `step`, for a checkpoint: plain JSON values."""
        epoch, position = divmod(step * self.batch_size, self.n_windows)
        return {
            "dataset": self.split.dataset,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "context": self.context,
            "order": hashlib.sha256(self._order(epoch).tobytes()).hexdigest(),
            "step": step,
            "epoch": epoch,
            "position": position,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise `BadInput`, naming what changed, unless this loader continues exactly where `state` was taken."""
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise BadInput(f"the checkpoint's loader state has step={step!r}, which is not a number of steps.")
        here = {
            "dataset": f"the hash of the prepared corpus ({self.split.name} split)",
            "seed": "seed",
            "batch_size": "train.batch_size",
            "context": "model.context",
            "order": "the order of windows (drawn by another version of numpy)",
            "epoch": "the epoch",
            "position": "the position in the epoch",
        }
        for key, value in self.state(step).items():
            if state.get(key) != value:
                raise BadInput(
                    f"{here[key]} changed since the checkpoint: it was {state.get(key)!r} and is now {value!r}; go on "
                    "with the data and settings of the checkpoint, or start a new run."
                )

    def _order(self, epoch: int) -> np.ndarray:
        """(windows,) int64, a permutation."""
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a batch may straddle two epochs
                del self._orders[min(self._orders)]
            key = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
            self._orders[epoch] = np.random.Generator(np.random.Philox(key)).permutation(self.n_windows)
        return self._orders[epoch]


def validation_starts(split: Split, context: int, n_tokens: int) -> np.ndarray:
    """(n,) starts of non-overlapping windows of S target tokens, spread evenly over the split: `n_tokens` // S of them,
    at least one, or all windows if there are no more. Raises `BadInput` for a split shorter than one window."""
    windows = _windows(split, context)
    count = min(windows, max(1, n_tokens // context))
    return np.arange(count) * windows // count * context


def _windows(split: Split, context: int) -> int:
    windows = split.n_windows(context)
    if not windows:
        share = ", data.val_fraction" if split.name == "val" else ""
        raise BadInput(
            f"the {split.name} split has {split.n_tokens} tokens, fewer than the {context + 1} of one sequence: "
            f"lower model.context={context}, or add text (data.max_mb, data.path{share})."
        )
    return windows


def _ignore_interruption(worker: int) -> None:
    """Signals to the whole process group are for the main process to answer: it needs its batches until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
