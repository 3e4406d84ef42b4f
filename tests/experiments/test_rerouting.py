"""Claims about the command that says what fine-tuning did to routing."""

import json
import sys

import pytest

from experiments import rerouting as command
from moe.analysis.rerouting import compare
from moe.analysis.tracing import What, windows_of_run
from moe.run.jsonl import to_text
from moe.run.load import load_run
from tests.small_runs import settings, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    """A run, and one that goes on from it with its experts alone."""
    folder = tmp_path_factory.mktemp("runs")
    train(settings(corpus, folder / "base"))
    tuned = {"source": str(folder / "base"), "tune.parts": ["experts"], "optim.lr": 0.1}
    train(settings(corpus, folder / "tuned", tuned))
    return folder


def _run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["rerouting", *words])
    command.main()
    return capsys.readouterr().out


def _refused(monkeypatch, capsys, *words):
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, capsys, *words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_lines_are_what_is_compared_and_the_tables_are_of_them(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    printed = _run(
        monkeypatch, capsys, f"before={runs / 'base'}", f"after={runs / 'tuned'}", "which=last", f"out={out}"
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    before, (after, tokenizer, cfg) = load_run(runs / "base")[0], load_run(runs / "tuned", "last")
    rows = compare(before, after, windows_of_run(What(batch_size=4), cfg, tokenizer))
    about = {key: lines[0][key] for key in ("before_source", "after_source", "sampling")}
    assert lines == [json.loads(to_text(about | vars(row))) for row in rows]
    assert [(line["layer"], line["domain"]) for line in lines[:4]] == [
        (0, None),
        (0, "algebra"),
        (0, "botany"),
        (0, "chess"),
    ]
    # Nothing below the first router was trained.
    assert [line["flips"]["value"] for line in lines[:4]] == [0] * 4
    assert lines[4]["flips"] == lines[4]["by_states"]
    assert lines[4]["flips"]["value"] > 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    (row,) = [cells for cells in table if cells[:2] == ["1", "all"]]
    assert row[2] == f"{lines[4]['flips']['value']:.3f}"
    assert row[-1] == "0.000"
    # The expert that moved most stands first.
    moves = [
        abs(after - before)
        for line in lines
        for before, after in zip(line["before"]["share_E"], line["after"]["share_E"], strict=True)
        if line["domain"]
    ]
    start = next(i for i, cells in enumerate(table) if cells[1] == "expert") + 2
    assert abs(float(table[start][-1])) == pytest.approx(max(moves), abs=5e-4)


def test_two_checkpoints_of_a_run_and_a_text_of_ones_own(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("to be or not to be, " * 20)
    words = [f"before={runs / 'base'}", f"after={runs / 'base'}", f"text={tmp_path / 'a.txt'}"]
    same = _run(monkeypatch, capsys, *words)
    assert "intervals over windows" in same
    assert "| 1     | all  | 0.000 |" in same
    other = _run(monkeypatch, capsys, *words, "which_before=step-6", "which=last")
    assert "base, step-00000006; after:" in other


def test_what_cannot_be_compared_is_refused_in_one_sentence(runs, corpus, tmp_path, monkeypatch, capsys):
    base = f"before={runs / 'base'}"
    assert "after=... is needed" in _refused(monkeypatch, capsys, base)
    changes = {"train.steps": 1, "optim.warmup": 0}
    train(settings(corpus, tmp_path / "wide", changes | {"model.moe.n_experts": 6}))
    train(settings(corpus, tmp_path / "char", changes | {"tokenizer.name": "char"}))
    train(settings(corpus, tmp_path / "dense", changes | {"model.moe": None}))
    out = tmp_path / "rows.jsonl"
    for name, said in (("wide", "experts by MoE layer"), ("char", "other tokenizers"), ("dense", "dense")):
        assert said in _refused(monkeypatch, capsys, base, f"after={tmp_path / name}", f"out={out}")
    assert not out.exists()
    out.write_text("")
    assert "exists" in _refused(monkeypatch, capsys, base, f"after={runs / 'tuned'}", f"out={out}")
    assert "tokens=-1" in _refused(monkeypatch, capsys, base, f"after={runs / 'tuned'}", "tokens=-1")
