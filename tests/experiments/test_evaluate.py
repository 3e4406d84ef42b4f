"""Claims about the command that scores a model on a text."""

import json
import shutil
import sys

import numpy as np
import pytest
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from experiments import evaluate as command
from moe.config.model import ModelConfig
from moe.config.router import RouterConfig
from moe.convert.hf_weights import save
from moe.eval import harness
from moe.model.transformer import Transformer
from moe.run import checkpoint
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


def test_experts_in_few_bits_are_scored_as_the_weights_that_they_stand_for(run, tmp_path, monkeypatch, capsys):
    """By the text and by tasks, against a run of the same weights, but for the matrices, which are rounded there."""
    words = ["which=last", "experts=int8"]
    if load_run(run)[2].model.moe is None:
        with pytest.raises(SystemExit, match="2"):
            _evaluate(monkeypatch, capsys, f"run={run}", *words)
        assert "experts=int8 stores routed experts in few bits, and this model is dense" in capsys.readouterr().err
        return
    rounded = shutil.copytree(run, tmp_path / "rounded")
    (path,) = [path for path in (rounded / "checkpoints").iterdir() if path.name == "step-00000007"]
    snapshot = checkpoint.load(path)
    for name in [name for name in snapshot.model if name.endswith(("w_up_EFD", "w_down_EDF"))]:
        w_ENM = snapshot.model[name]
        step = w_ENM.abs().amax(-1, keepdim=True) / 127
        snapshot.model[name] = (w_ENM / step).round() * step
    shutil.rmtree(rounded / "checkpoints")
    checkpoint.save(rounded / "checkpoints", snapshot, keep=1)
    for kind, more in {"text": [], "tasks": ["tasks=arithmetic,heldout", "limit=6"]}.items():
        outs = [tmp_path / f"{kind}-{name}" for name in ("few", "rounded")]
        printed = _evaluate(monkeypatch, capsys, f"run={run}", *words, *more, f"out={outs[0]}")
        _evaluate(monkeypatch, capsys, f"run={rounded}", "which=last", *more, f"out={outs[1]}")
        # 2 layers of 4 experts: w_up of 32 rows of 32, w_down of 32 rows of 16, and a float32 for each of 64 rows.
        n, n_bytes = 8 * 32 * (32 + 16), 8 * (32 * (32 + 16) + 4 * 64)
        stored = {"format": "int8", "bits": 8 * n_bytes / n, "n_bytes": n_bytes, "wide_bytes": 4 * n}
        lines, expected = map(_lines, outs)
        assert [line.pop("experts") for line in lines] == [stored] * len(lines)
        assert [line.pop("experts") for line in expected] == [None] * len(lines)
        assert len(lines) > 1
        for line, want in zip(lines, expected, strict=True):
            number = "loss" if kind == "text" else "score"
            assert line[number]["value"] == pytest.approx(want[number]["value"], rel=1e-6)
        assert printed.startswith("experts: int8, 9.333 bits a weight, 0.0 MB in place of 0.0 MB\n")


TASKS = "arithmetic, copy ,heldout"


def test_tasks_are_asked_of_a_run_and_written_as_lines(run, tmp_path, monkeypatch, capsys):
    words = f"run={run}", "which=last", f"tasks={TASKS}", "limit=6", "fewshot=0", f"out={tmp_path / 'o'}", "tokens=9000"
    printed = _evaluate(monkeypatch, capsys, *words)
    lines = _lines(tmp_path / "o")
    assert [(line["task"], line["metric"], line["n"], line["chance"]) for line in lines] == [
        ("arithmetic", "acc", 6, 0.25),
        ("arithmetic", "exact_match", 6, None),
        ("copy", "exact_match", 6, None),
        ("heldout", "bits_per_byte", 3, None),  # of nine documents every third
    ]
    assert {(line["source"], line["checkpoint"]) for line in lines} == {(str(run), "step-00000007")}
    (row,) = [row for row in printed.splitlines() if row.startswith("| heldout ")]
    assert f"{lines[3]['score']['value']:.4f}" in row
    assert "tasks of lm-evaluation-harness, 32 tokens of context" in printed


def test_held_out_documents_are_of_the_validation_text_spread_evenly(run, monkeypatch):
    """As many as have the tokens that are asked for."""
    texts = {}
    for tokens in (0, 2500):
        cfg = command.EvaluateConfig(run=str(run), tasks="heldout", tokens=tokens)
        subject = command.of_run(cfg, None)
        texts[tokens] = command.held_out(cfg, subject)
        split = subject.windows().corpus.split("val")
    assert sum(len(text.encode()) + 1 for text in texts[0]) == split.n_tokens
    every = split.n_tokens // 2496
    assert texts[2500] == texts[0][::every]
    assert len(texts[2500]) < len(texts[0])


