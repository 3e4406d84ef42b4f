"""Claims about moe/eval/answers.py: what a model says, where it ends, and which answers are right."""

import pytest

from moe.config.router import RouterConfig
from moe.data.chat import DEFAULT, Template
from moe.errors import BadInput
from moe.eval import answers as module
from moe.eval.answers import ask, before, reply_ids
from moe.eval.generate import generate
from moe.model.transformer import Transformer
from tests.small_models import BYTES, tiny

TEMPLATE = Template(DEFAULT)


def question(text: str, answer: str) -> tuple[str, list[dict[str, str]]]:
    return "sums", [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


@pytest.fixture
def model() -> Transformer:
    return Transformer(tiny(context=120), RouterConfig()).initialize(0).eval()


def test_answers_of_many_are_those_of_each_alone(model):
    asked = [question("a" * n, "b") for n in (1, 7, 30, 2)]
    together = ask(model, BYTES, TEMPLATE, asked, 20, batch_size=3)
    for (_, messages), answer in zip(asked, together, strict=True):
        prompt = reply_ids(TEMPLATE, messages[:1], BYTES)
        alone = list(generate(model, prompt, 20, temperature=0, eot=BYTES.eot))
        assert answer.said == BYTES.decode(alone).partition(TEMPLATE.end_of_turn)[0]
        assert (answer.prompt, answer.wanted, answer.task) == (messages[0]["content"], "b", "sums")


@pytest.mark.parametrize(
    ("said", "wanted", "exact", "ended"),
    [
        (b"12<|end|>rest", "12", True, True),
        (b" 12\n<|end|>", "12", True, True),
        (b"12", "12", False, False),
        (b"123<|end|>", "12", False, True),
        (b"", "12", False, False),
    ],
)
def test_an_answer_is_right_that_says_it_and_ends(said, wanted, exact, ended, model, monkeypatch):
    class Drawn:
        def answers(self):
            return [list(said)]

    monkeypatch.setattr(module, "rollout", lambda *arguments, **settings: Drawn())
    (answer,) = ask(model, BYTES, TEMPLATE, [question("a", wanted)], 20)
    assert (answer.exact, answer.ended) == (exact, ended)


def test_the_end_of_text_ends_an_answer_too(model, monkeypatch):
    class Drawn:
        def answers(self):
            return [[*b"12", BYTES.eot]]

    monkeypatch.setattr(module, "rollout", lambda *arguments, **settings: Drawn())
    (answer,) = ask(model, BYTES, TEMPLATE, [question("a", "12")], 20)
    assert (answer.said, answer.exact) == ("12", True)


def test_what_cannot_be_checked_or_has_no_room_is_refused(model):
    with pytest.raises(BadInput, match="conversation 0 does not end with an answer"):
        ask(model, BYTES, TEMPLATE, [("", [{"role": "user", "content": "a"}])], 5)
    with pytest.raises(BadInput, match=r"longer than model\.context=120"):
        ask(model, BYTES, TEMPLATE, [question("a" * 110, "b")], 20)


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([1, 2, 3, 9, 8, 5], [1, 2, 3]),
        ([9, 9, 8], [9]),
        ([9, 8], []),
        ([1, 9], [1, 9]),
        ([], []),
        ([9, 1, 9, 8, 9, 8], [9, 1]),
    ],
)
def test_tokens_come_up_to_where_the_end_begins(ids, kept):
    assert list(before(iter(ids), [9, 8])) == kept


def test_no_more_is_held_back_than_the_end_has():
    ids = iter([1, 2, 3])
    coming = before(ids, [9, 8])
    assert next(coming) == 1
    assert list(ids) == [3]
