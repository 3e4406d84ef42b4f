"""A line per kind of simulated study: how often intervals hold the truth, and how often words are wrong."""

from collections.abc import Iterator, Sequence

from experiments.stats.simulation import CHECKED, MANY, Line

HEADINGS = (
    "noise", "true difference", "seeds", "95% interval holds it", "wrong word", f"all of {MANY} intervals",
    f"any of {MANY} words wrong",
)  # fmt: skip
RANKS = ("noise", "seeds", f"all ranks of {MANY} models held")


def rows(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """The lines of one comparison and of many."""
    names = [name for name in CHECKED if name != "all ranks covered"]
    shares = {(line.noise, line.effect, line.seeds, line.what): line.share for line in lines}
    kinds = dict.fromkeys((line.noise, line.effect, line.seeds) for line in lines if line.what in names)
    for kind in kinds:
        noise, effect, seeds = kind
        yield noise, effect, str(seeds), *(f"{shares[*kind, name]:.1%}" for name in names)


def rank_rows(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """The lines of ranks."""
    for line in lines:
        if line.what == "all ranks covered":
            yield line.noise, str(line.seeds), f"{line.share:.1%}"
