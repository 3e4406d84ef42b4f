"""Claims about the command that writes questions."""

import json
import sys

import pytest

from experiments import instructions as command


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
