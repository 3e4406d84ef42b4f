"""What the rows of all stages of `experiments.gpu_evidence` come to: counts, targets met and missed, the layer against
its peers. Printed at the end of a run, and filled into docs/kernels.md."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.pages import tables
from experiments.suites import cases

STAGES = ("correctness", "kernels", "layer", "train_step", "tune")
STATUSES = ("measured", "failed", "wrong", "absent", "left out")
STAGE_HEADINGS = ("stage", *STATUSES, "seconds")
TARGET_HEADINGS = ("stage", "target", "of", "met", "worst", "bound")
LAYER_HEADINGS = ("shape", "load", "experts of", "forward TF/s", "backward TF/s", "share of bmm", "ours is")


def path_of(folder: Path, stage: str) -> Path:
    """Where a stage's rows are."""
    return folder / f"gpu-{stage}.jsonl"


def read(folder: Path, code: str | None = None) -> list[dict[str, Any]]:
    """The last row of every key in a folder's gpu-*.jsonl, of this code or of any, stage by stage."""
    rows: list[dict[str, Any]] = []
    for stage in STAGES:
        last: dict[str, dict[str, Any]] = {}
        for row in cases.read(path_of(folder, stage)):
            if code in (None, row["code"]):
                last[json.dumps(_key(row))] = row
        rows += last.values()
    return rows


def _key(row: dict[str, Any]) -> list[Any]:
    """What says which measurement a row is: the letters and words that its suite put before its status."""
    names = list(row)
    begin, end = (names.index(name) if name in names else 0 for name in ("suite", "status"))
    return [row["device"], row["commit"], row["code"], [[name, row[name]] for name in names[begin:end]]]


def stages(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line per stage: how many rows of each status."""
    lines = []
    for stage in STAGES:
        mine = [row for row in rows if row["stage"] == stage]
        count = Counter(row["status"] for row in mine)
        if mine:
            seconds = f"{sum(row.get('seconds', 0) for row in mine):,.0f}"
            lines.append((stage, *(str(count[status] or "") for status in STATUSES), seconds))
    return lines


def targets(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line per target, and per shape where it has one: how many rows meet it and the worst of them."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        of = f"{row['shape']} {row['load']}" if row["stage"] == "layer" else row.get("op", "")
        for target in row.get("targets", []):
            groups.setdefault((row["stage"], target["what"], of), []).append(target)
    lines: list[tuple[str, ...]] = []
    for (stage, what, of), group in groups.items():
        numbers = [target["value"] for target in group if target["value"] is not None]
        bounds = [target["bound"] for target in group]
        worst = (max if group[0]["at_most"] else min)(numbers, default=None)
        met = sum(target["met"] for target in group)
        shown = f"{met} of {len(group)}" if len(group) > 1 else "met" if met else "missed"
        lines.append((stage, what, of, shown, tables.number(worst, ",.4g"), f"{bounds[0]:,.4g}"))
    return lines


def layer(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line per shape and contestant under the uniform load; what is absent or failed says so."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row["stage"] != "layer" or row["load"] not in ("uniform", "every"):
            continue
        head = row["shape"], row["load"], row["contestant"]
        if row["status"] != "measured":
            lines.append((*head, row["status"], "", "", ""))
            continue
        shares = f"{tables.number(row['forward_of_bmm'], '.2f')}, {tables.number(row['backward_of_bmm'], '.2f')}"
        speeds = tables.number(row["forward_tf"], ",.0f"), tables.number(row["backward_tf"], ",.0f")
        lines.append((*head, *speeds, shares, tables.number(row.get("ours_over_this"), ".2f", "×")))
    return lines


def wrong(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence per row that is wrong or failed, but for candidate tiles, which may."""
    bad = [row for row in rows if row["status"] in ("wrong", "failed") and row["stage"] != "tune"]
    return [f"{row['status']}: {cases.describe(dict(_key(row)[3]))}: {row['error']}" for row in bad]
