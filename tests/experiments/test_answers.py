"""Claims about the command that asks a model."""

import json
import sys

import pytest

from experiments import answers as command
from experiments.answers import wilson
from tests.small_runs import settings, train


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(settings(corpus, str(folder), {"model.context": 96, "train.steps": 2, "train.eval_every": 2}))
    return folder


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"prompt": f"What comes after {i}?", "completion": str(i + 1), "task": ("a", "b")[i % 2]} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _ask(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["answers", *words])
    command.main()


def test_a_row_for_all_and_for_each_task_and_a_line_for_each_answer(run, questions, tmp_path, monkeypatch, capsys):
    out = tmp_path / "answers.jsonl"
    _ask(monkeypatch, f"run={run}", f"questions={questions}", "max_new=6", f"out={out}", "show=1")
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in printed.splitlines() if line.startswith("|")]
    assert rows[2:] == [["all", "5", "0.0%"], ["a", "3", "0.0%"], ["b", "2", "0.0%"]]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["prompt"], line["wanted"]) for line in lines][1] == ("What comes after 1?", "2")
    assert printed.count("wanted") == 2


def test_wilsons_interval_is_his():
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    z, n, p = 1.959963984540054, 40, 0.1
    half = z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    expected = [(p + z * z / 2 / n + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert wilson(4, 40) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "q.jsonl is empty"),
        ("{]\n", "q.jsonl: line 1 is not JSON"),
        ('{"prompt": "a", "completion": ""}\n', "message 1 is an empty answer"),
    ],
)
def test_questions_that_are_none_are_refused_with_their_line(line, why, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(SystemExit) as ended:
        _ask(monkeypatch, f"run={run}", f"questions={tmp_path / 'q.jsonl'}")
    assert ended.value.code == 2
    assert why in capsys.readouterr().err
