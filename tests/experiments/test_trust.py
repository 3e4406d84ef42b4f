"""Claims about the command that tries metrics on planted routers."""

import json
import sys

import pytest

from experiments import trust as command
from experiments.stats.recovery import HARDER, NOISES, PLAIN, SIZES, by_size
from moe.analysis.caveats import CAVEATS


def _run(monkeypatch, *words):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["trust", *words])
    command.main()


def test_metrics_are_printed_and_kept_with_the_command(monkeypatch, tmp_path, capsys):
    settings = (*(by_size(n, noise) for noise in NOISES for n in (12, 100)), by_size(200, 0.5), *HARDER.values())
    monkeypatch.setattr(command, "SETTINGS", settings)
    assert PLAIN in settings
    assert max(SIZES) == 200
    out = tmp_path / "a" / "rows.jsonl"
    _run(monkeypatch, "draws=1", "seed=3", f"out={out}")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(settings) * len(CAVEATS)
    assert {row["draws"] for row in rows} == {1}
    assert {row["command"] for row in rows} == {f"python -m experiments.trust draws=1 seed=3 out={out}"}
    printed = capsys.readouterr().out
    assert all(f"| {metric} " in printed for metric in CAVEATS)
    assert "names beyond tokens" in printed


@pytest.mark.parametrize(("word", "sentence"), [("draws=0", "draws=0 is out of"), ("seed=-1", "seed=-1 is out of")])
def test_what_cannot_be_tried_is_refused(monkeypatch, capsys, word, sentence):
    with pytest.raises(SystemExit, match="2"):
        _run(monkeypatch, word)
    assert sentence in capsys.readouterr().err
