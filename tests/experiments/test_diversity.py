"""Claims about the command that fine-tunes on more and more kinds of task."""

import json
import sys

import pytest

from experiments import diversity as command
from experiments.pages.diversity_table import Row


def test_the_table_is_printed_and_the_rows_are_kept_with_their_command(tmp_path, monkeypatch, capsys):
    rows = [Row(kinds, seed, [], 3.0 - kinds / 8, 1.0) for seed in (0, 1) for kinds in (0, 1, 8)]
    monkeypatch.setattr(command, "measure", lambda *arguments: rows)
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["diversity", "seeds=[0,1]", f"run={tmp_path / 'runs'}", f"out={out}"])
    command.main()
    assert "kinds of task" in capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["kinds"], line["seed"], line["others"]) for line in lines] == [
        (r.kinds, r.seed, r.others) for r in rows
    ]
    assert all("'seeds=[0,1]' steps=300" in line["command"] for line in lines)


@pytest.mark.parametrize("word", ["steps=0", "base_steps=0", "seeds=[]", "seeds=[-1]", "seeds=[1,1]"])
def test_what_cannot_be_is_refused(word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diversity", word])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert word.split("=")[0] in capsys.readouterr().err
