"""The tables of a study: each number with a link to the run, or the runs, that it is of.

One table, three readers: a page, Markdown, and CSV with every digit.
"""

import csv
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from experiments.pages.tables import markdown, number
from experiments.stats import decide
from experiments.stats.decide import Judgement
from experiments.stats.outcome import Arm, Outcome
from experiments.stats.speedup import AXES
from experiments.stats.statistics import t_interval
from experiments.stats.verdict import Run, measured, signed, times


class Part(NamedTuple):
    """Some words of a cell, and where they lead."""

    text: str
    link: str = ""


Cell = Sequence[Part]


@dataclass(frozen=True)
class Table:
    """A table as people read it, and the same with every digit."""

    name: str  # of its CSV
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    records: Sequence[dict[str, Any]]  # a line of the CSV each, None what is not known
    ids: Sequence[str] = ()  # of the rows, for links to them

    def markdown(self) -> str:
        """For a file beside the page; what leads to a place on the page is plain there."""
        as_text = lambda part: f"[{part.text}]({part.link})" if part.link and part.link[0] != "#" else part.text
        return markdown(self.headings, [[", ".join(map(as_text, cell)) for cell in row] for row in self.rows])

    def csv(self) -> str:
        """For machines."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.records[0]) if self.records else ["arm"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return text.getvalue()


def tables(result: Outcome, folder: Path) -> dict[str, Table]:
    """All tables of the study in `folder`, by name."""
    arms = result.arms
    made = [verdicts(result, folder), costs(arms), speedups(arms), runs(arms, folder), settings(arms), curves(arms)]
    return {table.name: table for table in made}


def verdicts(result: Outcome, folder: Path) -> Table:
    """A row per arm: its loss, and how it stands against the base and its twin."""
    # A column for the twins only where there are any.
    twins = any(arm.beside_twin for arm in result.arms)
    base = result.study.base
    headings = ["arm", "seeds", "loss (nats per token)", "bits per byte"]
    headings += [f"against {base}", "verdict"] if base else []
    headings += ["against its dense twin"] if twins else []
    headings += ["rank", *(["could have shown"] if base else [])]
    rows: list[list[Cell]] = []
    records = []
    for place, arm in enumerate(result.arms):
        its_runs = f"#runs-{place}"

        # For people.
        losses, bits = ([getattr(run.summary.val, name) for run in arm.runs] for name in ("loss", "bpb"))
        judged, beside = arm.judgement, arm.beside_twin
        row: list[Cell] = [
            [Part(arm.name)],
            [Part(str(seed), link(run, folder)) for seed, run in zip(arm.seeds, arm.runs, strict=True)],
            [Part(spread_of(losses), its_runs)],
            [Part(spread_of(bits), its_runs)],
        ]
        if base:
            to = its_runs if judged else ""
            row += [[Part("the base" if arm.name == base else difference(judged), to)], [Part(word_of(judged))]]
        row += [[Part(f"{difference(beside)}, {word_of(beside)}" if beside else "", its_runs)]] if twins else []
        row.append([Part("" if arm.ranks is None else "–".join(map(str, dict.fromkeys(arm.ranks))))])
        row += [[Part(number(judged.detectable, ".3f") if judged else "")]] if base else []
        rows.append(row)

        # With every digit.
        record = {"arm": arm.name, "seeds": len(arm.seeds), "loss": np.mean(losses), "bits_per_byte": np.mean(bits)}
        record |= {"rank_from": arm.ranks and arm.ranks[0], "rank_to": arm.ranks and arm.ranks[1]}
        for name, of in (("difference", judged), ("bits_difference", arm.bits), ("twin_difference", beside)):
            record |= judgement_record(name, of)
        records.append(record)
    return Table("arms", headings, rows, records)


def costs(arms: Sequence[Arm]) -> Table:
    """A row per arm: what it costs, and how it routes."""
    # (heading, name in the CSV, form, of a run; None where it has none)
    columns: list[tuple[str, str, str, Callable[[Run], float | None]]] = [
        ("active parameters", "active", ",.0f", lambda run: run.summary.params.active),
        ("total", "total", ",.0f", lambda run: run.summary.params.total),
        ("FLOPs per token", "flops_per_token", ",.0f", lambda run: run.summary.flops.training),
        ("FLOPs", "flops", ".3g", lambda run: run.summary.tokens * run.summary.flops.training),
        ("tokens/s", "tokens_per_s", ",.0f", lambda run: run.summary.tokens_per_s),
        ("seconds", "seconds", ",.1f", lambda run: run.summary.seconds),
        ("MaxVio", "max_vio", ".2f", lambda run: measured(run).max_vio),
        ("dead experts", "dead", ".2f", dead),
    ]
    headings = ["arm", *(heading for heading, *_ in columns)]
    rows, records = [], []
    for place, arm in enumerate(arms):
        means = {name: mean([of(run) for run in arm.runs]) for _, name, _, of in columns}
        shown = [number(means[name], form) for _, name, form, _ in columns]
        rows.append([[Part(arm.name)], *([Part(text, f"#runs-{place}")] for text in shown)])
        records.append({"arm": arm.name} | means)
    return Table("costs", headings, rows, records)


def speedups(arms: Sequence[Arm]) -> Table:
    """A row per arm: how much sooner it has the base's loss, in each currency."""
    rows, records = [], []
    for place, arm in enumerate(arms):
        if arm.speedups is None:
            continue
        record: dict[str, Any] = {"arm": arm.name}
        for axis in AXES:
            bounds = zip(("", "_low", "_high"), arm.speedups[axis] or (None, None, None), strict=True)
            record |= {f"{axis}{end}": value if value and math.isfinite(value) else None for end, value in bounds}
        records.append(record)
        rows.append([[Part(arm.name)], *([Part(times(arm.speedups[axis]), f"#runs-{place}")] for axis in AXES)])
    return Table("speedups", ["arm", *(f"speedup in {axis}" for axis in ("steps", "FLOPs", "seconds"))], rows, records)


