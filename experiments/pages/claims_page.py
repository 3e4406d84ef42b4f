"""docs/claims.md: the ledger of published claims, from the rows of finished runs."""

from collections.abc import Sequence

from experiments.pages.tables import markdown
from experiments.stats import decide
from experiments.stats.ledger import CLAIMS, CONFIRMED, NOT_RUN, QUANTITIES, Claim, Finding, Row, findings
from experiments.stats.verdict import scientific, signed

HEADINGS = ("claim", "paper", "compared", "expected", "effect (95% over seeds)", "verdict", "could have shown")
MARGIN = 0.01  # nats per token, declared in the study's file

INTRODUCTION = """# Published claims, put to the test

What papers say of Mixture-of-Experts models, tried here at a laptop's size. A small model may honestly differ from a
large one: a verdict is of the scale that stands below, and no more. Runs of one seed are paired: same batches, same
initial weights where models have them in common.

*Confirmed* and *contradicted* are of effects whose 95% interval over seeds leaves out 0, or that a margin of
{margin:g} nats, declared beforehand, holds (*same*). All else is *inconclusive*, with the seeds that would decide at
the effect and spread that were measured. *Could have shown* is the smallest effect that this many seeds find in four of
five studies. Verdicts are not corrected for how many there are: of twenty true nulls one would be called an effect.
"""


SCALING = "Scaling forms (2203.15556; 2402.07871; 2502.05172; 2202.01169) have a page: [scaling.md](scaling.md).\n"


def page(rows: Sequence[Row], gpu_rows: Sequence[Row] = (), margin: float = MARGIN) -> str:
    """The whole page."""
    tiers = [tier_section(tier, result, margin) for tier, result in (("cpu", rows), ("gpu", gpu_rows))]
    return "\n".join([INTRODUCTION.format(margin=margin), *tiers, SCALING])


def tier_section(tier: str, rows: Sequence[Row], margin: float) -> str:
    """A tier's table, what it was made with, and its scale."""
    command = f"`python -m experiments.claims tier={tier}`"
    title = {"cpu": "On a CPU", "gpu": "On a GPU"}[tier]
    if not rows:
        return f"## {title}\n\nNot run: {command}.\n"
    lines = [line for claim in CLAIMS for line in claim_lines(claim, rows, tier, margin)]
    return f"## {title}\n\n{summary(rows, tier, margin)}\n\n{markdown(HEADINGS, lines)}\n{scale(rows)}\n\n{command}\n"


def summary(rows: Sequence[Row], tier: str, margin: float) -> str:
    """How many claims came out how, by their first contrast."""
    verdicts = [made[0].verdict if (made := findings(claim, rows, tier, margin)) else NOT_RUN for claim in CLAIMS]
    counted = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(sorted(verdicts))}
    return f"Of {len(CLAIMS)} claims: " + ", ".join(f"{n} {verdict}" for verdict, n in counted.items()) + "."


def scale(rows: Sequence[Row]) -> str:
    """At what size, on what, of which code."""
    base = next((row for row in rows if row.arm == "top-k"), rows[0])
    seeds = sorted({row.seed for row in rows})
    commits = ", ".join(sorted({row.commit[:10] for row in rows if row.commit})) or "unknown"
    devices = ", ".join(sorted({row.device for row in rows}))
    return (
        f"Scale: {base.active:,} active of {base.total:,} parameters, {base.tokens:,} tokens, {base.flops:.2g} FLOPs "
        f"of training; {len(rows)} runs, seeds {', '.join(map(str, seeds))}; {base.precision}, {devices}, torch "
        f"{base.versions.get('torch', '?')}; commit {commits}."
    )


def claim_lines(claim: Claim, rows: Sequence[Row], tier: str, margin: float) -> list[tuple[str, ...]]:
    """A line for each contrast; the claim's words stand on the first."""
    made = findings(claim, rows, tier, margin)
    if not made:
        return [(claim.text, claim.papers, claim.missing, "", "", NOT_RUN, "")]
    names = [(claim.text, claim.papers), *[("", "")] * (len(made) - 1)]
    return [(*name, *contrast_cells(result)) for name, result in zip(names, made, strict=True)]


def contrast_cells(result: Finding) -> tuple[str, ...]:
    """What was compared, what was expected, the effect, the verdict, and what could have been shown."""
    contrast, judged = result.contrast, result.judgement
    quantity = QUANTITIES[contrast.quantity]
    against = contrast.against if isinstance(contrast.against, str) else f"{contrast.against:g}"
    compared = f"{contrast.arm} − {against}: {quantity.name}"
    if judged is None:
        return compared, contrast.expected, "", result.verdict, ""
    if isinstance(contrast.against, float) and contrast.quantity == "leak":  # spans powers of ten: no interval
        leak = judged.mean + contrast.against
        return compared, contrast.expected, f"{scientific(max(leak, 0.0))} {quantity.unit}", words(result), ""
    effect = signed(judged.mean)
    if judged.low is not None and judged.high is not None:
        effect += f" ({signed(judged.low)} to {signed(judged.high)})"
    effect += f" {quantity.unit}" if quantity.unit else ""
    shown = f"{judged.detectable:.3f}" if judged.detectable else ""
    return compared, contrast.expected, effect, words(result), shown


def words(result: Finding) -> str:
    """The verdict, and what else a reader must know of it."""
    judged = result.judgement
    assert judged is not None, "nothing was run"
    if result.all_seeds is not None:
        return f"{result.verdict} (in {'each' if result.all_seeds else 'not each'} of {judged.n} seeds)"
    if not judged.mean and not judged.deviation and judged.n > 1:
        return f"{result.verdict}: no difference in any seed"
    if judged.word == decide.INCONCLUSIVE:
        more = (
            f"about {judged.seeds_needed} seeds would decide" if judged.seeds_needed else "no number of seeds is named"
        )
        return f"{result.verdict}; {more}"
    if judged.word == decide.SINGLE:
        return f"{result.verdict}: one seed gives no verdict"
    if judged.equivalent and result.verdict == CONFIRMED and result.contrast.expected != "same":
        return f"{result.verdict}, though within the margin"
    return result.verdict
