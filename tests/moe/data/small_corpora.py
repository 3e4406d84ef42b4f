"""Corpora of random documents, prepared, and what is in their shards: for the tests of moe/data/."""

import random

import numpy as np
import torch

from moe.config.data import CleanConfig, TokenizerConfig
from moe.data.shards import Dataset
from moe.data.sources import Document

AS_IT_IS = CleanConfig(html=False, unicode="none", min_chars=0, max_repetition=1.0, exact=False, near=0.0)
BYTE = TokenizerConfig("byte")


def silent(line: str) -> None:
    pass


def documents_of(n: int, seed: int = 0) -> list[Document]:
    """Documents of random words, some not ASCII, of very uneven lengths, in three domains."""
    rng = random.Random(seed)
    words = ["alpha", "beta", "γάμμα", "delta", "😀", "x = 1", "\n", "漢字", "of", "the"]
    texts = [" ".join(rng.choices(words, k=rng.choice([3, 10, 60]))) + str(i) for i in range(n)]
    return [Document(text, rng.choice(["code", "prose", "verse"]), f"{seed}-{i}") for i, text in enumerate(texts)]


def texts_of(dataset: Dataset, name: str) -> list[tuple[str, str]]:
    """(text, domain) of each document, decoded from the files alone."""
    found = []
    for path in sorted(dataset.folder.glob(f"{name}-*.bin")):
        tokens = np.fromfile(path, dataset.manifest["dtype"]).tolist()
        table = np.load(path.with_suffix(".documents.npy"), allow_pickle=False).tolist()
        stops = [start for start, _ in table[1:]] + [len(tokens)]
        for (start, domain), stop in zip(table, stops, strict=True):
            assert tokens[stop - 1] == dataset.tokenizer.eot
            found.append((dataset.tokenizer.decode(tokens[start : stop - 1]), dataset.domains[domain]))
    return found


def all_tokens(dataset: Dataset, name: str) -> list[int]:
    return [
        token
        for path in sorted(dataset.folder.glob(f"{name}-*.bin"))
        for token in np.fromfile(path, dataset.manifest["dtype"]).tolist()
    ]


def same(left, right) -> bool:
    return all(torch.equal(getattr(left, key), getattr(right, key)) for key in ("tokens_BS", "targets_BS", "domain_BS"))