def test_held_out_text_has_the_bits_per_byte_of_the_same_windows(run, tmp_path, monkeypatch, capsys):
    """A document of three whole contexts, by the harness; and after the end-of-text token, window after window."""
    tokenizer = load_run(run)[1]
    text = ("to be or not to be, " * 40)[: 3 * 32]
    (tmp_path / "a.txt").write_text(text)
    np.save(tmp_path / "ids.npy", np.array([tokenizer.eot, *tokenizer.encode(text)]))
    _evaluate(
        monkeypatch, capsys, f"run={run}", "tasks=heldout", f"text={tmp_path / 'a.txt'}", f"out={tmp_path / 'tasks'}"
    )
    _evaluate(monkeypatch, capsys, f"run={run}", f"text={tmp_path / 'ids.npy'}", "tokens=0", f"out={tmp_path / 'ids'}")
    (asked,), (scored, _) = _lines(tmp_path / "tasks"), _lines(tmp_path / "ids")
    assert scored["tokens"] == 3 * 32
    assert asked["score"]["value"] == pytest.approx(scored["bpb"]["value"], rel=1e-5)


def test_a_folder_of_transformers_gets_the_scores_of_the_same_model_in_the_harness(run, tmp_path, monkeypatch, capsys):
    tokenizer = load_run(run)[1]
    cfg = ModelConfig("m", tokenizer.vocab_size, 64, 2, 32, n_heads=2, d_ff=16, tie_embeddings=False, init_std=0.3)
    model = Transformer(cfg, RouterConfig()).initialize(0)
    save(model, RouterConfig(), tokenizer, tmp_path / "llama")
    words = f"hf={tmp_path / 'llama'}", "tasks=brackets,copy", "limit=24", f"out={tmp_path / 'o'}"
    _evaluate(monkeypatch, capsys, *words)
    loaded = harness.load(["brackets", "copy"], None, list)
    theirs = HFLM(str(tmp_path / "llama"), device="cpu", dtype="float32", batch_size=8)
    expected = evaluator.evaluate(theirs, loaded, limit=24, bootstrap_iters=10)["results"]
    for line in _lines(tmp_path / "o"):
        of_task = expected[line["task"]]
        metric = line["metric"]
        assert (line["score"]["value"], line["stderr"]) == (of_task[f"{metric},none"], of_task[f"{metric}_stderr,none"])


def test_what_a_folders_tokenizer_puts_before_a_text_stands_before_every_question(run, tmp_path, monkeypatch, capsys):
    tokenizer = load_run(run)[1]
    cfg = ModelConfig("m", tokenizer.vocab_size, 64, 2, 32, n_heads=2, d_ff=16, tie_embeddings=False)
    save(Transformer(cfg, RouterConfig()).initialize(0), RouterConfig(), tokenizer, tmp_path / "llama")
    path = tmp_path / "llama" / "tokenizer.json"
    ends = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [tokenizer.eot], "tokens": ["<|endoftext|>"]}}
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    step = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": ends}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": step}))
    read = []
    real = Transformer.forward
    spy = lambda model, tokens_BS, **rest: read.append(tokens_BS[:, 0].tolist()) or real(model, tokens_BS, **rest)
    monkeypatch.setattr(Transformer, "forward", spy)
    printed = _evaluate(monkeypatch, capsys, f"hf={tmp_path / 'llama'}", "tasks=brackets", "limit=3")
    assert "64 tokens of context, <|endoftext|> before every text" in printed
    assert {token for batch in read for token in batch} == {tokenizer.eot}


def test_without_lm_eval_the_sentence_names_the_command_that_installs_it(run, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval" or name == "moe.eval.harness"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delattr("moe.eval.harness", raising=False)
    with pytest.raises(SystemExit, match="2"):
        _evaluate(monkeypatch, capsys, f"run={run}", "tasks=copy")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: tasks=copy needs the package lm-eval")
    assert line.endswith("pip install 'moe-switchyard[tasks]'.")


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
        (("run={run}", "limit=-1", "tasks=copy"), "limit=-1 is out of range: accepted is at least 0"),
        (("run={run}", "fewshot=-2", "tasks=copy"), "fewshot=-2 is out of range: accepted is at least 0, or -1"),
        (("run={run}", "limit=3"), "limit=3 means nothing without tasks="),
        (("run={run}", "fewshot=0"), "fewshot=0 means nothing without tasks="),
        (
            ("run={run}", "tasks=copy", "text=a.txt"),
            "text=a.txt means nothing to tasks=copy: it says which text heldout",
        ),
        (("run={run}", "tasks=copy", "tokens=9"), "tokens=9 means nothing to tasks=copy"),
        (("run={run}", "tasks=copy", "data=text", "data.path={tmp}"), "data=... means nothing to tasks=copy"),
        (("run={run}", "tasks=heldout", "text=a.npy"), "a.npy holds token ids, and tasks=heldout are text"),
        (("run={run}", "tasks=heldout", "text={tmp}/latin.txt"), "is no UTF-8"),
        (("run={run}", "tasks=copy", "context=33"), "context=33 is out of range: the model reads at most 32"),
        (("run={run}", "tasks=copy", "context=20"), "answers of 24 tokens, and the model reads 20"),
        (("run={run}", "experts=int3"), "experts=int3 is not one of int8, "),
        (
            ("hf=x", "experts=int8"),
            "experts=int8 is for run=...: make a run of hf=x first, with python -m experiments.con",
        ),
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
