"""Claims about `python -m experiments.convert`: what runs and transformers' folders compute and say after it, in how
much memory, and what is refused."""

import dataclasses
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
import yaml
from gguf import GGUFReader
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import experiments.convert
import experiments.evaluate
import experiments.generate
import experiments.upcycle
from moe.config.data import TokenizerConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.convert.hf_weights import save, save_tensors
from moe.data.tokenizer import train as train_tokenizer
from moe.errors import BadInput
from moe.eval.generate import generate
from moe.model.transformer import Transformer
from moe.run.folder import read_config
from moe.run.load import load_run
from moe.run.streamed import Tensors
from tests.llama_cpp import Engine
from tests.packed_folders import pack, pack_fp8
from tests.small_runs import files, settings, train

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
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
        *command(experiments.convert, f"source={source}", f"to={tmp_path / 'new'}", *arguments),
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


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of two checkpoints whose model transformers has."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(settings(corpus, folder, {"model.qk_norm": "head", "tokenizer.name": "bpe", "tokenizer.vocab_size": 300}))
    return folder


TEXTS = ["The end of <|endoftext|> it all", "naïve 漢字 😀  \n\n 1234"]


def test_transformers_reads_and_continues_text_as_the_run_does(imported, trained):
    before = files(trained)
    folder, status, out, err = imported(trained, "shard_gb=0.00002")
    assert (status, err) == (0, "")
    assert files(trained) == before
    assert out.startswith(f"converted: {folder}  qwen3_moe, ")
    model, tokenizer, _ = load_run(trained)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == hf.config.eos_token_id == tokenizer.eot
    for text in TEXTS:
        prompt = theirs(text, return_tensors="pt")
        assert prompt.input_ids[0].tolist() == tokenizer.encode(text)
        with torch.no_grad():
            torch.testing.assert_close(hf(**prompt).logits, model(prompt.input_ids).logits_BSV, rtol=1e-4, atol=1e-5)
        said = hf.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        ours = generate(model, tokenizer.encode(text), 12, temperature=0, eot=tokenizer.eot)
        assert theirs.decode(said) == tokenizer.decode([*tokenizer.encode(text), *ours])


def test_files_are_of_the_size_that_was_asked_for_and_the_index_names_every_tensor_once(imported, trained):
    folder, *_ = imported(trained, "shard_gb=0.00002")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(shards) > 3
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    sizes = [[tensor.nbytes for tensor in tensors.values()] for tensors in shards.values()]
    assert all(sum(shard) <= 20_000 or len(shard) == 1 for shard in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))


def test_the_checkpoint_that_is_named_is_the_one_that_is_written(imported, trained, tmp_path):
    steps = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert len(steps) > 1
    for which in ("last", *(f"step-{int(step[5:])}" for step in steps)):
        folder, status, _, err = imported(trained, f"which={which}")
        assert (status, err) == (0, "")
        expected = load_run(trained, which)[0].embed.weight
        assert torch.equal(load_file(folder / "model.safetensors")["model.embed_tokens.weight"], expected)
        shutil.rmtree(folder)
    folder, status, _, err = imported(trained, "which=step-5")
    assert (status, err.startswith("error: which=step-5 is not one of"), folder.exists()) == (2, True, False)


def test_weights_are_written_in_the_dtype_that_is_asked_for(imported, command, trained, tmp_path):
    folder, *_ = imported(trained, "dtype=bfloat16")
    model = load_run(trained)[0]
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert torch.equal(
        load_file(folder / "model.safetensors")["model.norm.weight"], model.norm.weight.to(torch.bfloat16)
    )
    # The way back keeps them, or widens them; either way the run computes the same.
    for dtype, words in ((torch.bfloat16, []), (torch.float32, ["dtype=float32"])):
        run = tmp_path / str(dtype)
        status, _, err = command(experiments.convert, f"source={folder}", f"to={run}", *words)
        assert (status, err) == (0, "")
        stored = load_file(run / "checkpoints" / "step-00000000" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {dtype}
        for name, tensor in load_run(run)[0].state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name].bfloat16().float()), name


