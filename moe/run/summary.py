"""What a run says of itself in numbers: a line of metrics.jsonl for every step, and summary.json at its end.

Whoever writes, shows or compares a run takes these records by name. The files are JSON, where a number that is not
finite is null.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.errors import BadInput
from moe.model.cost import Flops, Size
from moe.run import jsonl

# Raised when a field goes or means another thing; one that only comes has a default. A file without a number is of 1.
SCHEMA = 1


@dataclass(frozen=True)
class Score:
    """How well a text was predicted."""

    loss: float  # nats per token
    bpb: float  # bits per byte of the text


@dataclass(frozen=True)
class DomainScore(Score):
    """The same of one domain's part of the validation text."""

    tokens: int


@dataclass(frozen=True)
class Validation(Score):
    """The same of all the validation text, and of each domain that it has."""

    domains: dict[str, DomainScore]


@dataclass(frozen=True)
class LayerMetrics:
    """What one MoE layer did with what was counted: one optimiser step, or a whole validation."""

    layer: int  # from 0, among all layers
    max_vio: float
    load_entropy: float
    effective_experts: float
    dead: int
    dropped: float  # share of the rows
    skipped: float  # share of the tokens, that no expert took
    # what experts computed per token, in rows at one of mean width; cheap ones compute none. None in older files
    rows: float | None = None
    losses: dict[str, float] = field(default_factory=dict)  # of a step, unweighted, by name as in MetricsLine
    starved: int | None = None  # experts with less than a tenth of a fair load, dead ones among them
    # What log.doctor watches in training; None where it does not, or the router has nothing of the kind
    bias: float | None = None  # the largest selection bias, without its sign
    entropy: float | None = None  # of a token's probabilities, the mean, over ln E; every log.every steps
    weakest: float | None = None  # the smallest gradient norm of an expert over the median's; every log.every steps


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong in training, and what to try (moe/analysis/doctor.py)."""

    kind: str
    step: int
    layer: int | None  # among all layers; None: the whole model
    evidence: str  # with its numbers
    cause: str  # the likely one
    advice: str  # the first setting to try

    def sentence(self) -> str:
        """For a terminal."""
        where = "" if self.layer is None else f" in layer {self.layer}"
        return f"{self.kind}{where} at step {self.step}: {self.evidence}. Likely {self.cause}; try {self.advice}."


@dataclass(frozen=True)
class ExpertLoad:
    """Where the rows of the last validation went; a soft router's are every token at every expert."""

    layers: list[int]  # the MoE layers, from 0, among all layers
    domains: list[str]
    counts: list[list[list[int]]]  # routed rows by (MoE layer, domain, expert); null, copy and constant experts too
    routing: list[LayerMetrics] = field(default_factory=list)  # of the whole validation text

    def expert_counts(self) -> list[list[int]]:
        """The same by (MoE layer, expert), summed over the domains."""
        return [[sum(column) for column in zip(*by_domain, strict=True)] for by_domain in self.counts]


@dataclass(frozen=True)
class StepCounts:
    """A line of routing/counts.jsonl: where the rows of one step went."""

    step: int
    counts: list[list[int]]  # routed rows by (MoE layer, expert), as in `ExpertLoad`


@dataclass(frozen=True)
class MetricsLine:
    """One step of a run, or its beginning (step 0), of which no more is known than a validation. A loss is the mean
    over the step's tokens, in nats per token, and None or NaN where it was not finite."""

    step: int
    seconds: float  # of training so far, without validations and checkpoints
    loss: float | None = None  # what was minimised
    lm_loss: float | None = None  # next-token loss
    losses: dict[str, float] = field(default_factory=dict)  # unweighted, by name: aux, z, ...; flat in the file
    grad_norm: float | None = None
    lr: float | None = None
    tokens_per_s: float | None = None
    skipped: int | None = None  # steps not taken so far, because they were not finite
    layers: list[LayerMetrics] | None = None  # the MoE layers
    alarms: list[Alarm] | None = None  # that this step raised
    answers: dict[str, float] | None = None  # of objectives other than lm, figures by name (moe/train/objective.py)
    val: Validation | None = None


@dataclass(frozen=True)
class Summary:
    """A finished run: what was trained, on what, where, and how good it is."""

    name: str
    seed: int
    model: dict[str, Any]  # the settings, as in config.yaml
    params: Size
    flops: Flops  # per token, with `rows` where the router does not fix them
    steps: int
    tokens: int  # trained on
    seconds: float  # of training, without validations and checkpoints
    tokens_per_s: float
    peak_memory_bytes: int
    val: Validation
    val_windows: list[float]  # mean nats per token of each window of the validation text
    load: ExpertLoad | None  # None for a dense model
    dataset: str
    tokenizer: str  # its fingerprint
    precision: str
    dispatch: str
    device: str
    threads: int
    versions: dict[str, str]
    skipped: int  # steps that were not taken, because they were not finite
    commit: str | None  # of the code; None outside a checkout
    dirty: bool | None  # whether tracked files differed from it; None where that is unknown
    schema: int = SCHEMA
    seed_init: int | None = None  # of the initial weights, and of the batches; None in older files, where it was `seed`
    seed_data: int | None = None
    rows: float | None = None  # `LayerMetrics.rows`, the mean over MoE layers and steps; None for a dense model


def read_summary(folder: Path) -> Summary:
    """The summary of the run in `folder`. Raises `BadInput` if it is not finished, damaged, or of a newer version."""
    path, again = folder / "summary.json", "; restore it, or delete it and have it made again with resume=true"
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"run={folder} is not finished: it has no summary.json.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {str(error).splitlines()[0]}{again}.") from error
    schema = tree.get("schema", 1) if isinstance(tree, dict) else 1
    if isinstance(schema, int) and schema > SCHEMA:
        raise BadInput(f"{path} was written by a newer version (schema {schema}; this one reads {SCHEMA}): update it.")
    try:
        return jsonl.record(Summary, tree, str(path))
    except BadInput as damage:
        raise BadInput(f"{str(damage).rstrip('.')}{again}.") from None


def write_summary(folder: Path, summary: Summary) -> None:
    """Write summary.json, whole or not at all."""
    jsonl.write_json(folder / "summary.json", dataclasses.asdict(summary))


def line_to_json(line: MetricsLine) -> dict[str, Any]:
    """A line as it stands in metrics.jsonl: what is not known is left out, and losses have their names."""
    known = lambda pairs: {name: value for name, value in pairs if value is not None}
    tree = dataclasses.asdict(line, dict_factory=known)
    return tree | tree.pop("losses")


def line_from_json(tree: dict[str, Any], where: str = "the line") -> MetricsLine:
    """A line from its JSON. A number whose name is no field's is a loss. Raises `BadInput` for anything else."""
    names = {entry.name for entry in dataclasses.fields(MetricsLine)}
    losses = {name: value for name, value in tree.items() if name not in names}
    return jsonl.record(MetricsLine, {**{k: v for k, v in tree.items() if k in names}, "losses": losses}, where)


def read_metrics(folder: Path) -> list[MetricsLine]:
    """The lines of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [line_from_json(tree, str(path)) for tree in jsonl.read_lines(path)]
