"""What routing became between two models of one shape, as before and after fine-tuning: which tokens go elsewhere, how
loads and specialisation moved, and whether the routers or the states they read are to blame.

Both models read the same tokens. A layer's router R reads states z. What is seen is R_before(z_before) against
R_after(z_after); each model's router is also asked about the other's states, in every layer by itself:

by states   R_before(z_before) against R_before(z_after): the model after, with the router of before put back here
by router   R_before(z_before) against R_after(z_before): the model before, with the router of after

The two need not add up to what is seen: a token may flip by either alone, by both together only, or be turned back.
States differ by whatever lies below a layer, routers that sent tokens elsewhere included: what `by states` has is not
the doing of attention or experts alone.

Letters beyond the glossary: Y domains, U units that are resampled, Q quantities.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.analysis import metrics
from moe.analysis.decisions import flipped, kept
from moe.analysis.effects import FEW, ratios
from moe.analysis.significance import intervals, of_tokens
from moe.analysis.specialisation import count_by, permuted_information
from moe.analysis.stability import check, experts_of, routes
from moe.analysis.windows import Windows
from moe.config.model import layer_moe, moe_layers
from moe.errors import BadInput
from moe.model.transformer import Transformer


class Interval(NamedTuple):
    """A share with its 95% interval over documents or windows, within 0 to 1, which is all of it where there is one."""

    value: float
    low: float
    high: float


class Bits(NamedTuple):
    """What a routed row's expert tells of its domain, in bits."""

    value: float
    low: float  # over documents, without what few of them inform by chance
    high: float
    chance: float  # the mean under documents' labels that are dealt anew


class Routed(NamedTuple):
    """How one of the two models routes the tokens."""

    max_vio: float
    effective_experts: float
    dead: int
    share_E: list[float]  # of the tokens that take each expert
    bits: Bits | None  # of all of the text alone; None too where no two domains have two documents


@dataclass(frozen=True)
class Rerouted:
    """One MoE layer, in all of the text or in a domain of it."""

    layer: int  # among all layers
    domain: str | None  # None: all of the text
    tokens: int
    flips: Interval  # share of the tokens that have another set of experts
    changed: Interval  # mean share of a token's experts of before that it lost
    chance_flips: float  # the same two if the choices of after were dealt to other tokens of this row
    chance_changed: float
    by_states: Interval | None  # flips through the states alone, and through the router alone; None where tokens pass
    by_router: Interval | None  # the layer by (Mixture-of-Depths)
    before: Routed
    after: Routed
    unit: str  # what was resampled: documents | windows
    units: int


class Places(NamedTuple):
    """Where the tokens stand, (T,)."""

    domain_T: np.ndarray
    doc_T: np.ndarray
    window_T: np.ndarray

    @property
    def unit(self) -> str:
        """What is resampled: documents, whose tokens are alike, or windows where there are few documents."""
        return "documents" if len(np.unique(self.doc_T)) >= FEW else "windows"

    def at(self, mask_T: np.ndarray) -> "Places":
        """Those of the tokens in a mask."""
        return Places(*(column_T[mask_T] for column_T in self))


