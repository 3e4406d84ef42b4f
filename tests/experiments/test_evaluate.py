"""Claims about the command that scores a model on a text."""

import json
import sys

import numpy as np
import pytest

from experiments import evaluate as command
from moe.config.model import ModelConfig
from moe.config.router import RouterConfig
from moe.convert.hf_weights import save
from moe.model.transformer import Transformer
from moe.run.load import load_run
from moe.run.summary import read_metrics, read_summary
from tests.small_runs import EVALUATED, settings, train


@pytest.fixture(scope="module", params=["moe", "dense"])
def run(request, tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = {"train.eval_tokens": 700, "checkpoint.every": EVALUATED, "checkpoint.keep": 10}
    train(settings(corpus, str(folder), changes | ({"model.moe": None} if request.param == "dense" else {})))
    return folder


def _evaluate(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    command.main()
    return capsys.readouterr().out


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _scores(val, n_tokens):
    """What a run's own files say of a validation, by domain."""
    domains = {name: (of.loss, of.bpb, of.tokens) for name, of in val.domains.items()}
    return {None: (val.loss, val.bpb, n_tokens)} | domains


def _numbers(lines):
    return {line["domain"]: (line["loss"]["value"], line["bpb"]["value"], line["tokens"]) for line in lines}


def test_a_runs_own_validation_text_has_the_numbers_of_its_summary(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "scores.jsonl"
    printed = _evaluate(monkeypatch, capsys, f"run={run}", "which=last", f"out={out}")
    val = read_summary(run).val
    assert _numbers(_lines(out)) == _scores(val, 672)
    (row,) = [line for line in printed.splitlines() if line.startswith("| all ")]
    assert f"{val.loss:.4f}" in row
    assert f"{val.bpb:.4f}" in row


def test_a_router_that_chooses_among_a_batch_gets_the_batches_of_the_validation(corpus, tmp_path, monkeypatch, capsys):
    changes = {
        "router.name": "expert-choice",
        "balance.aux": 0.0,
        "balance.z": 0.0,
        "train.steps": 2,
        "optim.warmup": 0,
    }
    train(settings(corpus, str(tmp_path / "run"), changes | {"train.eval_tokens": 700}))
    _evaluate(monkeypatch, capsys, f"run={tmp_path / 'run'}", "which=last", f"out={tmp_path / 'o'}")
    assert _numbers(_lines(tmp_path / "o")) == _scores(read_summary(tmp_path / "run").val, 672)


def test_any_checkpoint_has_the_numbers_that_were_logged_at_its_step(run, tmp_path, monkeypatch, capsys):
    logged = {line.step: line.val for line in read_metrics(run) if line.val}
    steps = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    assert len(steps) > 2
    for step in steps:
        out = tmp_path / f"{step}.jsonl"
        _evaluate(monkeypatch, capsys, f"run={run}", f"which=step-{step}", f"out={out}")
        assert _numbers(_lines(out)) == _scores(logged[step], 672)


def test_a_text_and_a_corpus_of_ones_own(run, corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("to be or not to be, " * 40)
    _evaluate(monkeypatch, capsys, f"run={run}", f"text={tmp_path / 'a.txt'}", f"out={tmp_path / 'text'}")
    lines = _lines(tmp_path / "text")
    assert [(line["domain"], line["unit"]) for line in lines] == [(None, "windows"), ("text", "windows")]
    words = ["data=text", f"data.path={corpus / 'texts' / 'botany'}", "data.val_fraction=0.6", "tokens=0"]
    words += [f"data.cache={tmp_path / 'cache'}", f"out={tmp_path / 'corpus'}"]
    printed = _evaluate(monkeypatch, capsys, f"run={run}", *words)
    lines = _lines(tmp_path / "corpus")
    assert [(line["domain"], line["unit"]) for line in lines] == [(None, "documents"), ("botany", "documents")]
    for name in ("loss", "bpb"):
        assert lines[0][name]["low"] < lines[0][name]["value"] < lines[0][name]["high"]
    assert "intervals over" in printed


def test_a_folder_of_transformers_has_the_numbers_of_the_run_it_came_from(run, tmp_path, monkeypatch, capsys):
    """A model with the weights of Llama's family, beside the same in a run's form."""
    tokenizer = load_run(run)[1]
    cfg = ModelConfig("m", tokenizer.vocab_size, 32, 2, 32, n_heads=2, d_ff=16, tie_embeddings=False)
    model = Transformer(cfg, RouterConfig()).initialize(0)
    save(model, RouterConfig(), tokenizer, tmp_path / "llama")
    (tmp_path / "a.txt").write_text("to be or not to be, " * 40)
    words = f"hf={tmp_path / 'llama'}", f"text={tmp_path / 'a.txt'}"
    _evaluate(monkeypatch, capsys, *words, f"out={tmp_path / 'text'}", "tokens=320")
    ids = np.array(tokenizer.encode("to be or not to be, " * 40))
    np.save(tmp_path / "ids.npy", ids)
    printed = _evaluate(
        monkeypatch, capsys, words[0], f"text={tmp_path / 'ids.npy'}", f"out={tmp_path / 'ids'}", "tokens=320"
    )
    by_text, by_ids = _lines(tmp_path / "text"), _lines(tmp_path / "ids")
    assert by_text[0]["loss"] == by_ids[0]["loss"]
    assert by_text[0]["tokens"] == 320
    assert "llama: the first 320 tokens of ids.npy" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "run=... is needed, or hf=..., one of them."),
        (("run=x", "hf=y"), "both are given"),
        (("run={run}", "tokens=-2"), "tokens=-2 is out of range: accepted is at least 0, or -1"),
        (("run={run}", "context=33"), "context=33 is out of range: the model reads at most 32"),
        (("run={run}", "which=step-99"), "which=step-99 is not one of best, last"),
        (("run={run}", "text={tmp}/latin.txt"), "is no UTF-8"),
        (("run={run}", "text={tmp}/short.txt"), "give a longer text"),
        (("run={run}", "out={tmp}/short.txt"), "short.txt exists"),
        (("run={tmp}/norun",), "norun is not a run's folder"),
        (("hf={tmp}/nofolder",), "config.json cannot be read"),
        (("hf=x", "data.path=y"), "data.path=y means nothing to data=blend"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(run, tmp_path, monkeypatch, capsys, words, sentence):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "short.txt").write_text("a")
    words = [word.format(run=run, tmp=tmp_path) for word in words]
    words += [] if any(word.startswith("out=") for word in words) else [f"out={tmp_path / 'o'}"]
    with pytest.raises(SystemExit, match="2"):
        _evaluate(monkeypatch, capsys, *words)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line
    assert not (tmp_path / "o").exists()
