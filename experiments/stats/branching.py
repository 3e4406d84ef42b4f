"""What branch-train-mix came to: losses over seeds, one arm against another, and what experts took of which domain.

Letters beyond the glossary: L MoE layers · M domains.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.stats.decide import Judgement, judge
from experiments.stats.statistics import Interval, t_interval
from experiments.study.branches import ARMS
from moe.analysis.specialisation import information, key_specialisation


@dataclass(frozen=True)
class Row:
    """A model of a study: what it cost, and how it does on the validation text of all domains."""

    seed: int
    arm: str  # of `ARMS`, or copy-DOMAIN
    steps: int  # of its last stage
    flops: float | None  # of training, all stages before it included; None for a copy
    loss: float  # nats per token
    domains: dict[str, float]  # the same by domain
    counts: list[list[list[int]]] | None = None  # rows by (MoE layer, domain, expert); None for a dense model
    k: int | None = None  # experts of a token
    device: str = ""

    def tree(self) -> dict[str, Any]:
        """As it stands in a file."""
        return dataclasses.asdict(self)


def of_arm(rows: Sequence[Row], arm: str) -> list[Row]:
    """Its rows by seed."""
    return sorted((row for row in rows if row.arm == arm), key=lambda row: row.seed)


def arms_of(rows: Sequence[Row]) -> list[str]:
    """Those that there are, in the order of `ARMS`."""
    return [arm for arm in ARMS if of_arm(rows, arm)]


def loss_of(row: Row, domain: str) -> float:
    """In all ("") or in a domain."""
    return row.domains[domain] if domain else row.loss


def losses(rows: Sequence[Row], arm: str, domain: str = "") -> Interval:
    """The mean over seeds, with its 95% interval."""
    return t_interval([loss_of(row, domain) for row in of_arm(rows, arm)])


def against(rows: Sequence[Row], arm: str, other: str, domain: str = "") -> Judgement:
    """An arm's loss minus another's by seed; below 0 the arm is better."""
    pairs = zip(of_arm(rows, arm), of_arm(rows, other), strict=True)
    return judge([loss_of(row, domain) - loss_of(than, domain) for row, than in pairs])


def shares(row: Row, layer: int) -> Tensor:
    """The share of each domain's tokens that an expert takes in the `layer`th MoE layer, (M, E)."""
    count_LME, k = routed(row)
    return key_specialisation(count_LME[layer], k)


def at_home(row: Row) -> float:
    """The share of tokens that the expert made of their own domain takes, the mean over domains and layers; of a
    merged model. Chance is `by_chance`."""
    n_layers = len(routed(row)[0])
    return float(torch.stack([shares(row, layer).diagonal() for layer in range(n_layers)]).mean())


def by_chance(row: Row) -> float:
    """The share of tokens that an expert takes without any preference, K / E."""
    count_LME, k = routed(row)
    return k / count_LME.shape[-1]


def bits(row: Row) -> float:
    """What an expert tells of the domain of its row, in bits, the mean over layers."""
    count_LME = routed(row)[0]
    return sum(information(count_ME) for count_ME in count_LME) / len(count_LME)


def routed(row: Row) -> tuple[Tensor, int]:
    """Rows by (MoE layer, domain, expert), and how many experts a token takes."""
    if row.counts is None or row.k is None:
        raise ValueError(f"{row.arm} is a dense model, and has no experts")
    return torch.tensor(row.counts), row.k
