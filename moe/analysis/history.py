"""What a run's own files say of its routing over training: loads and metrics by step.

Letters beyond the glossary: L the MoE layers, N steps that have a record.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from moe.analysis.heat_map import ratios
from moe.errors import BadInput
from moe.run import jsonl
from moe.run.summary import Alarm, StepCounts, read_metrics

T = TypeVar("T")


@dataclass(frozen=True)
class History:
    """A run over its training; arrays are empty where nothing was written yet."""

    layers: list[int]  # the MoE layers, among all layers
    load_steps: list[int]
    load_NLE: np.ndarray  # c_i / fair, of the batch of that step; NaN beyond a layer's experts
    steps: list[int]
    max_vio_NL: np.ndarray
    effective_NL: np.ndarray  # effective experts over all of them
    val_steps: list[int]
    val_loss: list[float]
    alarms: list[Alarm] = field(default_factory=list)  # that the doctor raised


def read_history(folder: Path, most: int = 400) -> History:
    """The history of the run in `folder`, of at most so many steps, spread evenly and with the last. Raises `BadInput`
    for a folder without metrics.jsonl, a dense run, and files that are damaged."""
    if not (folder / "metrics.jsonl").is_file():
        raise BadInput(f"{folder} has no metrics.jsonl: its training left no record.")
    lines = read_metrics(folder)
    routed = [line for line in lines if line.layers]
    val = [(line.step, line.val.loss) for line in lines if line.val]
    layers = [layer.layer for layer in routed[0].layers or []] if routed else []
    # Loads, of the steps that have them.
    path = folder / "routing" / "counts.jsonl"
    records = spread(jsonl.read_records(StepCounts, path), most)
    widths = [len(count_E) for count_E in records[0].counts] if records else []
    for record in records:
        if [len(count_E) for count_E in record.counts] != widths:
            raise BadInput(f"{path} is damaged: step {record.step} has other layers or experts than the first.")
    # Metrics of the layers.
    routed = spread(routed, most)
    column = lambda name: np.array([[getattr(layer, name) for layer in line.layers or []] for line in routed])
    effective_NL = column("effective_experts") / np.array(widths or 1) if routed else np.zeros((0, 0))
    return History(
        layers=layers,
        load_steps=[record.step for record in records],
        load_NLE=np.stack([ratios(record.counts) for record in records]) if records else np.zeros((0, 0, 0)),
        steps=[line.step for line in routed],
        max_vio_NL=column("max_vio") if routed else np.zeros((0, 0)),
        effective_NL=effective_NL,
        val_steps=[step for step, _ in val],
        val_loss=[loss for _, loss in val],
        alarms=[alarm for line in lines for alarm in line.alarms or []],
    )


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most so many of a list, at least one, spread evenly with both ends."""
    places = np.linspace(0, len(values) - 1, min(len(values), max(1, most))).round().astype(int)
    return [values[i] for i in places]
