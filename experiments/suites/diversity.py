"""Does it help, for tasks that are not learnt, to fine-tune on more kinds of task, at as many questions?

One base model is fine-tuned on `N` questions of 1, 2, 4 or 8 kinds of task (`LEARNT`; which ones, a seed draws). Then
questions of four other kinds are scored, which no run saw, and held-out questions of all eight: nats per token of the
answers. Published of instruction tuning at scale: more kinds help, with diminishing returns (FLAN, 2109.01652;
2204.07705).
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.pages.diversity_table import KINDS, Row
from moe.analysis.windows import of_corpus
from moe.config.data import DataConfig, TokenizerConfig
from moe.config.run import Config, build
from moe.data.instructions import Question, questions
from moe.data.prepare import cache_root, prepare
from moe.eval.scores import score
from moe.model import dispatch
from moe.run import machine
from moe.run.jsonl import write_lines
from moe.run.load import load_run
from moe.train.loop import train

Say = Callable[[str], None]
LEARNT = ("add", "larger", "parity", "next", "copy", "first", "reverse", "length")
OTHERS = ("smaller", "last", "upper", "twice")
N = 4000  # questions that a run learns from
ASKED = 200  # of each kind that are scored


def measure(run: Path, seeds: Sequence[int], steps: int, base_steps: int, say: Say) -> list[Row]:
    """All runs, in folders below `run`; those that are finished are not trained again."""
    train(base_config(run, base_steps), say)
    cache = cache_root(DataConfig())
    for name, scored_tasks in (("others", OTHERS), ("eight", LEARNT)):
        asked = [question for task in scored_tasks for question in questions(task, ASKED, 0, True, cache)]
        write_once(run / f"{name}.jsonl", asked)
    scores = partial(scored, run)
    rows = [Row(0, seed, [], *scores(run / "base", say)) for seed in seeds]
    for seed in seeds:
        for kinds in KINDS:
            tasks = sorted(random.Random(seed).sample(LEARNT, len(LEARNT))[:kinds])
            name = f"kinds{kinds}-seed{seed}"
            learnt = [question for task in tasks for question in questions(task, N // kinds, seed, False, cache)]
            write_once(run / f"{name}.jsonl", learnt)
            train(tuned_config(run, name, seed, steps), say)
            rows.append(Row(kinds, seed, tasks, *scores(run / name, say)))
    return rows


def base_config(run: Path, steps: int) -> Config:
    """A small model of the blend's text."""
    return build({**common(run / "base", 0, steps), "data": {"max_mb": 1.0}, "optim": {"lr": 8e-3}})


def tuned_config(run: Path, name: str, seed: int, steps: int) -> Config:
    """That model, fine-tuned on the questions in a file."""
    data = {"name": "chat", "path": str(run / f"{name}.jsonl"), "domain_field": "task", "documents": "whole"}
    cfg: Config = build({**common(run / name, seed, steps), "data": data, "optim": {"lr": 1e-3, "weight_decay": 0.0}})
    cfg.source, cfg.tokenizer = str(run / "base"), TokenizerConfig("saved", path=str(run / "base"))
    return cfg


def common(folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """The settings that all runs have."""
    moe = {"n_experts": 8, "k": 2, "d_expert": 64}
    model = {"context": 128, "n_layers": 2, "d_model": 96, "n_heads": 3, "d_ff": 192, "init_std": 0.1, "moe": moe}
    trained = {"steps": steps, "batch_size": 8, "threads": 1, "precision": "fp32", "eval_every": 0, "eval_tokens": 8192}
    return {
        "run": str(folder), "resume": True, "seed": seed, "model": model, "train": trained, "balance": {"aux": 0.01},
        "tokenizer": {"vocab_size": 1024},
    }  # fmt: skip


def write_once(path: Path, rows: Sequence[Question]) -> None:
    """A file of questions, if it is not there."""
    if not path.exists():
        write_lines(path, (row._asdict() for row in rows))


def scored(run: Path, folder: Path, say: Say) -> tuple[float, float]:
    """A run's loss on the other kinds, and on the eight."""
    model, tokenizer, cfg = load_run(folder, "last")
    model.document_end = tokenizer.eot  # the base model had its documents packed
    losses = []
    for name in ("others", "eight"):
        data = DataConfig("chat", path=str(run / f"{name}.jsonl"), val_fraction=0.5, documents="whole")
        dataset = prepare(data, TokenizerConfig("saved", path=str(folder)), lambda line: None)
        windows = of_corpus(dataset, cfg.model.context, 0, 0, whole=True)
        device = machine.choose_device("cpu")
        losses.append(score(model, windows, tokenizer, backend=dispatch.choose("auto", device)[0])[0].loss.value)
    say(f"{folder}: {losses[0]:.3f} nats on other kinds, {losses[1]:.3f} on the eight")
    return losses[0], losses[1]
