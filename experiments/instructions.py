"""Write questions with answers for fine-tuning, made of corpora that every machine has, and others that are held out.

    python -m experiments.instructions out=runs/questions
    python -m experiments.instructions out=runs/sums tasks=[add,larger] n=5000 held_out=200 seed=1

Two files of JSON lines with prompt, completion and task: train.jsonl has `n` questions, spread evenly over the tasks,
held-out.jsonl `held_out` of each task. Learn from the one (`data=chat`), and ask the other (experiments.answers). A
third, preferences.jsonl, has the questions of train.jsonl as a model of conversations is asked them, in the default
template's spelling, each with its answer and with another question's of the same task, which is worse (`data=
preferences`).
Docs, signature and verse are taken from Python and from Milton; each of the other tasks has one right answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli
from moe.config.data import DataConfig
from moe.data.chat import DEFAULT, Template
from moe.data.instructions import TASKS, Question, questions
from moe.data.prepare import cache_root
from moe.errors import BadInput
from moe.run import terminal
from moe.run.jsonl import write_lines


@dataclass
class InstructionsConfig:
    """Which questions, how many, and where they go."""

    out: str = ""  # the folder to make
    tasks: list[str] = field(default_factory=list)  # empty: all of them
    n: int = 4000  # questions to learn from, over all tasks
    held_out: int = 40  # questions to ask, of each task
    seed: int = 0  # of what is drawn
    cache: str = ""  # what had to be fetched; "": $SWITCHYARD_CACHE, else ~/.cache/switchyard

    def __post_init__(self) -> None:
        if not self.out:
            raise BadInput("out=... is needed: a folder to make, such as runs/questions.")
        for task in self.tasks:
            if task not in TASKS:
                raise BadInput(f"tasks has {task!r}: accepted are {', '.join(TASKS)}.")
        if len(set(self.tasks)) < len(self.tasks):
            raise BadInput(f"tasks={self.tasks} names a task twice.")
        if self.n < len(self.tasks or TASKS):
            raise BadInput(f"n={self.n} is out of range: accepted is at least one question of each task.")
        if self.held_out < 1:
            raise BadInput(f"held_out={self.held_out} is out of range: accepted is at least 1.")


@cli.command("instructions", InstructionsConfig, verbatim=("out", "cache"))
def main(cfg: InstructionsConfig) -> None:
    """Write the files."""
    folder, tasks = Path(cfg.out), cfg.tasks or list(TASKS)
    if folder.exists():
        raise BadInput(f"out={folder} exists: choose another folder.")
    cache, learnt, asked = cache_root(DataConfig(cache=cfg.cache)), [], []
    for i, task in enumerate(tasks):
        share = cfg.n // len(tasks) + (i < cfg.n % len(tasks))
        learnt += questions(task, share, cfg.seed, False, cache)
        asked += questions(task, cfg.held_out, cfg.seed, True, cache)
    folder.mkdir(parents=True)
    files = {"train": [row._asdict() for row in learnt], "held-out": [row._asdict() for row in asked]}
    files["preferences"] = preferences(learnt)
    for name, rows in files.items():
        write_lines(folder / f"{name}.jsonl", rows)
        terminal.say(f"{folder / name}.jsonl: {len(rows):,} questions of {len(tasks)} tasks")


def preferences(learnt: Sequence[Question]) -> list[dict[str, str]]:
    """Every question with its own answer and the next other one of its task; those without another are left out."""
    template, rows = Template(DEFAULT), []
    for i, question in enumerate(learnt):
        others = (other for other in (*learnt[i + 1 :], *learnt[:i]) if other.task == question.task)
        worse = next((other.completion for other in others if other.completion != question.completion), None)
        if worse is not None:
            prompt = template.render([{"role": "user", "content": question.prompt}], reply=True).text
            chosen, rejected = (answer + template.end_of_turn for answer in (question.completion, worse))
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


if __name__ == "__main__":
    main()
