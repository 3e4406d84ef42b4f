"""Claims about `python -m experiments.import_hf`: what the run computes, what it is good for, and what is refused."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import experiments.generate
import experiments.import_hf
import experiments.upcycle
from moe.convert.hf_weights import save
from moe.errors import BadInput
from moe.run.folder import read_config
from moe.run.load import load_run
from tests.small_runs import files, settings, train

README = (Path(__file__).parents[2] / "README.md").read_text()
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 32}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320, "initializer_range": 0.3}


def theirs(folder, model_type="llama", normalizer=None, **sizes):
    """A folder of transformers' own making."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SIZES | sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    built = Tokenizer(models.BPE())
    built.normalizer, built.decoder = normalizer, decoders.ByteLevel()
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.train_from_iterator(
        [README],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=built, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch):
    """(module, *arguments) -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        GlobalHydra.instance().clear()
        status, out, err = 0, io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), mock.patch("os.fsync"):
            try:
                module.main()
            except SystemExit as end:
                status = end.code
        return status, out.getvalue(), err.getvalue()

    return call


@pytest.fixture
def imported(command, tmp_path):
    """(source, *arguments) -> (the run's folder, exit status, stdout, stderr)."""
    return lambda source, *arguments: (
        tmp_path / "new",
        *command(experiments.import_hf, f"source={source}", f"run={tmp_path / 'new'}", *arguments),
    )


def test_a_run_that_went_to_transformers_and_back_is_the_same_bit_by_bit(imported, command, corpus, tmp_path):
    train(settings(corpus, tmp_path / "old", {"model.qk_norm": "head", "tokenizer.name": "char"}))
    model, tokenizer, cfg = load_run(tmp_path / "old")
    save(model, cfg.router, tokenizer, tmp_path / "out")
    folder, status, _, err = imported(tmp_path / "out")
    assert (status, err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml", "tokenizer"]
    again, its_tokenizer, its_config = load_run(folder)
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    assert its_config.router == cfg.router
    tokens_BS = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(tokens_BS).logits_BSV, model(tokens_BS).logits_BSV)
    texts = [
        command(experiments.generate, f"run={run}", "prompt=ab cd", "max_new=20", "temperature=0")
        for run in (tmp_path / "old", folder)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0] == 0


def test_a_folder_of_transformers_becomes_a_run_that_says_the_same(imported, command, tmp_path):
    source = theirs(tmp_path / "theirs", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    folder, status, out, err = imported(source)
    assert (status, err) == (0, "")
    assert f"experiments.generate run={folder}" in out
    hf = transformers.AutoModelForCausalLM.from_pretrained(source)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    prompt = hf_tokenizer("Mixture of", return_tensors="pt")
    said = hf.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0)[0]
    status, out, err = command(
        experiments.generate, f"run={folder}", "prompt=Mixture of", "max_new=12", "temperature=0"
    )
    assert (status, err) == (0, "")
    assert out == hf_tokenizer.decode(said, skip_special_tokens=True) + "\n"
    assert command(experiments.generate, f"run={folder}", "prompt=a", "show=next")[0] == 0


def test_an_imported_run_is_what_others_start_from_with_its_own_tokenizer(imported, command, corpus, tmp_path):
    folder, *_ = imported(theirs(tmp_path / "theirs"))
    model, tokenizer, cfg = load_run(folder, "last")
    its_own = {f"model.{key}": value for key, value in vars(cfg.model).items()}
    its_own |= {"tokenizer.name": "saved", "tokenizer.path": str(folder), "train.steps": 1, "source": str(folder)}
    new = settings(corpus, tmp_path / "tuned", its_own | {"optim.lr": 0.0, "optim.warmup": 0})
    train(new)
    tuned, its_tokenizer, _ = load_run(tmp_path / "tuned")
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    tokens_BS = torch.arange(20)[None]
    assert torch.equal(tuned(tokens_BS).logits_BSV, model(tokens_BS).logits_BSV)
    status, _, err = command(
        experiments.upcycle,
        f"source={folder}",
        f"run={tmp_path / 'moe'}",
        "data=text",
        f"data.path={corpus / 'texts'}",
        f"data.cache={corpus / 'cache'}",
        "data.val_fraction=0.15",
    )
    assert (status, err) == (0, "")
    assert read_config(tmp_path / "moe").model.moe.n_experts == 8


def test_there_is_no_training_of_an_imported_run_to_go_on_with(imported, corpus, tmp_path):
    folder, *_ = imported(theirs(tmp_path / "theirs"))
    before = files(folder)
    for changes in ({"resume": True}, {"run": str(tmp_path / "b"), "source": str(folder), "source_state": "all"}):
        cfg = read_config(folder)
        for key, value in changes.items():
            setattr(cfg, key, value)
        cfg.data = settings(corpus, folder).data
        cfg.train.device, cfg.train.eval_tokens, cfg.train.batch_size = "cpu", 256, 4
        with pytest.raises(BadInput, match=r"source=.*new run=NEW|source_state=weights"):
            train(cfg)
    assert files(folder) == before


def break_config(source, **changes):
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda source: break_config(source, model_type="mamba"), "model_type='mamba' is not one of gpt2"),
        (lambda source: break_config(source, auto_map={"AutoModel": "x.Y"}), "auto_map="),
        (lambda source: (source / "config.json").unlink(), "cannot be read as JSON"),
        (lambda source: (source / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (
            lambda source: (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y"]}}'),
            "code of the folder's own (auto_map), which is never run",
        ),
        (
            lambda source: (source / "model.safetensors").rename(source / "pytorch_model.bin"),
            "it has pytorch_model.bin, a pickle, which is never opened",
        ),
        (
            lambda source: change_tensors(source, lambda tensors: tensors.update(more=torch.ones(1))),
            "tensor more is not part of a llama",
        ),
        (
            lambda source: change_tensors(
                source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})
            ),
            "tensor model.norm.weight is I8",
        ),
        (
            lambda source: change_tensors(source, lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))),
            "the weight norm.weight is not finite",
        ),
        (lambda source: break_config(source, vocab_size=200), "300 tokens are more than the model's 200"),
    ],
)
def test_a_folder_that_is_not_a_model_of_ours_is_refused_and_nothing_is_left(damage, message, imported, tmp_path):
    source = theirs(tmp_path / "theirs")
    damage(source)
    folder, status, _, err = imported(source)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("source=", "source=... is needed"),
        ("run=", "run=... is needed"),
        ("run=theirs", "run=theirs exists: choose another folder."),
        ("source=nowhere", "nowhere/config.json cannot be read"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_a_sentence(argument, message, imported, tmp_path):
    before = files(theirs(tmp_path / "theirs"))
    _, status, _, err = imported(tmp_path / "theirs", argument)
    assert (status, err.startswith(f"error: {message}")) == (2, True), err
    assert files(tmp_path / "theirs") == before


def test_a_tokenizer_that_reads_otherwise_is_taken_only_when_asked_for(imported, tmp_path):
    source = theirs(tmp_path / "theirs", normalizer=normalizers.NFC())
    folder, status, _, err = imported(source)
    assert (status, "into NFC first" in err, "inexact=true" in err, folder.exists()) == (2, True, True, False)
    folder, status, out, err = imported(source, "inexact=true")
    assert (status, err, folder.exists()) == (0, "", True)
    assert "warning: transformers puts text into NFC first" in out
