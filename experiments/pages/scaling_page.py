"""docs/scaling.md and its picture: what the fits of scaling laws say, and how far they can be trusted."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.pages.tables import markdown
from experiments.stats.scaling import FORMS, Estimate, Fit, Record, check, estimates, fit, held_out
from moe.errors import BadInput

HEADINGS = ("form", "parameter", "value", "95% over resampled runs", "")
FIT_HEADINGS = (
    "form", "runs", "left over (rms, nats)", "largest run left out", "its loss", "predicted", "off by",
    "seeds' deviation",
)  # fmt: skip
DRAWS = 200  # resamples that intervals are taken from
ROOT = Path(__file__).resolve().parent.parent.parent

INTRODUCTION = """# Scaling laws

Forms from the papers, fitted to runs of many sizes and lengths that this machine trains in seconds each. Exponents are
searched for from every point of a grid and coefficients solved for (`experiments/stats/scaling.py`); intervals come
from drawing arms, and of each its seeds, again. A parameter that spans more than a factor of 4 is *not identified*:
these runs do not tell it. The test of a law is the last columns: the largest model of the largest budget, left out and
predicted by all the others. The other sizes of that budget stay in the fit, so it is a step in size, not in FLOPs.

```sh
python -m experiments.scaling                                   # train what has no line yet, fit, write this page
python -m experiments.scaling train=false                       # the fits alone
```
"""


def page(records: Sequence[Record], commit: str | None, device: str, png: Path) -> str:
    """The whole page."""
    fits, lines, refused, draws = [], [], [], []
    for name in FORMS:
        try:
            fitted = fit(of_form(records, name), name)
            fits.append(fit_cells(records, fitted))
            told = estimates(of_form(records, name), fitted, DRAWS)
            lines += [(name, parameter, *estimate_cells(estimate)) for parameter, estimate in told.items()]
            draws.append(f"{name} {min(estimate.draws for estimate in told.values())}")
        except BadInput as bad:
            refused.append(f"- {name}: {bad}")
    forms = "\n".join(f"- **{name}**: {form.paper}" for name, form in FORMS.items())
    left = "\n".join(["\nNot fitted:\n", *refused, ""]) if refused else ""  # a table is one only after an empty line
    n_arms = len({record.arm for record in records})
    used = f"Draws out of {DRAWS} that had enough sizes, which the intervals are of: {', '.join(draws) or 'none'}."
    made = f"{len(records)} runs of {n_arms} sizes and lengths; {device}, commit {commit or 'unknown'}."
    picture = os.path.relpath(png if png.is_absolute() else ROOT / png, ROOT / "docs")
    return "\n".join(
        [INTRODUCTION, forms, left, markdown(FIT_HEADINGS, fits), markdown(HEADINGS, lines), used, "", made, "",
         f"![Loss over training FLOPs by size, and the Chinchilla fit]({picture})", ""]
    )  # fmt: skip


def not_fitted(records: Sequence[Record]) -> dict[str, str]:
    """Why, by form, of the forms that these runs cannot be fitted to."""
    reasons = {}
    for name in FORMS:
        try:
            check(of_form(records, name), name)
        except BadInput as bad:
            reasons[name] = str(bad)
    return reasons


def of_form(records: Sequence[Record], name: str) -> list[Record]:
    """The runs that a form is about: one number of experts where it has none, equal tokens where it has no D."""
    usual = most_common([record.experts for record in records])
    if name in ("chinchilla", "granularity"):
        return [record for record in records if record.experts == usual]
    return list(records)


def most_common(values: Sequence[int]) -> int:
    """The value that is there most often."""
    return max(set(values), key=lambda value: (values.count(value), -value))


def fit_cells(records: Sequence[Record], fitted: Fit) -> tuple[str, ...]:
    """How well a form fits, and predicts what it has not seen."""
    of = of_form(records, fitted.form)
    largest = held_out(of, fitted.form)
    deviation = "" if largest.deviation is None else f"{largest.deviation:.3f}"
    name = f"{fitted.form} (stuck: {fitted.stuck})" if fitted.stuck else fitted.form
    off = f"{largest.predicted - largest.loss:+.3f}".replace("-", "−")
    numbers = f"{fitted.rms:.3f}", largest.arm, f"{largest.loss:.3f}", f"{largest.predicted:.3f}", off, deviation
    return name, str(len(of)), *numbers


def estimate_cells(estimate: Estimate) -> tuple[str, str, str]:
    """Value, interval, and whether the runs tell it."""
    said = "" if estimate.identified else "not identified"
    return f"{estimate.value:.3g}", f"{estimate.low:.3g} to {estimate.high:.3g}", said


def picture(records: Sequence[Record], path: Path) -> bool:
    """Draw loss over FLOPs by size with the Chinchilla fit; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    usual = of_form(records, "chinchilla")
    try:
        fitted = fit(usual, "chinchilla")
    except BadInput:
        return False
    # A colour for each size: its runs, and the fit along the budgets that they had.
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
    for i, active in enumerate(sorted({record.active for record in usual})):
        mine = sorted((record for record in usual if record.active == active), key=lambda record: record.flops)
        flops = np.array([record.flops for record in mine])
        axes.plot(flops, [record.loss for record in mine], "o", color=colours[i % len(colours)], label=f"{active:,}")
        per_token = mine[0].flops / mine[0].tokens
        along = np.geomspace(flops.min(), flops.max(), 40)
        line = [Record("", 0, active, active, usual[0].experts, 1.0, int(f / per_token), f, 0.0) for f in along]
        style = "x" if flops.max() < 1.01 * flops.min() else "-"  # one budget is a point of the fit, not a line
        axes.plot(along, fitted.predict(line), style, color=colours[i % len(colours)], linewidth=1)
    # What the axes are.
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs of a run's training")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(title="active parameters", frameon=False)
    axes.set_title("Points: runs. Lines and crosses: c + a/N^alpha + b/D^beta, fitted to all of them", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True
