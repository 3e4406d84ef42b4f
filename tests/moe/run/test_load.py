"""A run read back: the weights of the checkpoint asked for, and what is refused."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe.config.data import TokenizerConfig
from moe.data.tokenizer import train
from moe.errors import BadInput
from moe.model.transformer import model_tensors
from moe.run import checkpoint
from moe.run.load import load_run, open_run
from tests.small_models import BYTES, tiny


@pytest.mark.parametrize(("which", "step"), [("best", 5), ("last", 12), ("step-9", 9), ("step-00000009", 9)])
def test_a_run_loads_with_the_weights_of_the_checkpoint_asked_for(made_run, which, step):
    model, tokenizer, cfg = load_run(made_run, which)
    saved = load_file(made_run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], each) for name, each in saved.items())
    assert model.head.weight is model.embed.weight
    assert tokenizer.fingerprint == BYTES.fingerprint
    assert cfg.model == tiny()


def test_a_run_that_is_opened_has_the_weights_tokenizer_and_settings_of_one_that_is_loaded(made_run):
    for which in ("best", "last"):
        model, tokenizer, cfg = load_run(made_run, which)
        tensors, its_tokenizer, its_config = open_run(made_run, which)
        assert tensors.keys() == model_tensors(model).keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in model_tensors(model).items())
        assert (its_tokenizer.fingerprint, its_config) == (tokenizer.fingerprint, cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("norm.weight"), "the weight norm.weight is missing"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "the weight more is not part of the model"),
        (
            lambda tensors: tensors.update({"norm.weight": torch.ones(3)}),
            r"norm.weight has shape \(3,\), and",
        ),
    ],
)
def test_opening_a_checkpoint_that_does_not_fit_is_refused_by_the_weights_name(change, message, run):
    snapshot = checkpoint.load(run / "checkpoints" / "step-00000009")
    change(snapshot.model)
    shutil.rmtree(run / "checkpoints")
    checkpoint.save(run / "checkpoints", snapshot, keep=1)
    with pytest.raises(BadInput, match=message):
        open_run(run)


def test_opening_a_damaged_checkpoint_is_refused(run):
    path = run / "checkpoints" / "step-00000009" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInput, match=r"model\.safetensors: altered since it was written"):
        open_run(run, "step-9")


def test_the_best_of_one_checkpoint_is_that_one_whether_it_has_a_score_or_not(run):
    snapshot = checkpoint.load(run / "checkpoints" / "step-00000009")
    shutil.rmtree(run / "checkpoints")
    checkpoint.save(run / "checkpoints", snapshot, keep=1)
    state = load_run(run, "best")[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in snapshot.model.items())


@pytest.mark.parametrize("which", ["step-7", "newest", "step-", "../step-9"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(made_run, which):
    with pytest.raises(BadInput, match=rf"which={which} is not one of best, last, step-00000005, step-0"):
        load_run(made_run, which)


def test_another_tokenizer_is_refused_naming_both(run):
    other = train(TokenizerConfig("char"), ["é"])
    other.save(run / "tokenizer")
    with pytest.raises(BadInput) as refused:
        load_run(run)
    assert other.fingerprint in str(refused.value)
    assert BYTES.fingerprint in str(refused.value)


def test_a_missing_run_is_refused_with_the_runs_beside_it(made_run):
    with pytest.raises(BadInput, match=r"frist is not a run's folder.*; there are .*runs.*/first\."):
        load_run(made_run.parent / "frist")


def test_a_folder_of_runs_is_refused_with_the_runs_inside_it(made_run):
    with pytest.raises(BadInput, match=r"it has no config.yaml; there are .*/first\."):
        load_run(made_run.parent)


def test_a_missing_run_with_none_beside_it_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"none/x is not a run's folder: it has no config.yaml\."):
        load_run(tmp_path / "none" / "x")


def test_a_run_without_a_checkpoint_is_refused(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(BadInput, match="has no checkpoint"):
        load_run(run)


def test_weights_that_do_not_fit_the_config_are_refused(run):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    for key, value, named in (("d_ff", 24, "up.weight"), ("n_layers", 3, "blocks.3"), ("qk_norm", "head", "q_norm")):
        changed = tree | {"model": tree["model"] | {key: value}}
        (run / "config.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(BadInput, match=rf"does not fit .*config.yaml: .*{named}"):
            load_run(run)


def test_a_model_knows_the_end_of_a_document_where_its_run_kept_documents_separate(run):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    assert load_run(run)[0].document_end is None
    (run / "config.yaml").write_text(yaml.safe_dump(tree | {"data": tree["data"] | {"documents": "separate"}}))
    assert load_run(run)[0].document_end == BYTES.eot


@pytest.mark.parametrize("content", [b"model: [", b"\xff\xfe", b"just text"])
def test_a_damaged_config_is_refused(run, content):
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(BadInput):
        load_run(run)
