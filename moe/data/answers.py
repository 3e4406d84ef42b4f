"""Prompts with answers, as lines of JSON: pairs of which one was preferred, and tasks whose right answer is known.

data=preferences   `prompt`, `chosen` and `rejected`
data=prompts       `prompt` and `answer`, the right one

As a text (for the tokenizer, the validation and objective.name=lm) a row is its prompt and its chosen or right answer.
`moe/data/answer_loader.py` makes batches of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.config.data import DataConfig
from moe.data import files
from moe.data.unreadable import BadDocument, check_unicode

FIELDS = {"preferences": ("prompt", "chosen", "rejected"), "prompts": ("prompt", "answer")}


@dataclass(frozen=True)
class Row:
    """A line of such a file."""

    where: str  # file and line, for messages
    domain: str
    prompt: str
    answers: tuple[str, ...]  # chosen and rejected, or the right one

    def text(self) -> str:
        """Of the row as a document."""
        return self.prompt + self.answers[0]


def read_rows(cfg: DataConfig) -> Iterator[Row | BadDocument]:
    """Every row of the .jsonl files of `cfg.path`, in the order of their names, and every line that is none.
    Raises `BadInput` where there is no file."""
    _, paths, faults = files.text_files(cfg.path)
    yield from faults
    longest = round(cfg.max_document_mb * 1e6)
    for file in paths:
        if files.suffix(file) != ".jsonl":
            yield BadDocument(files.readable(file), f"is no .jsonl, which data={cfg.name} reads", "of another kind")
            continue
        try:
            for number, line in files.lines(file, longest):
                where = f"{files.readable(file)}, line {number}"
                try:
                    yield _row(line, where, cfg, longest, file)
                except BadDocument as fault:
                    yield fault
        except BadDocument as fault:
            yield fault


def _row(line: bytes | None, where: str, cfg: DataConfig, longest: int, file: Path) -> Row:
    """Raises `BadDocument` for a line that is no such row, an empty field, and a pair that prefers nothing."""
    if line is None:
        raise files.too_large(where, longest)
    row = files.parsed(line, where)
    names = FIELDS[cfg.name]
    values = []
    for name in names:
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value:
            what = f"needs {', '.join(names)} as text that is not empty, and {name} is {str(value)[:40]!r}"
            raise BadDocument(where, what, f"without {name}")
        check_unicode(value, where, f": {name}")
        values.append(value)
    if len(values) == 3 and values[1] == values[2]:
        raise BadDocument(where, "prefers an answer to itself: chosen and rejected are equal", "preferring nothing")
    return Row(where, files.readable(files.unpacked(file).stem), values[0], tuple(values[1:]))
