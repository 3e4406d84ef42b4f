"""One table of a sweep of comparisons: a line per router (or whatever else was swept), and one for the dense twin.

    python -m experiments.compare -m experiment=routers router=softmax,hash,expert-choice seed=0,1,2

Comparisons that differ in their seed alone are one line. Nothing here trains: a line is made of what
`experiments.compare` returned. It is printed, and written beside the comparisons' folders: table.md, and table.json
with every number. The others are compared with the line that `baseline=...` names, where the sweep has it.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiments.pages import tables
from experiments.stats import statistics, verdict
from experiments.stats.verdict import Measured, SeedResult
from moe.run.jsonl import write_atomically, write_json
from moe.run.terminal import say

SEEDS = ("seed", "seeds")
ROUTERS = ("router", "router.name")  # what needs no key before it
BASELINE = "softmax"  # the line that the others are compared with, besides their twins, unless another is named
HEADINGS = (
    "", "Validation loss", "Against its twin", "Against {baseline}", "Active", "Parameters", "MaxVio",
    "Effective experts", "Skipped", "Dropped in training", "Tokens/s", "Causal leak",
)  # fmt: skip
OPTIONAL = {"Against {baseline}": "against", "Active": "active", "Parameters": "total"}  # only where a line has one


class Job(NamedTuple):
    """One comparison of a sweep: the overrides it was started with, and what compare.json holds."""

    overrides: list[str]
    result: verdict.Comparison


@dataclass(frozen=True)
class Line:
    """A line of the table. A list has a number for each of `seeds`; None is what was not measured, as a dense model's
    routing is not. Intervals are of 95%, Student's t over seeds; routing is of the whole validation set, the mean over
    MoE layers and seeds, but for `dropped`, which is of all training steps, as evaluation drops nothing; `leak` is the
    largest over seeds."""

    label: str
    seeds: list[int]
    losses: list[float]  # nats per token
    loss: float
    loss_half: float | None  # half the interval
    differences: list[float]  # of the loss to the dense twin's with the same seed
    difference: float | None
    difference_half: float | None
    against: float | None  # the same difference to the baseline's loss
    against_half: float | None
    max_vio: float | None
    effective_experts: float | None
    skipped: float | None  # share of the tokens
    dropped: float | None  # share of the rows
    tokens_per_s: float
    leak: float | None
    active: int | None = None  # parameters; None in results of earlier versions, and the next too
    total: int | None = None


def report(jobs: Sequence[Job], swept: Sequence[str] = ()) -> None:
    """Print the table of a sweep, and write it into the folder that its comparisons' folders are in. `swept` is what
    all of its jobs differ in, of which `jobs` may be some: a line is called the same whether or not the others are."""
    first = jobs[0].result
    baseline = first.config["baseline"]
    sweep = lines(jobs, baseline, swept)
    headings, rows = table(sweep, baseline)
    folder = Path(first.folder).parent
    source = {name: getattr(first, name) for name in ("command", "commit", "dirty", "device", "versions")}
    numbers = [dataclasses.asdict(line) | source | {"baseline": baseline} for line in sweep]
    write_atomically(folder / "table.md", tables.markdown(headings, rows))
    write_json(folder / "table.json", numbers)
    print()
    tables.print_table(headings, rows)
    leaking = [line.label for line in sweep if (line.leak or 0) > verdict.LEAK]
    if leaking:
        say(f"Not comparable, because the router sees later tokens: {', '.join(leaking)}.")
    say(f"table: {folder / 'table.md'}")


def lines(jobs: Sequence[Job], baseline: str = BASELINE, swept: Sequence[str] = ()) -> list[Line]:
    """The table's lines, the lowest loss first; `baseline` is the label of the one they are compared with, `swept` as
    in `labels`. Where comparisons have different dense twins, as with another K, each twin has a line; "dense twin"
    alone is that of the most."""
    # Runs by the line they belong to, and dense twins by what they are.
    groups: dict[str, list[SeedResult]] = defaultdict(list)
    twins: dict[str, dict[int, Measured]] = defaultdict(dict)  # by what they are, then by seed
    whose: dict[str, dict[str, None]] = defaultdict(dict)
    for label, (_, result) in zip(labels([job.overrides for job in jobs], swept), jobs, strict=True):
        groups[label] += result.by_seed
        whose[result.twin][label] = None
        for pair in result.by_seed:
            twins[result.twin].setdefault(pair.seed, pair.dense)

    # A line per router.
    losses = {pair.seed: pair.moe.loss for pair in groups.get(baseline, [])}
    result_lines = []
    for label, group in groups.items():
        other = losses if label != baseline else {}
        seeds = [pair.seed for pair in group]
        result_lines.append(line(label, seeds, [pair.moe for pair in group], [pair.dense for pair in group], other))

    # The dense twins, the one that most routers share by its plain name.
    usual = max(twins, key=lambda twin: len(whose[twin]))
    for twin, by_seed in twins.items():
        label = "dense twin" if twin == usual else f"dense twin of {', '.join(whose[twin])}"
        result_lines.append(line(label, list(by_seed), list(by_seed.values()), (), losses))
    return sorted(result_lines, key=lambda sweep_line: sweep_line.loss)


def line(
    label: str,
    seeds: list[int],
    runs: list[Measured],
    twins: Sequence[Measured],
    baseline: dict[int, float],
) -> Line:
    """A line from `verdict.measured` of every seed's run, of its dense twin's, and the baseline's losses by
    seed."""
    losses = [run.loss for run in runs]
    differences = [run.loss - twin.loss for run, twin in zip(runs, twins, strict=True)] if twins else []
    loss, loss_half = _interval(losses)
    difference, difference_half = _interval(differences) if differences else (None, None)
    against, against_half = None, None
    if baseline and baseline.keys() >= set(seeds):
        against, against_half = _interval([final - baseline[seed] for seed, final in zip(seeds, losses, strict=True)])
    leaks = [run.leak for run in runs if run.leak is not None]
    return Line(
        label=label,
        seeds=seeds,
        losses=losses,
        loss=loss,
        loss_half=loss_half,
        differences=differences,
        difference=difference,
        difference_half=difference_half,
        against=against,
        against_half=against_half,
        **{name: statistics.mean([getattr(run, name) for run in runs]) for name in (*verdict.ROUTING, "dropped")},
        tokens_per_s=sum(run.tokens_per_s for run in runs) / len(runs),
        leak=max(leaks) if leaks else None,
        active=runs[0].active,
        total=runs[0].total,
    )


def _interval(values: list[float]) -> tuple[float, float | None]:
    """The mean and half its interval, None from one value."""
    mean, _, high = statistics.t_interval(values)
    return mean, high - mean if math.isfinite(high) else None


def labels(jobs: Sequence[Sequence[str]], swept: Sequence[str] = ()) -> list[str]:
    """What to call each job, from its overrides: the values of what varies over the jobs, or is among `swept`, the seed
    left out. A router goes by its name, one of your own by its class, anything else with its key."""
    given = []
    for overrides in jobs:
        pairs = (re.sub(r"\\(.)", r"\1", word.lstrip("+~")).partition("=") for word in overrides)  # as it was typed
        given.append({key: value for key, _, value in pairs if key not in SEEDS})
    usual = [key for key in reversed(ROUTERS) if key in given[0]][:1]
    several = {key for key in given[0] if key in swept or len({settings.get(key) for settings in given}) > 1}
    varying = [key for key in given[0] if key in several] or usual
    names = {settings[key] for settings in given for key in ROUTERS if key in settings}
    short = {name: name.rpartition(":")[2] for name in names}
    if len(set(short.values())) < len(names):  # two classes of one name
        short = {name: name for name in names}
    called = [
        " ".join(short[settings[key]] if key in ROUTERS else f"{key}={settings[key]}" for key in varying)
        for settings in given
    ]
    return [label or "MoE" for label in called]


def table(compared: Sequence[Line], baseline: str = BASELINE) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, without the columns of what no line has: a baseline that is not in the sweep, numbers of
    parameters in old results."""
    rows = [list(cells(line)) for line in compared]
    shown = [
        i
        for i, heading in enumerate(HEADINGS)
        if heading not in OPTIONAL or any(getattr(line, OPTIONAL[heading]) is not None for line in compared)
    ]
    return [HEADINGS[i].format(baseline=baseline) for i in shown], [[row[i] for i in shown] for row in rows]


def cells(line: Line) -> tuple[str, ...]:
    """What the table says of a line."""
    return (
        line.label,
        f"{line.loss:.3f}" + ("" if line.loss_half is None else f" ± {line.loss_half:.3f}"),
        _difference(line.difference, line.difference_half),
        _difference(line.against, line.against_half),
        tables.number(line.active, ",d"),
        tables.number(line.total, ",d"),
        tables.number(line.max_vio, ".2f"),
        tables.number(line.effective_experts, ".2f"),
        tables.number(line.skipped, ".1%"),
        tables.number(line.dropped, ".1%"),
        f"{line.tokens_per_s:,.0f}",
        "" if line.leak is None else verdict.scientific(line.leak),
    )


def _difference(mean: float | None, half: float | None) -> str:
    """A difference with its interval, as far as they are known."""
    if mean is None or half is None:
        return "" if mean is None else verdict.signed(mean)
    return f"{verdict.signed(mean)} ({verdict.signed(mean - half)} to {verdict.signed(mean + half)})"
