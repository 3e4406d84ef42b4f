"""Claims about the command that writes questions."""

import json
import sys

import pytest

from experiments import instructions as command
from moe.data.chat import DEFAULT, Template, tokenize
from tests.small_models import BYTES


def _write(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["instructions", *words])
    command.main()


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_are_spread_over_the_tasks_and_others_are_held_out(tmp_path, monkeypatch):
    out = tmp_path / "q"
    _write(monkeypatch, f"out={out}", "tasks=[add,copy,first]", "n=31", "held_out=5")
    learnt, asked = _rows(out / "train.jsonl"), _rows(out / "held-out.jsonl")
    assert [sum(row["task"] == task for row in learnt) for task in ("add", "copy", "first")] == [11, 10, 10]
    assert [sum(row["task"] == task for row in asked) for task in ("add", "copy", "first")] == [5, 5, 5]
    assert not {row["prompt"] for row in learnt} & {row["prompt"] for row in asked}


def test_a_preference_is_a_question_as_a_model_is_asked_it_with_a_right_and_a_wrong_answer(tmp_path, monkeypatch):
    out = tmp_path / "q"
    _write(monkeypatch, f"out={out}", "tasks=[add,copy]", "n=20", "held_out=5")
    learnt, pairs = _rows(out / "train.jsonl"), _rows(out / "preferences.jsonl")
    assert len(pairs) == len(learnt)
    answers = {task: {row["completion"] for row in learnt if row["task"] == task} for task in ("add", "copy")}
    for row, pair in zip(learnt, pairs, strict=True):
        assert pair["prompt"] == f"<|user|>\n{row['prompt']}<|end|>\n<|assistant|>\n"
        assert pair["chosen"] == row["completion"] + "<|end|>"
        rejected = pair["rejected"].removesuffix("<|end|>")
        assert rejected in answers[row["task"]] - {row["completion"]}
    # The tokens of both are those of the conversation.
    conversation = tokenize(Template(DEFAULT).render(
        [{"role": "user", "content": learnt[0]["prompt"]}, {"role": "assistant", "content": learnt[0]["completion"]}]
    ), BYTES).ids  # fmt: skip
    ids = BYTES.encode(pairs[0]["prompt"]) + BYTES.encode(pairs[0]["chosen"])
    assert conversation[: len(ids)] == ids


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "out=... is needed"),
        (["out=Q", "tasks=[divide]"], "tasks has 'divide'"),
        (["out=Q", "tasks=[add,add]"], "names a task twice"),
        (["out=Q", "n=3"], "n=3 is out of range"),
        (["out=Q", "held_out=0"], "held_out=0 is out of range"),
        (["out=there"], "out=there exists"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(words, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit) as ended:
        _write(monkeypatch, *words)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
