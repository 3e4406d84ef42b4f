"""Questions with answers, made here: of the corpora that every machine has, and of small tasks with one right answer.

    docs       a module of Python, or a part of its reference -> the first sentence on it
    signature  what a function of the library is for -> how its definition begins
    verse      a line of Milton -> the line behind it
    all others a task on small numbers or a word -> the one right answer

Every question is put in one of several wordings. A pair is drawn by (kind, seed, number) alone, so that more questions,
or more kinds, change no other. Questions that are held out have their own subjects: a topic, function, poem, or pair of
operands is either learnt from or asked about.
"""

import ast
import hashlib
import itertools
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moe.data import blend
from moe.errors import BadInput

HELD_OUT = 0.1  # of the subjects
LONGEST = 160  # characters of an answer that is taken from a corpus
WORDS = (
    "apple", "bread", "candle", "dragon", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle",
    "ladder", "market", "needle", "orange", "pencil", "quartz", "ribbon", "saddle", "timber", "unicorn", "velvet",
    "window", "yellow", "zipper", "anchor", "bottle", "cradle", "desert", "eleven", "feather", "goblin", "hammer",
    "insect", "jungle", "kitten", "lemon", "mirror", "napkin", "oyster", "pillow", "rabbit", "silver", "tunnel",
    "umbrella", "violin", "walnut",
)  # fmt: skip


class Question(NamedTuple):
    """What is asked, the right answer, and the kind of task."""

    prompt: str
    completion: str
    task: str


Pair = tuple[str, str]  # the question in one wording, its answer
Maker = Callable[[random.Random], tuple[Pair, str]]  # and the subject


def _numbers(wordings: Sequence[str], answer: Callable[[int, int], object], draw: random.Random) -> tuple[Pair, str]:
    a, b = draw.randrange(100), draw.randrange(100)
    both = any("{b}" in wording for wording in wordings)
    return (draw.choice(wordings).format(a=a, b=b), str(answer(a, b))), f"{a} {b}" if both else str(a)


def _word(wordings: Sequence[str], answer: Callable[[str], object], draw: random.Random) -> tuple[Pair, str]:
    word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 6))) if draw.random() < 0.5 else ""
    word = word or draw.choice(WORDS)
    return (draw.choice(wordings).format(w=word), str(answer(word))), word


# Kinds with one right answer, which `exact` of moe/eval/answers.py holds answers against.
MAKERS: dict[str, Maker] = {
    "add": partial(_numbers, ("What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} ="), lambda a, b: a + b),
    "larger": partial(
        _numbers, ("Which is larger, {a} or {b}?", "Name the larger of {a} and {b}.", "max of {a} and {b}"), max
    ),
    "parity": partial(_numbers, ("Is {a} even or odd?", "Even or odd: {a}"), lambda a, b: ("even", "odd")[a % 2]),
    "next": partial(
        _numbers, ("What comes after {a}?", "Count on from {a}.", "The number behind {a} is"), lambda a, b: a + 1
    ),
    "copy": partial(_word, ("Repeat: {w}", "Say {w}.", "Write the word {w}."), lambda w: w),
    "first": partial(_word, ("What is the first letter of {w}?", "First letter: {w}"), lambda w: w[0]),
    "last": partial(_word, ("What is the last letter of {w}?", "Last letter: {w}"), lambda w: w[-1]),
    "upper": partial(_word, ("Write {w} in capitals.", "In capitals: {w}"), str.upper),
    "reverse": partial(_word, ("Spell {w} backwards.", "Backwards: {w}"), lambda w: w[::-1]),
    "length": partial(_word, ("How many letters has {w}?", "Letters in {w}:"), len),
    "twice": partial(_word, ("Say {w} twice.", "Write {w} two times."), lambda w: f"{w} {w}"),
    "smaller": partial(
        _numbers, ("Which is smaller, {a} or {b}?", "Name the smaller of {a} and {b}.", "min of {a} and {b}"), min
    ),
}
CHECKED = tuple(MAKERS)
TAKEN = ("docs", "signature", "verse")  # from corpora
TASKS = (*TAKEN, *CHECKED)


