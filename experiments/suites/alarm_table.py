"""What injected faults say of the doctor's alarms: a line per fault, and a line per alarm."""

import statistics
from collections.abc import Iterator, Sequence

from experiments.suites.faults import FAULTS, Row
from moe.analysis.doctor import KINDS

BY_FAULT = ("fault", "told of", "after", "by", "loss shows it", "lead", "loss at the end")
BY_ALARM = ("alarm", "runs with a fault it may tell", "of those told", "healthy runs", "false alarms")


def fault_rows(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Per fault: in how many runs an alarm that fits was raised, how many steps after it began (median), the alarms
    that were, in how many runs the loss shows it, how many steps earlier the alarm was, and what the loss ends at,
    against the healthy twin's."""
    for fault in FAULTS:
        runs = [row for row in rows if row.fault == fault.name]
        if not runs:
            continue
        told = [row.rightly for row in runs if row.rightly is not None]
        shown = [row.shows for row in runs if row.shows is not None]
        leads = [row.shows - row.rightly for row in runs if row.shows is not None and row.rightly is not None]
        kinds = {alarm.kind for row in runs for alarm in row.alarms if alarm.kind in fault.expects}
        yield (
            fault.name,
            f"{len(told)} of {len(runs)}",
            f"{statistics.median(told) - fault.begins + 1:.0f} steps" if told else "–",
            ", ".join(kind for kind in KINDS if kind in kinds) or "–",
            f"{len(shown)} of {len(runs)}",
            f"{statistics.median(leads):+.0f} steps" if leads else "–",
            f"{statistics.median(row.final for row in runs):+.3f}",
        )


def alarm_rows(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Per alarm: runs with a fault that it may tell, and how many it told; healthy runs, and those in which it was
    raised."""
    expects = {fault.name: fault.expects for fault in FAULTS}
    healthy = [row for row in rows if not row.fault]
    raised = lambda row, kind: any(alarm.kind == kind for alarm in row.alarms)
    for kind in KINDS:
        faulty = [row for row in rows if row.fault and kind in expects[row.fault]]
        told = sum(raised(row, kind) for row in faulty)
        yield kind, str(len(faulty)), str(told), str(len(healthy)), str(sum(raised(row, kind) for row in healthy))
