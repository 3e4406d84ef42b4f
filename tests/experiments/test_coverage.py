"""Claims about the command that simulates studies."""

import json
import sys

import pytest

from experiments import coverage as command


def _run(monkeypatch, *words):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["coverage", *words])
    command.main()


def test_shares_are_printed_and_kept(monkeypatch, tmp_path, capsys):
    _run(monkeypatch, "studies=40", "seeds=3,5", f"out={tmp_path / 'a' / 'rows.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "a" / "rows.jsonl").read_text().splitlines()]
    assert {row["seeds"] for row in rows} == {3, 5}
    assert all(0 <= row["share"] <= 1 and row["studies"] == 40 for row in rows)
    printed = capsys.readouterr().out
    covered = next(row for row in rows if row["what"] == "covered")
    assert f"{covered['share']:.1%}" in printed


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("studies=0", "studies=0 is out of range"),
        ("seeds=1", "seeds=1 must be numbers of at least 2"),
        ("seeds=a", "seeds=a must"),
    ],
)
def test_what_cannot_be_simulated_is_refused(monkeypatch, capsys, word, sentence):
    with pytest.raises(SystemExit, match="2"):
        _run(monkeypatch, word)
    assert sentence in capsys.readouterr().err
