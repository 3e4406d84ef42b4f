"""A run read back: the weights of the checkpoint asked for, and what is refused."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kernels.quantized import FORMATS, dequantize
from moe.config.data import TokenizerConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.data.tokenizer import train
from moe.errors import BadInput
from moe.model.transformer import Transformer, model_tensors
from moe.run import checkpoint
from moe.run.load import load_run, open_run
from moe.run.streamed import Tensors
from tests.small_models import BYTES, random_weights, tiny, write_run

ROOT = Path(__file__).parents[3]


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


FEW = ModelConfig("few", 257, 16, 2, 32, 2, d_ff=24, moe=MoEConfig(4, 2, 32, n_shared=1), init_std=0.3)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_are_stored_in_the_format_asked_for_and_all_else_as_it_was(format, tmp_path):
    run = write_run(tmp_path / "run", FEW, {1: random_weights(FEW)})
    (model, _, cfg), wide = load_run(run, experts=format), load_run(run)[0]
    assert cfg.model == FEW
    assert not model.training
    for block, its in zip(model.blocks, wide.blocks, strict=True):
        stored = block.mlp.experts.weights()
        for w, of_it in zip(stored, (its.mlp.experts.w_up_EFD, its.mlp.experts.w_down_EDF), strict=True):
            want = FORMATS[format](of_it)
            assert type(w) is type(want)
            assert all(torch.equal(*(of.view(torch.uint8) for of in pair)) for pair in zip(w, want, strict=True))
            assert 0 < (dequantize(w) - of_it).norm() < 0.2 * of_it.norm()
    # Whatever is not the two matrices, buffers that no checkpoint holds among them.
    theirs = {**dict(wide.named_parameters()), **dict(wide.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert "mlp.experts." in name or torch.equal(tensor, theirs[name])
    assert model.head.weight is model.embed.weight


def test_changes_of_low_rank_are_in_the_experts_that_are_stored(tmp_path):
    """A stack that was trained by two narrow ones: what is rounded is the sum."""
    weights, place = random_weights(FEW), "blocks.1.mlp.experts.parametrizations.w_up_EFD"
    base, draw = weights.pop("blocks.1.mlp.experts.w_up_EFD"), torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=draw) for shape in ((4, 2, 32), (4, 64, 2)))
    weights |= {f"{place}.original": base, f"{place}.0.a": a, f"{place}.0.b": b}
    weights[f"{place}.0.scale"] = torch.tensor(0.5, dtype=torch.float64)
    run = write_run(tmp_path / "run", FEW, {1: weights})
    changed = base + 0.5 * (b @ a)
    assert torch.equal(load_run(run)[0].blocks[1].mlp.experts.w_up_EFD, changed)
    stored = load_run(run, experts="int8")[0].blocks[1].mlp.experts.weights()[0]
    assert torch.equal(stored.values, FORMATS["int8"](changed).values)


@pytest.mark.parametrize(
    ("changes", "format", "sentence"),
    [
        ({}, "int3", f"experts=int3 is not one of {', '.join(FORMATS)}"),
        ({"moe": None}, "int8", "experts=int8 stores routed experts in few bits, and this model is dense"),
        (
            {"moe": MoEConfig(4, 2, 40)},
            "mxfp4",
            "experts=mxfp4 cannot store model.moe.d_expert=40: mxfp4 takes rows of",
        ),
    ],
)
def test_experts_that_cannot_be_stored_are_refused_before_a_checkpoint_is_read(changes, format, sentence, tmp_path):
    model = dataclasses.replace(FEW, **changes)
    run = write_run(tmp_path / "run", model, {1: random_weights(model)})
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(BadInput) as refused:
        load_run(run, experts=format)
    assert sentence in str(refused.value)


LIMITED = """
import resource, sys
from pathlib import Path
from moe.run import machine
from moe.run.load import load_run

format = sys.argv[1]
load_run(Path("small"), experts=format)
machine.return_freed_memory()
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((taken + 60_000) * 1024,) * 2)
load_run(Path("large"), experts=format)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_experts_that_are_larger_than_memory_are_read_into_few_bits(tmp_path):
    """101 MB of them in 60 MB more than the same process has after it loaded a small run; they take 27 MB."""
    large = dataclasses.replace(FEW, n_layers=16, d_model=256, head_dim=8, moe=MoEConfig(8, 2, 512))
    with torch.device("meta"):
        meta = {name: w.bfloat16() for name, w in model_tensors(Transformer(large, RouterConfig())).items()}
    values = Tensors(meta, lambda name: torch.full(meta[name].shape, 0.1, dtype=torch.bfloat16))
    assert sum(w.nbytes for name, w in meta.items() if "experts" in name) > 100_000_000
    write_run(tmp_path / "small", FEW, {1: random_weights(FEW)})
    write_run(tmp_path / "large", large, {1: values})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for format, fits in (("mxfp4", True), ("", False)):
        words = [sys.executable, "-c", LIMITED, format]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == fits, done.stderr
        assert fits or "allocate memory" in done.stderr
