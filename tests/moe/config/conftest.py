"""Settings are refused before anything is built: every test of moe/config/ holds it."""

import pytest

from moe.model import transformer


@pytest.fixture(autouse=True)
def _no_model_is_built(monkeypatch):
    def refuse(*args):
        raise AssertionError("a model was built")

    monkeypatch.setattr(transformer.Transformer, "__init__", refuse)
