"""Claims about the suite that plans steps and takes them."""

import json

import pytest

from experiments.suites import memory
from tests.experiments.bench_command import command


def test_a_row_has_what_was_planned_and_what_was_asked_for(monkeypatch, tmp_path, capsys):
    command(monkeypatch, "suite=memory", "sizes=smoke", f"out={tmp_path / 'rows.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["measured"] * len(memory.SMOKE)
    for row in rows:
        assert abs(row["planned"] / row["asked"] - 1) == abs(row["error"]) < 0.01
        assert row["seconds_per_step"] > 0
    assert "planned is" in capsys.readouterr().out


def test_there_are_at_least_twelve_shapes_and_no_two_alike():
    assert len(set(memory.SHAPES)) == len(memory.SHAPES) >= 12


def test_a_shape_that_cannot_be_taken_says_why():
    (case,) = memory.cases((memory.SMOKE[0]._replace(vocab=0),))
    with pytest.raises(RuntimeError, match="to be less than"):
        case.measure()
