"""Claims about the command that traces a run."""

import sys

import numpy as np
import pandas
import pytest

from experiments import trace as command
from moe.analysis.trace import Trace
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.convert.hf_tokenizer import FILE
from moe.convert.hf_weights import save
from moe.model.transformer import Transformer
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
        (("run=x", "hf=y", "out=x"), "run and hf are given"),
        (("hf=x", "out=x", "data.path=y"), "data.path=y means nothing to data=blend"),
        (("records=x", "out=x"), "records=FILE and format=sglang, vllm or megatron go together"),
        (("records=x", "format=tf", "out=x"), "format=tf is not one of sglang, vllm, megatron"),
        (("run={run}", "out={tmp}/t", "stream=true"), "stream=true is of hf=..."),
        (("run={run}", "out={tmp}/t", "context=33"), "context=33 is out of range: the model reads at most 32"),
        (("hf={tmp}/nofolder", "out={tmp}/t"), "config.json cannot be read"),
        (("records={tmp}/latin.txt", "format=vllm", "out={tmp}/t"), "line 1 is no JSON"),
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


@pytest.fixture(scope="module")
def theirs(run, tmp_path_factory):
    """A folder of transformers, with the run's tokenizer."""
    tokenizer = load_run(run)[1]
    moe = MoEConfig(n_experts=4, k=2, d_expert=16)
    model = ModelConfig(
        "m", tokenizer.vocab_size, 32, 2, 32, n_heads=2, d_ff=16, moe=moe, qk_norm="full", tie_embeddings=False
    )
    folder = tmp_path_factory.mktemp("hf") / "olmoe"
    save(Transformer(model, RouterConfig()).initialize(0), RouterConfig(), tokenizer, folder, shard_bytes=40_000)
    return folder


def _bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("text", ["a text", "a corpus"])
def test_a_folder_of_transformers_is_traced_alike_whole_and_layer_by_layer(
    theirs, corpus, tmp_path, monkeypatch, capsys, text
):
    (tmp_path / "a.txt").write_text("to be or not to be, " * 40)
    words = [f"text={tmp_path / 'a.txt'}"]
    if text == "a corpus":
        words = ["data=text", f"data.path={corpus / 'texts'}", f"data.cache={corpus / 'cache'}", "tokens=640"]
    _trace(monkeypatch, capsys, f"hf={theirs}", f"out={tmp_path / 'whole'}", *words)
    said = _trace(monkeypatch, capsys, f"hf={theirs}", f"out={tmp_path / 'streamed'}", *words, "stream=true")
    assert "trace: layer 2 of 2" in said
    assert _bytes_of(tmp_path / "whole") == _bytes_of(tmp_path / "streamed")
    trace = Trace(tmp_path / "whole")
    assert (trace.about.run, trace.about.checkpoint) == (str(theirs), "")
    assert trace.about.domains == (["text"] if text == "a text" else ["algebra", "botany", "chess"])


def test_without_a_tokenizer_a_folder_takes_token_ids_and_says_so(theirs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in theirs.iterdir():
        if path.name != FILE:
            (folder / path.name).symlink_to(path)
    with pytest.raises(SystemExit, match="2"):
        _trace(monkeypatch, capsys, f"hf={folder}", f"out={tmp_path / 't'}")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "has no tokenizer.json" in line
    assert line.endswith("without it the text is token ids: text=IDS.npy.")
    ids = np.random.default_rng(0).integers(0, 256, 100).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    _trace(monkeypatch, capsys, f"hf={folder}", f"out={tmp_path / 't'}", f"text={tmp_path / 'ids.npy'}", "context=16")
    trace = Trace(tmp_path / "t")
    assert trace.about.tokenizer == ""
    assert trace.about.context == 16
    assert trace.table("tokens")["token"].to_pylist() == ids[:96].tolist()


def test_another_corpus_is_read_with_the_runs_tokenizer(run, corpus, tmp_path, monkeypatch, capsys):
    words = [f"run={run}", f"out={tmp_path / 't'}", "tokens=0", f"data.cache={corpus / 'cache'}"]
    _trace(
        monkeypatch, capsys, *words, "data=text", f"data.path={corpus / 'texts' / 'botany'}", "data.val_fraction=0.3"
    )
    trace = Trace(tmp_path / "t")
    assert trace.about.domains == ["botany"]
    assert trace.about.tokenizer == load_run(run)[1].fingerprint


def test_exported_arrays_come_back_as_records(run, tmp_path, monkeypatch, capsys):
    _trace(monkeypatch, capsys, f"run={run}", f"out={tmp_path / 'trace'}", "tokens=320", "export=true")
    npz, words = tmp_path / "trace" / "routed_experts.npz", ["format=vllm", "n_experts=4", "export=true"]
    printed = _trace(monkeypatch, capsys, f"records={npz}", f"out={tmp_path / 'again'}", *words)
    traces = [Trace(tmp_path / name) for name in ("trace", "again")]
    assert traces[0].experts().tolist() == traces[1].experts().tolist()
    assert [layer.sum(0).tolist() for layer in traces[0].counts] == [layer[0].tolist() for layer in traces[1].counts]
    arrays = [np.load(tmp_path / name / "routed_experts.npz") for name in ("trace", "again")]
    assert all((arrays[0][name] == arrays[1][name]).all() for name in ("routed_experts", "input_ids"))
    assert "320 tokens in 2 MoE layers, 1 pass that vllm recorded" in printed
