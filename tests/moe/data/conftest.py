"""Fixtures of the tests of moe/data/."""

import hashlib

import pytest

import moe.data.prepare
import moe.data.shards
from moe.config.data import DataConfig
from moe.data.prepare import prepare
from moe.data.shards import Dataset
from moe.data.sources import Document
from tests.moe.data.small_corpora import AS_IT_IS, BYTE, documents_of, silent


@pytest.fixture
def prepare_documents(tmp_path, monkeypatch):
    """`prepare` on documents given as a list, with small shards."""
    monkeypatch.setattr(moe.data.shards, "SHARD_TOKENS", 700)
    monkeypatch.setattr(moe.data.shards, "ENCODE_CHARACTERS", 900)

    def build(documents: list[Document], /, tokenizer=BYTE, say=silent, **settings) -> Dataset:
        settings = {"cache": str(tmp_path), "clean": AS_IT_IS, "val_fraction": 0.2} | settings
        content = hashlib.sha256(repr(documents).encode()).hexdigest()
        monkeypatch.setattr(
            moe.data.prepare.sources, "documents", lambda cfg, cache, unreadable, template=None: iter(documents)
        )
        monkeypatch.setattr(moe.data.prepare.sources, "source_fingerprint", lambda cfg, cache, *readers: content)
        return prepare(DataConfig(**settings), tokenizer, say)

    return build


@pytest.fixture
def dataset(prepare_documents) -> Dataset:
    return prepare_documents(documents_of(120))
