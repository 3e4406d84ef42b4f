"""Tables of what steps on many GPUs would take, and of how published numbers are predicted."""

from collections.abc import Iterator, Sequence

from experiments.stats.planner import gigabytes
from experiments.stats.published import UNCHECKED, Row
from experiments.stats.scale_out import CHANGE, Effect, Line

HEADINGS = (
    "GPUs", "copies × shard, ep", "routing", "loads", "nodes of a token", "busiest rank", "dropped", "all-to-all",
    "step", "against even top-k", "forward", "tokens/s of a GPU", "TFLOP/s", "memory",
)  # fmt: skip
EFFECTS = ("constant", f"{CHANGE:.0%} lower", f"{CHANGE:.0%} higher")
CHECKS = ("published", "machine", "", "is", "predicted", "error", "", "source")
LEFT, CHECKS_LEFT = 4, 2


def cells(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """The lines of ways of routing."""
    for line in lines:
        memory = gigabytes(line.memory) + ("" if line.fits else ", too much")
        yield (
            f"{line.gpus:,}", f"{line.replicate} × {line.shard}, {line.ep}", line.routing, line.loads,
            f"{line.nodes:.2f}", f"{line.imbalance:.2f}×", f"{line.dropped:.1%}" if line.dropped else "",
            f"{line.exchange:.0%}", time(line.seconds), f"{line.slower:+.1%}", time(line.forward),
            f"{line.tokens_per_second:,.0f}", f"{line.tflops:,.0f}", memory,
        )  # fmt: skip


def effect_cells(effects: Sequence[Effect]) -> Iterator[tuple[str, ...]]:
    """The lines of constants."""
    for effect in effects:
        yield effect.what, f"{effect.lower:+.1%}", f"{effect.higher:+.1%}"


def check_cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """The lines of published numbers, and of what none was found for."""
    for row in rows:
        form = ",.2f" if row.high < 10 else ",.0f"
        published = f"{row.low:{form}}" if row.low == row.high else f"{row.low:{form}} to {row.high:{form}}"
        inside = "inside" if row.low != row.high and not row.error else f"{row.error:+.1%}"
        yield (
            row.what, row.machine, row.unit, published, f"{row.predicted:{form}}", inside, row.verdict, row.source,
        )  # fmt: skip
    for what in UNCHECKED:
        yield what, "", "", "", "", "", "unchecked", ""


def summary(rows: Sequence[Row]) -> str:
    """How many rows are within reach, fitted ones left out."""
    free = [row for row in rows if not row.fitted]
    near = sum(row.verdict != "missed" for row in free)
    return f"Of {len(free)} rows that nothing was fitted to, {near} are within 15%; {len(rows) - len(free)} are fitted."


def time(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"
