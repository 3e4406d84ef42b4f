"""Claims about the command that writes the inspector's page."""

import shutil
import sys

import pytest

from experiments import inspector as command
from moe.analysis.trace import Trace
from moe.run.summary import read_summary
from tests.planted_traces import random_routes, write_trace
from tests.small_runs import settings, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in (("moe", {}), ("other", {"seed": 1}), ("dense", {"model.moe": None})):
        train(settings(corpus, str(folder / name), changes))
    return folder


def _inspect(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["inspector", *words])
    command.main()
    return capsys.readouterr().out


def test_a_run_becomes_a_page_and_a_second_time_its_trace_is_not_made_again(runs, tmp_path, monkeypatch, capsys):
    words = (f"run={runs / 'moe'}", f"out={tmp_path}", "tokens=600")
    printed = _inspect(monkeypatch, capsys, *words)
    assert f"page: {tmp_path / 'index.html'}" in printed
    assert "trace:" in printed
    trace = Trace(tmp_path / "trace")
    row = next(line for line in printed.splitlines() if line.startswith("| 0"))
    count_E = trace.counts[0].sum(0)
    assert f"{count_E.max() / count_E.mean() - 1:.2f}" in row
    assert (tmp_path / "index.html").read_text().count('data-run="0"') > 1
    assert "trace:" not in _inspect(monkeypatch, capsys, *words)
    assert "trace:" in _inspect(monkeypatch, capsys, *words[:2], "tokens=300"), "of another text it is made anew"


def test_by_default_the_page_stands_in_the_runs_folder_which_can_still_be_read(runs, monkeypatch, capsys):
    _inspect(monkeypatch, capsys, f"run={runs / 'other'}", "tokens=300")
    assert (runs / "other" / "inspector" / "index.html").is_file()
    assert read_summary(runs / "other").name == "other"


def test_runs_stand_side_by_side(runs, tmp_path, monkeypatch, capsys):
    printed = _inspect(
        monkeypatch, capsys, f"run={runs / 'moe'}", f"beside=[{runs / 'other'}]", f"out={tmp_path}", "tokens=300"
    )
    assert {line.partition(":")[0] for line in printed.splitlines()} >= {"moe", "other", "page"}
    text = (tmp_path / "index.html").read_text()
    assert "Side by side" in text
    assert 'data-run="1"' in text


def test_without_a_tokenizer_ids_are_shown_and_a_trace_alone_is_enough(runs, tmp_path, monkeypatch, capsys):
    write_trace(tmp_path / "trace", random_routes(160, 1, 4, 2), run=str(tmp_path / "gone"))
    printed = _inspect(monkeypatch, capsys, f"trace={tmp_path / 'trace'}", f"out={tmp_path / 'page'}")
    assert "note: token ids are shown" in printed
    text = (tmp_path / "page" / "index.html").read_text()
    assert "\\u27e8" in text, "⟨7⟩"
    assert "none: ids are shown" in text
    assert "Nothing is known of this model’s training" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "run=... is needed"),
        (("run={runs}/moe", "trace=x"), "and not both"),
        (("trace={tmp}",), "out=... is needed with trace=..."),
        (("trace={tmp}", "out={tmp}/p", "beside=[x]"), "beside=... goes with run=..."),
        (("run={runs}/dense", "out={tmp}/p"), "is a dense model"),
        (("run={runs}/none", "out={tmp}/p"), "none"),
        (("trace={tmp}", "out={tmp}/p"), "is no trace"),
        (("trace={tmp}/other", "out={tmp}/p"), "says nothing of what was traced"),
        (("run={runs}/moe", "out={tmp}/p", "text={tmp}/none.txt"), "none.txt cannot be read"),
        (("run={runs}/moe", "out={tmp}/file/p"), "cannot be written"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(runs, tmp_path, monkeypatch, capsys, words, sentence):
    import pyarrow.parquet

    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other" / "tokens.parquet")
    shutil.copy(tmp_path / "other" / "tokens.parquet", tmp_path / "other" / "routes.parquet")
    shutil.copy(tmp_path / "other" / "tokens.parquet", tmp_path / "other" / "counts.parquet")
    with pytest.raises(SystemExit, match="2"):
        _inspect(monkeypatch, capsys, *(word.format(runs=runs, tmp=tmp_path) for word in words))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line
    assert not (tmp_path / "p").exists()