def test_a_number_too_large_for_bfloat16_is_refused_by_name(imported, tmp_path):
    source = theirs(tmp_path / "theirs")
    change_tensors(source, lambda tensors: tensors["model.norm.weight"].fill_(torch.finfo(torch.float32).max))
    folder, status, _, err = imported(source, "dtype=bfloat16")
    assert (status, folder.exists()) == (2, False)
    assert "the weight norm.weight is not finite in bfloat16." in err


def test_what_transformers_does_with_documents_that_the_run_kept_separate_is_said(imported, trained, corpus, tmp_path):
    assert "attends across" not in imported(trained)[2]
    shutil.rmtree(tmp_path / "new")
    one_step = {"model.qk_norm": "head", "data.documents": "separate", "train.steps": 1, "optim.warmup": 0}
    train(settings(corpus, tmp_path / "separate", one_step))
    assert "data.documents=separate: transformers attends across documents" in imported(tmp_path / "separate")[2]


def test_a_folder_without_a_tokenizer_is_written_only_when_asked_for(imported, trained):
    folder, status, out, _ = imported(trained, "with_tokenizer=false")
    assert (status, sorted(path.name for path in folder.iterdir())) == (0, ["config.json", "model.safetensors"])
    assert "no tokenizer" in out


def test_a_folder_with_anything_in_it_is_left_alone(imported, trained, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("mine")
    _, status, _, err = imported(trained)
    assert (status, "exists already" in err) == (2, True)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine"]


def test_a_model_that_transformers_has_no_name_for_is_refused_by_the_setting(imported, tmp_path, corpus):
    train(settings(corpus, tmp_path / "shared", {"model.moe.n_shared": 1, "train.steps": 1, "optim.warmup": 0}))
    folder, status, _, err = imported(tmp_path / "shared")
    assert (status, "model.moe.n_shared=1 has no counterpart" in err, folder.exists()) == (2, True, False)


@pytest.mark.parametrize("place", ["", "payload"], ids=["elsewhere", "in the run's folder"])
def test_a_router_of_ones_own_is_refused_without_an_option_that_there_is_not(place, imported, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "payload.py").write_text("raise SystemExit('imported')")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["router"]["name"] = f"{place or 'nothing_there'}:Own"
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    folder, status, _, err = imported(run)
    assert (status, folder.exists()) == (2, False)
    assert err.startswith(f"error: source={run} has router.name={tree['router']['name']}, a class of one's own, which")
    assert "trust" not in err


@pytest.mark.parametrize("direction", ["folder", "run"])
def test_a_disk_that_fills_up_is_said_and_leaves_nothing(direction, command, trained, tmp_path):
    """Of which the files' limit is a stand-in: a write that fails half-way."""
    source = theirs(tmp_path / "theirs") if direction == "run" else trained
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        status, _, err = command(experiments.convert, f"source={source}", f"to={tmp_path / 'new'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot be written (File too large)" in err
    assert sorted(tmp_path.iterdir()) == before


LIMITED = """
import resource, sys
from hydra.core.global_hydra import GlobalHydra
import experiments.convert
words = sys.argv
sys.argv = [words[0], *words[-2:]]
experiments.convert.main()
GlobalHydra.instance().clear()
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((taken + 60_000) * 1024,) * 2)
sys.argv = words[:-2]
experiments.convert.main()
"""


GPT2 = {"model.norm": "layer", "model.position": "learned", "model.bias": True, "model.activation": "gelu_tanh"}
FAMILIES = {
    "gpt2": GPT2 | {"model.moe": None},
    "llama": {"model.moe": None, "model.n_kv_heads": 1},
    "llama with experts": {"model.tie_embeddings": False},
    "qwen3": {"model.moe": None, "model.qk_norm": "head"},
    "olmoe": {"model.qk_norm": "full", "router.renormalize": False},
    "qwen3moe": {"model.qk_norm": "head"},
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_trained_run_becomes_a_gguf_file_that_llama_cpp_computes_the_same_of(architecture, command, corpus, tmp_path):
    train(settings(corpus, tmp_path / "run", FAMILIES[architecture] | {"tokenizer.name": "char"}))
    model, tokenizer, cfg = load_run(tmp_path / "run")
    save(model, cfg.router, tokenizer, tmp_path / "folder")
    files_of = []
    for source in ("run", "folder"):
        status, out, err = command(experiments.convert, f"source={source}", f"to={source}-out/m.gguf")
        assert (status, err) == (0, "")
        assert out.startswith(f"converted: {source}-out/m.gguf  {architecture.split()[0]}, ")
        # Apart from the model's name, which is the folder's there.
        reader = GGUFReader(tmp_path / f"{source}-out" / "m.gguf")
        files_of.append({tensor.name: tensor.data.tobytes() for tensor in reader.tensors})
    assert files_of[0] == files_of[1]
    engine, text = Engine(tmp_path / "run-out" / "m.gguf", tokenizer.vocab_size), "ab cd é"
    ids = tokenizer.encode(text)
    assert engine.encode(text) == ids
    with torch.no_grad():
        ours_V = torch.log_softmax(model(torch.tensor([ids])).logits_BSV[0, -1], -1)
    torch.testing.assert_close(engine.log_probs(ids), ours_V, rtol=0, atol=5e-3 if architecture == "gpt2" else 2e-5)
    assert engine.greedy(ids, 12) == list(generate(model, ids, 12, temperature=0, eot=tokenizer.eot))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dtype=int4"], "dtype=int4 is not one of float32, float16, bfloat16, q8_0."),
        (["shard_gb=2"], "shard_gb=2.0 has no meaning for a run that becomes GGUF."),
        (["with_tokenizer=false"], "with_tokenizer=false has no meaning for a run that becomes GGUF."),
        (["inexact=true"], "router.renormalize=False has no counterpart in llama.cpp's qwen3moe: accepted is True."),
    ],
)
def test_what_cannot_become_gguf_is_refused_in_a_sentence(words, message, command, corpus, tmp_path):
    train(settings(corpus, tmp_path / "run", {"model.qk_norm": "head", "router.renormalize": False}))
    status, _, err = command(experiments.convert, "source=run", "to=m.gguf", *words)
    assert (status, err) == (2, f"error: {message}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_weight_that_is_not_finite_does_not_become_gguf(command, trained, tmp_path):
    model, _, cfg = load_run(trained)
    with torch.no_grad():
        model.blocks[1].mlp.router.w_ED[0, 0] = float("nan")
    save(model, cfg.router, train_tokenizer(TokenizerConfig("byte"), []), tmp_path / "folder")
    status, _, err = command(experiments.convert, "source=folder", "to=m.gguf")
    assert (status, err) == (2, "error: the weight blocks.1.mlp.router.w_ED is not finite in float32.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_tokenizer_that_llama_cpp_does_not_follow_is_written_only_when_asked_for(command, trained, tmp_path):
    """It cuts numbers otherwise, which matters where there are tokens of two digits."""
    tokenizer = train_tokenizer(TokenizerConfig("bpe", 262), ["in 1987 and 1988, 1913 to 1915 and 16 of 17"] * 9)
    model, _, cfg = load_run(trained)
    save(model, cfg.router, tokenizer, tmp_path / "folder")
    status, _, err = command(experiments.convert, "source=folder", "to=m.gguf")
    assert (status, (tmp_path / "m.gguf").exists()) == (2, False)
    assert "tokens, such as b'19': with inexact=true it is written all the same." in err
    status, out, err = command(experiments.convert, "source=folder", "to=m.gguf", "inexact=true")
    assert (status, err) == (0, "")
    assert "warning: llama.cpp cuts text inside of " in out
    engine = Engine(tmp_path / "m.gguf", cfg.model.vocab_size or 300)
    assert engine.encode("in 19") == tokenizer.encode("in 19")
    assert engine.encode("1919") != tokenizer.encode("1919")


def write_folder(folder, cfg, shard_bytes=5_000_000_000):
    """A folder of transformers in bfloat16, whose every tensor is one number, another for each."""
    with torch.device("meta"):
        meta = Transformer(cfg, RouterConfig()).state_dict()
    values = Tensors(meta, lambda name: torch.full(meta[name].shape, (zlib.crc32(name.encode()) % 1000) / 1000))
    tokenizer = train_tokenizer(TokenizerConfig("byte"), [])
    save_tensors(values.to(torch.bfloat16), cfg, RouterConfig(), tokenizer, folder, shard_bytes)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_model_larger_than_memory_is_converted_to_all_forms(tmp_path):
    """106 MB of weights in 60 MB more than the same process has after it converted a small model."""
    moe = MoEConfig(8, 2, 1024)
    small = ModelConfig(
        "small", 300, 32, 1, 16, 4, d_ff=16, tie_embeddings=False, moe=dataclasses.replace(moe, d_expert=16)
    )
    write_folder(tmp_path / "small", small)
    write_folder(tmp_path / "a", dataclasses.replace(small, n_layers=8, d_model=256, moe=moe), 30_000_000)
    assert sum(path.stat().st_size for path in (tmp_path / "a").iterdir()) > 100_000_000
    for name in ("a", "small"):
        pack_fp8(shutil.copytree(tmp_path / name, tmp_path / f"{name}-fp8"), powers_of_two=True)
    shards = "shard_gb=0.03"
    for source, target, *more in (
        ("", "-run"),
        ("-run", "-b", shards),
        ("", ".gguf"),
        ("-run", "-2.gguf", "dtype=q8_0"),
        ("-fp8", "-3.gguf"),
    ):
        words = [f"source=a{source}", f"to=a{target}", *more, f"source=small{source}", f"to=small{target}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "a-b"))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


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
    # Both may end inside a character, which one shows and the other leaves out.
    assert out.rstrip("\n\ufffd") == hf_tokenizer.decode(said, skip_special_tokens=True).rstrip("\ufffd")
    assert command(experiments.generate, f"run={folder}", "prompt=a", "show=next")[0] == 0


def test_a_published_gpt_oss_says_the_same_bit_by_bit_with_its_experts_in_as_few_bits(imported, command, tmp_path):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "head_dim": 32}
    source = theirs(tmp_path / "theirs", "gpt_oss", **sizes | {"intermediate_size": 96, "initializer_range": 0.5})
    folder, status, _, err = imported(pack(source))
    assert (status, err) == (0, "")
    # The same numbers, and about a quarter of the bytes.
    (wide, tokenizer, _), (stored, *_) = load_run(folder), load_run(folder, experts="mxfp4")
    blocks = load_file(source / "model-1.safetensors")
    for layer, block in enumerate(stored.blocks):
        for w, name in zip(block.mlp.experts.weights(), ("gate_up_proj", "down_proj"), strict=True):
            assert w.values.shape == blocks[f"model.layers.{layer}.mlp.experts.{name}_blocks"].shape
    ids = tokenizer.encode("Mixture of experts")
    with torch.no_grad():
        for backend in ("reference", "torch"):
            logits = [of(torch.tensor([ids]), backend=backend).logits_BSV for of in (wide, stored)]
            assert torch.equal(*logits)
            said = [list(generate(of, ids, 12, seed=3, eot=-1, backend=backend)) for of in (wide, stored)]
            assert said[0] == said[1]
    # By the commands.
    words = [f"run={folder}", "prompt=Mixture of", "max_new=12"]
    plain, few = (command(experiments.generate, *words, *more) for more in ([], ["experts=mxfp4"]))
    assert few[:2] == plain[:2]
    assert (plain[2], few[2]) == ("", "experts: mxfp4, 4.25 bits a weight, 0.1 MB in place of 0.6 MB\n")
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question. " * 20)
    words = [f"run={folder}", f"text={tmp_path / 'a.txt'}"]
    plain, few = (command(experiments.evaluate, *words, *more) for more in ([], ["experts=mxfp4"]))
    assert (few[0], few[2]) == (plain[0], plain[2]) == (0, "")
    assert few[1] == "experts: mxfp4, 4.25 bits a weight, 0.1 MB in place of 0.6 MB\n" + plain[1]


@pytest.mark.parametrize("powers_of_two", [True, False])
def test_a_published_folder_in_fp8_keeps_its_experts_numbers_where_its_scales_are_powers_of_two(
    powers_of_two, imported, command, tmp_path
):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 160, "moe_intermediate_size": 256}
    source = pack_fp8(theirs(tmp_path / "theirs", "qwen3_moe", **sizes), powers_of_two)
    folder, status, _, err = imported(source)
    assert (status, err) == (0, "")
    (wide, tokenizer, _), (stored, *_) = load_run(folder), load_run(folder, experts="fp8")
    ids, tensors = torch.tensor([tokenizer.encode("Mixture of experts")]), load_file(source / "model.safetensors")
    for layer, block in enumerate(stored.blocks):
        w_up, w_down = block.mlp.experts.weights()
        for w, parts in ((w_up, ("gate", "up")), (w_down, ("down",))):
            for numbers, suffix in ((w.values, ""), (w.scales, "_scale_inv")):
                name = f"model.layers.{layer}.mlp.experts.{{}}.{{}}_proj.weight{suffix}"
                published = [torch.cat([tensors[name.format(e, part)] for part in parts]) for e in range(4)]
                assert torch.equal(numbers.float(), torch.stack(published).float()) == powers_of_two
    with torch.no_grad():
        for backend in ("reference", "torch"):
            logits = [of(ids, backend=backend).logits_BSV for of in (wide, stored)]
            assert torch.equal(*logits) == powers_of_two


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
        (
            lambda source: break_config(source, quantization_config={"quant_method": "gptq"}),
            "quantization_config.quant_method='gptq' is not supported in a llama: accepted is fp8.",
        ),
        (
            lambda source: change_tensors(source, lambda tensors: tensors.update(a_scale_inv=torch.ones(1, 1))),
            "tensor a_scale_inv is there, and a is missing: accepted is F8_E4M3.",
        ),
        (lambda source: (source / "config.json").unlink(), "it has no config.yaml and no config.json"),
        (lambda source: (source / "config.json").write_text("{"), "cannot be read as JSON"),
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
        (
            lambda source: change_tensors(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
            "tensor model.layers.1.mlp.up_proj.weight is missing",
        ),
        (
            lambda source: change_tensors(
                source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)})
            ),
            "tensor model.norm.weight has shape (31,), and the settings say (32,)",
        ),
        (
            lambda source: (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors"),
            "has no model.safetensors and no model.safetensors.index.json",
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
        ("to=", "to=... is needed"),
        ("to=theirs", "to=theirs exists: choose another."),
        ("source=nowhere", "source=nowhere is neither a run's folder nor one that transformers wrote"),
        ("which=last", "which=last has no meaning for a folder of transformers that becomes a run."),
        (
            "with_tokenizer=false",
            "with_tokenizer=false has no meaning for a folder of transformers that becomes a run.",
        ),
        ("shard_gb=1", "shard_gb=1.0 has no meaning for a folder of transformers that becomes a run."),
        ("dtype=q8_0", "dtype=q8_0 is not one of float32, bfloat16"),
        ("dtype=int8", "dtype=int8 is not one of float32, bfloat16"),
        ("shard_gb=0", "shard_gb=0.0 is out of range"),
        ("dtyp=float32", "dtyp is not a setting"),
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
