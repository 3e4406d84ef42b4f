"""The text that is traced, in windows of S tokens: of a prepared corpus, of a file of text, or of token ids.

Windows are read as they are needed: a long text of a corpus or of ids takes no more memory than a short one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.data.loader import read_windows, validation_windows
from moe.data.shards import Dataset
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput

TEXT = "text"  # the domain of a text of one's own
LONGEST = 512  # tokens of a window of another library's model, if it is not said
AT_ONCE = 1024  # tokens of a batch, if it is not said
CHECKED = 1 << 20  # token ids that are looked at together
Columns = tuple[np.ndarray, ...]


@dataclass
class Windows:
    """What is traced. Iterating gives batches: tokens (n, S + 1), domain, document and position in it (n, S), and the
    targets that count (n, S), −1 for others; and the same ones every time."""

    context: int  # S
    batch_size: int  # windows at a time; 0: as many as have `AT_ONCE` tokens
    starts: np.ndarray  # of every window, in tokens
    read: Callable[[np.ndarray], Columns]  # a batch's windows, by their numbers
    domains: list[str]
    sampling: str  # which tokens of which text, in words
    corpus: Dataset | None = None  # what they are windows of; None: one text

    def __iter__(self) -> Iterator[Columns]:
        n_windows = self.batch_size or max(1, AT_ONCE // self.context)
        for chunk in np.array_split(np.arange(len(self.starts)), math.ceil(len(self.starts) / n_windows)):
            yield self.read(chunk)


def of_corpus(dataset: Dataset, context: int, batch_size: int, n_tokens: int, whole: bool = False) -> Windows:
    """Windows spread evenly over the validation text, of at most `n_tokens`; 0: all of it. `whole`: of whole documents.
    Raises `BadInput` for a text that is shorter than one window."""
    split = dataset.split("val")
    windows = validation_windows(split, context, n_tokens or split.n_tokens, whole)
    sampling = f"{len(windows.start_W)} windows of {context} tokens, spread evenly over the validation text"

    def read(chunk: np.ndarray) -> Columns:
        tokens_BS1, targets_BS, domain_BS = read_windows(split, windows.take(chunk), context)
        return tokens_BS1, domain_BS, *split.places(windows.start_W[chunk], context), targets_BS

    return Windows(context, batch_size, windows.start_W, read, dataset.domains, sampling, dataset)


def of_text(path: Path, tokenizer: Tokenizer, context: int, batch_size: int, n_tokens: int) -> Windows:
    """The first `n_tokens` of a file of UTF-8 text, one document; 0: all. Raises `BadInput` for one that cannot be
    read, or is too short."""
    tokens = np.array(tokenizer.encode(read_text(path)), np.int64)
    return _document(path, len(tokens), lambda start, stop: tokens[start:stop], context, batch_size, n_tokens)


def read_text(path: Path) -> str:
    """A file of UTF-8 text. Raises `BadInput`."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise BadInput(f"text={path} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"text={path} is no UTF-8 (byte {error.start}).") from error


def of_ids(path: Path, vocab_size: int, context: int, batch_size: int, n_tokens: int) -> Windows:
    """The same of a .npy file of token ids, (N,) whole numbers from 0 to V − 1. Raises `BadInput` for anything else; a
    pickle is never opened."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
    except OSError as error:
        raise BadInput(f"text={path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise BadInput(f"text={path} is no whole .npy file ({error}).") from error
    if len(shape) != 1 or not np.issubdtype(dtype, np.integer):
        raise BadInput(f"text={path} holds {dtype} {shape}: accepted are token ids, (N,) whole numbers.")
    if path.stat().st_size != offset + shape[0] * dtype.itemsize:
        raise BadInput(f"text={path} is damaged: it has not the bytes of {shape[0]} ids.")
    # Read, not mapped: pages of a map that were looked at stay in memory.
    read = lambda start, stop: np.fromfile(path, dtype, stop - start, offset=offset + start * dtype.itemsize)
    for start in range(0, shape[0], CHECKED):
        ids = read(start, min(shape[0], start + CHECKED))
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(outside):
            place = start + outside[0]
            raise BadInput(f"text={path} has id {ids[outside[0]]} at {place}: the model's are 0 to {vocab_size - 1}.")
    return _document(path, shape[0], read, context, batch_size, n_tokens)


def _document(
    path: Path, length: int, read: Callable[[int, int], np.ndarray], context: int, batch_size: int, n_tokens: int
) -> Windows:
    """Windows of one document of so many tokens."""
    if length <= context:
        raise BadInput(f"text={path} has {length} tokens, and one window takes {context + 1}: give a longer text.")
    starts = np.arange((length - 1) // context)[: n_tokens // context or None] * context

    def columns(chunk: np.ndarray) -> Columns:
        place_BS = starts[chunk][:, None] + np.arange(context)
        tokens_BS1 = np.stack([read(int(start), int(start) + context + 1) for start in starts[chunk]]).astype(np.int64)
        return tokens_BS1, np.zeros_like(place_BS), np.zeros_like(place_BS), place_BS, tokens_BS1[:, 1:]

    sampling = f"the first {len(starts) * context} tokens of {path.name}"
    return Windows(context, batch_size, starts, columns, [TEXT], sampling)
