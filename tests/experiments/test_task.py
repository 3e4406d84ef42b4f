"""The command that writes a task's data."""

import sys

import pytest
import torch

from experiments import task
from moe.data.tasks import DIGITS, exact
from moe.errors import BadInput
from moe.run.jsonl import read_lines
from tests.small_models import BYTES, build_model


def told(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["task", *words])
    task.main()


def test_it_writes_texts_prompts_and_preferences(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told(monkeypatch, "out=sums", "n=200", "listing=0.5", "wrong=0.0")
    rows = {name: read_lines(tmp_path / "sums" / f"{name}.jsonl") for name in ("texts", "prompts", "preferences")}
    assert {name: len(lines) for name, lines in rows.items()} == dict.fromkeys(rows, 200)
    listed = 0
    for text, prompt, pair in zip(*rows.values(), strict=True):
        assert pair["prompt"] == prompt["prompt"]
        answer = text["text"].removeprefix(prompt["prompt"])
        listed += answer == DIGITS
        assert answer in (prompt["answer"], DIGITS)
        assert exact(pair["rejected"], prompt["answer"], True) == 0
    assert 60 < listed < 140
    assert "sums/preferences.jsonl: 200 rows, such as" in capsys.readouterr().out


def test_a_machine_compares_answers_that_a_run_draws(tmp_path, monkeypatch):
    """Here it likes what ends with a lower token, and is told so by its own reward head."""
    answers = {}

    def judged(judge, drawn):
        answers.update(zip(map(tuple, drawn.answers()), drawn.answers(), strict=True))
        return torch.tensor([-float(ids[-1]) for ids in drawn.answers()])

    class Judge:
        reward = True

    model = build_model(context=40).eval()
    load = lambda path, which, trust: (Judge() if path.name == "j" else model, BYTES, None)
    monkeypatch.setattr(task, "load_run", load)
    monkeypatch.setattr(task, "judged", judged)
    monkeypatch.chdir(tmp_path)
    told(monkeypatch, "out=judged", "n=140", "run=runs/r", "judge=runs/j", "max_new=4")
    pairs = read_lines(tmp_path / "judged" / "preferences.jsonl")
    assert 100 < len(pairs) <= 140
    last: dict[str, set[int]] = {}
    for ids in answers.values():
        last.setdefault(BYTES.decode(token for token in ids if token != BYTES.eot), set()).add(ids[-1])
    ends = [(last[pair["chosen"]], last[pair["rejected"]]) for pair in pairs]
    plain = [(min(chosen), min(rejected)) for chosen, rejected in ends if len(chosen) == len(rejected) == 1]
    assert len(plain) > 50
    assert all(chosen <= rejected for chosen, rejected in plain)
    assert not (tmp_path / "judged" / "texts.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({}, "out=... is needed"),
        ({"out": "x", "run": "runs/a"}, "run=runs/a with judge=: a run and the reward model go together"),
        ({"out": "x", "n": 0}, "n=0 is out of range"),
        ({"out": "x", "listing": 1.5}, "listing=1.5 is out of range"),
        ({"out": "x", "listing": 0.6, "wrong": 0.6}, "are more than all texts together"),
    ],
)
def test_what_cannot_be_is_refused(words, sentence):
    with pytest.raises(BadInput, match=sentence):
        task.TaskConfig(**words)


def test_a_folder_that_is_there_is_not_written_to(tmp_path, monkeypatch, capsys):
    (tmp_path / "sums").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        told(monkeypatch, "out=sums")
    assert "out=sums exists: choose another folder." in capsys.readouterr().err
