"""Batches of prompts and of preferred pairs, each a pure function of (seed, step) as those of text are.

A row is in the split that its text is in (moe/data/prepare.py). A prompt and an answer are tokenized apart, so that no
token spans the join and a prompt has the same tokens whatever follows it; an answer ends with the end-of-text token,
which is learnt with it. P pairs or prompts, S places.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from moe.config.data import DataConfig
from moe.data.answers import Row, read_rows
from moe.data.loader import NO_TARGET, Batch, Loader
from moe.data.prepare import held_out
from moe.data.shards import Split
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput


@dataclass
class Prompts:
    """One step's prompts as tokens, and the right answer of each as text."""

    prompts: list[list[int]]
    answers: list[str]


def rows_of(cfg: DataConfig, split: str) -> list[Row]:
    """The rows whose text is in this split, in the files' order. Raises `BadInput` where there is none."""
    rows = [row for row in read_rows(cfg) if isinstance(row, Row)]  # what is none was refused, or counted and left out
    rows = [row for row in rows if held_out(row.text(), cfg.val_fraction) == (split == "val")]
    if not rows:
        raise BadInput(f"data.path={cfg.path} has no row for the {split} split: add rows, or set data.val_fraction.")
    return rows


class AnswerLoader(Loader):
    """What loaders of rows share: `Loader`'s order, place and checks over rows in place of windows."""

    def __init__(self, split: Split, n_rows: int, batch_size: int, context: int, seed: int) -> None:
        """`batch_size`: rows of a step."""
        self.split, self.n_windows = split, n_rows
        self.batch_size, self.context, self.seed, self.workers = batch_size, context, seed, 0
        self._orders = {}

    def rows(self, step: int) -> list[int]:
        """The numbers of a step's rows (from 0)."""
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._order(n // self.n_windows)[n % self.n_windows]) for n in samples]

    def iterate(self, from_step: int) -> Generator[Batch, None, None]:
        """Batches of `from_step`, `from_step` + 1, ... without end."""
        for step in count(from_step):
            yield self.batch(step)


class PairLoader(AnswerLoader):
    """Batches of 2·P rows: each pair's preferred answer behind its prompt, then its rejected one."""

    def __init__(
        self, split: Split, rows: Sequence[Row], tokenizer: Tokenizer, batch_size: int, context: int, seed: int
    ) -> None:
        """`batch_size` = 2·P. Raises `BadInput` for a row that is longer than `context` tokens."""
        super().__init__(split, len(rows), batch_size // 2, context, seed)
        self.pad = tokenizer.eot
        self.sides = [
            (tokenize(row.prompt, answer, tokenizer, context, row.where)) for row in rows for answer in row.answers
        ]

    def batch(self, step: int) -> Batch:
        """The pairs of step `step` (from 0): every token of a row is read, and those of the answer are targets."""
        return pad_rows([self.sides[2 * row + side] for row in self.rows(step) for side in (0, 1)], self.pad)


class PromptLoader(AnswerLoader):
    """Batches of P prompts."""

    def __init__(
        self,
        split: Split,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        batch_size: int,
        context: int,
        seed: int,
        max_new: int,
    ) -> None:
        """`batch_size` = P. Raises `BadInput` for a prompt with no room for `max_new` tokens behind it."""
        super().__init__(split, len(rows), batch_size, context, seed)
        self.answers = [row.answers[0] for row in rows]
        self.prompts = [tokenizer.encode(row.prompt) for row in rows]
        for row, prompt in zip(rows, self.prompts, strict=True):
            if len(prompt) + max_new > context:
                raise BadInput(
                    f"{row.where}: the prompt has {len(prompt)} tokens, and with an answer of objective.max_new="
                    f"{max_new} it is longer than model.context={context}: shorten it, or lower max_new."
                )

    def batch(self, step: int) -> Prompts:  # type: ignore[override]
        """The prompts of step `step`, from 0."""
        rows = self.rows(step)
        return Prompts([self.prompts[row] for row in rows], [self.answers[row] for row in rows])


def tokenize(prompt: str, answer: str, tokenizer: Tokenizer, context: int, where: str) -> tuple[list[int], int]:
    """A prompt's and its answer's tokens, end-of-text behind them, and how many are the prompt's. Raises `BadInput`
    where they are more than `context`."""
    prompt_ids = tokenizer.encode(prompt)
    ids = [*prompt_ids, *tokenizer.encode(answer), tokenizer.eot]
    if len(ids) > context:
        raise BadInput(
            f"{where}: prompt and answer have {len(ids)} tokens, more than model.context={context}: shorten them, or "
            "start from a model that reads more."
        )
    return ids, len(prompt_ids)


def pad_rows(sides: Sequence[tuple[list[int], int]], pad: int) -> Batch:
    """Rows of tokens as one batch, as long as the longest, `pad` behind the others; targets are the answers' tokens."""
    longest = max(len(ids) for ids, _ in sides)
    tokens_BS = torch.full((len(sides), longest), pad, dtype=torch.int64)
    targets_BS = torch.full((len(sides), longest), NO_TARGET, dtype=torch.int64)
    for b, (ids, n_prompt) in enumerate(sides):
        tokens_BS[b, : len(ids)] = torch.tensor(ids)
        targets_BS[b, n_prompt - 1 : len(ids) - 1] = torch.tensor(ids[n_prompt:])
    return Batch(tokens_BS, targets_BS, torch.zeros(tokens_BS.shape, dtype=torch.uint8))
