"""What the inspector's script is given of a `Look`: arrays, and the names and texts that go with them.

Letters beyond the glossary: L the MoE layers, C passages, W tokens of one, N what is left of a list.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.pages.inspector_tables import Look
from experiments.pages.packed import Pack, index_kind
from moe.analysis.history import spread
from moe.analysis.inspection import Inspection, LayerView
from moe.data.tokenizer import Tokenizer
from moe.run.terminal import printable

TEXT_BYTES = 2_000_000  # what the passages of a run may take in the page, before they are compressed
HISTORY_BYTES = 2_000_000  # the same of loads over training
NONE = -1
AROUND = 7  # tokens to either side of a passage's own
ARROWS = str.maketrans("\n\t\u200b\u200c\u200d\ufeff\u00ad", "↵⇥␣␣␣␣␣")
SCALE = 100  # of ratios that are kept as whole numbers


def shown(tokenizer: Tokenizer | None, token: int) -> str:
    """A token as people read it: its text, bytes that are no text as \\x.., line breaks and tabs as arrows, and what
    else would not show as pictures; its id where there is no tokenizer."""
    if tokenizer is None or token >= tokenizer.vocab_size:
        return f"⟨{token}⟩"
    text = tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
    return printable(text.translate(ARROWS)) or f"⟨{token}⟩"


def packed(pack: Pack, i: int, look: Look) -> dict[str, Any]:
    """Add a run's arrays to the pack, by names that begin with its number; what of it is no array."""
    inspection, views = look.inspection, look.inspection.layers
    about = inspection.about
    widest = max(about.n_experts)
    add = lambda name, array: pack.add(f"{i}/{name}", array)
    # Load and domains.
    by_layer = lambda arrays, kind: np.stack([padded(array, widest).astype(kind) for array in arrays])
    add("domain", by_layer([view.rows_YE for view in views], np.uint32))
    # Cards: tokens, partners, passages.
    strings = Strings(look.tokenizer)
    for name in ("taken", "predicted"):
        tops = [getattr(view, name) for view in views]
        numbered = [strings.numbers(top.token) for top in tops]
        add(f"{name}/token", by_experts(numbered, widest, NONE).astype(np.int32))
        add(f"{name}/rows", by_experts([top.rows for top in tops], widest, 0).astype(np.int32))
        add(f"{name}/lift", by_experts([top.lift for top in tops], widest, 0).astype(np.float32))
    for name in ("together", "onward"):
        kept = [partners for view in views if (partners := getattr(view, name)) is not None]
        if kept:
            width = max(partners.expert.shape[1] for partners in kept)
            square = lambda array, fill, width=width: np.pad(
                array, ((0, 0), (0, width - array.shape[1])), constant_values=fill
            )
            experts = [square(p.expert, NONE) for p in kept]
            ratios = [np.round(square(p.ratio, 0) * SCALE).clip(0, 2**16 - 1) for p in kept]
            add(f"{name}/expert", by_experts(experts, widest, NONE).astype(np.int16))
            add(f"{name}/ratio", by_experts(ratios, widest, 0).astype(np.uint16))
    add("contexts", by_experts([passages(inspection, view, strings) for view in views], widest, NONE).astype(np.int32))
    # Passages token by token, and loads over training.
    chosen_N = text_rows(inspection)
    text = text_arrays(inspection, chosen_N, strings)
    for name, array in text.items():
        add(f"text/{name}", array)
    history = look.history
    if history and len(history.load_steps):
        steps_N = spread(range(len(history.load_steps)), HISTORY_BYTES // (2 * history.load_NLE[0].size))
        load_NLE = np.nan_to_num(history.load_NLE[steps_N])
        add("history/load", np.round(load_NLE * SCALE).clip(0, 2**16 - 1).astype(np.uint16))
        add("history/load_steps", np.array(history.load_steps, np.int32)[steps_N])
    if history and len(history.steps):
        add("history/effective", history.effective_NL.astype(np.float32))
        add("history/max_vio", history.max_vio_NL.astype(np.float32))
        add("history/steps", np.array(history.steps, np.int32))
    if look.evidence:
        for end in ("low", "high"):
            lift = np.nan_to_num(getattr(look.evidence.of.lift, end)).transpose(0, 2, 1)
            add(f"lift/{end}", np.round(lift * SCALE).clip(0, 2**16 - 1).astype(np.uint16))
    if look.probed:
        importance = [[importance_of(look, view, e) for e in range(widest)] for view in views]
        add("importance", np.array(importance, np.float32))
        add("twin", np.stack([twins(look, view, widest) for view in views]).astype(np.float32))
    return {
        "name": printable(look.name),
        "earned": [name._asdict() for name in look.evidence.earned()] if look.evidence else [],
        "layers": about.layers,
        "n_experts": about.n_experts,
        "k": about.k,
        "weighted": not bool(np.isnan(inspection.routes.weight_TLK).all()),
        "scored": not bool(np.isnan(inspection.routes.entropy_TL).all()),
        "domains": [printable(domain) for domain in about.domains],
        "tokens": len(inspection.tokens.token),
        "around": AROUND,
        "none": NONE,
        "scale": SCALE,
        "strings": strings.texts,
    }


def importance_of(look: Look, view: LayerView, expert: int) -> tuple[float, float, float]:
    """What masking an expert does to the loss, in nats, with both ends of its interval; NaN where it was not tried."""
    assert look.probed is not None, "asked of a model that was"
    effect = look.probed.importance.get((view.layer, expert))
    return (effect.total.difference, effect.total.low, effect.total.high) if effect else (math.nan,) * 3


def twins(look: Look, view: LayerView, widest: int) -> np.ndarray:
    """Of every expert its nearest twin, how alike their outputs are, and how alike they are by chance: (E, 3)."""
    assert look.probed is not None, "asked of a model that was"
    alike = next(one for one in look.probed.alike if one.layer == view.layer)
    twin_E3 = np.full((widest, 3), NONE, float)
    for e, twin in enumerate(alike.twin_E):
        if twin >= 0:
            twin_E3[e] = twin, alike.cosine_EE[e, twin], alike.chance_cosine
    return twin_E3


class Strings:
    """The texts of the tokens that the page shows, each once."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        self.number_of: dict[int, int] = {}

    def numbers(self, token: np.ndarray) -> np.ndarray:
        """Every token's place in `texts`; a negative one stays."""
        tokens, inverse = np.unique(token, return_inverse=True)
        places = [NONE if t < 0 else self.number(int(t)) for t in tokens]
        return np.array(places, np.int64)[inverse].reshape(token.shape)

    def number(self, token: int) -> int:
        """One token's."""
        if token not in self.number_of:
            self.number_of[token] = len(self.texts)
            self.texts.append(shown(self.tokenizer, token))
        return self.number_of[token]


def padded(array: np.ndarray, width: int) -> np.ndarray:
    """With zeros to the right, to so many columns."""
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))


