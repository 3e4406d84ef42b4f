"""Small models aligned on a task whose answers can be verified: what each objective makes of one and the same start.

The start has learnt sums (`7+35 mod 10=`) until it knows some answers, from texts of which one in twenty lists all ten
digits instead. Then every arm goes on from it: rewards of exact answers; a reward that looks for the answer anywhere,
with and without a leash (KL); a reward model's; DPO on a scripted person's preferences, summed and by token; and
answers drawn in bf16 by one backend and learnt in fp32 by another, with and without replay of the experts they were
drawn by.
What comes of it is measured on prompts that were held out.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe.config.data import DataConfig
from moe.config.run import Config, build
from moe.data.answer_loader import rows_of
from moe.data.tasks import DIGITS, contains, exact, preferences, sums, texts
from moe.eval.rollout import rollout
from moe.run.jsonl import write_lines
from moe.run.load import load_run
from moe.run.summary import MetricsLine, read_metrics
from moe.train.loop import train

START_STEPS, STEPS = 1150, 100
LAST = 20  # steps over which a run's own figures are averaged at its end
AS_THEY_ARE = {"html": False, "unicode": "none", "min_chars": 0, "max_repetition": 1.0, "exact": False, "near": 0.0}
MODEL = {
    "name": "sums", "context": 32, "n_layers": 2, "d_model": 64, "n_heads": 2, "d_ff": 128, "qk_norm": "head",
    "init_std": 0.1, "moe": {"n_experts": 8, "k": 2, "d_expert": 64},
}  # fmt: skip
GRPO = {"name": "grpo"}
FIGURES = ("reward", "gap", "kl", "flips", "ratio", "far", "flat", "accuracy", "chosen", "rejected")


class Arm(NamedTuple):
    """One way to go on from the start."""

    name: str
    data: str  # of data/
    objective: dict[str, Any]
    dispatch: str = "torch"
    lr: float = 1e-3


JUDGE = Arm("a reward model", "preferences", {"name": "reward"})
ARMS = (
    Arm("exact", "prompts", GRPO),
    Arm("anywhere", "prompts", GRPO | {"reward": "contains"}),
    Arm("anywhere, KL 0.2", "prompts", GRPO | {"reward": "contains", "kl": 0.2}),
    JUDGE,
    Arm("by the reward model", "prompts", GRPO | {"reward": "model"}),
    Arm("DPO, summed", "preferences", {"name": "dpo"}),
    Arm("DPO, by token", "preferences", {"name": "dpo", "loss": "sigmoid_norm"}),
    Arm("DPO, IPO", "preferences", {"name": "dpo", "loss": "ipo"}),
    Arm("exact, drawn in bf16", "prompts", GRPO | {"draw_dispatch": "torch", "draw_precision": "bf16"}, "reference"),
    Arm(
        "exact, drawn in bf16, replayed", "prompts",
        GRPO | {"draw_dispatch": "torch", "draw_precision": "bf16", "replay": True}, "reference",
    ),
)  # fmt: skip


class Row(NamedTuple):
    """A run's end; what is held out is sampled at temperature 1."""

    arm: str
    seed: int
    steps: int
    exact: float  # share of the held-out prompts whose answer is exactly right
    contains: float  # share in whose answer the right one is anywhere
    lists: float  # share that lists all ten digits
    length: float  # tokens of an answer
    figures: dict[str, float]  # of the run's last steps, the mean; ratio: the largest of all its steps


HEADINGS = ("arm", "runs", "exact", "anywhere", "lists all ten", "tokens", "its reward", "KL from the start")
PAIRS = ("arm", "runs", "pairs told apart", "preferred answer", "rejected answer", "other experts than the start's")
ROUTES = ("arm", "runs", "other experts", "largest log-ratio", "tokens beyond the clip", "exact")


def measure(
    folder: Path,
    seeds: Sequence[int],
    steps: int,
    start_steps: int,
    say: Callable[[str], None],
    names: Sequence[str] = (),
) -> list[Row]:
    """Train what is missing in `folder`, and measure: the start, then every arm with every seed. `names`: of these arms
    alone, as `slug` has them; what a reward model judges needs that one's too."""
    write_data(folder)
    start = folder / "start"
    if not (start / "summary.json").exists():
        train(start_config(folder, start_steps), say)
    rows = [measured("start", 0, start, folder, start_steps)]
    for seed in seeds:
        for arm in (arm for arm in ARMS if not names or slug(arm.name) in names):
            run = folder / f"{slug(arm.name)}-seed{seed}"
            if not (run / "summary.json").exists():
                train(arm_config(arm, seed, steps, folder), say)
            rows.append(measured(arm.name, seed, run, folder, steps))
            say(f"{arm.name}, seed {seed}: exact {rows[-1].exact:.3f}, anywhere {rows[-1].contains:.3f}")
    return rows


def slug(name: str) -> str:
    """A name as part of a folder's."""
    return "-".join(name.lower().replace(",", "").replace(".", "").split())


def write_data(folder: Path) -> None:
    """What the start and the arms learn from, where it is not there yet."""
    tasks = sums(0)
    files: dict[str, Iterator[dict[str, str]]] = {
        "texts": ({"text": text} for text in texts(tasks, 0.05, 0.0, 0)),
        "prompts": ({"prompt": task.prompt, "answer": task.answer} for task in tasks),
        "preferences": preferences(tasks, 0.1, 0),
    }
    for name, lines in files.items():
        path = folder / "data" / name / f"{name}.jsonl"
        if not path.exists():
            write_lines(path, lines)


