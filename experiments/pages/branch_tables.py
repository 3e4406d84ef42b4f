"""Branch-train-mix as tables: what every arm came to, by domain, and which expert took which domain at each stage."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from experiments.stats.branching import Row, against, arms_of, at_home, bits, by_chance, losses, of_arm, shares
from experiments.stats.decide import Judgement
from experiments.stats.statistics import Interval, t_interval
from experiments.study.branches import CONTROLS

MIXED = "mixed"
AT_HOME = ("merged", "routed", "mixed")  # whose experts were made of a domain each
ROUTED = (*AT_HOME, "upcycled", "scratch")  # whose routers choose


class Table(NamedTuple):
    """What `print_table` draws."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int = 1


def all_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """By name, in the order in which they are read."""
    return {
        "arms": arms(rows),
        "domains": by_domain(rows),
        "copies": copies(rows),
        "experts": specialised(rows),
        "shares": shares_of(rows),
    }


def arms(rows: Sequence[Row]) -> Table:
    """A row per arm: cost, loss, and how `mixed` does against it, by seed."""
    names = arms_of(rows)
    cells = []
    for arm in names:
        first = of_arm(rows, arm)[0]
        against_it = said(against(rows, MIXED, arm)) if MIXED in names and arm != MIXED else ("", "")
        cells.append((arm, f"{first.steps:,}", f"{first.flops:.3g}", interval(losses(rows, arm)), *against_it))
    return Table(("arm", "last steps", "training FLOPs", "loss", "mixed minus it", "mixed is"), cells)


def by_domain(rows: Sequence[Row]) -> Table:
    """A row per arm, the mean loss of each domain over seeds; then how `mixed` does against controls in each."""
    names, domains = arms_of(rows), list(rows[0].domains)
    cells = [(arm, *(f"{losses(rows, arm, domain).mean:.3f}" for domain in domains)) for arm in names]
    for control in [control for control in CONTROLS if control in names and MIXED in names]:
        cells.append((f"mixed minus {control}", *(difference(against(rows, MIXED, control, d)) for d in domains)))
    return Table(("arm", *domains), cells)


def copies(rows: Sequence[Row]) -> Table:
    """A row per copy: what its loss in each domain is above the dense model's, the mean over seeds."""
    domains = list(rows[0].domains)
    names = list(dict.fromkeys(row.arm for row in rows if row.arm.startswith("copy-")))
    cells = [
        (name.replace("-", " of ", 1), *(f"{against(rows, name, 'dense', domain).mean:+.3f}" for domain in domains))
        for name in names
    ]
    return Table(("copy minus dense", *domains), cells)


def specialised(rows: Sequence[Row]) -> Table:
    """A row per stage: how much of a domain its own expert takes, and what experts tell of domains."""
    cells = []
    for arm in [arm for arm in ROUTED if of_arm(rows, arm)]:
        runs = of_arm(rows, arm)
        home = interval(t_interval([at_home(row) for row in runs])) if arm in AT_HOME else "no expert is a domain's"
        chance = f"{by_chance(runs[0]):.3f}"
        cells.append((arm, home, chance, interval(t_interval([bits(row) for row in runs]))))
    return Table(("stage", "share at the domain's own expert", "by chance", "bits of domain"), cells)


def shares_of(rows: Sequence[Row]) -> Table:
    """A row per stage, layer and domain, of the first seed: the share of the domain's tokens at each expert."""
    domains = list(rows[0].domains)
    return Table(
        ("stage", "layer", "domain", *(f"expert {e} ({domain})" for e, domain in enumerate(domains))),
        list(_share_rows(rows)),
        3,
    )


def _share_rows(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in (of_arm(rows, arm)[0] for arm in ROUTED if of_arm(rows, arm)):
        for layer in range(len(row.counts or [])):
            for domain, share_E in zip(row.domains, shares(row, layer).tolist(), strict=True):
                yield row.arm, str(layer), domain, *(f"{share:.2f}" for share in share_E)


def interval(of: Interval) -> str:
    """A mean, and half of its 95% interval where there are seeds for one."""
    half = f" ± {of.high - of.mean:.3f}" if of.high < float("inf") else ""
    return f"{of.mean:.3f}{half}"


def difference(of: Judgement) -> str:
    """A mean difference with its interval."""
    half = f" ± {of.high - of.mean:.3f}" if of.high is not None else ""
    return f"{of.mean:+.3f}{half}"


def said(of: Judgement) -> tuple[str, str]:
    """A difference, and the word for it."""
    return difference(of), of.word
