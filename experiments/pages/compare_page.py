"""A comparison as one self-contained HTML page: no network, no script, readable in light and dark.

Here is what the drawings show and where each mark goes, in px; page.html draws it, as SVG coloured by its style sheet.

Letters beside the glossary: Y domains (with all text before them where a share is of rows) · r rows of a heat map.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from experiments.pages.charts import ticks
from experiments.stats import verdict
from experiments.stats.verdict import Comparison, Pair, Run
from moe.run.jsonl import to_text

TEMPLATE = Path(__file__).with_name("page.html")
BINS = 120  # a training curve is drawn as at most this many means
CLIP = 4.0  # a heat map's colours end at this ratio and at its inverse
NAMES = {"moe": "MoE", "dense": "dense twin"}


def render(pairs: list[Pair], result: Comparison) -> str:
    """The page about `pairs`; `result` is what compare.json holds: numbers, words, settings."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    # The first seed's experts stand for all: those of another have nothing in common with them but their number.
    summary = pairs[0].moe.summary
    load = summary.load
    assert load is not None, "a comparison has a Mixture of Experts"
    share_LYE = [shares(counts) for counts in load.counts]
    layers = [f"layer {layer}" for layer in load.layers]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        result=result,
        summary=summary,
        n_seeds=len(pairs),
        charts=[loss_chart(pairs, 0, "step"), loss_chart(pairs, 1, "training time (s)")],
        bin=bin_width(pairs[0].moe),
        layer_map=heat_map(layers, [share_YE[0] for share_YE in share_LYE]),
        domain_maps=[
            (layer, heat_map(["all text", *load.domains], share_YE, by_domain(share_YE)))
            for layer, share_YE in zip(layers, share_LYE, strict=True)
        ],
        specialists=[
            (layer, specialists(load.domains, share_YE)) for layer, share_YE in zip(layers, share_LYE, strict=True)
        ],
        domains=load.domains,
        n_experts=share_LYE[0].shape[1],
        legend=[
            shade(2.0**power) | {"ratio": name}
            for power, name in zip(range(-2, 3), ("¼× or less", "½×", "1×", "2×", "4× or more"), strict=True)
        ],
        settings=to_text(result.config, indent=1),
    )


def bin_width(run: Run) -> int:
    """Steps that one point of a training curve is the mean of."""
    return math.ceil(len(run.metrics) / BINS)


def training_curve(run: Run, axis: str) -> tuple[list[float], list[float]]:
    """Means of `axis` ("step" or "seconds") and of the language-model loss (nats per token) over `bin_width` steps.
    Steps without a finite loss (skipped ones) are left out."""
    lines = [line for line in run.metrics if line.lm_loss is not None]
    width = bin_width(run)
    groups = [lines[i : i + width] for i in range(0, len(lines), width)]
    mean = lambda key: [float(np.mean([getattr(line, key) for line in group])) for group in groups]
    return mean(axis), mean("lm_loss")


def loss_chart(pairs: list[Pair], axis: int, title: str) -> dict[str, Any]:
    """Loss of every run over steps (axis 0) or training seconds (axis 1).

    Training is a thin line, validation has symbols. The range leaves out the first fifth of the way, where every model
    falls from ln V, so that what separates the two is visible."""
    width, height, left, right, top, bottom = 480, 330, 52, 98, 12, 44

    # What is drawn: two curves of every run.
    curves = []  # (name, kind, x, y)
    for pair in pairs:
        for name, run in zip(NAMES, pair, strict=True):
            curves.append((name, "train", *training_curve(run, ("step", "seconds")[axis])))
            steps_seconds_loss = verdict.validation_curve(run)
            curves.append((name, "val", steps_seconds_loss[axis], steps_seconds_loss[2]))

    # Where a point goes: the whole way across, and the losses of its later part up and down.
    end = max(x[-1] for *_, x, _ in curves if x) or 1.0
    late = [b for *_, x, y in curves for a, b in zip(x, y, strict=True) if a >= 0.2 * x[-1]]
    margin = 0.05 * (max(late) - min(late)) or 0.5
    low, high = min(late) - margin, max(late) + margin
    across = lambda x: round(left + x / end * (width - left - right), 1)
    down = lambda y: round(top + (high - y) / (high - low) * (height - top - bottom), 1)

    # Where every model ends, and where the MoE reaches its twin's loss.
    final = {
        name: float(np.mean([y[-1] for model, kind, _, y in curves if (model, kind) == (name, "val")]))
        for name in NAMES
    }
    reached = verdict.reach(*pairs[0], axis) if len(pairs) == 1 else None

    # What the template draws, in px.
    return {
        "id": f"chart{axis}",
        "title": title,
        "width": width,
        "height": height,
        "plot": {"x": left, "y": top, "width": width - left - right, "height": height - top - bottom},
        "label": f"Loss over {title}: " + ", ".join(f"{NAMES[name]} ends at {final[name]:.3f}" for name in NAMES),
        "x_ticks": [(across(tick), f"{tick:,g}") for tick in ticks(0, end)],
        "y_ticks": [(down(tick), f"{tick:g}") for tick in ticks(low, high)],
        "lines": [
            {
                "name": name,
                "kind": kind,
                "points": " ".join(f"{across(a)},{down(b)}" for a, b in zip(x, y, strict=True)),
            }
            for name, kind, x, y in sorted(curves, key=lambda curve: curve[1] == "val")
        ],
        "marks": [
            {
                "name": name,
                "x": across(a),
                "y": down(b),
                "text": f"{NAMES[name]}, {title} {a:,.4g}: {b:.3f} nats per token",
            }
            for name, kind, x, y in curves
            for a, b in zip(x, y, strict=True)
            if kind == "val"
        ],
        "ends": [
            {"name": name, "y": y, "text": f"{'MoE' if name == 'moe' else 'dense'} {final[name]:.3f}"}
            for name, y in zip(NAMES, apart(down(final["moe"]), down(final["dense"]), 16), strict=True)
        ],
        "reached": reached
        and {
            "x": across(reached),
            "y": down(final["dense"]),
            "text": f"step {reached:,.0f}" if axis == 0 else f"{reached:,.1f} s",
        },
    }


