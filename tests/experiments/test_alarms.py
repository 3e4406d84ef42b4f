"""Claims about the command that measures alarms."""

import json
import sys

import pytest

from experiments import alarms as command
from experiments.suites.faults import Row
from moe.run.summary import Alarm


def _run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["alarms", *words])
    command.main()


def test_tables_are_printed_and_rows_kept_with_the_command_that_made_them(monkeypatch, tmp_path, capsys):
    rows = [
        Row("", "softmax", 5, [], None, None, 0.0),
        Row("no balance loss", "softmax", 5, [Alarm("uneven load", 150, 1, "e", "c", "a")], 150, None, 0.01),
    ]
    monkeypatch.setattr(command, "measure", lambda seeds, say, steps: rows if (seeds, steps) == ([5], 500) else [])
    _run(monkeypatch, "seeds=[5]", f"out={tmp_path / 'new' / 'rows.jsonl'}")
    printed = capsys.readouterr().out
    words = ["no balance loss", "1 of 1", "150 steps", "uneven load", "0 of 1", "–", "+0.010"]
    assert words in [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    kept = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    assert [row["fault"] for row in kept] == ["", "no balance loss"]
    assert kept[1]["alarms"][0]["kind"] == "uneven load"
    assert kept[0]["command"].startswith("python -m experiments.alarms")
    assert "seeds=[5]" in kept[0]["command"]


def test_runs_of_no_step_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        _run(monkeypatch, "steps=0")
    assert "steps=0 is out of range" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seeds", "words"), [("[]", "seeds=[] is out of range"), ("[-1]", "out of range"), ("[a]", "seeds")]
)
def test_seeds_that_are_no_numbers_are_refused(monkeypatch, capsys, seeds, words):
    with pytest.raises(SystemExit, match="2"):
        _run(monkeypatch, f"seeds={seeds}")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
