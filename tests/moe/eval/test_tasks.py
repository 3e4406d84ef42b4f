"""Claims about the questions that are made by code: they are right, told by nothing but what they ask, and always the
same."""

import hashlib
import json
from collections import Counter

import pytest

from moe.eval.tasks import CLOSING, COMMON, DOMAINS, SHOTS, TASKS, WORDS, documents

CHOSEN = [name for name in TASKS if name != "copy"]


def right(question):
    return question["choices"][question["gold"]]


@pytest.mark.parametrize("name", TASKS)
def test_no_text_is_put_twice_nor_shown_and_asked(name):
    shown, asked = documents(name)
    assert (len(shown), len(asked)) == (SHOTS, 300)
    assert len({question["text"] for question in shown + asked}) == SHOTS + 300


@pytest.mark.parametrize("name", CHOSEN)
def test_one_of_four_choices_is_right_and_its_place_says_nothing(name):
    questions = documents(name)[1]
    assert {len(set(question["choices"])) for question in questions} == {4}
    count = Counter(question["gold"] for question in questions)
    # Chi square, three degrees of freedom: above 16.3 once in a thousand.
    assert sum((count[i] - 75) ** 2 / 75 for i in range(4)) < 16.3


def test_a_sum_is_right_and_three_numbers_of_its_length_are_wrong():
    for question in documents("arithmetic")[1]:
        a, plus, b, equals = question["text"].split()
        assert (plus, equals) == ("+", "=")
        assert right(question) == str(int(a) + int(b))
        assert {len(choice) for choice in question["choices"]} == {2}


def test_any_corner_of_the_four_numbers_may_be_the_sum():
    """The smallest, the largest and those between are right equally often: the choices alone say nothing."""
    rank = Counter(sorted(map(int, q["choices"])).index(int(right(q))) for q in documents("arithmetic")[1])
    assert sum((rank[i] - 75) ** 2 / 75 for i in range(4)) < 16.3


def test_a_copy_is_the_rest_of_a_line_that_stood_there_twice():
    for question in documents("copy")[1]:
        line, again, first = question["text"].split("\n")
        assert line == again == f"{first} {question['answer']}"
        assert set(line.split()) <= set(WORDS.split())


def test_what_followed_before_follows_and_the_others_followed_something_else():
    for question in documents("induction")[1]:
        *words, last = question["text"].split()
        assert words.count(last) == 1
        assert words[words.index(last) + 1] == right(question)
        assert set(question["choices"]) <= set(words[1:]) - {last}


def test_brackets_are_closed_as_a_stack_says():
    opening = {closing: kind for kind, closing in CLOSING.items()}
    for question in documents("brackets")[1]:
        stack = []
        for kind in question["text"]:
            if kind in CLOSING:
                stack.append(kind)
            else:
                assert stack.pop() == opening[kind]
        assert right(question) == CLOSING[stack[-1]]
        assert set(question["choices"]) == set(CLOSING.values())
        assert set(CLOSING) <= set(question["text"])


def test_the_bracket_opened_last_is_the_one_to_close_in_44_of_100():
    """A shortcut, which docs/measuring.md tells beside chance."""
    last = [CLOSING[next(kind for kind in reversed(q["text"]) if kind in CLOSING)] for q in documents("brackets")[1]]
    share = sum(kind == right(q) for kind, q in zip(last, documents("brackets")[1], strict=True)) / len(last)
    assert round(100 * share) == 44


def test_a_sentence_ends_with_the_word_that_ends_it_in_the_reference():
    from pydoc_data.topics import topics

    text = " ".join(" ".join(part.split()) for part in topics.values())
    for question in documents("cloze")[1]:
        assert f"{question['text']} {right(question)}" in text


def test_a_domain_is_told_by_its_words_alone_and_no_choice_was_among_them():
    domain_of = {word: domain for domain, words in DOMAINS.items() for word in words.split()}
    assert len(domain_of) == sum(len(words.split()) for words in DOMAINS.values())
    assert not domain_of.keys() & set(COMMON.split())
    for question in documents("latent")[1]:
        words = question["text"].split()
        (domain,) = {domain_of[word] for word in words if word in domain_of}
        assert sum(word in domain_of for word in words) == 8 == len(words) - 8
        assert domain_of[right(question)] == domain
        assert {domain_of[choice] for choice in question["choices"]} == set(DOMAINS)
        assert not set(question["choices"]) & set(words)


def test_the_questions_are_the_same_on_every_machine():
    """But for those of Python's own documentation, which changes with it."""
    everything = json.dumps([documents(name) for name in TASKS if name != "cloze"])
    assert hashlib.sha256(everything.encode()).hexdigest()[:16] == "33a37a789af63aa9"
