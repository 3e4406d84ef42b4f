"""How well a model predicts any text: nats per token and bits per byte, in all and by domain, each with its 95%
interval over documents.

The interval is of texts that are like these, for this one model. Tokens of a document are alike, so documents are
drawn anew, and not tokens; where there are fewer than ten documents, windows are, and the interval is too narrow for
other texts.

Letters beyond the glossary: U units that are resampled.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from moe.analysis.effects import FEW, ratios
from moe.analysis.windows import Windows
from moe.data.loader import NO_TARGET
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.eval.evaluate import TextTally, eval_mode
from moe.model.transformer import Transformer
from moe.run.summary import Score


class Interval(NamedTuple):
    """A number with its 95% interval, infinite where that is unknown."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scored:
    """How well a text, or a domain's part of it, is predicted."""

    domain: str | None  # None: all of the text
    loss: Interval  # nats per token
    bpb: Interval | None  # bits per byte of the text; None where a token's bytes are unknown
    tokens: int
    unit: str  # what was resampled: documents | windows
    units: int


class Units(NamedTuple):
    """Sums over the targets that share a window, a document and a domain, (U,)."""

    window_U: np.ndarray
    doc_U: np.ndarray
    domain_U: np.ndarray
    tokens_U: np.ndarray
    nats_U: np.ndarray
    bytes_U: np.ndarray


@torch.inference_mode()
def score(
    model: Transformer,
    windows: Windows,
    tokenizer: Tokenizer | None,
    *,
    backend: str = "torch",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Scored]:
    """Score every window: all of the text first, then each domain that it has. The model is in eval mode meanwhile. Of
    the same windows and batches the numbers are those of `moe.eval.evaluate.evaluate`. Bits per byte count the text's
    own bytes: the end-of-text token has none, and its loss counts. Memory holds a few numbers per window and document.

    Raises `BadInput` for a loss that is not finite."""
    device = next(model.parameters()).device
    bytes_V = np.zeros(model.cfg.vocab_size, np.int32)  # ids that only the model has are none of the text's
    if tokenizer:
        bytes_V[: tokenizer.vocab_size] = tokenizer.token_bytes
    text, parts, n_windows = TextTally(windows.domains, bytes_V, device), [], 0
    for read_BS1, domain_BS, doc_BS, _, targets_BS in windows:
        tokens_BS1 = torch.from_numpy(read_BS1).to(device)
        with eval_mode(model), autocast():
            logits_BSV = model(tokens_BS1[:, :-1], backend=backend).logits_BSV
        nats_BS = text.add(logits_BSV, torch.from_numpy(targets_BS).to(device), torch.from_numpy(domain_BS).to(device))
        # `doc_BS` is of the tokens that are read: after the end of a text the next document's first is predicted.
        target_doc_BS = doc_BS + (read_BS1[:, :-1] == tokenizer.eot) if tokenizer else doc_BS
        window_BS = np.repeat(np.arange(n_windows, n_windows + len(read_BS1))[:, None], doc_BS.shape[1], 1)
        columns = window_BS, target_doc_BS, domain_BS, nats_BS.cpu().numpy(), bytes_V[read_BS1[:, 1:]]
        counts_BS = targets_BS != NO_TARGET
        parts.append(sums(*(column[counts_BS] for column in columns)))
        n_windows += len(read_BS1)
    # The numbers are the tally's; the units are for their intervals.
    validation = text.validation()
    if not math.isfinite(validation.loss):
        raise BadInput(f"the model's loss is {validation.loss}: choose another checkpoint (which=...).")
    units = Units(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    by_document = len(np.unique(units.doc_U)) >= FEW
    rows = [scored(None, validation, units, by_document, bool(tokenizer))]
    for name, domain in validation.domains.items():
        of_domain_U = units.domain_U == windows.domains.index(name)
        part = Units(*(column[of_domain_U] for column in units))
        rows.append(scored(name, domain, part, by_document, bool(tokenizer)))
    return rows


def sums(
    window_T: np.ndarray, doc_T: np.ndarray, domain_T: np.ndarray, nats_T: np.ndarray, bytes_T: np.ndarray
) -> Units:
    """A batch's targets summed by window, document and domain."""
    keys_3T = np.stack([window_T, doc_T, domain_T])
    (window_U, doc_U, domain_U), unit_T, tokens_U = np.unique(keys_3T, axis=1, return_inverse=True, return_counts=True)
    nats_U, bytes_U = (np.bincount(unit_T.ravel(), value_T) for value_T in (nats_T, bytes_T))
    return Units(window_U, doc_U, domain_U, tokens_U, nats_U, bytes_U)


def scored(domain: str | None, score: Score, part: Units, by_document: bool, has_bytes: bool) -> Scored:
    """What is known of a score, with the intervals over the documents or windows of its part of the text."""
    _, unit_U = np.unique(part.doc_U if by_document else part.window_U, return_inverse=True)
    tokens_U, nats_U, bytes_U = (np.bincount(unit_U, column) for column in part[3:])
    _, (low,), (high,) = ratios(nats_U[None], tokens_U)
    bpb = None
    if has_bytes and bytes_U.any():
        _, (bits_low,), (bits_high,) = ratios(nats_U[None] / math.log(2), bytes_U)
        bpb = Interval(score.bpb, float(bits_low), float(bits_high))
    unit = "documents" if by_document else "windows"
    return Scored(domain, Interval(score.loss, float(low), float(high)), bpb, int(tokens_U.sum()), unit, len(tokens_U))
