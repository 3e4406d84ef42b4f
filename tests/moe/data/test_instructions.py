"""Claims about moe/data/instructions.py: what is asked, that answers are right, and that nothing held out is learnt."""

import ast
import re
from pathlib import Path

import pytest

from moe.data import blend, instructions
from moe.data.instructions import CHECKED, TASKS, questions
from moe.errors import BadInput

POEM = "\n".join(f"The {i}th line of a poem that is as long as lines are" for i in range(400))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A poem in place of Milton's, which would have to be fetched."""
    monkeypatch.setattr(blend, "texts", lambda domain, domains, cache: iter([("poem", POEM)]))
    return tmp_path


def right(task: str, prompt: str) -> str:
    """The answer by the words of the question."""
    numbers = [int(number) for number in re.findall(r"\d+", prompt)]
    # The word is the one that no wording of the task has.
    word = re.sub(r"[:.?]", "", prompt).split()
    for text in word:
        if text not in KNOWN:
            break
    match task:
        case "add":
            return str(sum(numbers))
        case "larger" | "smaller":
            return str(sorted(numbers)[-1 if task == "larger" else 0])
        case "parity":
            return ["even", "odd"][numbers[0] % 2]
        case "next":
            return str(numbers[0] + 1)
        case "copy":
            return text
        case "first" | "last":
            return text[0 if task == "first" else -1]
        case "upper":
            return text.upper()
        case "reverse":
            return "".join(reversed(text))
        case "length":
            return str(len(list(text)))
        case _:
            return text + " " + text


KNOWN = {
    word for text in instructions.MAKERS.values() for wording in text.args[0] for word in re.findall(r"\w+", wording)
}


@pytest.mark.parametrize("task", CHECKED)
def test_the_answer_is_the_right_one_and_held_out_subjects_are_not_learnt(task, cache):
    learnt, asked = (questions(task, 120, 0, held_out, cache) for held_out in (False, True))
    for question in learnt + asked:
        assert question.completion == right(task, question.prompt), question
        assert question.task == task
    subject = lambda question: tuple(re.findall(r"\d+", question.prompt)) or right("copy", question.prompt)
    assert not {subject(question) for question in learnt} & {subject(question) for question in asked}
    assert len({question.prompt for question in learnt}) > 20


def test_more_questions_and_another_seed(cache):
    few, more, other = (questions("reverse", n, seed, False, cache) for n, seed in ((20, 0), (50, 0), (20, 1)))
    assert more[:20] == few
    assert other != few


def test_questions_of_verse_ask_for_the_line_behind(cache):
    asked = questions("verse", 20, 0, True, cache)
    for question in asked:
        line = question.prompt.removeprefix("Which line follows: ")
        lines = POEM.split("\n")
        assert lines[lines.index(line) + 1] == question.completion
    learnt = questions("verse", 200, 0, False, cache)
    assert not {question.prompt for question in learnt} & {question.prompt for question in asked}


def test_a_signature_is_a_definition_that_the_library_has(monkeypatch, cache):
    source = 'def f(a, b: int = 3, *c):\n    """Do one thing well. And more."""\n\ndef g():\n    """No"""\n'
    monkeypatch.setattr(instructions, "_library", lambda: iter([("m", source.encode())]))
    (pair,) = instructions._taken("signature", cache)
    assert pair == ("Write the definition of a function: Do one thing well.", "def f(a, b: int=3, *c):")
    ast.parse(pair[1] + " pass")


def test_docs_ask_what_a_module_is_for_and_what_a_heading_says(monkeypatch, cache):
    monkeypatch.setattr(instructions, "_library", lambda: iter([("a.b", b'"""Reads letters aloud.\n\nMore."""')]))
    pairs = list(instructions._taken("docs", cache))
    assert pairs[-1] == ("What is Python's module a.b for?", "Reads letters aloud.")
    assert len(pairs) > 20
    assert all(question.startswith("What does Python's reference say of ") for question, _ in pairs[:-1])


def test_a_task_that_there_is_not_and_more_than_a_corpus_gives_are_refused(cache):
    with pytest.raises(BadInput, match="tasks has 'divide': accepted are docs"):
        questions("divide", 1, 0, False, cache)
    with pytest.raises(BadInput, match="n=1000 is more than the"):
        questions("verse", 1000, 0, False, cache)
    assert len(TASKS) == len(set(TASKS)) == 15
