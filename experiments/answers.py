"""Ask a model questions whose answers are known, and count how many it has right.

    python -m experiments.answers run=runs/sft questions=runs/questions/held-out.jsonl
    python -m experiments.answers run=runs/sft questions=runs/questions/held-out.jsonl show=3 out=runs/answers.jsonl

A table by task: how many answers are exactly the right one, with a 95% interval (Wilson, 1927), how many ended by
themselves, and the mean length. `questions` is as for `data=chat`: JSON lines of messages that end with the right
answer, or of prompt and completion; the field `task` divides them. `out` writes every answer (`Answer` of
moe/eval/answers.py).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import scipy

from experiments import cli
from experiments.pages import tables
from moe.data import files
from moe.data.chat import Message, Template, messages_of, template_of
from moe.data.unreadable import BadDocument
from moe.errors import BadInput
from moe.eval.answers import Answer, ask
from moe.model import dispatch
from moe.run import machine, terminal
from moe.run.jsonl import write_lines
from moe.run.load import load_run

HEADINGS = ("task", "questions", "exact", "95% interval", "ended", "characters")


@dataclass
class AnswersConfig:
    """Who is asked what."""

    run: str = ""  # a run's folder
    questions: str = ""  # a file of JSON lines
    which: str = "best"  # best (lowest validation loss) | last | step-N
    max_new: int = 48  # tokens of an answer
    temperature: float = 0.0  # 0: always the most probable token
    batch_size: int = 64  # questions at a time
    seed: int = 0  # of what is drawn
    show: int = 0  # so many questions of each task are shown with their answers
    out: str = ""  # a file to write, in JSON lines; "": none
    trust: bool = False  # run a router of one's own that the run names

    def __post_init__(self) -> None:
        for key in ("run", "questions"):
            if not getattr(self, key):
                raise BadInput(f"{key}=... is needed.")
        for key, least in (("max_new", 1), ("batch_size", 1), ("show", 0), ("temperature", 0), ("seed", 0)):
            if not least <= getattr(self, key) < 2**62:
                raise BadInput(f"{key}={getattr(self, key)} is out of range: accepted is at least {least}.")


@cli.command("answers", AnswersConfig, verbatim=("run", "questions", "out"))
def main(cfg: AnswersConfig) -> None:
    """Ask, print a row for all questions and for each task, and write the answers."""
    # What cannot be is refused before anything runs.
    if cfg.out and Path(cfg.out).exists():
        raise BadInput(f"out={cfg.out} exists: choose another, or move it away.")
    device = machine.choose_device("auto")
    model, tokenizer, _ = load_run(Path(cfg.run), cfg.which, cfg.trust)
    template = template_of("", tokenizer)
    conversations = read_conversations(Path(cfg.questions), template)
    # Ask, and say it.
    answers = ask(
        model.to(device), tokenizer, template, conversations, cfg.max_new, temperature=cfg.temperature,
        batch_size=cfg.batch_size, seed=cfg.seed, backend=dispatch.choose("auto", device)[0],
    )  # fmt: skip
    by_task = {task: [answer for answer in answers if answer.task == task] for task, _ in conversations}
    tables.print_table(HEADINGS, [cells("all", answers), *(cells(*pair) for pair in sorted(by_task.items()))])
    for answer in [answer for of_task in by_task.values() for answer in of_task[: cfg.show]]:
        mark = "right" if answer.exact else f"wanted {answer.wanted!r}"
        terminal.say(f"{answer.task}: {answer.prompt!r} -> {answer.said!r} ({mark})")
    if cfg.out:
        write_lines(Path(cfg.out), map(asdict, answers))
        terminal.say(f"lines: {cfg.out}")


def read_conversations(path: Path, template: Template) -> list[tuple[str, list[Message]]]:
    """Every line's task, "" where it names none, and its messages. Raises `BadInput` for a line that is none."""
    conversations = []
    try:
        for number, line in files.lines(path):
            where = f"line {number}"
            row = files.parsed(line or b"", where)
            messages = messages_of(row, where, template.specials)
            conversations.append((str(row.get("task", "")), messages))
    except (BadDocument, OSError) as error:
        raise BadInput(f"questions={path}: {error}.") from error
    if not conversations:
        raise BadInput(f"questions={path} is empty.")
    return conversations


def cells(task: str, answers: Sequence[Answer]) -> tuple[str, ...]:
    """A row of the table."""
    n, exact = len(answers), sum(answer.exact for answer in answers)
    low, high = wilson(exact, n)
    ended, length = (sum(map(of, answers)) / n for of in (lambda a: a.ended, lambda a: len(a.said)))
    return task, str(n), f"{exact / n:.1%}", f"{low:.1%} to {high:.1%}", f"{ended:.0%}", f"{length:.1f}"


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval for a share of n (1927)."""
    interval = scipy.stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


if __name__ == "__main__":
    main()
