"""A study as one self-contained HTML page, a Markdown table, and each figure and table by itself.

No network and no script; it opens from disk. The words come from `experiments.stats.outcome`.
"""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from experiments.pages.charts import Point, Series, line_chart, scatter
from experiments.pages.tables import markdown, number
from experiments.stats import decide
from experiments.stats.outcome import Arm, Outcome, sentences
from experiments.stats.speedup import AXES
from experiments.stats.statistics import t_interval
from experiments.stats.verdict import signed, times
from moe.run.jsonl import write_atomically

TEMPLATE = Path(__file__).with_name("study.html")
AXIS_TITLES = {"steps": "steps", "flops": "FLOPs of training", "seconds": "training time (s)"}
HEADINGS = (
    "arm", "seeds", "loss (nats per token)", "bits per byte", "against the base", "verdict", "rank", "could have shown",
    "speedup in steps", "in FLOPs", "in seconds", "MaxVio", "dead", "active", "total", "FLOPs per token", "tokens/s",
)  # fmt: skip


def write(folder: Path, result: Outcome) -> list[Path]:
    """Write the page, the table, and what they show: index.html, table.md, figures/*.svg, tables/*.csv. Returns the
    paths."""
    charts, rows = figures(result.arms), [cells(arm, result.study.base) for arm in result.arms]
    files = {
        folder / "index.html": render(result, charts, rows, folder),
        folder / "table.md": "\n".join(sentences(result)) + "\n\n" + markdown(HEADINGS, rows),
        folder / "tables" / "arms.csv": to_csv(HEADINGS, rows),
        folder / "tables" / "runs.csv": to_csv(RUN_HEADINGS, run_rows(result.arms, folder)),
        folder / "tables" / "settings.csv": to_csv(SETTING_HEADINGS, setting_rows(result.arms)),
    }
    files |= {folder / "figures" / f"{name}.svg": svg for name, (_, svg) in charts.items()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return list(files)


def render(result: Outcome, charts: dict[str, tuple[str, str]], rows: Sequence[Sequence[str]], folder: Path) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    summary = result.arms[0].runs[0].summary
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        study=result.study,
        sentences=sentences(result),
        headings=HEADINGS,
        rows=rows,
        charts=[(title, name, svg) for name, (title, svg) in charts.items()],
        settings=list(setting_rows(result.arms)),
        setting_headings=SETTING_HEADINGS,
        runs=list(run_rows(result.arms, folder)),
        run_headings=RUN_HEADINGS,
        summary=summary,
    )


def cells(arm: Arm, base: str) -> tuple[str, ...]:
    """A line of the table of arms; the base has nothing to be compared with."""
    # Against the base.
    judged, speedups = arm.judgement, arm.speedups or {}
    against = "the base" if arm.name == base else "–"
    shown = ""
    if judged:
        against = signed(judged.mean)
        if judged.low is not None and judged.high is not None:
            against += f" ({signed(judged.low)} to {signed(judged.high)})"
        shown = number(judged.detectable, ".3f")
    load = [run.summary.load for run in arm.runs]
    of_layers = lambda name: (
        ""
        if None in load
        else f"{np.mean([getattr(layer, name) for entry in load if entry for layer in entry.routing]):.2f}"
    )
    return (
        arm.name,
        ", ".join(map(str, arm.seeds)),
        spread_of([run.summary.val.loss for run in arm.runs]),
        spread_of([run.summary.val.bpb for run in arm.runs]),
        against,
        word_of(arm),
        "" if arm.ranks is None else "–".join(map(str, dict.fromkeys(arm.ranks))),
        shown,
        *(times(speedups[axis]) if speedups.get(axis) else "" for axis in AXES),
        of_layers("max_vio"),
        of_layers("dead"),
        number(arm.mean("params.active"), ",.0f"),
        number(arm.mean("params.total"), ",.0f"),
        number(arm.mean("flops.training"), ",.0f"),
        number(arm.mean("tokens_per_s"), ",.0f"),
    )


def word_of(arm: Arm) -> str:
    """The verdict in a word or two."""
    judged = arm.judgement
    if judged is None:
        return ""
    if judged.word == decide.INCONCLUSIVE:
        return f"inconclusive; {judged.seeds_needed or 'no number of'} seeds"
    return "no verdict: one seed" if judged.word == decide.SINGLE else judged.said()


def spread_of(values: list[float]) -> str:
    """A mean over seeds ± half its 95% interval."""
    interval = t_interval(values)
    return f"{interval.mean:.3f} ± {interval.high - interval.mean:.3f}" if len(values) > 1 else f"{interval.mean:.3f}"


SETTING_HEADINGS = ("arm", "setting", "base", "here")


def setting_rows(arms: Sequence[Arm]) -> Iterator[tuple[str, ...]]:
    """Every setting in which an arm differs from the base."""
    for arm in arms:
        for key, theirs, here in arm.settings:
            yield arm.name, key, _value(theirs), _value(here)


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


RUN_HEADINGS = ("arm", "seed", "loss", "bits per byte", "steps", "seconds", "run")


def run_rows(arms: Sequence[Arm], folder: Path) -> Iterator[tuple[str, ...]]:
    """Every finished run, with the way to its folder."""
    for arm in arms:
        for seed, run in zip(arm.seeds, arm.runs, strict=True):
            end = run.summary
            losses = f"{end.val.loss:.4f}", f"{end.val.bpb:.4f}"
            yield (
                arm.name,
                str(seed),
                *losses,
                f"{end.steps}",
                f"{end.seconds:.1f}",
                os.path.relpath(run.folder, folder),
            )


def figures(arms: Sequence[Arm]) -> dict[str, tuple[str, str]]:
    """(title, SVG) by the name of a file."""
    drawn = {
        f"loss-{axis}": (
            f"Loss over {title}",
            line_chart([series(arm, axis) for arm in arms], title, "validation loss"),
        )
        for axis, title in AXIS_TITLES.items()
    }
    points = [(arm.name, arm.curves[0].flops[-1], arm.mean("val.loss") or 0.0) for arm in arms]
    front = [
        Point(n, x, y, not any(a <= x and b <= y and (a, b) != (x, y) for _, a, b in points)) for n, x, y in points
    ]
    return drawn | {"pareto": ("Loss against what training cost", scatter(front, "FLOPs of a run", "validation loss"))}


def series(arm: Arm, axis: str) -> Series:
    """An arm's curve: the mean over seeds at every evaluation that all have, and half a 95% interval round it."""
    n_points = min(len(curve.loss) for curve in arm.curves)
    x = [float(np.mean([getattr(curve, axis)[i] for curve in arm.curves])) for i in range(n_points)]
    if len(arm.curves) == 1:
        loss = arm.curves[0].loss[:n_points]
        return Series(arm.name, x, loss, loss, loss)
    intervals = [t_interval([curve.loss[i] for curve in arm.curves]) for i in range(n_points)]
    return Series(arm.name, x, *(list(column) for column in zip(*intervals, strict=True)))


def to_csv(headings: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """A table for machines."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([headings, *rows])
    return text.getvalue()
