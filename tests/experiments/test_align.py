"""Claims about the command that aligns models."""

import json
import sys

import pytest

from experiments import align as command
from experiments.suites.alignment import Row

ROW = Row("exact", 0, 7, 0.5, 0.6, 0.1, 2.0, {"reward": 0.5, "kl": 0.2, "flips": 0.0, "ratio": 0.1, "far": 0.0})


def _run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["align", *words])
    command.main()


def test_tables_are_printed_and_rows_kept_with_the_command_that_made_them(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(command, "measure", lambda *arguments: asked.append(arguments[1:4]) or [ROW])
    _run(monkeypatch, "seeds=[4]", "steps=7", f"out={tmp_path / 'rows.jsonl'}")
    assert asked == [([4], 7, 1150)]
    assert "| exact" in capsys.readouterr().out
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (row["arm"], row["exact"], row["figures"]["kl"]) == ("exact", 0.5, 0.2)
    assert row["command"].startswith("python -m experiments.align")
    assert "seeds=[4] steps=7" in row["command"].replace("'", "")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("steps=0", "steps=0 is out of range"),
        ("seeds=[]", "seeds=[] is out of range"),
        ("start_steps=-1", "steps=-1"),
        ("arms=[ppo]", "accepted are exact, anywhere,"),
    ],
)
def test_runs_that_cannot_be_are_refused(monkeypatch, capsys, word, sentence):
    with pytest.raises(SystemExit, match="2"):
        _run(monkeypatch, word)
    assert sentence in capsys.readouterr().err
