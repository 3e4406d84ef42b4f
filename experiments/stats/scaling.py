"""Scaling laws: forms from the papers, fitted to the final losses of runs of many sizes.

A form is linear in its coefficients once its exponents are known. So the exponents alone are searched for, from every
point of a grid, and the coefficients solved for each time (variable projection, Golub and Pereyra 1973), all of them at
least 0; the best few points are then improved by a least-squares solver with a loss that outliers hardly move. A fit
that does not leave the grid, or ends at a bound, is `stuck` and said to be.

Letters beyond the glossary: N active parameters · G granularity · R runs · P exponents · C coefficients.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from moe.errors import BadInput

Array = NDArray[np.float64]
STARTS = 6  # grid points that are improved
NOISE = 0.01  # nats: residuals beyond it count less and less
WIDE = 4.0  # a positive parameter whose interval spans more than this factor is not identified


@dataclass(frozen=True)
class Record:
    """A finished run, as a scaling law sees it."""

    arm: str  # the same for runs that only a seed tells apart
    seed: int
    active: int  # parameters
    total: int
    experts: int  # E; 1 for a dense model
    granularity: float  # d_ff of the dense model over the width of an expert; 1 for a dense model
    tokens: int  # trained on
    flops: float  # of all the training
    loss: float  # nats per token


class Form(NamedTuple):
    """A law: what its coefficients stand before, given exponents, and where those are searched."""

    paper: str
    exponents: tuple[str, ...]
    coefficients: tuple[str, ...]
    columns: Callable[[Sequence[Record], Array], Array]  # (R runs, P exponents) -> (R, C)
    grid: tuple[tuple[float, ...], ...]  # starting values of each exponent
    bounds: tuple[tuple[float, float], ...]
    logarithmic: bool = False  # the logarithm of the loss is what is linear, with coefficients of either sign


def _of(records: Sequence[Record], name: str) -> Array:
    return np.array([getattr(record, name) for record in records], float)


def _chinchilla(records: Sequence[Record], exponents_P: Array) -> Array:
    alpha, beta = exponents_P
    n, d = _of(records, "active"), _of(records, "tokens")
    return np.stack([np.ones_like(n), n**-alpha, d**-beta], 1)


def _granularity(records: Sequence[Record], exponents_P: Array) -> Array:
    alpha, beta, gamma = exponents_P
    n, d, g = (_of(records, name) for name in ("active", "tokens", "granularity"))
    return np.stack([np.ones_like(n), n**-alpha, g**-gamma * n**-alpha, d**-beta], 1)


def _joint(records: Sequence[Record], exponents_P: Array) -> Array:
    alpha, beta, delta, omega = exponents_P
    n, d, e = (_of(records, name) for name in ("active", "tokens", "experts"))
    return np.stack([np.ones_like(n), e**-delta * n**-alpha, e**omega * d**-beta], 1)


def _routed(records: Sequence[Record], exponents_P: Array) -> Array:
    start, most = np.exp(exponents_P)
    n, e = np.log(_of(records, "active")), _of(records, "experts")
    saturated = np.log(1 / (1 / (e - 1 + 1 / (1 / start - 1 / (start + most))) + 1 / (start + most)))
    return np.stack([np.ones_like(n), n, saturated, n * saturated], 1)


_RATES = (0.15, 0.3, 0.5, 0.8)
_RATE = (0.01, 2.0)
FORMS = {
    "chinchilla": Form(
        "2203.15556, on active parameters: c + a/N^alpha + b/D^beta",
        ("alpha", "beta"), ("c", "a", "b"), _chinchilla, (_RATES, _RATES), (_RATE, _RATE),
    ),
    "granularity": Form(
        "2402.07871: c + (a + g/G^gamma)/N^alpha + b/D^beta",
        ("alpha", "beta", "gamma"), ("c", "a", "g", "b"), _granularity, (_RATES, _RATES, (0.3, 0.6, 1.0)), (_RATE,) * 3,
    ),
    "joint": Form(
        "2502.05172, without its interactions: c + a/(E^delta N^alpha) + b E^omega/D^beta",
        ("alpha", "beta", "delta", "omega"), ("c", "a", "b"), _joint,
        (_RATES, _RATES, (0.05, 0.2, 0.5), (0.0, 0.1)), (_RATE, _RATE, (0.0, 2.0), (-1.0, 1.0)),
    ),
    "routed": Form(
        "2202.01169, at equal tokens: ln L = a ln N + b ln E' + c ln N ln E' + d, E' saturating",
        ("ln E_start", "ln E_max"), ("d", "a", "b", "c"), _routed, ((0.1, 1.0), (3.0, 5.0)), ((0.01, 3.0), (1.0, 9.0)),
        True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A form's parameters, and how well they fit."""

    form: str
    parameters: dict[str, float]  # exponents, then coefficients
    rms: float  # root mean square of what is left, nats
    stuck: str  # why the search is not to be trusted; "" where it ended by itself
    start: tuple[float, ...]  # the exponents it came from

    def predict(self, records: Sequence[Record]) -> Array:
        """The loss (nats per token) of runs of these sizes, (R,)."""
        form = FORMS[self.form]
        exponents_P = np.array([self.parameters[name] for name in form.exponents])
        values_R = form.columns(records, exponents_P) @ [self.parameters[name] for name in form.coefficients]
        return np.exp(values_R) if form.logarithmic else values_R


