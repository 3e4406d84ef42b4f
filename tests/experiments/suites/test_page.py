"""Claims about the suite that works the inspector's page."""

import json

import pytest

from experiments.suites import page
from experiments.suites.cases import Absent
from tests.browser import needs_browser
from tests.experiments.bench_command import command


@needs_browser
def test_a_row_has_what_a_click_a_hover_and_a_passage_took(monkeypatch, tmp_path, capsys):
    command(monkeypatch, "suite=page", "sizes=smoke", f"out={tmp_path / 'rows.jsonl'}")
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["status"] == "measured"
    assert row["bytes"] > 10_000
    assert min(row[name] for name in ("opens", "click", "hover", "passage")) > 0
    assert row["click"] <= row["click_slow"]
    assert "click to paint" in capsys.readouterr().out


def test_routes_are_random_and_a_tokens_experts_differ(tmp_path):
    trace = page.random_trace(page.Size(2, 8, 3, 1024), tmp_path / "t")
    expert_TLK = trace.experts()
    assert all(len(set(row)) == 3 for row in expert_TLK.reshape(-1, 3).tolist())
    assert min(trace.counts[0].sum(0)) > 0.7 * 1024 * 3 / 8


def test_without_a_browser_the_row_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "BROWSERS", ("no-such-browser",))
    with pytest.raises(Absent, match="no Chromium"):
        page.in_browser(tmp_path, 1)