def questions(task: str, n: int, seed: int, held_out: bool, cache: Path) -> list[Question]:
    """`n` questions of one kind, none of which has a subject of the other share. `cache` keeps what verse is read from.
    Raises `BadInput` for a kind that there is not, and for more questions than a corpus gives."""
    if task not in TASKS:
        raise BadInput(f"tasks has {task!r}: accepted are {', '.join(TASKS)}.")
    if task in CHECKED:
        return list(_drawn(task, n, seed, held_out))
    of_corpus = [pair for pair in dict(_taken(task, cache)).items() if _is_held_out(pair[0]) == held_out]
    if len(of_corpus) < n:
        raise BadInput(f"n={n} is more than the {len(of_corpus)} {'held-out ' * held_out}questions of tasks={task}.")
    order = sorted(of_corpus, key=lambda pair: hashlib.sha256(f"{seed}/{pair[0]}".encode()).digest())
    return [Question(*pair, task) for pair in order[:n]]


def _drawn(task: str, n: int, seed: int, held_out: bool) -> Iterator[Question]:
    number, made = 0, 0
    while made < n:
        pair, subject = MAKERS[task](random.Random(f"{task}/{seed}/{number}"))
        number += 1
        if _is_held_out(subject) == held_out:
            made += 1
            yield Question(*pair, task)


def _is_held_out(subject: str) -> bool:
    digest = hashlib.sha256(subject.encode()).digest()
    return int.from_bytes(digest[:8]) < HELD_OUT * 2**64


def _taken(task: str, cache: Path) -> Iterator[Pair]:
    """Every pair that a corpus gives, in an order that does not change."""
    if task == "verse":
        for _, text in blend.texts("verse", ["verse"], cache):
            lines = [" ".join(line.split()) for line in text.splitlines()]
            for line, behind in itertools.pairwise(lines):
                if min(len(line), len(behind)) > 20 and not line.isupper() and not behind.isupper():
                    yield f"Which line follows: {line}", behind
    elif task == "docs":
        from pydoc_data.topics import topics  # 0.7 MB of text that only this needs

        for name in sorted(topics, key=blend.hash_order):
            for heading, text in _sections(topics[name]):
                yield f"What does Python's reference say of {heading}?", text
        for name, source in _library():
            modules = [node for node, _ in blend.documented(source) or [] if isinstance(node, ast.Module)]
            if sentence := _first_sentence(ast.get_docstring(modules[0]) or "") if modules else "":
                yield f"What is Python's module {name} for?", sentence
    else:
        for _, source in _library():
            yield from _signatures(source)


def _library() -> Iterator[tuple[str, bytes]]:
    """The modules of the standard library by name, and their source."""
    parts = blend.python_files(Path(sysconfig.get_path("stdlib")), "stdlib")
    for name in sorted(parts, key=blend.hash_order):
        module = name.removeprefix("stdlib/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        yield module, Path(parts[name]).read_bytes()


def _sections(topic: str) -> Iterator[Pair]:
    """Headings of a topic and the first sentence below each."""
    lines = topic.splitlines()
    for i, line in enumerate(lines[1:], 1):
        if len(line) > 3 and set(line) <= set("*=-~") and len(line) >= len(lines[i - 1].strip()) > 2:
            sentence = _first_sentence("\n".join(lines[i + 1 :]))
            if sentence:
                yield lines[i - 1].strip(), sentence


def _signatures(source: bytes) -> Iterator[Pair]:
    """What the documented functions of a Python file are for, and how their definitions begin."""
    for node, _ in blend.documented(source) or []:
        if not isinstance(node, ast.FunctionDef):
            continue
        purpose = _first_sentence(ast.get_docstring(node) or "")
        header = f"def {node.name}({ast.unparse(node.args)}):"
        if purpose and len(header) <= LONGEST:
            yield f"Write the definition of a function: {purpose}", header


def _first_sentence(text: str) -> str:
    """On one line; "" where it is no sentence, or a long one."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    return sentence if 10 < len(sentence) <= LONGEST and sentence[-1] in ".!?" else ""
