"""Claims about the command that traces a run."""

import sys

import numpy as np
import pandas
import pytest

from experiments import trace as command
from moe.analysis.trace import Trace
from moe.run.load import load_run
from moe.run.summary import read_summary
from tests.small_runs import settings, train


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(settings(corpus, str(folder), {"train.eval_tokens": 10**9}))
    return folder


def _trace(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["trace", *words])
    command.main()
    return capsys.readouterr().out


def test_a_trace_of_all_the_text_has_the_counts_and_the_loss_of_the_runs_own_validation(
    run, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "trace"
    printed = _trace(monkeypatch, capsys, f"run={run}", f"out={out}", "tokens=0", "which=last", "batch_size=5")
    summary, trace = read_summary(run), Trace(out)
    assert [layer.sum(0).tolist() for layer in trace.counts] == summary.load.expert_counts()
    assert trace.table("tokens")["loss"].to_numpy().mean() == pytest.approx(summary.val.loss, rel=1e-5)
    assert f"{trace.n_tokens:,} tokens in {len(summary.load.layers)} MoE layers" in printed


def test_documents_are_counted_and_a_position_is_in_its_document(run, tmp_path, monkeypatch, capsys):
    _trace(monkeypatch, capsys, f"run={run}", f"out={tmp_path / 'trace'}", "tokens=0")
    tokens = pandas.read_parquet(tmp_path / "trace" / "tokens.parquet")
    end = load_run(run)[1].eot
    ended = tokens.token.shift() == end
    assert (tokens.pos[ended] == 0).all()
    assert ended.sum() == tokens.doc.nunique() - 1
    same = tokens.doc.diff() == 0
    assert (tokens.pos.diff()[same] == 1).all()


def test_a_text_of_ones_own_is_one_document(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("to be or not to be, " * 40)
    out = tmp_path / "trace"
    _trace(monkeypatch, capsys, f"run={run}", f"out={out}", f"text={tmp_path / 'a.txt'}", "export=true")
    trace = Trace(out)
    tokens = load_run(run)[1].encode("to be or not to be, " * 40)
    assert trace.table("tokens")["token"].to_pylist() == list(tokens[: trace.n_tokens])
    assert trace.table("tokens")["pos"].to_pylist() == list(range(trace.n_tokens))
    arrays = np.load(out / "routed_experts.npz", allow_pickle=False)
    assert arrays["routed_experts"].dtype == np.int32
    assert arrays["routed_experts"].tolist() == trace.experts().tolist()
    assert arrays["input_ids"].tolist() == trace.table("tokens")["token"].to_pylist()
    counts = np.load(out / "expert_counts.npy", allow_pickle=False)
    assert counts.tolist() == [layer.sum(0).tolist() for layer in trace.counts]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("out=x",), "run=... is needed"),
        (("run=x",), "out=... is needed"),
        (("run={run}", "out={tmp}/t", "tokens=-1"), "tokens=-1 is out of range"),
        (("run={run}", "out={tmp}/t", "text={tmp}/none.txt"), "none.txt cannot be read"),
        (("run={run}", "out={tmp}/t", "text={tmp}/latin.txt"), "is no UTF-8"),
        (("run={run}", "out={tmp}/t", "text={tmp}/short.txt"), "give a longer text"),
        (("run={run}", "out={tmp}"), "exists"),
        (("run={tmp}/norun", "out={tmp}/t"), "norun is not a run's folder"),
    ],
)
def test_what_cannot_be_traced_is_refused_in_a_sentence(run, tmp_path, monkeypatch, capsys, words, sentence):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(SystemExit, match="2"):
        _trace(monkeypatch, capsys, *(word.format(run=run, tmp=tmp_path) for word in words))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line
    assert not (tmp_path / "t").exists()


def test_a_dense_model_and_a_soft_router_are_refused(corpus, tmp_path, monkeypatch, capsys):
    for name, changes, sentence in (
        ("dense", {"model.moe": None}, "is a dense model"),
        ("soft", {"router.name": "soft", "balance.aux": 0.0, "balance.z": 0.0}, "has a soft router"),
    ):
        train(
            settings(
                corpus, str(tmp_path / name), {"train.steps": 1, "optim.warmup": 0, "train.eval_every": 0} | changes
            )
        )
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            _trace(monkeypatch, capsys, f"run={tmp_path / name}", f"out={tmp_path / 't'}")
        assert sentence in capsys.readouterr().err
