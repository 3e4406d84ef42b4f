"""All that a page says of a trace, computed once: an `Inspection`, layer by layer.

A trace is read whole up to `most` tokens; of a longer one windows spread evenly over it. Every figure is of these
tokens alone.

Letters beyond the glossary: L the MoE layers, M keys (token ids that are common enough), N partners that are kept.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from moe.analysis import metrics, placement, specialisation
from moe.analysis.history import spread
from moe.analysis.trace import About, Trace
from moe.errors import BadInput
from moe.routing.contract import DROPPED
from moe.run.summary import LayerMetrics

MATRIX = 64  # experts up to which all pairs are kept; above, the strongest partners
PARTNERS = 16
KEYS = 4096  # the most frequent tokens, of which experts' preferences are counted
COMMON = 20  # times that a token occurs, and
TAKEN = 5  # times that an expert takes it, before it may stand on the expert's card
TOP = 8  # tokens on a card
CONTEXTS = 3  # passages on a card
CLOSE = 0.01  # a margin that a computation in bf16 may turn
DEVICES = (2, 4, 8, 16, 32, 64)
DECODED = 2**14  # tokens of which decode batches are made
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Tokens(NamedTuple):
    """The tokens that are inspected, in the order of the text: columns of tokens.parquet, (T,)."""

    doc: np.ndarray
    pos: np.ndarray
    token: np.ndarray
    next: np.ndarray
    domain: np.ndarray  # index into `About.domains`
    window: np.ndarray
    loss: np.ndarray


class Top(NamedTuple):
    """Every expert's tokens with the highest lift, (E, TOP): ids, -1 where there is none; how often the expert took
    them; and the lift."""

    token: np.ndarray
    rows: np.ndarray
    lift: np.ndarray


class Partners(NamedTuple):
    """Experts that go with each expert, (E, N), the most likely first, -1 for none; and how many times as often as
    chance has it."""

    expert: np.ndarray
    ratio: np.ndarray


class Routes(NamedTuple):
    """What the routers did with them, by layer."""

    expert_TLK: np.ndarray
    weight_TLK: np.ndarray
    margin_TL: np.ndarray  # NaN where a router has no scores, and so is entropy
    entropy_TL: np.ndarray


@dataclass(frozen=True)
class LayerView:
    """One MoE layer."""

    layer: int  # among all layers
    n_experts: int
    rows_YE: np.ndarray  # routed rows by domain and expert
    metrics: LayerMetrics
    starved: int
    gini: float
    cv_squared: float
    coverage_E: np.ndarray
    entropy: float  # mean over tokens, over ln E; NaN without scores
    margin: float
    close: float  # share of tokens whose margin is under `CLOSE`: choices that another dtype may turn
    information: float  # bits that a row's expert tells of its domain
    taken: Top  # by the token that is read
    predicted: Top  # by the token that follows
    together: Partners | None  # in the same layer; None for K = 1
    onward: Partners | None  # in the next MoE layer; None for the last
    contexts_EC: np.ndarray  # rows of `Tokens` that stand for each expert, -1 for none
    devices: list[tuple[int, float, float]]  # EP degree, imbalance, imbalance with a copy per device besides
    distinct: list[tuple[int, float]]  # tokens of a decode batch, different experts that they take


@dataclass(frozen=True)
class Inspection:
    """A trace, inspected."""

    about: About
    tokens: Tokens
    routes: Routes
    layers: list[LayerView]
    of: int  # tokens of the trace

    @property
    def sampling(self) -> str:
        """Which tokens these are, in words."""
        part = "" if len(self.tokens.token) == self.of else f"{len(self.tokens.token):,} of the {self.of:,} tokens of "
        return f"{part}{self.about.sampling}"


def inspect(trace: Trace, most: int = 200_000) -> Inspection:
    """Inspect at most so many tokens of a trace. Raises `BadInput` for one without tokens."""
    if not trace.n_tokens:
        raise BadInput(f"{trace.folder} has no tokens: there is nothing to inspect.")
    tokens, routes = read(trace, most)
    layers = []
    for i in range(len(trace.about.layers)):
        after = trace.about.n_experts[i + 1] if i + 1 < len(trace.about.layers) else 0
        layers.append(view(trace.about, i, tokens, routes, after))
    return Inspection(trace.about, tokens, routes, layers, trace.n_tokens)


def read(trace: Trace, most: int) -> tuple[Tokens, Routes]:
    """The tokens that are inspected, whole windows spread evenly over the trace, and their routes."""
    table = trace.table("tokens", list(Tokens._fields)).combine_chunks()
    columns = {name: table[name].combine_chunks() for name in Tokens._fields}
    columns["domain"] = columns["domain"].indices
    columns = {name: column.to_numpy(zero_copy_only=False) for name, column in columns.items()}
    # Which windows: all of them, or as many as there is room for.
    start_W = np.flatnonzero(np.diff(columns["window"], prepend=-1))
    size = trace.n_tokens // len(start_W)
    start_W = np.array(spread(start_W.tolist(), most // max(1, size)))
    keep_T = np.isin(columns["window"], columns["window"][start_W])
    # Their routes, a part of the file at a time.
    n_layers, k = len(trace.about.layers), trace.about.k
    parts: list[tuple[np.ndarray, ...]] = []
    for batch in trace.batches():
        if any(batch[name].null_count or batch[name].flatten().null_count for name in ("expert", "weight")):
            raise BadInput(f"{trace.folder / 'routes.parquet'} is damaged: a token has no experts, not even none.")
        row_N = keep_T[batch["token_row"].to_numpy()]
        flat = [batch[name].flatten().to_numpy(zero_copy_only=False).reshape(-1, k) for name in ("expert", "weight")]
        flat += [batch[name].to_numpy(zero_copy_only=False) for name in ("margin", "entropy")]
        parts.append(tuple(column[row_N] for column in flat))
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    expert_TLK, weight_TLK = (column.reshape(-1, n_layers, k) for column in joined[:2])
    margin_TL, entropy_TL = (column.reshape(-1, n_layers).astype(np.float32) for column in joined[2:])
    most_L = expert_TLK.max((0, 2))
    for layer, most, n_experts in zip(trace.about.layers, most_L, trace.about.n_experts, strict=True):
        if most >= n_experts:
            raise BadInput(
                f"{trace.folder / 'routes.parquet'} names expert {most} in layer {layer}, which has {n_experts}."
            )
    tokens = Tokens(**{name: column[keep_T] for name, column in columns.items()})
    return tokens, Routes(expert_TLK, weight_TLK.astype(np.float32), margin_TL, entropy_TL)


def view(about: About, i: int, tokens: Tokens, routes: Routes, n_after: int) -> LayerView:
    """MoE layer i of the trace; `n_after` experts has the next one, 0 where there is none."""
    n_experts, n_tokens = about.n_experts[i], len(tokens.token)
    expert_TK = torch.from_numpy(routes.expert_TLK[:, i].astype(np.int64))
    # How even the load is, in all and by domain.
    domain_T = torch.from_numpy(tokens.domain.astype(np.int64))
    rows_YE = specialisation.count_by(domain_T, expert_TK, len(about.domains), n_experts)
    count_E = rows_YE.sum(0)
    dropped, skipped = int((expert_TK == DROPPED).sum()), int((expert_TK < 0).all(1).sum())
    # Which experts go together, here and from here to the next layer.
    per_token = float(count_E.sum()) / n_tokens  # K, where it is fixed
    token_E = count_E.double() / n_tokens
    together = onward = None
    if about.k > 1 and per_token > 1 and n_experts > 1:
        pair_EE = specialisation.pairs(expert_TK, expert_TK, n_experts, n_experts).fill_diagonal_(-1)
        # Of the K experts of a token K - 1 are others, and none of them is the expert itself.
        others = (per_token - 1) / per_token * n_experts / (n_experts - 1)
        together = partners(pair_EE, token_E, token_E * others, n_tokens)
    if n_after:
        next_TK = torch.from_numpy(routes.expert_TLK[:, i + 1].astype(np.int64))
        next_E = torch.bincount(next_TK[next_TK >= 0], minlength=n_after).double() / n_tokens
        onward = partners(specialisation.pairs(expert_TK, next_TK, n_experts, n_after), token_E, next_E, n_tokens)
    # How decided the router is. float16 has no more than three digits of a margin.
    margin_T, entropy_T = routes.margin_TL[:, i], routes.entropy_TL[:, i]
    scored = ~np.isnan(entropy_T)
    mean = lambda value_T: float(value_T[scored].mean()) if scored.any() else math.nan
    return LayerView(
        layer=about.layers[i],
        n_experts=n_experts,
        rows_YE=rows_YE.numpy(),
        metrics=metrics.layer_metrics(about.layers[i], count_E, dropped, skipped, n_tokens),
        starved=metrics.starved_experts(count_E),
        gini=metrics.gini(count_E),
        cv_squared=metrics.cv_squared(count_E),
        coverage_E=metrics.coverage(count_E).numpy(),
        entropy=mean(entropy_T) / math.log(n_experts) if n_experts > 1 else math.nan,
        margin=mean(margin_T),
        close=mean(margin_T < CLOSE),
        information=specialisation.information(rows_YE),
        taken=top_tokens(tokens.token, expert_TK, n_experts),
        predicted=top_tokens(tokens.next, expert_TK, n_experts),
        together=together,
        onward=onward,
        contexts_EC=contexts(expert_TK, n_experts, about.layers[i]),
        devices=devices(count_E),
        distinct=[(n, placement.distinct_experts(expert_TK[:DECODED], n)) for n in BATCHES if n <= n_tokens],
    )


def partners(pair_EE: torch.Tensor, token_E: torch.Tensor, chance_E: torch.Tensor, n_tokens: int) -> Partners:
    """Of how many tokens take expert i and, elsewhere, expert j, (E, E'), negative for no pair: each expert's partners.
    `token_E` is the share of the tokens that take i, `chance_E` the share of the tokens that would take j if it had
    nothing to do with i."""
    expected_EE = n_tokens * token_E[:, None] * chance_E[None]
    # Pairs that chance has less than once are no evidence, either way.
    known_EE = (pair_EE >= 0) & ((expected_EE >= 1) | (pair_EE >= TAKEN))
    ratio_EE = torch.where(known_EE, pair_EE / expected_EE.clamp_min(1e-9), -1.0)
    kept = pair_EE.shape[1] if pair_EE.shape[1] <= MATRIX else PARTNERS
    ratio_EN, expert_EN = ratio_EE.sort(dim=1, descending=True, stable=True)
    known_EN = ratio_EN[:, :kept] >= 0
    expert_EN = torch.where(known_EN, expert_EN[:, :kept], -1)
    return Partners(expert_EN.numpy().astype(np.int32), ratio_EN[:, :kept].clamp_min(0).numpy().astype(np.float32))


def top_tokens(key_T: np.ndarray, expert_TK: torch.Tensor, n_experts: int) -> Top:
    """Every expert's tokens with the highest lift, of those that are common enough."""
    key_M, index_T, count_M = np.unique(key_T, return_inverse=True, return_counts=True)
    # Of the common ones the most frequent, as their own numbers; the rest is one number more.
    common = np.argsort(-count_M, kind="stable")[:KEYS]
    common = common[(count_M[common] >= COMMON) & (key_M[common] >= 0)]  # of a record a token may be unknown
    number_M = np.full(len(key_M), len(common))
    number_M[common] = np.arange(len(common))
    rows_ME = specialisation.count_by(torch.from_numpy(number_M[index_T]), expert_TK, len(common) + 1, n_experts)
    lift_ME = torch.where(rows_ME >= TAKEN, specialisation.lift(rows_ME), -1.0)[:-1]
    # The best, where there are as many that the expert prefers at all.
    lift_EM, order_EM = lift_ME.T.sort(dim=1, descending=True, stable=True)
    short = max(0, TOP - lift_EM.shape[1])
    lift_EM = torch.nn.functional.pad(lift_EM, (0, short), value=-1.0)[:, :TOP]
    order_EM = torch.nn.functional.pad(order_EM, (0, short))[:, :TOP]
    preferred_EM = (lift_EM > 1).numpy()
    token_EM = np.where(preferred_EM, key_M[common[order_EM.numpy()]] if len(common) else -1, -1)
    rows_EM = np.where(preferred_EM, rows_ME.T.gather(1, order_EM).numpy(), 0)
    return Top(token_EM.astype(np.int32), rows_EM.astype(np.int32), lift_EM.numpy().astype(np.float32))


def contexts(expert_TK: torch.Tensor, n_experts: int, seed: int) -> np.ndarray:
    """Rows of tokens that stand for each expert, (E, CONTEXTS): drawn at random of those it takes, not the ones that
    look best; -1 where there are fewer."""
    taken_TK = expert_TK.numpy()
    row_N, slot_N = np.nonzero(taken_TK >= 0)
    shuffled_N = np.random.default_rng(seed).permutation(len(row_N))
    taker_N, row_N = taken_TK[row_N, slot_N][shuffled_N], row_N[shuffled_N]
    # By expert, in the order drawn: the first few of each.
    order_N = np.argsort(taker_N, kind="stable")
    first_E = np.searchsorted(taker_N[order_N], np.arange(n_experts))
    context_EC = np.full((n_experts, CONTEXTS), -1)
    for e in range(n_experts):
        rows_C = [row for row in order_N[first_E[e] : first_E[e] + CONTEXTS] if taker_N[row] == e]
        context_EC[e, : len(rows_C)] = row_N[rows_C]
    return context_EC


def devices(count_E: torch.Tensor) -> list[tuple[int, float, float]]:
    """(devices, imbalance, imbalance with a copy per device besides), for every degree that divides the experts."""
    return [
        (
            n,
            placement.imbalance(placement.device_load(count_E, n)),
            placement.imbalance(placement.replicated_load(count_E, n, n)),
        )
        for n in DEVICES
        if len(count_E) % n == 0
    ]
