"""What an intervention costs: the loss of every token with and without it, with intervals over documents.

Differences are paired: the same tokens, after minus before, in nats; above 0 the model got worse. Every interval is of
the texts that are like these, with this one model.

Letters beyond the glossary: U units that are resampled, R resamples, Q variants, Y domains.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from moe.analysis.interventions import Block, Change, Window, check, intervene, remember, resume
from moe.analysis.specialisation import count_by
from moe.analysis.trace import padded
from moe.config.model import layer_moe, moe_layers
from moe.convert.quantize import Rounding, rounded
from moe.errors import BadInput
from moe.model.layer import MoELayer
from moe.model.transformer import Transformer, next_token_loss
from moe.routing.contract import UNUSED

CONFIDENCE = 0.95
RESAMPLES = 2000
FEW = 10  # documents below which windows are resampled
HURT = 10  # tokens that are named
DRAWS = 3  # of random experts
CELLS = 2**24  # units of several resamples at a time


class Variant(NamedTuple):
    """One way to route or to compute otherwise."""

    what: str
    changes: Sequence[Change] = ()
    expert_TLK: np.ndarray | None = None  # recorded experts of all the text, as a trace has them
    rounding: Rounding | None = None  # weights of fewer bits, instead of another routing


class Difference(NamedTuple):
    """Of some tokens the mean loss before and after, in nats; their difference with its 95% interval, infinite where
    there is a single unit."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    tokens: int
    units: int  # documents or windows, as `Effect.unit` says


class Hurt(NamedTuple):
    """A token whose loss rose."""

    window: int
    place: int  # in the window
    read: int  # the token that was read, by its id
    next: int  # the token that was to be predicted
    domain: str
    before: float
    after: float


@dataclass(frozen=True)
class Effect:
    """What a variant does to the loss."""

    what: str
    changes: list[Change]
    unit: str  # what was resampled: documents | windows
    total: Difference
    domains: dict[str, Difference]
    hurt: list[Hurt]  # the tokens whose loss rose most, of different pairs of read and predicted token


@dataclass(frozen=True)
class Losses:
    """The loss of every token, (T,), in the order of the text: as the model is, and under every variant."""

    domains: list[str]
    read_T: np.ndarray
    next_T: np.ndarray
    domain_T: np.ndarray
    doc_T: np.ndarray
    window_T: np.ndarray
    place_T: np.ndarray
    before_T: np.ndarray
    after_QT: np.ndarray

    @property
    def unit(self) -> str:
        """What is resampled: documents, whose tokens are alike, or windows where there are few documents."""
        return "documents" if len(np.unique(self.doc_T)) >= FEW else "windows"

    @property
    def unit_T(self) -> np.ndarray:
        """Every token's unit."""
        return self.doc_T if self.unit == "documents" else self.window_T


@torch.inference_mode()
def measure(model: Transformer, windows: Iterable[Window], domains: list[str], variants: Sequence[Variant]) -> Losses:
    """Run the text as the model is and under every variant. A variant costs the blocks from its first changed layer on;
    memory holds a float32 per token and variant. Raises `BadInput` for what `check` refuses."""
    for variant in variants:
        if not variant.rounding:
            check(model, variant.changes)
    device = next(model.parameters()).device
    parts, n_tokens, n_windows = [], 0, 0
    for read_BS1, domain_BS, doc_BS, *_ in windows:
        tokens_BS, targets_BS = (torch.from_numpy(part).to(device) for part in (read_BS1[:, :-1], read_BS1[:, 1:]))
        with remember(model) as blocks:
            before_BS = _losses(model, tokens_BS, targets_BS)
        after_QBS = [_losses(model, tokens_BS, targets_BS, blocks, variant, n_tokens) for variant in variants]
        # Columns of this batch.
        b, s = tokens_BS.shape
        window_BS = np.repeat(np.arange(n_windows, n_windows + b)[:, None], s, 1)
        place_BS = np.tile(np.arange(s), (b, 1))
        columns = (read_BS1[:, :-1], read_BS1[:, 1:], domain_BS, doc_BS, window_BS, place_BS, before_BS)
        after_QT = np.stack(after_QBS).reshape(len(variants), -1) if variants else np.empty((0, b * s), np.float32)
        parts.append((*(column.ravel() for column in columns), after_QT))
        n_tokens, n_windows = n_tokens + b * s, n_windows + b
    return Losses(domains, *(np.concatenate(column, -1) for column in zip(*parts, strict=True)))


def _losses(
    model: Transformer,
    tokens_BS: Tensor,
    targets_BS: Tensor,
    blocks: Sequence[Block] = (),
    variant: Variant = Variant("as it is"),  # noqa: B008 — immutable
    start: int = 0,
) -> np.ndarray:
    """(B, S) float32 of one pass; `start` is the batch's first token in the text."""
    layers, recorded = moe_layers(model.cfg), None
    first = min((change.layer for change in variant.changes), default=0)
    if variant.expert_TLK is not None:
        first = layers[0]
        expert_TLK = torch.from_numpy(variant.expert_TLK[start : start + tokens_BS.numel()].astype(np.int64))
        recorded = [_recorded(expert_TLK[:, i], blocks[layer]) for i, layer in enumerate(layers)]
    changed = intervene(model, variant.changes)
    if variant.rounding:
        changed, first = rounded(model, variant.rounding), variant.rounding.first
    with changed, resume(model, blocks, first):
        logits_BSV = model(tokens_BS, recorded=recorded).logits_BSV
    return next_token_loss(logits_BSV, targets_BS, reduction="none").float().cpu().numpy()


