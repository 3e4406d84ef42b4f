"""Traces with routes that are known: written as the library writes them, without any model."""

from pathlib import Path

import numpy as np

from moe.analysis.trace import About, Batch, Trace, Writer

WINDOW = 16


def write_trace(folder: Path, expert_TLK: np.ndarray, **columns) -> Trace:
    """A trace of these experts; `columns`: token, domain, doc (T,), weight_TLK, margin_TL, entropy_TL, and fields of
    `About`. By default tokens count up to 50, every window is a document, and everything is one domain."""
    n_tokens, n_layers, k = expert_TLK.shape
    assert n_tokens % WINDOW == 0, n_tokens
    token_T = columns.pop("token", np.arange(n_tokens) % 50)
    domain_T = columns.pop("domain", np.zeros(n_tokens, int))
    doc_T = columns.pop("doc", np.arange(n_tokens) // WINDOW)
    weight_TLK = columns.pop("weight_TLK", np.full(expert_TLK.shape, 1 / k))
    margin_TL = columns.pop("margin_TL", np.full((n_tokens, n_layers), 0.1))
    entropy_TL = columns.pop("entropy_TL", np.full((n_tokens, n_layers), 0.5))
    loss_T = columns.pop("loss", np.linspace(1, 3, n_tokens))
    widest = int(expert_TLK.max()) + 1
    fields = dict(
        run="runs/planted", checkpoint="step-00000001", tokenizer="", vocab_size=1000, context=WINDOW,
        layers=list(range(n_layers)), n_experts=[widest] * n_layers, k=k, domains=["text"], sampling="planted windows",
    )  # fmt: skip
    about = About(**(fields | columns))
    by_window = lambda column: np.asarray(column).reshape(-1, WINDOW)
    place_T = np.arange(n_tokens) % WINDOW
    with Writer(folder, about) as writer:
        writer.add(
            Batch(
                by_window(token_T),
                by_window(np.roll(token_T, -1)),
                by_window(domain_T),
                by_window(doc_T),
                by_window(place_T),
                by_window(loss_T),
                expert_TLK,
                weight_TLK,
                margin_TL,
                entropy_TL,
            )
        )
    return Trace(folder)


def random_routes(n_tokens: int, n_layers: int, n_experts: int, k: int, seed: int = 0) -> np.ndarray:
    """(T, L, K): K different experts of every token in every layer, drawn evenly."""
    order = np.random.default_rng(seed).random((n_tokens, n_layers, n_experts)).argsort(-1)
    return order[..., :k]
