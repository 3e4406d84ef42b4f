"""Claims about scores with intervals: against the run's own validation, and resamples drawn one by one."""

import dataclasses
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from moe.analysis.windows import of_corpus, of_ids, of_text
from moe.data.prepare import prepare
from moe.errors import BadInput
from moe.eval.evaluate import evaluate
from moe.eval.scores import Units, score, scored, sums
from moe.model.transformer import Transformer
from moe.run.summary import Score
from tests.small_runs import settings, silent

CONTEXT, V = 32, 290


@pytest.fixture(scope="module")
def dataset(corpus):
    """More than ten documents are held out."""
    cfg = settings(corpus, "", {"tokenizer.name": "bpe", "tokenizer.vocab_size": V, "data.val_fraction": 0.4})
    return prepare(cfg.data, cfg.tokenizer, silent)


@pytest.fixture(scope="module", params=["moe", "dense"])
def model(request, corpus):
    """Of more ids than the tokenizer has."""
    changes = {"model.vocab_size": V + 6, "model.init_std": 0.3} | (
        {"model.moe": None} if request.param == "dense" else {}
    )
    cfg = settings(corpus, "", changes)
    return Transformer(cfg.model, cfg.router).initialize(3)


def test_the_numbers_are_bit_for_bit_those_of_a_validation(model, dataset):
    windows = of_corpus(dataset, CONTEXT, 3, 1024)
    rows = score(model, windows, dataset.tokenizer)
    how = {"n_tokens": 1024, "batch_size": 3, "backend": "torch", "autocast": nullcontext}
    val = evaluate(model, dataset, **how).val
    assert {row.domain: (row.loss.value, row.bpb.value, row.tokens) for row in rows} == {
        None: (val.loss, val.bpb, 1024),
        **{name: (of.loss, of.bpb, of.tokens) for name, of in val.domains.items()},
    }


def test_a_domain_has_the_documents_that_are_its_own(model, dataset):
    """All the text: every document of the split is a unit, of one domain, though windows go over their ends."""
    rows = score(model, of_corpus(dataset, CONTEXT, 5, 0), dataset.tokenizer)
    domain_D = np.load(dataset.folder / "val-00000.documents.npy")[:, 1]
    expected = {name: int((domain_D == i).sum()) for i, name in enumerate(dataset.domains)}
    assert {row.domain: row.units for row in rows} == {None: len(domain_D), **expected}
    assert {row.unit for row in rows} == {"documents"}


def _units(n_docs, seed):
    """A window per document."""
    rng = np.random.default_rng(seed)
    number_U, tokens_U = np.arange(n_docs), rng.integers(5, 200, n_docs)
    nats_U = tokens_U * rng.gamma(9, 0.3, n_docs)
    return Units(number_U, number_U, 0 * number_U, tokens_U, nats_U, tokens_U * rng.uniform(2, 4, n_docs))


def test_intervals_are_those_of_documents_drawn_one_by_one():
    units = _units(200, 1)
    row = scored("all", Score(1.0, 1.0), units, by_document=True, has_bytes=True)
    rng = np.random.default_rng(9)
    losses, bits = [], []
    for _ in range(4000):
        drawn = rng.integers(0, 200, 200)
        nats = units.nats_U[drawn].sum()
        losses.append(nats / units.tokens_U[drawn].sum())
        bits.append(nats / math.log(2) / units.bytes_U[drawn].sum())
    for interval, values in ((row.loss, losses), (row.bpb, bits)):
        low, high = np.quantile(values, [0.025, 0.975])
        assert interval[1:] == pytest.approx((low, high), abs=0.08 * (high - low))


def test_an_interval_over_documents_is_wider_than_over_their_windows():
    """Windows of a document that are copies say nothing new."""
    units = _units(20, 2)
    many = Units(np.arange(200), *(np.repeat(column, 10) for column in units[1:]))
    width = lambda of: of.loss.high - of.loss.low
    rows = [scored(None, Score(1.0, 1.0), many, by_document, True) for by_document in (True, False)]
    assert (rows[0].units, rows[1].units) == (20, 200)
    assert width(rows[0]) > 2.5 * width(rows[1])


def test_sums_are_by_window_document_and_domain():
    window_BS, doc_BS = np.array([[0, 0, 0], [1, 1, 1]]), np.array([[4, 4, 5], [5, 5, 5]])
    domain_BS = np.array([[0, 0, 1], [1, 1, 1]], np.uint8)
    nats_BS, bytes_BS = np.arange(6.0).reshape(2, 3), np.arange(6).reshape(2, 3) * 10
    units = sums(*(column.ravel() for column in (window_BS, doc_BS, domain_BS, nats_BS, bytes_BS)))
    assert [column.tolist() for column in units] == [
        [0, 0, 1], [4, 5, 5], [0, 1, 1], [2, 1, 3], [1, 2, 12], [10, 20, 120]
    ]  # fmt: skip


def test_one_unit_has_no_interval():
    row = scored(None, Score(2.0, 1.0), _units(1, 0), by_document=True, has_bytes=True)
    assert [*row.loss[1:], *row.bpb[1:]] == [-math.inf, math.inf] * 2


def test_a_text_is_one_document_and_windows_are_drawn(model, dataset, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be, é " * 60)
    windows = of_text(tmp_path / "a.txt", dataset.tokenizer, CONTEXT, 2, 0)
    (row, domain) = score(model, windows, dataset.tokenizer)
    assert (row.unit, row.units) == ("windows", len(windows.starts))
    assert dataclasses.replace(domain, domain=None) == row
    # By hand, a window at a time, in float64.
    tokens = dataset.tokenizer.encode("to be or not to be, é " * 60)
    nats = n_bytes = 0
    twin = Transformer(model.cfg, model.router).double().eval()
    twin.load_state_dict(model.state_dict())
    for start in windows.starts.tolist():
        piece = torch.tensor(tokens[start : start + CONTEXT + 1])
        with torch.no_grad():
            log_prob_SV = twin(piece[None, :-1], backend="reference").logits_BSV[0].log_softmax(-1)
        nats -= log_prob_SV[torch.arange(CONTEXT), piece[1:]].sum().item()
        n_bytes += len(dataset.tokenizer.decode_bytes(piece[1:].tolist()))
    assert row.loss.value == pytest.approx(nats / row.tokens, rel=1e-5)
    assert row.bpb.value == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_ids_without_a_tokenizer_have_a_loss_and_no_bits_per_byte(model, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(200) % V)
    rows = score(model, of_ids(tmp_path / "ids.npy", V, CONTEXT, 2, 0), None)
    assert [row.bpb for row in rows] == [None, None]
    assert rows[0].tokens == 192


def test_a_loss_that_is_not_finite_is_refused(model, dataset):
    broken = Transformer(model.cfg, model.router)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.embed.weight.fill_(math.nan)
    with pytest.raises(BadInput, match="the model's loss is nan: choose another checkpoint"):
        score(broken, of_corpus(dataset, CONTEXT, 3, 64), dataset.tokenizer)
