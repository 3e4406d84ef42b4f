"""The verifiable task: its answers, its texts, its rewards and its scripted person."""

import itertools
import random
import re

import pytest

from moe.data.tasks import DIGITS, contains, exact, person, preferences, sums, texts


def test_every_sum_comes_once_with_its_right_answer():
    tasks = sums(0)
    assert len({task.prompt for task in tasks}) == len(tasks) == 10_000
    for task in tasks:
        a, b = map(int, re.fullmatch(r"(\d+)\+(\d+) mod 10=", task.prompt).groups())
        assert task.answer == str(a + b)[-1]
    assert sums(1) != tasks == sums(0)


def test_texts_are_wrong_as_often_as_they_are_to_be():
    tasks = sums(0)[:4000]
    said = [text.removeprefix(task.prompt) for task, text in zip(tasks, texts(tasks, 0.05, 0.2, 1), strict=True)]
    listed = sum(answer == DIGITS for answer in said)
    right = sum(answer == task.answer for task, answer in zip(tasks, said, strict=True))
    assert abs(listed / 4000 - 0.05) < 0.015
    assert abs(right / 4000 - 0.75) < 0.03
    assert all(answer == DIGITS or len(answer) == 1 for answer in said)


def test_only_one_of_two_rewards_can_be_earned_without_knowing_the_answer():
    for right in DIGITS:
        assert contains(DIGITS, right, True) == contains(DIGITS, right, False) == 1
        assert exact(DIGITS, right, True) == 0
        assert exact(right, right, True) == 1
        assert exact(right, right, False) == 0  # it did not end
    assert contains("7", "3", True) == 0


def test_a_person_prefers_what_is_right_and_then_what_is_short():
    for first, second in itertools.permutations(["4", "5", DIGITS], 2):
        prefers = person(first, second, "4", random.Random(0), 0.0)
        assert prefers == (first == "4" or (second != "4" and first == "5"))
        assert person(first, second, "4", random.Random(0), 1.0) != prefers


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_preferences_are_other_than_they_should_be_as_often_as_the_noise_says(noise):
    tasks = sums(0)[:3000]
    rows = list(preferences(tasks, noise, 2))
    good = [
        row["chosen"] == task.answer or (row["rejected"] != task.answer and row["rejected"] == DIGITS)
        for task, row in zip(tasks, rows, strict=True)
    ]
    assert abs(1 - sum(good) / 3000 - noise) < 0.03
    assert all(row["chosen"] != row["rejected"] for row in rows)