def check(records: Sequence[Record], name: str) -> None:
    """Refuse records that cannot say anything of a form. Raises `BadInput`."""
    form = FORMS[name]
    for record in records:
        if not math.isfinite(record.loss):
            raise BadInput(f"the loss of {record.arm}, seed {record.seed}, is not finite: leave that run out.")
        for what in ("active", "experts", "granularity", "tokens", "flops", "loss"):
            if not 0 < getattr(record, what) < math.inf:
                value = getattr(record, what)
                raise BadInput(f"{what}={value:g} of {record.arm}, seed {record.seed}, must be a number above 0.")
    tokens = [record.tokens for record in records]
    if form.logarithmic and tokens and max(tokens) > 1.1 * min(tokens):
        raise BadInput(
            f"the form {name} is of runs with equal tokens; here they have {min(tokens):,} to {max(tokens):,}."
        )
    needed = len(form.exponents) + len(form.coefficients) + 1
    sizes = len({(record.active, record.experts, record.tokens) for record in records})
    if sizes < needed:
        raise BadInput(
            f"the form {name} has {needed - 1} parameters, and needs runs of {needed} sizes; here are {sizes}."
        )
    told = {"granularity": ("active", "tokens", "granularity"), "joint": ("active", "tokens", "experts")}
    for what in ("active", "experts") if form.logarithmic else told.get(name, ("active", "tokens")):
        if len({getattr(record, what) for record in records}) < 2:
            raise BadInput(f"the form {name} needs runs with different numbers of {what}; all have the same.")


def fit(records: Sequence[Record], name: str, starts: Sequence[tuple[float, ...]] | None = None) -> Fit:
    """The best fit of a form, from all points of its grid or from these `starts`. Raises `BadInput` as `check`."""
    check(records, name)
    form = FORMS[name]
    loss_R = _of(records, "loss")
    target_R = np.log(loss_R) if form.logarithmic else loss_R
    scale = NOISE / float(loss_R.mean()) if form.logarithmic else NOISE
    low, high = (np.array(side) for side in zip(*form.bounds, strict=True))

    def residuals(exponents_P: Array) -> Array:
        columns = form.columns(records, exponents_P)
        return columns @ solve(columns, target_R, form.logarithmic) - target_R

    # The best points of the grid, then each improved.
    points = list(starts or itertools.product(*form.grid))
    cost = lambda point: float(np.square(residuals(np.array(point))).sum())
    best: tuple[float, Array, tuple[float, ...]] | None = None
    for point in sorted(points, key=cost)[:STARTS]:
        inside = np.clip(point, low + 1e-9, high - 1e-9)
        done = scipy.optimize.least_squares(residuals, inside, bounds=(low, high), loss="soft_l1", f_scale=scale)
        if best is None or done.cost < best[0]:
            best = done.cost, done.x, tuple(point)
    assert best is not None, "a form has a grid"
    _, exponents_P, start = best
    columns = form.columns(records, exponents_P)
    values = [*exponents_P, *solve(columns, target_R, form.logarithmic)]
    parameters = dict(zip((*form.exponents, *form.coefficients), map(float, values), strict=True))
    stuck = why_stuck(exponents_P, start, low, high, form.exponents)
    fitted = Fit(name, parameters, 0.0, stuck, start)
    rms = float(np.sqrt(np.mean(np.square(fitted.predict(records) - loss_R))))
    return replace(fitted, rms=rms)


