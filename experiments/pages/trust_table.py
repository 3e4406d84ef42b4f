"""Which metrics of what experts are for may be believed: tables of what they made of planted routers."""

from collections.abc import Iterator, Sequence

from experiments.stats.recovery import DECISIVE, HARDER, NAMES, NOISES, PLAIN, Line, answers, fooled, matches, needed
from moe.analysis.caveats import CAVEATS

ASKED = {"domain": "domains", "read": "the token read", "predicted": "the token predicted"}
HEADINGS = (
    "metric", "asked of", "not told apart", "nor, where it is harder", "documents", "of noisier routers", "drawn",
)  # fmt: skip
CANNOT = ("metric", "what it cannot tell")
NAMES_HEADINGS = ("text", "names", "experts rightly named", "false names a page")
LEFT = 4


def rows(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """A row per metric: whom it mistakes, how many documents it needs, whether it is drawn."""
    right = answers(lines)
    for metric, caveat in CAVEATS.items():
        decisive = next(line for line in lines if line.metric == metric and matches(line, DECISIVE))
        usual = fooled(decisive)
        harder = [(name, fooled(line)) for name, line in in_settings(lines, metric) if set(fooled(line)) - set(usual)]
        also = "; ".join(f"{name}: {', '.join(set_of(routers, usual))}" for name, routers in harder)
        if not caveat.asks:
            yield metric, "domains, as a control", ", ".join(usual), "", "", "", "for its own question"
            continue
        sizes = [size(needed(lines, metric, noise)) for noise in NOISES]
        yield metric, ASKED[caveat.asks], ", ".join(usual), also, *sizes, "yes" if right[metric] else "no"


def in_settings(lines: Sequence[Line], metric: str) -> Iterator[tuple[str, Line]]:
    """A metric's line in each of the harder settings, with what is harder."""
    for name, setting in HARDER.items():
        yield name, next(line for line in lines if line.metric == metric and matches(line, setting))


def set_of(routers: dict[str, float], without: dict[str, float]) -> list[str]:
    """The names of routers that are not among others."""
    return [router for router in routers if router not in without]


def size(line: Line | None) -> str:
    """Documents, and their tokens."""
    return "never" if line is None else f"{line.documents} ({line.tokens:,.0f} tokens)"


def name_rows(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """A row per setting and kind of name."""
    for text, setting in {"plain": PLAIN, **HARDER}.items():
        for kind in NAMES:
            line = next(line for line in lines if line.metric == kind and matches(line, setting))
            assert line.wrong is not None
            false = {router: value for router, value in line.wrong.items() if value > 0}
            yield text, kind, f"{line.right:.0%}", ", ".join(f"{router} {value:.1f}" for router, value in false.items())


def caveat_rows() -> Iterator[tuple[str, str]]:
    """A row per metric: what it cannot tell."""
    for metric, caveat in CAVEATS.items():
        yield metric, caveat.cannot_tell
