"""Published claims about Mixture-of-Experts models, and what finished runs say of each.

A claim is a list of contrasts between two arms of a study (`conf/experiment/claims.yaml`), or of one arm with a number.
Each has a quantity and a direction that the papers expect; runs of one seed are paired. `findings` judges them all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from experiments.stats import decide
from experiments.stats.decide import Judgement, judge
from experiments.stats.speedup import first_reach
from experiments.stats.verdict import LEAK

CONFIRMED, CONTRADICTED, INCONCLUSIVE, NOT_RUN = "confirmed", "contradicted", "inconclusive", "not run"


@dataclass(frozen=True)
class Row:
    """What is kept of a finished run. None is what a run of its kind does not have."""

    id: str  # the job's, a hash of its settings
    arm: str
    seed: int
    loss: float  # of the validation text, nats per token
    bpb: float
    steps: int
    tokens: int
    active: int  # parameters
    total: int
    flops: float  # of all the training
    curve: list[list[float]]  # [step, seconds of training, loss] at every evaluation
    max_vio: float | None = None  # of the whole validation text, the mean of the MoE layers
    dead: float | None = None  # experts without a row in the validation text, the mean of the MoE layers
    specialisation: float | None = None  # bits that a row's expert tells of its domain, the mean of the MoE layers
    leak: float | None = None  # `moe.eval.evaluate.causal_leak`
    settled: float | None = None  # share of the final choices of experts that were made after a tenth of the steps
    commit: str | None = None
    device: str = ""
    precision: str = ""
    versions: dict[str, str] = field(default_factory=dict)


class Quantity(NamedTuple):
    """Something of a run, or of a run and the one it is compared with, that is subtracted."""

    name: str
    unit: str
    of: Callable[[Row, Row | None], float | None]


def _log_seconds(row: Row, other: Row | None) -> float | None:
    """ln of the seconds in which a run has the other's final loss, over the other's; None if it never has it."""
    if other is None:
        return 0.0
    reached = first_reach([point[1] for point in row.curve], [point[2] for point in row.curve], other.loss)
    return None if reached is None else math.log(reached / other.curve[-1][1])


QUANTITIES = {
    "loss": Quantity("validation loss", "nats", lambda row, _: row.loss),
    "max_vio": Quantity("MaxVio", "", lambda row, _: row.max_vio),
    "dead": Quantity("dead experts", "", lambda row, _: row.dead),
    "specialisation": Quantity("domain specialisation", "bits", lambda row, _: row.specialisation),
    "leak": Quantity("causal leak", "logits", lambda row, _: row.leak),
    "settled": Quantity("choices settled after a tenth", "", lambda row, _: row.settled),
    "log_seconds": Quantity("ln of the time to the other's loss", "", _log_seconds),
}


@dataclass(frozen=True)
class Contrast:
    """`arm` minus `against`, another arm or a number, of a quantity; and how the papers expect it to come out."""

    arm: str
    against: str | float
    expected: str  # lower | higher | same
    quantity: str = "loss"


@dataclass(frozen=True)
class Claim:
    """A published claim. Its first contrast decides; the others say more."""

    text: str
    papers: str
    contrasts: list[Contrast]
    tiers: tuple[str, ...] = ("cpu", "gpu")
    missing: str = ""  # why it is not run where its tier is not among these


CLAIMS = [
    Claim(
        "An MoE beats the dense model of the same active parameters, step for step",
        "2101.03961; 2505.20225",
        [Contrast("top-k", "dense", "lower")],
    ),
    Claim(
        "... and by the clock",
        "2409.02060",
        [Contrast("top-k", "dense", "lower", "log_seconds")],
        tiers=("gpu",),
        missing="its runs need a machine to themselves",
    ),
    Claim(
        "More experts at the same K help",
        "2101.03961; 2502.05172",
        [Contrast("more-experts", "top-k", "lower"), Contrast("top-k", "fewer-experts", "lower")],
    ),
    Claim(
        "Fine-grained experts beat coarse ones at equal active parameters, and the gain flattens",
        "2402.07871",
        [Contrast("fine-grained", "top-k", "lower"), Contrast("finer-grained", "fine-grained", "same")],
    ),
    Claim(
        "A loss-free bias balances better than the auxiliary loss, at no loss in quality",
        "2408.15664",
        [
            Contrast("sigmoid-bias", "sigmoid-aux", "lower", "max_vio"),
            Contrast("sigmoid-bias", "sigmoid-aux", "same"),
        ],
    ),
    Claim(
        "Without balancing, routing collapses: experts die and the loss is higher",
        "1701.06538; 2101.03961",
        [Contrast("no-balance", "top-k", "higher", "dead"), Contrast("no-balance", "top-k", "higher")],
    ),
    Claim(
        "The router z-loss keeps bf16 training stable under a high learning rate",
        "2202.08906",
        [Contrast("z-under-stress", "no-z-under-stress", "lower")],
        tiers=("gpu",),
        missing="bf16 is emulated on most processors",
    ),
    Claim(
        "Balancing over the global batch specialises experts more than over micro-batches, at a lower loss",
        "2501.11873",
        [
            Contrast("global-batch-balance", "micro-batch-balance", "higher", "specialisation"),
            Contrast("global-batch-balance", "micro-batch-balance", "lower"),
        ],
    ),
    Claim(
        "A shared expert helps (DeepSeekMoE; OLMoE finds slightly against it)",
        "2401.06066; 2409.02060",
        [Contrast("shared-expert", "top-k", "lower")],
    ),
    Claim(
        "The form of a learned router hardly matters; a hash or a random one costs quality",
        "2604.14419; 2106.04426",
        [
            Contrast("hash", "top-k", "higher"),
            Contrast("random", "top-k", "higher"),
            Contrast("cosine", "top-k", "same"),
            Contrast("sigmoid-aux", "top-k", "same"),
        ],
    ),
    Claim(
        "Expert choice leaks the future (soft routing as the positive control, top-K as the negative)",
        "2202.09368; 2308.00951",
        [
            Contrast("expert-choice", LEAK, "higher", "leak"),
            Contrast("soft", LEAK, "higher", "leak"),
            Contrast("top-k", LEAK, "lower", "leak"),
        ],
    ),
    Claim("ReLU routing beats top-K", "2412.14711", [Contrast("relu", "top-k", "lower")]),
    Claim(
        "Mixture-of-Depths matches at equal training FLOPs",
        "2404.02258",
        [Contrast("mod", "top-k", "same")],
    ),
    Claim(
        "Upcycling wins early, and training from scratch overtakes",
        "2212.05055; 2409.02060",
        [],
        tiers=(),
        missing="its second stage starts from runs of the first, which a study's plan does not have yet",
    ),
    Claim(
        "Routers saturate early: most of the final routing is there after a tenth of training",
        "2409.02060; 2505.20225",
        [Contrast("top-k", 0.5, "higher", "settled")],
    ),
]


@dataclass(frozen=True)
class Finding:
    """What the runs say of a contrast."""

    contrast: Contrast
    verdict: str
    judgement: Judgement | None = None  # of the paired differences; None where nothing was run
    all_seeds: bool | None = None  # for a leak: whether it is on the expected side in every seed


def finding(contrast: Contrast, rows: Sequence[Row], margin: float) -> Finding:
    """The verdict on a contrast from the runs of its arms that have a seed in common."""
    differences = paired(contrast, rows)
    if not differences:
        return Finding(contrast, NOT_RUN)
    quantity, sign = contrast.quantity, -1 if contrast.expected == "higher" else 1
    judged = judge(differences, margin if quantity == "loss" else None)
    if quantity == "leak":  # the same in every seed or not: no interval of a mean says that
        sides = {difference * sign < 0 for difference in differences}
        return Finding(contrast, CONFIRMED if sides == {True} else CONTRADICTED, judged, sides == {True})
    return Finding(contrast, _verdict(contrast.expected, judged, sign), judged)


def _verdict(expected: str, judged: Judgement, sign: int) -> str:
    """A word for differences of which the papers expect that they are lower (or, with their sign turned, higher) than
    0, or as good as 0."""
    if judged.n > 1 and not judged.mean and not judged.deviation:  # not the least difference in any seed
        return CONFIRMED if expected == "same" else CONTRADICTED
    if judged.word in (decide.SINGLE, decide.INCONCLUSIVE):
        return INCONCLUSIVE
    if expected == "same":
        return CONFIRMED if judged.equivalent else CONTRADICTED
    if judged.word == decide.EQUIVALENT:  # too small to matter, whichever way it points
        return CONTRADICTED
    return CONFIRMED if judged.mean * sign < 0 else CONTRADICTED


def paired(contrast: Contrast, rows: Sequence[Row]) -> list[float]:
    """The quantity's differences, one for each seed that has all it takes, in order of the seeds."""
    of = QUANTITIES[contrast.quantity].of
    arms = {name: {row.seed: row for row in rows if row.arm == name} for name in (contrast.arm, str(contrast.against))}
    differences = []
    for seed, row in sorted(arms[contrast.arm].items()):
        if isinstance(contrast.against, float):
            value, other = of(row, None), contrast.against
        elif seed in arms[contrast.against]:
            partner = arms[contrast.against][seed]
            value, other = of(row, partner), of(partner, None)  # type: ignore[assignment]
        else:
            continue
        if value is not None and other is not None and math.isfinite(value - other):
            differences.append(value - other)
    return differences


def findings(claim: Claim, rows: Sequence[Row], tier: str, margin: float) -> list[Finding]:
    """The verdicts on a claim's contrasts; none where its tier does not run it."""
    return [finding(contrast, rows, margin) for contrast in claim.contrasts] if tier in claim.tiers else []