def by_experts(arrays: Sequence[np.ndarray], widest: int, fill: int) -> np.ndarray:
    """Arrays (E, ...) of layers that may have different numbers of experts, as one (L, E, ...)."""
    fitted = [np.pad(a, [(0, widest - len(a)), *[(0, 0)] * (a.ndim - 1)], constant_values=fill) for a in arrays]
    return np.stack(fitted)


def passages(inspection: Inspection, view: LayerView, strings: Strings) -> np.ndarray:
    """The tokens round every passage of every expert, (E, C, W) as numbers of texts, the one in question in the
    middle; `NONE` beyond the ends of its window, and where there is no passage."""
    tokens, around = inspection.tokens, np.arange(-AROUND, AROUND + 1)
    row_ECW = view.contexts_EC[:, :, None] + around
    inside_ECW = (row_ECW >= 0) & (row_ECW < len(tokens.token)) & (view.contexts_EC[:, :, None] >= 0)
    row_ECW = row_ECW.clip(0, len(tokens.token) - 1)
    same_ECW = tokens.window[row_ECW] == tokens.window[view.contexts_EC.clip(0)][:, :, None]
    return strings.numbers(np.where(inside_ECW & same_ECW, tokens.token[row_ECW], NONE))


def text_rows(inspection: Inspection) -> np.ndarray:
    """Rows of the tokens that the page shows one by one: whole windows, spread evenly."""
    tokens, routes = inspection.tokens, inspection.routes
    start_W = np.flatnonzero(np.diff(tokens.window, prepend=NONE))
    size = len(tokens.token) // len(start_W)
    bytes_of_token = 3 * routes.expert_TLK[0].size + 8
    start_W = np.array(spread(start_W.tolist(), TEXT_BYTES // (bytes_of_token * size)))
    return np.flatnonzero(np.isin(tokens.window, tokens.window[start_W]))


def text_arrays(inspection: Inspection, row_N: np.ndarray, strings: Strings) -> dict[str, np.ndarray]:
    """What the page shows of these tokens: text, where they stand, loss, and in every layer experts, weights and
    entropy (as a share of ln E, of 255)."""
    tokens, routes, about = inspection.tokens, inspection.routes, inspection.about
    expert_NLK = routes.expert_TLK[row_N].astype(np.int64)
    kind = index_kind(max(about.n_experts))  # one number more than there are experts: none
    none = max(about.n_experts)
    scale_L = np.array([math.log(n) if n > 1 else 1.0 for n in about.n_experts])
    entropy_NL = np.nan_to_num(routes.entropy_TL[row_N] / scale_L)
    return {
        "token": strings.numbers(tokens.token[row_N]).astype(np.int32),
        "doc": tokens.doc[row_N].astype(np.int32),
        "pos": tokens.pos[row_N].astype(np.int32),
        "domain": tokens.domain[row_N].astype(np.int32),
        "window": tokens.window[row_N].astype(np.int32),
        "loss": tokens.loss[row_N].astype(np.float32),  # NaN where it is not known
        "expert": np.where(expert_NLK < 0, none, expert_NLK).astype(kind),
        "weight": np.round(np.nan_to_num(routes.weight_TLK[row_N]).clip(0, 1) * 255).astype(np.uint8),
        "entropy": np.round(entropy_NL.clip(0, 1) * 255).astype(np.uint8),
    }
