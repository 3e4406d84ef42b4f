"""What runs that learnt more and more kinds of task came to, as a table."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.stats.statistics import Interval, t_interval

KINDS = (1, 2, 4, 8)
HEADINGS = ("kinds of task", "other kinds, nats", "less than with one", "its own eight kinds, nats")


class Row(NamedTuple):
    """What a run came to, in nats per token of the answers."""

    kinds: int  # 0: the base model, before fine-tuning
    seed: int
    tasks: list[str]
    others: float  # of the kinds that no run learnt
    learnt: float  # of held-out questions of the eight kinds


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each number of kinds: means over the seeds with t intervals, differences by seed."""
    table: list[tuple[str, ...]] = []
    by_kinds = {kinds: [row for row in rows if row.kinds == kinds] for kinds in (0, *KINDS)}
    for kinds, runs in by_kinds.items():
        if not runs:
            continue
        others, learnt = (t_interval([getattr(row, name) for row in runs]) for name in ("others", "learnt"))
        less = ""
        if kinds > 1:
            one = {row.seed: row.others for row in by_kinds[1]}
            less = shown(t_interval([one[row.seed] - row.others for row in runs]))
        if kinds == 0:  # one model, whatever the seed
            others, learnt = (interval._replace(low=interval.mean, high=interval.mean) for interval in (others, learnt))
        table.append((str(kinds) if kinds else "none", shown(others), less, shown(learnt)))
    return table


def shown(interval: Interval) -> str:
    """A mean and its interval."""
    mean, low, high = interval
    return f"{mean:.3f}" if low == high else f"{mean:.3f} ({low:.3f} to {high:.3f})"
