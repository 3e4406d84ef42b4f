"""What a model answers to questions whose right answer is known."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moe.data.chat import Message, Template, tokenize
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.eval.rollout import rollout
from moe.model.transformer import Transformer


@dataclass(frozen=True)
class Answer:
    """An answer, and whether it is the right one."""

    task: str
    prompt: str
    wanted: str
    said: str  # without the end of the turn
    ended: bool  # by the model, and not for its length
    exact: bool  # said is wanted, but for white space around it


def reply_ids(template: Template, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The tokens that an assistant's next answer follows."""
    return tokenize(template.render(messages, reply=True), tokenizer).ids


def end_ids(template: Template, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer."""
    return tokenizer.encode(template.end_of_turn, specials=True)


def before(ids: Iterable[int], end: Sequence[int]) -> Iterator[int]:
    """Tokens as they come, up to where the end of an answer begins: some are held back until they cannot be its."""
    held: list[int] = []
    for token in ids:
        held.append(token)
        if held[-len(end) :] == list(end):
            yield from held[: -len(end)]
            return
        if len(held) >= len(end):
            yield held.pop(0)
    yield from held


def ask(
    model: Transformer,
    tokenizer: Tokenizer,
    template: Template,
    conversations: Sequence[tuple[str, list[Message]]],
    max_new: int,
    *,
    temperature: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
    backend: str = "torch",
) -> list[Answer]:
    """The model's answers to conversations, each with its task and ending with the right answer. An answer is over at
    the template's end of a turn, at the end-of-text token or after `max_new` tokens. Raises `BadInput` for a
    conversation that does not end with an answer, and for one that leaves no room for it."""
    end, answers = end_ids(template, tokenizer), []
    for start in range(0, len(conversations), batch_size):
        batch = conversations[start : start + batch_size]
        prompts = []
        for number, (_, messages) in enumerate(batch, start):
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise BadInput(f"conversation {number} does not end with an answer, so that there is nothing to check.")
            prompts.append(reply_ids(template, messages[:-1], tokenizer))
        # One token that ends an answer stops it; of several the first few would be drawn in vain.
        stop = [tokenizer.eot, *(end if len(end) == 1 else [])]
        seeds = [seed + number for number in range(start, start + len(batch))]
        drawn = rollout(
            model, prompts, max_new, seeds=seeds, stop=stop, pad=tokenizer.eot, temperature=temperature, backend=backend
        )
        for (task, messages), ids in zip(batch, drawn.answers(), strict=True):
            kept = list(before(before(ids, end), [tokenizer.eot]))
            said, wanted, ended = tokenizer.decode(kept), messages[-1]["content"], len(kept) < len(ids)
            exact = said.strip() == wanted.strip() and ended
            answers.append(Answer(task, messages[-2]["content"], wanted, said, ended, exact))
    return answers
