"""One table of a sweep of comparisons: a line per router (or whatever else was swept), and one for the dense twin.

    python -m experiments.compare -m experiment=routers router=softmax,hash,expert-choice seed=0,1,2

Comparisons that differ in their seed alone are one line. Nothing here trains: a line is made of what
`experiments.compare` returned. It is printed, and written beside the comparisons' folders: table.md, and table.json
with every number. The others are compared with the line that `baseline=...` names, where the sweep has it.

Of many lines one is the best by chance. So words are corrected for the number of comparisons in their column (Holm),
intervals of a column hold together (max-t), and a line has the ranks that it may have rather than a place.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.pages import tables
from experiments.stats import arms, statistics, verdict
from experiments.stats.decide import Judgement
from experiments.stats.verdict import Measured, SeedResult
from moe.run.jsonl import write_atomically, write_json
from moe.run.terminal import say

SEEDS = ("seed", "seeds")
ROUTERS = ("router", "router.name")  # what needs no key before it
BASELINE = "softmax"  # the line that the others are compared with, besides their twins, unless another is named
HEADINGS = (
    "", "Rank", "Validation loss", "Against its twin", "Against {baseline}", "Smallest effect (deviation)",
    "Seeds to decide", "Active", "Parameters", "MaxVio", "Effective experts", "Skipped", "Dropped in training",
    "Tokens/s", "Causal leak",
)  # fmt: skip
OPTIONAL = {  # only where a line has one
    "Rank": "rank", "Against {baseline}": "against", "Smallest effect (deviation)": "detectable",
    "Seeds to decide": "seeds_needed", "Active": "active", "Parameters": "total",
}  # fmt: skip


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
    # What `judged` says of the lines beside each other; None where there is nothing to say.
    beside_twin: Judgement | None = None  # corrected for the number of lines, as the next is
    beside_baseline: Judgement | None = None
    rank: list[int] | None = None  # the ranks that the line may have, from and to
    # of the difference to the baseline, or to the twin in a sweep without it, corrected too
    deviation: float | None = None
    detectable: float | None = None  # smallest difference that the seeds show with 80% power
    seeds_needed: int | None = None  # in all, where the word is inconclusive
    text: str = ""  # what lines have in common whose losses can be compared


def report(jobs: Sequence[Job], swept: Sequence[str] = ()) -> None:
    """Print the table of a sweep, and write it into the folder that its comparisons' folders are in. `swept` is what
    all of its jobs differ in, of which `jobs` may be some: a line is called the same whether or not the others are."""
    first = jobs[0].result
    baseline = first.config["baseline"]
    sweep = judged(lines(jobs, baseline, swept), baseline, first.config.get("margin") or None)
    headings, rows = table(sweep, baseline)
    note = "".join(f"\n{sentence}\n" for sentence in notes(sweep))
    folder = Path(first.folder).parent
    source = {name: getattr(first, name) for name in ("command", "commit", "dirty", "device", "versions")}
    numbers = [dataclasses.asdict(line) | source | {"baseline": baseline} for line in sweep]
    write_atomically(folder / "table.md", tables.markdown(headings, rows) + note)
    write_json(folder / "table.json", numbers)
    print()
    tables.print_table(headings, rows)
    print(note, end="")
    say(f"table: {folder / 'table.md'}")


def lines(jobs: Sequence[Job], baseline: str = BASELINE, swept: Sequence[str] = ()) -> list[Line]:
    """The table's lines, the lowest loss first; `baseline` is the label of the one they are compared with, `swept` as
    in `labels`. Where comparisons have different dense twins, as with another K, each twin has a line; "dense twin"
    alone is that of the most."""
    # Runs by the line they belong to, and dense twins by what they are.
    groups: dict[str, list[SeedResult]] = defaultdict(list)
    twins: dict[str, dict[int, Measured]] = defaultdict(dict)  # by what they are, then by seed
    whose: dict[str, dict[str, None]] = defaultdict(dict)
    texts: dict[str, str] = {}  # of a router and of a twin
    for label, (_, result) in zip(labels([job.overrides for job in jobs], swept), jobs, strict=True):
        groups[label] += result.by_seed
        texts[label] = texts[result.twin] = result.text
        whose[result.twin][label] = None
        for pair in result.by_seed:
            twins[result.twin].setdefault(pair.seed, pair.dense)

    # A line per router.
    losses = {pair.seed: pair.moe.loss for pair in groups.get(baseline, [])}
    result_lines = []
    for label, group in groups.items():
        other = losses if label != baseline and texts[label] == texts.get(baseline) else {}
        seeds = [pair.seed for pair in group]
        runs, their_twins = [pair.moe for pair in group], [pair.dense for pair in group]
        result_lines.append(line(label, seeds, runs, their_twins, other, texts[label]))

    # The dense twins, the one that most routers share by its plain name.
    usual = max(twins, key=lambda twin: len(whose[twin]))
    for twin, by_seed in twins.items():
        label = "dense twin" if twin == usual else f"dense twin of {', '.join(whose[twin])}"
        other = losses if texts[twin] == texts.get(baseline) else {}
        result_lines.append(line(label, list(by_seed), list(by_seed.values()), (), other, texts[twin]))
    return sorted(result_lines, key=lambda sweep_line: sweep_line.loss)


def line(
    label: str,
    seeds: list[int],
    runs: list[Measured],
    twins: Sequence[Measured],
    baseline: dict[int, float],
    text: str = "",
) -> Line:
    """A line from `verdict.measured` of every seed's run, of its dense twin's, and the baseline's losses by
    seed."""
    # Of the losses, what is left once the twin's or the baseline's of the same seed is taken off.
    losses = [run.loss for run in runs]
    differences = [run.loss - twin.loss for run, twin in zip(runs, twins, strict=True)] if twins else []
    loss, loss_half = _interval(losses)
    difference, difference_half = _interval(differences) if differences else (None, None)
    against, against_half = None, None
    if baseline and baseline.keys() >= set(seeds):
        against, against_half = _interval([final - baseline[seed] for seed, final in zip(seeds, losses, strict=True)])
    # Of everything else, the mean over the seeds.
    over = lambda name: statistics.mean([getattr(run, name) for run in runs])
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
        max_vio=over("max_vio"),
        effective_experts=over("effective_experts"),
        skipped=over("skipped"),
        dropped=over("dropped"),
        tokens_per_s=sum(run.tokens_per_s for run in runs) / len(runs),
        leak=max(leaks) if leaks else None,
        active=runs[0].active,
        total=runs[0].total,
        text=text,
    )


def judged(sweep: Sequence[Line], baseline: str = BASELINE, margin: float | None = None) -> list[Line]:
    """The lines with what they say beside each other: words, intervals, ranks. Of lines with a single seed and of
    routers that see later tokens there is nothing to say, of lines of different texts there are no ranks. `margin` as
    in `decide.judge`."""
    # Every line with its twin, and with the baseline, seed by seed: two families of comparisons.
    able = [line for line in sweep if len(line.seeds) > 1 and not _leaks(line)]
    standard = next((dict(zip(line.seeds, line.losses, strict=True)) for line in able if line.label == baseline), {})
    to_twin = {line.label: line.differences for line in able if line.differences}
    to_baseline = {
        line.label: [loss - standard[seed] for seed, loss in zip(line.seeds, line.losses, strict=True)]
        for line in able
        if line.against is not None and standard.keys() >= set(line.seeds)
    }
    beside_twin, beside_baseline = (
        dict(zip(family, arms.judge_arms(list(family.values()), margin), strict=True))
        for family in (to_twin, to_baseline)
    )

    # Ranks of the lines that have the most usual seeds; the corrected numbers of the family that the table is about.
    ranks = _ranks(able)
    main = beside_baseline or beside_twin
    said = []
    for line in sweep:
        about = main.get(line.label)
        said.append(
            dataclasses.replace(
                line,
                beside_twin=beside_twin.get(line.label),
                beside_baseline=beside_baseline.get(line.label),
                rank=ranks.get(line.label),
                deviation=about.deviation if about else None,
                detectable=about.detectable if about else None,
                seeds_needed=about.seeds_needed if about else None,
            )
        )
    return said


def _ranks(able: Sequence[Line]) -> dict[str, list[int]]:
    """By label, where there are several lines of one text with the same seeds."""
    seeds = [sorted(line.seeds) for line in able]
    usual = max(seeds, key=seeds.count, default=[])
    alike = [line for line, own_seeds in zip(able, seeds, strict=True) if own_seeds == usual]
    if len(alike) < 2 or len({line.text for line in able}) > 1:
        return {}
    scores_An = np.array([[dict(zip(line.seeds, line.losses, strict=True))[seed] for seed in usual] for line in alike])
    return {line.label: list(rank) for line, rank in zip(alike, arms.rank_intervals(scores_An), strict=True)}


def notes(sweep: Sequence[Line]) -> list[str]:
    """What is to be known beside the table, a sentence each."""
    said = []
    n_twin, n_baseline = (
        sum(getattr(line, name) is not None for line in sweep) for name in ("beside_twin", "beside_baseline")
    )
    if n_twin or n_baseline:
        said.append(
            "Words are corrected for the comparisons of their column (Holm), and its intervals hold together (max-t, "
            "95%). Rank is where a line may stand; the lines are in the order of their means, which is less sure. The "
            "smallest effect is what these seeds show with 80% power, beside the deviation of the paired differences; "
            "seeds to decide are in all, were the measured difference and deviation the true ones."
        )
    elif sweep and len(sweep[0].seeds) == 1:
        said.append("One seed gives no verdict: the differences have no interval over seeds.")
    if len({line.text for line in sweep}) > 1:
        said.append("Lines of different text or tokenizer have no common ranks, and no common baseline.")
    leaking = [line.label for line in sweep if _leaks(line)]
    if leaking:
        said.append(f"Not comparable, because the router sees later tokens: {', '.join(leaking)}.")
    return said


def _leaks(line: Line) -> bool:
    return (line.leak or 0) > verdict.LEAK


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
        "" if line.rank is None else "–".join(map(str, dict.fromkeys(line.rank))),
        f"{line.loss:.3f}" + ("" if line.loss_half is None else f" ± {line.loss_half:.3f}"),
        _difference(line.difference, line.beside_twin),
        _difference(line.against, line.beside_baseline),
        "" if line.detectable is None else f"{line.detectable:.3f} ({line.deviation:.3f})",
        tables.number(line.seeds_needed, ",d"),
        tables.number(line.active, ",d"),
        tables.number(line.total, ",d"),
        tables.number(line.max_vio, ".2f"),
        tables.number(line.effective_experts, ".2f"),
        tables.number(line.skipped, ".1%"),
        tables.number(line.dropped, ".1%"),
        f"{line.tokens_per_s:,.0f}",
        "" if line.leak is None else verdict.scientific(line.leak),
    )


def _difference(mean: float | None, judgement: Judgement | None) -> str:
    """A difference with its interval and its word, as far as they are known."""
    if mean is None or judgement is None:
        return "" if mean is None else verdict.signed(mean)
    _, low, high = judgement.interval
    return f"{verdict.signed(mean)} ({verdict.signed(low)} to {verdict.signed(high)}), {judgement.said()}"