def data_of(name: str, folder: Path) -> dict[str, Any]:
    """The data settings of an arm; the start's texts are `data=text`."""
    path = str(folder / "data" / name)
    kind = "text" if name == "texts" else name
    return {"name": kind, "path": path, "clean": AS_THEY_ARE, "documents": "separate", "cache": str(folder / "cache")}


def common(run: Path, seed: int) -> dict[str, Any]:
    """What all runs have in common."""
    return {
        "run": str(run), "resume": True, "seed": seed, "model": MODEL, "tokenizer": {"name": "byte"},
        "checkpoint": {"every": 0}, "log": {"every": 10, "doctor": False}, "dispatch": "torch",
    }  # fmt: skip


def start_config(folder: Path, steps: int) -> Config:
    """The run that all arms go on from."""
    return build(
        common(folder / "start", 0) | {
            "data": data_of("texts", folder),
            "optim": {"lr": 4e-3, "schedule": "constant", "warmup": min(50, steps)},
            "train": {"steps": steps, "batch_size": 64, "threads": 1, "precision": "fp32", "eval_every": 0},
        }
    )  # fmt: skip


def arm_config(arm: Arm, seed: int, steps: int, folder: Path) -> Config:
    """A run of an arm."""
    objective = dict(arm.objective)
    if objective.get("reward") == "model":
        objective["judge"] = str(folder / f"{slug(JUDGE.name)}-seed{seed}")
    return build(
        common(folder / f"{slug(arm.name)}-seed{seed}", seed) | {
            "source": str(folder / "start"), "objective": objective, "dispatch": arm.dispatch,
            "balance": {"aux": 0.0, "z": 0.0}, "data": data_of(arm.data, folder),
            "optim": {"lr": arm.lr, "weight_decay": 0.0},
            "train": {"steps": steps, "batch_size": 64, "threads": 1, "precision": "fp32", "eval_every": 0},
        }
    )  # fmt: skip


def measured(arm: str, seed: int, run: Path, folder: Path, steps: int) -> Row:
    """A run's end: answers to every held-out prompt, and its own last figures."""
    model, tokenizer, _ = load_run(run, "last")
    held_out = rows_of(DataConfig(name="prompts", path=str(folder / "data" / "prompts")), "val")
    drawn = rollout(
        model, [tokenizer.encode(row.prompt) for row in held_out], 16, seeds=range(len(held_out)),
        stop=[tokenizer.eot], pad=tokenizer.eot,
    )  # fmt: skip
    stopped = drawn.stopped_B.tolist()
    said = [tokenizer.decode(ids[: len(ids) - ended]) for ids, ended in zip(drawn.answers(), stopped, strict=True)]
    answers = list(zip(said, [row.answers[0] for row in held_out], stopped, strict=True))
    return Row(
        arm, seed, steps,
        exact=statistics.fmean(exact(*answer) for answer in answers),
        contains=statistics.fmean(contains(*answer) for answer in answers),
        lists=statistics.fmean(DIGITS in text for text in said),
        length=drawn.answer_BS1.sum().item() / len(said),
        figures=own_figures(read_metrics(run)),
    )  # fmt: skip


def own_figures(lines: Sequence[MetricsLine]) -> dict[str, float]:
    """The means of a run's figures over its last steps; of `ratio` the largest of all."""
    told = [line.answers for line in lines if line.answers]
    figures = {}
    for name in FIGURES:
        values = [answers[name] for answers in told if name in answers]
        if values:
            figures[name] = max(values) if name == "ratio" else statistics.fmean(values[-LAST:])
    return figures


def cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """A line per arm: means over its runs, and from the least to the most where there are several."""
    for arm, runs in by_arm(rows).items():
        shares = [over([getattr(row, name) for row in runs], "{:.0%}") for name in ("exact", "contains", "lists")]
        figures = [over(figure(runs, name), "{:.2f}") for name in ("reward", "kl")]
        yield arm, str(len(runs)), *shares, over([row.length for row in runs], "{:.1f}"), *figures


def route_cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """A line per arm of exact rewards: how training routed other than drawing, and what it did to the ratios."""
    for arm, runs in by_arm(rows).items():
        if arm.startswith("exact"):
            shares = [over(figure(runs, name), shape) for name, shape in
                      (("flips", "{:.2%}"), ("ratio", "{:.2g}"), ("far", "{:.3%}"))]  # fmt: skip
            yield arm, str(len(runs)), *shares, over([row.exact for row in runs], "{:.0%}")


def pair_cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """A line per arm that learns from pairs: the share in which it prefers what was preferred, by how many nats both
    answers became more likely than at the start, and how many choices of experts are others."""
    for arm, runs in by_arm(rows).items():
        if figure(runs, "accuracy"):
            shapes = ("accuracy", "{:.0%}"), ("chosen", "{:+.1f}"), ("rejected", "{:+.1f}"), ("flips", "{:.0%}")
            yield arm, str(len(runs)), *(over(figure(runs, name), shape) for name, shape in shapes)


def by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of every arm, in the order of the rows."""
    return {arm: [row for row in rows if row.arm == arm] for arm in dict.fromkeys(row.arm for row in rows)}


def figure(runs: Sequence[Row], name: str) -> list[float]:
    """One of the runs' own figures, of those that have it."""
    return [row.figures[name] for row in runs if name in row.figures]


def over(values: Sequence[float], shape: str) -> str:
    """The mean, with the least and the most of several."""
    if not values:
        return "–"
    mean = shape.format(statistics.fmean(values))
    low, high = shape.format(min(values)), shape.format(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"