def apart(a: float, b: float, distance: float) -> tuple[float, float]:
    """Two heights, moved from their middle until they are `distance` apart."""
    missing = max(0.0, distance - abs(a - b)) / 2
    return (a - missing, b + missing) if a <= b else (a + missing, b - missing)


def shares(counts: Sequence[Sequence[int]]) -> np.ndarray:
    """Routed rows (Y, E) by domain -> (1 + Y, E) share of the rows that go to each expert: first of all text, then of
    each domain; nan for a domain without a row."""
    count_YE = np.array(counts, dtype=float)
    count_YE = np.concatenate([count_YE.sum(0, keepdims=True), count_YE])
    with np.errstate(invalid="ignore"):
        return count_YE / count_YE.sum(1, keepdims=True)


def by_domain(share_YE: np.ndarray) -> list[int]:
    """Experts in an order that shows structure: grouped by the domain that leans most towards each, in the domains'
    order, and within a group from the strongest leaning down."""
    domain_YE = np.nan_to_num(share_YE[1:])
    leading_E, strength_E = domain_YE.argmax(0), domain_YE.max(0)
    return sorted(range(share_YE.shape[1]), key=lambda i: (leading_E[i], -strength_E[i]))


def specialists(domains: list[str], share_YE: np.ndarray) -> list[dict[str, Any] | None]:
    """For each domain the expert that gets most more of its rows than of all text's; None for a domain without
    rows, or where none gets more."""
    leaning: list[dict[str, Any] | None] = []
    for _, share_E in zip(domains, share_YE[1:], strict=True):
        more_E = np.nan_to_num(share_E - share_YE[0])
        expert = int(more_E.argmax())
        share, overall = f"{share_E[expert]:.1%}", f"{share_YE[0][expert]:.1%}"
        leaning.append({"expert": expert, "share": share, "overall": overall} if more_E[expert] > 0 else None)
    return leaning


def shade(ratio: float) -> dict[str, Any]:
    """The colour of a ratio to the even share: a tone for more and one for less, stronger with its logarithm."""
    power = math.log2(ratio) / math.log2(CLIP) if ratio else -1.0
    opacity = round(0.9 * min(1.0, abs(power)), 2)
    return {"tone": "over" if power > 0 else "under", "opacity": opacity, "strong": opacity > 0.7}


def heat_map(
    rows: list[str], share_rE: Sequence[np.ndarray] | np.ndarray, order: list[int] | None = None
) -> dict[str, Any]:
    """A row of cells per line of `share_rE` (r, E), coloured by share times E: 1 where all experts get the same.

    Columns are experts in `order`; without one, every row has its own, busiest first."""
    n_experts = len(share_rE[0])
    left, width, cell_height = 96, 920, 26
    cell_width = (width - left) / n_experts

    # A cell per row and expert; a row without anything routed stays empty.
    cells = []
    for r, (name, share_E) in enumerate(zip(rows, share_rE, strict=True)):
        if np.isnan(share_E).any():
            continue
        for column, expert in enumerate(order or np.argsort(-share_E, kind="stable").tolist()):
            ratio = float(share_E[expert] * n_experts)
            cells.append(
                shade(ratio)
                | {
                    "x": round(left + column * cell_width, 2),
                    "y": r * cell_height,
                    "text": f"{ratio:.1f}" if cell_width >= 30 else "",
                    "title": f"{name}: expert {expert} gets {share_E[expert]:.2%}, {ratio:.2f}× the even share",
                }
            )

    # The names beside the rows and below the columns, where there is room.
    return {
        "rows": [
            (name, r * cell_height + cell_height / 2 + 4, bool(np.isnan(share_E).any()))
            for r, (name, share_E) in enumerate(zip(rows, share_rE, strict=True))
        ],
        "cells": cells,
        "columns": [
            (round(left + (column + 0.5) * cell_width, 2), expert)
            for column, expert in enumerate(order or [])
            if cell_width >= 18
        ],
        "left": left,
        "width": width,
        "cell_width": round(cell_width - 1, 2),
        "cell_height": cell_height - 1,
        "height": len(rows) * cell_height + (18 if order else 0),
    }
