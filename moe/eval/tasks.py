"""Small tasks that need no download: questions made by code, the same on every machine.

A question is a text and either choices, of which one is right, or an answer to say. Those of a task are drawn one after
the other from its own seed, none twice: the first `SHOTS` may be shown as examples, the others are asked.

arithmetic  a sum of two numbers below 100, among four answers of its like
copy        a line of words that stood there twice is begun again: the rest of it, word for word
induction   which of four words of a list came after the last one before (2209.11895)
brackets    which of four brackets closes the innermost one that is open
cloze       the last word of a sentence of the language reference (`pydoc_data`): it changes with Python's version, and
            is part of what `data=blend` trains on
latent      words of one domain among common ones: which of four words, none of which was there, is of that domain

In a task with choices all that is in the text alike is in every choice, so that a model that does not understand it
answers as often right as chance.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe.eval.scores import Interval

SHOTS = 16  # questions that may be shown as examples
ASKED = 300  # questions, where they can be drawn without end
CLOSING = dict(zip("([{<", ")]}>", strict=True))
WORDS = (
    "bird cloud stone river lamp chair bread glass horse apple table green paper stream tower candle garden window "
    "winter summer silver copper letter bridge market island forest basket ladder mirror needle pepper rocket saddle"
)
COMMON = "the of and to in that with which is for as be by on not from this have all are or at but an when one"
DOMAINS = {  # as in the blend: plays, poems, programs, mathematics
    "drama": "king lord duke queen sword crown sir madam exeunt enter servant gentleman castle messenger majesty",
    "verse": "heaven angels eden serpent celestial seraph abyss satan paradise cherubim ethereal throne eternal hell",
    "code": "return import class def self raise except lambda None True else elif yield assert tuple",
    "math": "matrix integer polynomial equation derivative integral theorem vector coefficient prime symbol roots",
}


@dataclass(frozen=True)
class TaskScore:
    """What a task's metric came to."""

    task: str
    metric: str  # with its filter, where the task has one
    score: (
        Interval  # the value ± 1.96 standard errors, unknown for none or 0; of bits per byte, of documents drawn anew
    )
    stderr: float | None  # as the harness computes it; None where it does not
    n: int  # questions
    fewshot: int  # examples before each
    chance: float | None  # of accuracy, for who knows nothing; None where there is nothing to choose from


class Task(NamedTuple):
    """One task: how its questions are drawn and put."""

    questions: Callable[[random.Random], Iterator[dict[str, Any]]]  # text, and choices and gold (an index), or answer
    between: str = " "  # what stands between text and answer
    asked: int = ASKED


def documents(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The questions of a task of `TASKS`, no text twice: those to show, and those to ask."""
    drawn: dict[str, dict[str, Any]] = {}
    task = TASKS[name]
    for question in task.questions(random.Random(name)):
        drawn.setdefault(question["text"], question)
        if len(drawn) == SHOTS + task.asked:
            break
    return list(drawn.values())[:SHOTS], list(drawn.values())[SHOTS:]


def among(rng: random.Random, right: str, wrong: list[str]) -> dict[str, Any]:
    """The choices in an order that says nothing, and which is right."""
    choices = rng.sample([right, *wrong], len(wrong) + 1)
    return {"choices": choices, "gold": choices.index(right)}


def arithmetic(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Wrong by 1, by 10 and by both, up or down: four numbers of two digits, and any of the four may be right."""
    while True:
        a, b = rng.randrange(1, 88), rng.randrange(1, 88)
        if 21 <= a + b <= 88:
            one, ten = rng.choice((-1, 1)), rng.choice((-10, 10))
            wrong = [str(a + b + shift) for shift in (one, ten, one + ten)]
            yield {"text": f"{a} + {b} =", **among(rng, str(a + b), wrong)}


def copy(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Four words to a line; the first of them is there to begin with."""
    while True:
        first, *rest = rng.sample(WORDS.split(), 4)
        line = " ".join((first, *rest))
        yield {"text": f"{line}\n{line}\n{first}", "answer": " ".join(rest)}


def induction(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Eight words, and one of the first seven again; what came after it, and three others that came after one."""
    while True:
        words = rng.sample(WORDS.split(), 8)
        place = rng.randrange(7)
        wrong = rng.sample([words[i] for i in range(1, 8) if i not in (place, place + 1)], 3)
        yield {"text": " ".join((*words, words[place])), **among(rng, words[place + 1], wrong)}


def brackets(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Ten brackets of four kinds are opened, and some closed: the wrong choices are the closing brackets of the other
    kinds, each of which was opened too."""
    while True:
        text = ""
        opened: list[str] = []
        for kind in rng.sample([*CLOSING, *CLOSING, *rng.choices([*CLOSING], k=2)], 10):
            if opened and rng.random() < 0.4:
                text += CLOSING[opened.pop()]
            text += kind
            opened.append(kind)
        while len(opened) > 1 and rng.random() < 0.6:
            text += CLOSING[opened.pop()]
        right = CLOSING[opened[-1]]
        yield {"text": text, **among(rng, right, [kind for kind in CLOSING.values() if kind != right])}


def cloze(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Every sentence of the reference's prose that has a length to learn from; wrong are last words of others."""
    from pydoc_data.topics import topics  # 0.7 MB of text that only this task needs

    paragraphs = [part for name in sorted(topics) for part in topics[name].split("\n\n") if not part.startswith(" ")]
    sentences = [s for part in paragraphs for s in re.split(r"(?<=[a-z])\. (?=[A-Z])", " ".join(part.split()))]
    matches = [re.fullmatch(r"([A-Z][\w ,'\"()-]{50,200}) ([a-z]{5,})\.?", sentence) for sentence in sentences]
    ended = sorted({(match[1], match[2]) for match in matches if match})
    last_words = sorted({word for _, word in ended})
    for text, word in rng.sample(ended, len(ended)):
        wrong = rng.sample([other for other in last_words if other != word and other not in text.split()], 3)
        yield {"text": text, **among(rng, word, wrong)}


def latent(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Half of 16 words are of a domain, as `separable` of moe/analysis/planted.py; one word of each domain is kept
    back to choose from."""
    words = {domain: listed.split() for domain, listed in DOMAINS.items()}
    while True:
        domain = rng.choice(list(words))
        asked = {name: rng.choice(listed) for name, listed in words.items()}
        told = rng.choices([word for word in words[domain] if word != asked[domain]], k=8)
        text = " ".join(rng.sample([*told, *rng.choices(COMMON.split(), k=8)], 16))
        yield {"text": text, **among(rng, asked.pop(domain), list(asked.values()))}


TASKS = {
    "arithmetic": Task(arithmetic),
    "copy": Task(copy),
    "induction": Task(induction),
    "brackets": Task(brackets, between=""),
    "cloze": Task(cloze),
    "latent": Task(latent),
}
