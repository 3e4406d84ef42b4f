"""Claims about fine-tuning from end to end: a run goes on from the weights of another, on conversations."""

import json
import sys

import pytest
import torch

import experiments.train
from experiments import generate as command
from moe.data.chat import template_of
from moe.data.prepare import prepare
from moe.eval.answers import before, end_ids, reply_ids
from moe.eval.generate import generate
from moe.model.transformer import model_tensors
from moe.run import checkpoint
from moe.run.load import find_checkpoint, load_run
from moe.run.summary import read_summary
from tests.small_runs import SAVED, fate, settings, train, train_until

LOW_RANK = {"tune.rank": 2, "tune.alpha": 8.0}
CHOSEN = {"tune.parts": ["experts"], "tune.experts": ["0:1", "1:3"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs") / "base"
    train(settings(corpus, str(folder), {"model.context": 64}))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "sums.jsonl"
    rows = [{"prompt": f"{i} and 1?", "completion": str(i + 1)} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tuned(corpus, base, chats, folder, changes):
    """The settings of a run on the conversations, from the base's weights."""
    data = {"data.name": "chat", "data.path": str(chats), "data.documents": "whole", "source": str(base)}
    return settings(corpus, str(folder), {"model.context": 64, "optim.weight_decay": 0.5} | data | changes)


@pytest.mark.parametrize("changes", [{}, LOW_RANK, CHOSEN], ids=["all", "low rank", "chosen experts"])
def test_a_tuned_run_that_was_killed_goes_on_to_the_same_bits(changes, corpus, base, chats, tmp_path):
    whole, cut = (tuned(corpus, base, chats, tmp_path / name, changes) for name in ("whole", "cut"))
    train(whole)
    train_until(cut, SAVED + 2)
    cut.resume = True
    train(cut)
    assert fate(tmp_path / "whole") == fate(tmp_path / "cut")


@pytest.mark.parametrize("changes", [LOW_RANK, CHOSEN], ids=["low rank", "chosen experts"])
def test_a_tuned_run_is_a_plain_model_to_whoever_reads_it_and_can_be_tuned_again(
    changes, corpus, base, chats, tmp_path
):
    train(tuned(corpus, base, chats, tmp_path / "first", changes))
    before_it, after = (model_tensors(load_run(folder, "last")[0]) for folder in (base, tmp_path / "first"))
    assert before_it.keys() == after.keys()
    kept = [name for name in after if torch.equal(before_it[name], after[name])]
    assert {name for name in after if "experts" in name}.isdisjoint(kept)
    assert {"embed.weight", "norm.weight", "blocks.0.mlp.router.w_ED"} <= set(kept)
    # From there all of it goes on: the first step's validation is the last one's of before.
    train(tuned(corpus, tmp_path / "first", chats, tmp_path / "second", {"train.steps": 1, "optim.warmup": 0}))
    first = read_summary(tmp_path / "first").val.loss
    lines = (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["val"]["loss"] == pytest.approx(first, rel=1e-5)
    snapshot = checkpoint.load(find_checkpoint(tmp_path / "second" / "checkpoints", "last"))
    assert snapshot.model.keys() == after.keys()


def test_what_is_scored_is_the_answers_alone(corpus, base, chats, tmp_path):
    train(tuned(corpus, base, chats, tmp_path / "run", {"train.eval_tokens": 100_000}))
    model, tokenizer, cfg = load_run(tmp_path / "run", "last")
    template = template_of("", tokenizer)
    val = read_summary(tmp_path / "run").val
    # By hand: every held-out conversation by itself, in float64.
    split = prepare(cfg.data, cfg.tokenizer, lambda line: None).split("val")
    tokens, _ = split.read([0], split.n_tokens - 1)
    text = tokenizer.decode(tokens[0].tolist())
    nats, n_targets = 0.0, 0
    for conversation in text.split("<|endoftext|>")[:-1]:
        question, answer = conversation.removeprefix("<|user|>\n").split("<|end|>\n<|assistant|>\n")
        answer = answer.removesuffix("<|end|>\n")
        prompt = reply_ids(template, [{"role": "user", "content": question}], tokenizer)
        said = tokenizer.encode(answer) + end_ids(template, tokenizer)
        ids = torch.tensor([[*prompt, *said]])
        log_prob = model.double()(ids[:, :-1]).logits_BSV.log_softmax(-1)[0, len(prompt) - 1 :]
        nats -= log_prob.gather(-1, torch.tensor(said)[:, None]).sum().item()
        n_targets += len(said)
    assert sum(domain.tokens for domain in val.domains.values()) == n_targets
    assert val.loss == pytest.approx(nats / n_targets, rel=1e-5)


def test_a_run_of_conversations_is_asked(corpus, base, chats, tmp_path, monkeypatch, capsys):
    train(tuned(corpus, base, chats, tmp_path / "run", {}))
    model, tokenizer, _ = load_run(tmp_path / "run", "best")
    template = template_of("", tokenizer)
    prompt = reply_ids(template, [{"role": "user", "content": "3 and 1?"}], tokenizer)
    new = generate(model, prompt, 12, temperature=0, eot=tokenizer.eot)
    words = [f"run={tmp_path / 'run'}", "user=3 and 1?", "max_new=12", "temperature=0"]
    monkeypatch.setattr(sys, "argv", ["generate", *words])
    capsys.readouterr()
    command.main()
    assert capsys.readouterr().out == tokenizer.decode(before(new, end_ids(template, tokenizer))) + "\n"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["user=hello"], "needs a run that was trained on conversations"),
        (["user=hello", "prompt=hello"], "prompt=... and user=... are given"),
    ],
)
def test_a_run_without_conversations_is_not_asked(words, why, base, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", f"run={base}", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "documents"),
    [
        (["experiment=sft", "data.path=CHATS"], "whole"),
        (["data=chat", "data.path=CHATS"], "whole"),
        (["data=chat", "data.path=CHATS", "data.documents=separate"], "separate"),
        (["data=text", "data.path=CHATS"], "packed"),
    ],
)
def test_conversations_are_whole_whatever_the_source_did_with_its_documents(words, documents, base, chats, monkeypatch):
    given = []
    monkeypatch.setattr(experiments.train, "train", given.append)
    words = [word.replace("CHATS", str(chats)) for word in words]
    monkeypatch.setattr(sys, "argv", ["train", *words, f"source={base}"])
    experiments.train.main()
    (cfg,) = given
    assert cfg.data.documents == documents
    assert cfg.model.context == 64
