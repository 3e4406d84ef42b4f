"""Write the data of a task whose answers can be verified: sums, `7+35 mod 10=` and the answer `2`.

    python -m experiments.task out=sums                                  # texts, prompts and preferences
    python -m experiments.task out=sums listing=0.02 wrong=0.3           # how the texts are to be wrong
    python -m experiments.task out=judged run=runs/SFT judge=runs/REWARD # preferences of a machine, of a run's answers

    texts.jsonl        to learn from: a share `wrong` of the answers is wrong, a share `listing` lists all ten digits
    prompts.jsonl      prompts with their right answers: data=prompts
    preferences.jsonl  pairs of answers, the preferred one first: data=preferences

A scripted person prefers the right answer to a wrong one, and either to all ten digits; a share `noise` of what is
said is the other way round. With `run` and `judge` a run draws both answers, and a reward model (a run with
objective.name=reward) says which is preferred: preferences.jsonl alone is written.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import cli
from moe.data.tasks import Sum, preferences, sums, texts
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.eval.rollout import judged, rollout
from moe.model.transformer import Transformer
from moe.run import terminal
from moe.run.jsonl import write_lines
from moe.run.load import load_run

AT_ONCE = 128  # prompts of which answers are drawn together


@dataclass
class TaskConfig:
    """Which data."""

    out: str = ""  # a new folder
    n: int = 10_000  # prompts, at most the 10,000 there are
    listing: float = 0.05  # share of the texts that list all ten digits instead of an answer
    wrong: float = 0.0  # share of the texts with a wrong digit
    noise: float = 0.0  # share of the preferences that are the other way round
    seed: int = 0
    run: str = ""  # a run's folder, whose answers are to be compared
    judge: str = ""  # with run: the folder of a reward model, which compares them
    max_new: int = 16  # run: tokens of the longest answer
    trust: bool = False  # run a router of one's own that a run names

    def __post_init__(self) -> None:
        if not self.out:
            raise BadInput("out=... is needed: a new folder, such as sums.")
        if bool(self.run) != bool(self.judge):
            raise BadInput(f"run={self.run} with judge={self.judge}: a run and the reward model go together.")
        if not 1 <= self.n <= 10_000:
            raise BadInput(f"n={self.n} is out of range: accepted is between 1 and 10000.")
        for name in ("listing", "wrong", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name}={getattr(self, name)} is out of range: accepted is between 0 and 1.")
        if self.listing + self.wrong > 1:
            raise BadInput(f"listing={self.listing} and wrong={self.wrong} are more than all texts together.")


@cli.command("task", TaskConfig, verbatim=("out", "run", "judge"))
def main(cfg: TaskConfig) -> None:
    """Write the files and say what is in them."""
    out = Path(cfg.out)
    if os.path.lexists(out):
        raise BadInput(f"out={out} exists: choose another folder.")
    tasks = sums(cfg.seed)[: cfg.n]
    files: dict[str, Iterable[dict[str, Any]]] = {"preferences": preferences(tasks, cfg.noise, cfg.seed)}
    if cfg.run:
        files["preferences"] = list(of_machine(tasks, cfg))
    else:
        files["texts"] = ({"text": text} for text in texts(tasks, cfg.listing, cfg.wrong, cfg.seed))
        files["prompts"] = ({"prompt": task.prompt, "answer": task.answer} for task in tasks)
    for name, lines in files.items():
        write_lines(out / f"{name}.jsonl", rows := list(lines))
        terminal.say(f"{out / name}.jsonl: {len(rows):,} rows, such as {rows[0]}")


def of_machine(tasks: list[Sum], cfg: TaskConfig) -> Iterator[dict[str, str]]:
    """Two answers to each prompt that `cfg.run` draws, the one first that `cfg.judge` gives more; none where both are
    the same, or one is empty. Raises `BadInput` for a judge that is no reward model or reads other ids."""
    model, tokenizer, _ = load_run(Path(cfg.run), "last", cfg.trust)
    judge, its_tokenizer, _ = load_run(Path(cfg.judge), "last", cfg.trust)
    if judge.reward is None:
        raise BadInput(f"judge={cfg.judge} is no reward model: accepted is a run with objective.name=reward.")
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise BadInput(f"judge={cfg.judge} has another tokenizer than run={cfg.run}: the two must read the same ids.")
    pairs: list[dict[str, str]] = []
    for start in range(0, len(tasks), AT_ONCE):
        pairs += _compared(tasks[start : start + AT_ONCE], model, judge, tokenizer, cfg, start)
    if not pairs:
        raise BadInput(
            f"run={cfg.run} gives the same answer twice to each of {len(tasks)} prompts: nothing to compare."
        )
    yield from pairs


def _compared(
    tasks: list[Sum], model: Transformer, judge: Transformer, tokenizer: Tokenizer, cfg: TaskConfig, start: int
) -> Iterator[dict[str, str]]:
    rows = [tokenizer.encode(task.prompt) for task in tasks for _ in range(2)]
    seeds = [(cfg.seed * 10_000 + start) * 2 + b for b in range(len(rows))]
    answers = rollout(model, rows, cfg.max_new, seeds=seeds, stop=[tokenizer.eot], pad=tokenizer.eot)
    rewards = judged(judge, answers).tolist()
    said = zip(answers.answers(), answers.stopped_B.tolist(), strict=True)
    texts_B = [tokenizer.decode(ids[: len(ids) - stopped]) for ids, stopped in said]
    for i, task in enumerate(tasks):
        pair = sorted((2 * i, 2 * i + 1), key=lambda b: -rewards[b])
        chosen, rejected = (texts_B[b] for b in pair)
        if chosen and rejected and chosen != rejected:
            yield {"prompt": task.prompt, "chosen": chosen, "rejected": rejected}


if __name__ == "__main__":
    main()