def compare(before: Transformer, after: Transformer, windows: Windows) -> list[Rerouted]:
    """A row for all of the text and one for each domain, layer by layer. Raises `BadInput` for two models that are not
    alike, dense ones and soft routers (`check_alike`)."""
    check_alike(before, after)
    parts, n_windows = [], 0
    for _, domain_BS, doc_BS, *_ in windows:
        window_BS = np.repeat(np.arange(n_windows, n_windows + len(doc_BS))[:, None], doc_BS.shape[1], 1)
        parts.append([column.ravel().astype(np.int64) for column in (domain_BS, doc_BS, window_BS)])
        n_windows += len(doc_BS)
    places = Places(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    with asking(before, after) as after_asked:
        before_L = routes(before, windows)
    with asking(after, before) as before_asked:
        after_L = routes(after, windows)
    rows = []
    for i, layer in enumerate(moe_layers(before.cfg)):
        asked = None
        if before.depths()[i] is after.depths()[i] is None:
            asked = torch.cat(before_asked[i]), torch.cat(after_asked[i])
        n_experts = n_experts_of(before)[i]
        rows += of_layer(layer, n_experts, before_L[i], after_L[i], asked, places, windows.domains)
    return rows


def check_alike(before: Transformer, after: Transformer) -> None:
    """Raise `BadInput` for models whose choices cannot be compared expert by expert, or that have none."""
    for model in (before, after):
        check(model)
    told = [
        ("MoE layers", moe_layers(before.cfg), moe_layers(after.cfg)),
        ("experts by MoE layer", n_experts_of(before), n_experts_of(after)),
        ("K by MoE layer", *([layer_moe(m.cfg, layer).k for layer in moe_layers(m.cfg)] for m in (before, after))),
        ("d_model", before.cfg.d_model, after.cfg.d_model),
        ("router", before.router.name, after.router.name),
    ]
    for name, of_before, of_after in told:
        if of_before != of_after:
            raise BadInput(
                f"the two models differ in {name}, {of_before} before and {of_after} after: accepted are two of one "
                "shape, such as a run and one whose source it is."
            )


def n_experts_of(model: Transformer) -> list[int]:
    """Experts of every MoE layer, null, copy and constant ones too."""
    moes = [layer_moe(model.cfg, layer) for layer in moe_layers(model.cfg)]
    return [moe.n_experts + moe.n_cheap for moe in moes]


@contextmanager
def asking(model: Transformer, other: Transformer) -> Iterator[list[list[Tensor]]]:
    """While inside, whatever the routers of `model` are asked, those of `other` are asked too: by MoE layer their
    experts, (T, K) for every pass."""
    routers, calls = other.routers(), itertools.count()
    said: list[list[Tensor]] = [[] for _ in routers]

    def ask(router: Any, given: tuple[Any, ...], decided: Any) -> None:
        i = next(calls) % len(routers)
        said[i].append(experts_of(routers[i].forward(*given), len(given[0]), routers[i].n_experts))  # type: ignore[arg-type]

    # A router that layers share is called once for each.
    hooks = [router.register_forward_hook(ask) for router in dict.fromkeys(model.routers())]
    try:
        yield said
    finally:
        for hook in hooks:
            hook.remove()


def of_layer(
    layer: int,
    n_experts: int,
    before_TK: Tensor,
    after_TK: Tensor,
    asked: tuple[Tensor, Tensor] | None,
    places: Places,
    domains: Sequence[str],
) -> list[Rerouted]:
    """The rows of one layer from the experts of its tokens; `asked` are the router of before on the states of after,
    and the reverse. Domains without tokens have no row."""
    moved_TK = [after_TK, *(asked or ())]
    flipped_QT = np.stack([flipped(before_TK, other_TK).numpy() for other_TK in moved_TK])
    lost_T = 1 - kept(before_TK, after_TK).numpy()
    rows = []
    for y, domain in enumerate([None, *domains]):
        mask_T = np.ones(len(lost_T), bool) if domain is None else places.domain_T == y - 1
        if not mask_T.any():
            continue
        part, choices = places.at(mask_T), (before_TK[mask_T], after_TK[mask_T])
        unit_T = part.doc_T if places.unit == "documents" else part.window_T
        seen, *alone = means(unit_T, flipped_QT[:, mask_T])
        had_T = ~np.isnan(lost_T[mask_T])  # experts before
        (changed,) = means(unit_T[had_T], lost_T[mask_T][None, had_T])
        rows.append(
            Rerouted(
                layer=layer,
                domain=domain,
                tokens=int(mask_T.sum()),
                flips=seen,
                changed=changed,
                chance_flips=dealt_flips(*choices),
                chance_changed=dealt_changed(*choices, n_experts),
                by_states=alone[0] if asked else None,
                by_router=alone[1] if asked else None,
                before=routed(choices[0], n_experts, part, 0 if domain else len(domains)),
                after=routed(choices[1], n_experts, part, 0 if domain else len(domains)),
                unit=places.unit,
                units=len(np.unique(unit_T)),
            )
        )
    return rows


def means(unit_T: np.ndarray, value_QT: np.ndarray) -> list[Interval]:
    """Means over tokens with their intervals over units (`ratios`), of values from 0 to 1; NaN of no tokens."""
    if not len(unit_T):
        return [Interval(math.nan, math.nan, math.nan)] * len(value_QT)
    _, unit_T, count_U = np.unique(unit_T, return_inverse=True, return_counts=True)
    sum_QU = np.stack([np.bincount(unit_T, value_T) for value_T in value_QT])
    value_Q, *ends = ratios(sum_QU, count_U)
    return [Interval(*map(float, of)) for of in zip(value_Q, *(end_Q.clip(0, 1) for end_Q in ends), strict=True)]


def dealt_flips(before_TK: Tensor, after_TK: Tensor) -> float:
    """Share of flips if the sets of after were dealt to the tokens at random, in the mean over all deals: the chance
    that sets of two tokens, one of each choice, differ."""
    sets_NK = torch.cat([choice_TK.sort(-1).values for choice_TK in (before_TK, after_TK)]).numpy()
    _, set_N = np.unique(sets_NK, axis=0, return_inverse=True)
    share = lambda set_T: np.bincount(set_T, minlength=set_N.max() + 1) / len(before_TK)
    return float(1 - share(set_N.ravel()[: len(before_TK)]) @ share(set_N.ravel()[len(before_TK) :]))


def dealt_changed(before_TK: Tensor, after_TK: Tensor, n_experts: int) -> float:
    """1 − `agreement` in the mean over the same deals; 1 − K / E where loads are even. NaN where no token of before has
    an expert."""
    load_E = share_of_tokens(after_TK, n_experts)
    taken_TK = before_TK >= 0
    found_T = (load_E[before_TK.long().clamp_min(0)] * taken_TK).sum(-1) / taken_TK.sum(-1)
    return 1 - found_T.nanmean().item()


def share_of_tokens(expert_TK: Tensor, n_experts: int) -> Tensor:
    """Of the tokens, how many take each expert, (E,) float64."""
    count_E = torch.bincount(expert_TK[expert_TK >= 0].long(), minlength=n_experts)
    return count_E.double() / max(1, len(expert_TK))


def routed(expert_TK: Tensor, n_experts: int, places: Places, n_domains: int) -> Routed:
    """How the tokens are routed; `n_domains` 0: without asking what experts tell of domains."""
    count_E = count_by(torch.zeros(len(expert_TK)), expert_TK, 1, n_experts)[0]
    return Routed(
        max_vio=metrics.max_violation(count_E),
        effective_experts=metrics.effective_experts(count_E),
        dead=metrics.dead_experts(count_E),
        share_E=share_of_tokens(expert_TK, n_experts).tolist(),
        bits=informed(expert_TK, n_experts, places, n_domains),
    )


def informed(expert_TK: Tensor, n_experts: int, places: Places, n_domains: int) -> Bits | None:
    """What experts tell of domains, or None where no two domains have two documents."""
    docs = of_tokens(places.doc_T, places.domain_T, expert_TK[:, None].numpy().astype(np.int64), n_experts)
    if not n_domains or (np.bincount(docs.domain_D) >= 2).sum() < 2:
        return None
    (value,), (low,), (high,) = intervals(docs, expert_TK.shape[1], n_domains).information
    dealt_R = permuted_information(torch.from_numpy(docs.rows_DLE[:, 0]), torch.from_numpy(docs.domain_D), n_domains)
    return Bits(float(value), float(low), float(high), float(dealt_R.mean()))