def _recorded(expert_TK: Tensor, block: Block) -> Tensor:
    """A layer's recorded experts in the shape of its own routing. Raises `BadInput` where they have none."""
    routing = block[1]
    assert routing is not None, "an MoE layer gives a routing"
    if routing.token_N is not None:
        raise BadInput("replay: experts choose tokens in this model, and a token has no K experts to replay.")
    width = routing.expert.shape[1]
    if (expert_TK[:, width:] >= 0).any():
        raise BadInput(f"replay: a token of the record has more experts than the {width} that its router names.")
    short = max(0, width - expert_TK.shape[1])
    return nn.functional.pad(expert_TK[:, :width], (0, short), value=UNUSED).to(routing.expert.device)


def effects(losses: Losses, variants: Sequence[Variant], hurt: int = HURT) -> list[Effect]:
    """What every variant of `measure` does to the loss, in all and by domain, with the `hurt` most hurt tokens."""
    rows = [(_all(losses), "")] + [(losses.domain_T == y, name) for y, name in enumerate(losses.domains)]
    columns = [(name, differences(losses, mask_T)) for mask_T, name in rows if mask_T.any()]
    told = []
    for q, variant in enumerate(variants):
        by_domain = {name: column[q] for name, column in columns if name}
        worst = most_hurt(losses, q, hurt)
        told.append(Effect(variant.what, list(variant.changes), losses.unit, columns[0][1][q], by_domain, worst))
    return told


def _all(losses: Losses) -> np.ndarray:
    return np.ones(len(losses.before_T), bool)


def differences(losses: Losses, mask_T: np.ndarray) -> list[Difference]:
    """Of the tokens in the mask, every variant's difference: the mean over tokens, with its interval (`ratios`)."""
    unit_T, before_T, after_QT = losses.unit_T[mask_T], losses.before_T[mask_T], losses.after_QT[:, mask_T]
    _, unit_T, count_U = np.unique(unit_T, return_inverse=True, return_counts=True)
    n, n_tokens = len(count_U), len(unit_T)
    sums = lambda value_T: np.bincount(unit_T, value_T, minlength=n)
    before = float(before_T.mean(dtype=np.float64))
    risen_QU = np.stack([sums(after_T.astype(np.float64) - before_T) for after_T in after_QT])
    mean_Q, low_Q, high_Q = ratios(risen_QU, count_U)
    return [
        Difference(before, before + mean, mean, low, high, n_tokens, n)
        for mean, low, high in zip(mean_Q.tolist(), low_Q.tolist(), high_Q.tolist(), strict=True)
    ]