def runs(arms: Sequence[Arm], folder: Path) -> Table:
    """A row per finished run; each number leads to the file that it is from, the last column to the run's folder."""
    headings = ["arm", "seed", "loss", "bits per byte", "steps", "seconds", "run"]
    rows, records, ids = [], [], []
    for place, arm in enumerate(arms):
        for seed, run in zip(arm.seeds, arm.runs, strict=True):
            end, to = run.summary, link(run, folder)
            summary, metrics = f"{to}/summary.json", f"{to}/metrics.jsonl"
            row = [
                Part(arm.name),
                Part(str(seed), f"{to}/config.yaml"),
                Part(f"{end.val.loss:.4f}", summary),
                Part(f"{end.val.bpb:.4f}", summary),
                Part(f"{end.steps:,}", metrics),
                Part(f"{end.seconds:.1f}", metrics),
                Part(Path(run.folder).name, to),
            ]
            ids.append(f"runs-{place}" if run is arm.runs[0] else "")
            rows.append([[part] for part in row])
            losses = {"loss": end.val.loss, "bits_per_byte": end.val.bpb, "steps": end.steps, "seconds": end.seconds}
            records.append({"arm": arm.name, "seed": seed, **losses, "run": os.path.relpath(run.folder, folder)})
    return Table("runs", headings, rows, records, ids)


def settings(arms: Sequence[Arm]) -> Table:
    """Every setting in which an arm differs from the base, or a trial of a search from the first."""
    records = [
        {"arm": arm.name, "setting": key, "base": as_yaml(theirs), "here": as_yaml(mine)}
        for arm in arms
        for key, theirs, mine in arm.settings
    ]
    rows = [[[Part(text)] for text in record.values()] for record in records]
    return Table("settings", ["arm", "setting", "base", "here"], rows, records)


def curves(arms: Sequence[Arm]) -> Table:
    """Every evaluation of every run, for machines alone."""
    records = [
        {"arm": arm.name, "seed": seed, "step": step, "flops": flops, "seconds": seconds, "loss": loss}
        for arm in arms
        for seed, curve in zip(arm.seeds, arm.curves, strict=True)
        for step, flops, seconds, loss in zip(curve.steps, curve.flops, curve.seconds, curve.loss, strict=True)
    ]
    return Table("curves", [], [], records)


def link(run: Run, folder: Path) -> str:
    """From the page to a run's folder."""
    return quote(Path(os.path.relpath(run.folder, folder)).as_posix())


def difference(judged: Judgement | None) -> str:
    """A mean difference with its interval."""
    if judged is None:
        return "–"
    interval = "" if judged.low is None or judged.high is None else f" ({signed(judged.low)} to {signed(judged.high)})"
    return f"{signed(judged.mean)}{interval}"


def word_of(judged: Judgement | None) -> str:
    """The verdict in a word or two."""
    if judged is None:
        return ""
    if judged.word == decide.INCONCLUSIVE:
        return f"inconclusive; {judged.seeds_needed or f'more than {decide.MOST_SEEDS:,}'} seeds"
    return "no verdict: one seed" if judged.word == decide.SINGLE else judged.said()


def judgement_record(name: str, judged: Judgement | None) -> dict[str, Any]:
    """A verdict with every digit, under names that begin with `name`."""
    numbers = ("mean", "low", "high", "word", "deviation", "detectable", "p", "p_equivalent", "seeds_needed")
    return {f"{name}_{number}": judged and getattr(judged, number) for number in numbers}


def spread_of(values: Sequence[float]) -> str:
    """A mean over seeds ± half its 95% interval."""
    interval = t_interval(list(values))
    return f"{interval.mean:.3f} ± {interval.high - interval.mean:.3f}" if len(values) > 1 else f"{interval.mean:.3f}"


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where one is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def dead(run: Run) -> float | None:
    """Experts that nothing of the validation text went to, in all layers; None for a dense model."""
    layers = run.summary.load.routing if run.summary.load else []
    return float(sum(layer.dead for layer in layers)) if layers else None


def as_yaml(value: Any) -> str:
    """A setting's value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
