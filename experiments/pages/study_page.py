"""A study as one self-contained HTML page, a Markdown table, and each figure and table by itself.

No network and no script; it opens from disk. The words come from `experiments.stats.outcome`, the numbers from
`experiments.pages.study_tables`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np

from experiments.pages.charts import Point, Series, line_chart, scatter
from experiments.pages.study_tables import Table, tables
from experiments.stats.outcome import Arm, Outcome, sentences
from experiments.stats.statistics import t_interval
from moe.run.jsonl import write_atomically

TEMPLATE = Path(__file__).with_name("study.html")
AXIS_TITLES = {"steps": "steps", "flops": "FLOPs of training", "seconds": "training time (s)"}
LOSS = "validation loss (nats per token)"
IN_MARKDOWN = {"arms": "", "costs": "## What they cost, and how they route", "speedups": "", "runs": "## Runs"}


def write(folder: Path, result: Outcome) -> list[Path]:
    """Write the page, the table, and what they show: index.html, table.md, figures/*.svg, tables/*.csv. Returns the
    paths."""
    charts, made = figures(result.arms), tables(result, folder)
    files = {folder / "index.html": render(result, charts, made), folder / "table.md": in_markdown(result, made)}
    files |= {folder / "tables" / f"{name}.csv": table.csv() for name, table in made.items()}
    files |= {folder / "figures" / f"{name}.svg": svg for name, (_, svg) in charts.items()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return list(files)


def render(result: Outcome, charts: Mapping[str, tuple[str, str]], made: Mapping[str, Table]) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    ends = [run.summary for arm in result.arms for run in arm.runs]
    machines = [
        f"{end.device}, {end.threads} thread{'s' if end.threads != 1 else ''}, {end.precision}, dispatch {end.dispatch}"
        for end in ends
    ]
    versions = [", ".join(f"{name} {version}" for name, version in sorted(end.versions.items())) for end in ends]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        study=result.study,
        base=result.study.base,
        reference=result.reference,
        sentences=sentences(result),
        missing=result.missing,
        tables=made,
        charts=[(title, name, svg) for name, (title, svg) in charts.items()],
        several=any(len(arm.runs) > 1 for arm in result.arms),
        machines=list(dict.fromkeys(machines)),
        versions=list(dict.fromkeys(versions)),
    )


def in_markdown(result: Outcome, made: Mapping[str, Table]) -> str:
    """The same without the figures."""
    parts = ["\n".join(sentences(result))]
    for name, heading in IN_MARKDOWN.items():
        parts += [heading] if heading else []
        parts += [made[name].markdown().rstrip()] if made[name].rows else []
    if result.missing:
        parts += ["## Not in it", "\n".join(f"- {reason}" for reason in result.missing)]
    return "\n\n".join(parts) + "\n"


def figures(arms: Sequence[Arm]) -> dict[str, tuple[str, str]]:
    """(title, SVG) by the name of a file."""
    drawn = {
        f"loss-{axis}": (f"Loss over {title}", line_chart([series(arm, axis) for arm in arms], title, LOSS))
        for axis, title in AXIS_TITLES.items()
    }
    return drawn | {"pareto": ("Loss against what training cost", scatter(points(arms), "FLOPs of a run", LOSS))}


def series(arm: Arm, axis: str) -> Series:
    """An arm's curve: the mean over seeds at every evaluation that all have, and a 95% interval round it."""
    steps = sorted(set.intersection(*(set(curve.steps) for curve in arm.curves)))
    of = lambda name: [
        [getattr(curve, name)[curve.steps.index(step)] for curve in arm.curves] for step in steps
    ]  # evaluations of seeds
    x = [float(np.mean(values)) for values in of(axis)]
    if len(arm.curves) == 1:
        (loss,) = zip(*of("loss"), strict=True)
        return Series(arm.name, x, list(loss), list(loss), list(loss))
    intervals = [t_interval(values) for values in of("loss")]
    return Series(arm.name, x, *(list(column) for column in zip(*intervals, strict=True)))


def points(arms: Sequence[Arm]) -> list[Point]:
    """Every arm's final loss, with its 95% interval over seeds, against the FLOPs of its training."""
    ends = []
    for arm in arms:
        flops = float(np.mean([curve.flops[-1] for curve in arm.curves]))
        losses = [run.summary.val.loss for run in arm.runs]
        low, high = t_interval(losses)[1:] if len(losses) > 1 else (None, None)
        ends.append(Point(arm.name, flops, float(np.mean(losses)), False, low, high))
    beats = lambda one, other: one.x <= other.x and one.y <= other.y and (one.x, one.y) != (other.x, other.y)
    return [end._replace(front=not any(beats(other, end) for other in ends)) for end in ends]