def ratios(sum_QU: np.ndarray, count_U: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over counts with a 95% bootstrap interval over units, (Q,) each: a unit, such as a document, is drawn with
    all that it has, 2000 times, and the ratio of sums is the statistic. With few units percentiles are too narrow, by
    what separates the normal from Student's t; they are widened by it (Hesterberg, 1411.5279, expanded percentiles).
    Infinite where there is a single unit, or a resample counts nothing."""
    n = len(count_U)
    value_Q = sum_QU.sum(1) / count_U.sum()
    low_Q, high_Q = value_Q - math.inf, value_Q + math.inf
    generator, at_once = np.random.default_rng(n), max(1, CELLS // n)
    if n == 1:
        return value_Q, low_Q, high_Q
    # Resamples, a part at a time: of many units their weights are large.
    sums, counts = [], []
    for start in range(0, RESAMPLES, at_once):
        weight_UR = generator.multinomial(n, [1 / n] * n, min(at_once, RESAMPLES - start)).T.astype(np.float64)
        sums.append(sum_QU @ weight_UR)
        counts.append(count_U @ weight_UR)
    count_R = np.concatenate(counts)
    if not count_R.all():
        return value_Q, low_Q, high_Q
    # Their percentiles, widened.
    deviation_QR = np.concatenate(sums, 1) / count_R - value_Q[:, None]
    tail = (1 + CONFIDENCE) / 2
    widen = scipy.stats.t.ppf(tail, n - 1) / scipy.stats.norm.ppf(tail) * math.sqrt(n / (n - 1))
    low_Q, high_Q = value_Q + widen * np.quantile(deviation_QR, [1 - tail, tail], axis=1)
    return value_Q, low_Q, high_Q


def most_hurt(losses: Losses, q: int, most: int) -> list[Hurt]:
    """The tokens whose loss rose most under variant q; of the same pair of read and predicted token the worst."""
    risen_T = losses.after_QT[q] - losses.before_T
    told: dict[tuple[int, int], Hurt] = {}
    for t in np.argsort(-risen_T, kind="stable"):
        if len(told) == most or risen_T[t] <= 0:
            break
        pair = int(losses.read_T[t]), int(losses.next_T[t])
        place = int(losses.window_T[t]), int(losses.place_T[t])
        domain, before, after = losses.domains[losses.domain_T[t]], losses.before_T[t], losses.after_QT[q, t]
        told.setdefault(pair, Hurt(*place, *pair, domain, float(before), float(after)))
    return list(told.values())


def every_expert(model: Transformer) -> list[Variant]:
    """A variant per expert of every MoE layer, in which no token can choose it: `effects` of them is each expert's
    importance (EMO, 2605.06663). L · E passes, each from the masked layer on. A router without scores loses the
    expert's rows instead. Experts that come alone in their layer are left out."""
    variants = []
    for router, number in zip(model.routers(), moe_layers(model.cfg), strict=True):
        layer: MoELayer = model.blocks[number].mlp  # type: ignore[assignment]
        kind = "mask" if hasattr(router, "logits") else "drop"
        for e in range(layer.n_with_cheap if layer.n_with_cheap > 1 else 0):
            variants.append(Variant(f"{kind} {number}:{e}", [Change(kind, number, [e])]))
    return variants


def every_rounding(model: Transformer, dtype: str, one_by_one: bool = False) -> list[Variant]:
    """Every matrix rounded to `dtype`; in a model with experts theirs alone, all at once; and, where it is asked for,
    each expert alone, from whose layer on the model is run again."""
    experts = {layer: list(range(layer_moe(model.cfg, layer).n_experts)) for layer in moe_layers(model.cfg)}
    told = {"every matrix": None} | ({"all experts": experts} if experts else {})
    if one_by_one:
        told |= {f"{layer}:{e}": {layer: [e]} for layer, numbers in experts.items() for e in numbers}
    return [Variant(f"{dtype} {what}", rounding=Rounding(dtype, of)) for what, of in told.items()]


def used(model: Transformer, windows: Iterable[Window], n_domains: int) -> list[np.ndarray]:
    """Rows of every MoE layer by domain and expert, (Y, E), of this text."""
    device = next(model.parameters()).device
    layers: list[MoELayer] = [model.blocks[number].mlp for number in moe_layers(model.cfg)]  # type: ignore[misc]
    rows = [np.zeros((n_domains, layer.n_with_cheap), np.int64) for layer in layers]
    for read_BS1, domain_BS, *_ in windows:
        with torch.inference_mode():
            routing = model(torch.from_numpy(read_BS1[:, :-1]).to(device)).routing
        domain_T = torch.from_numpy(domain_BS.ravel().astype(np.int64))
        for layer, report, row_YE in zip(layers, routing, rows, strict=True):
            report = report._replace(**{
                name: None if getattr(report, name) is None else getattr(report, name).cpu()
                for name in ("expert", "weight", "token_N")
            })  # fmt: skip
            expert_TK = padded(report, len(domain_T), layer.n_with_cheap)[0]
            row_YE += count_by(domain_T, expert_TK, n_domains, layer.n_with_cheap).numpy()
    return rows


def keep(model: Transformer, windows: Iterable[Window], domains: list[str], share: float) -> list[Effect]:
    """The effects of keeping a share of every layer's experts, at least one, and masking the others (EMO, 2605.06663,
    keeps 25% and 12.5%): the busiest over all the text; for every domain the busiest in that domain; and, to compare,
    `DRAWS` times as many at random. Where fewer than K are kept, tokens take fewer. The busiest are those of the text
    that the loss is measured on."""
    rows, layers = used(model, windows, len(domains)), moe_layers(model.cfg)
    rng = np.random.default_rng(0)

    def kept(what: str, score_LE: list[np.ndarray]) -> Variant:
        """The experts with the highest scores stay, of equal ones the lower."""
        order_LE = [np.argsort(-score_E, kind="stable") for score_E in score_LE]
        rest = [sorted(order_E[max(1, round(share * len(order_E))) :].tolist()) for order_E in order_LE]
        return Variant(what, [Change("mask", *pair) for pair in zip(layers, rest, strict=True) if pair[1]])

    # Every domain's own choice is measured on its own tokens: one variant, put together from as many.
    variants = [kept("by use", [row_YE.sum(0) for row_YE in rows])]
    variants += [kept(f"at random, draw {i}", [rng.random(len(row_YE.T)) for row_YE in rows]) for i in range(DRAWS)]
    own_Y = [kept(name, [row_YE[y] for row_YE in rows]) for y, name in enumerate(domains)]
    losses = measure(model, windows, domains, [*variants, *own_Y])
    own_T = losses.after_QT[len(variants) + losses.domain_T, np.arange(len(losses.domain_T))]
    variants.insert(1, Variant("by each domain's use"))
    after_QT = np.insert(losses.after_QT[: len(variants) - 1], 1, own_T, axis=0)
    return effects(dataclasses.replace(losses, after_QT=after_QT), variants)