def solve(columns: Array, target_R: Array, either_sign: bool) -> Array:
    """The coefficients (C,) of columns (R, C) that fit best: at least 0 each, unless they may have either sign."""
    size_C = np.maximum(np.abs(columns).max(0), 1e-300)  # columns differ by powers of ten
    if either_sign:
        return np.asarray(np.linalg.lstsq(columns / size_C, target_R, rcond=None)[0] / size_C)
    return np.asarray(scipy.optimize.nnls(columns / size_C, target_R)[0] / size_C)


def why_stuck(exponents_P: Array, start: tuple[float, ...], low: Array, high: Array, names: Sequence[str]) -> str:
    """Why a search is not to be trusted, in words; "" where it is."""
    for name, value, least, most in zip(names, exponents_P, low, high, strict=True):
        if min(value - least, most - value) < 1e-4 * (most - least):
            return f"{name} ended at its bound, {value:.3g}"
    if np.abs(exponents_P - np.array(start)).max() < 1e-6:
        return "it never left its starting grid"
    return ""


@dataclass(frozen=True)
class Estimate:
    """A parameter, its 95% interval over resampled runs, and whether the runs tell it at all."""

    value: float
    low: float
    high: float
    identified: bool
    draws: int = 0  # resamples that the interval is of: those with too few sizes say nothing


def estimates(records: Sequence[Record], fitted: Fit, resamples: int = 200, seed: int = 0) -> dict[str, Estimate]:
    """Every parameter with its interval: arms are drawn again with replacement, and of each as many seeds as it has.
    Percentiles; a parameter that spans more than a factor of `WIDE`, or reaches 0, is not identified."""
    generator = np.random.default_rng(seed)
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record.arm, []).append(record)
    names, form = list(arms), FORMS[fitted.form]
    start = tuple(fitted.parameters[name] for name in form.exponents)
    drawn: dict[str, list[float]] = {name: [] for name in fitted.parameters}
    for _ in range(resamples):
        sample = [
            arms[name][i]
            for name in generator.choice(names, len(names))
            for i in generator.integers(0, len(arms[name]), len(arms[name]))
        ]
        try:
            again = fit(sample, fitted.form, [start])
        except BadInput:  # a draw of too few sizes
            continue
        for name, value in again.parameters.items():
            drawn[name].append(value)
    told = {}
    for name, values in drawn.items():
        low, high = (float(bound) for bound in np.quantile(values, [0.025, 0.975]))
        one_sign = low * high > 0
        identified = one_sign and max(abs(low), abs(high)) <= WIDE * min(abs(low), abs(high))
        told[name] = Estimate(fitted.parameters[name], low, high, identified, len(values))
    return told


class HeldOut(NamedTuple):
    """The largest runs, left out of a fit and predicted by it."""

    arm: str
    loss: float  # the mean over seeds
    predicted: float
    deviation: float | None  # of the seeds; None for one


def held_out(records: Sequence[Record], name: str) -> HeldOut:
    """How well the rest predicts the largest model of the largest budget, whose other sizes stay in the fit. Raises
    `BadInput` as `check`."""
    most = max(record.flops for record in records)
    budget = [record for record in records if record.flops > 0.99 * most]  # steps are whole, so FLOPs differ a little
    largest = max(budget, key=lambda record: (record.active, record.total)).arm
    left = [record for record in records if record.arm == largest]
    fitted = fit([record for record in records if record.arm != largest], name)
    losses = [record.loss for record in left]
    deviation = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
    return HeldOut(largest, float(np.mean(losses)), float(fitted.predict(left[:1])[0]), deviation)
