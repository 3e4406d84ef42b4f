"""Weights against transformers itself: the same weights must give the same logits and the same gradients."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.suites.families import VARIANTS, theirs
from experiments.suites.timing import relative_error as error
from moe.config.data import TokenizerConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.convert.hf_config import config_from_hf, config_to_hf, family_of, read_folder
from moe.convert.hf_weights import from_hf, load, save, tensor_map, to_hf
from moe.data.tokenizer import END_OF_TEXT, Tokenizer, train
from moe.errors import BadInput
from moe.eval.generate import generate
from moe.model.transformer import Transformer
from tests.small_runs import left_by_others

TOLERANCE = 1e-5  # relative, Frobenius
TOKENS_BS = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(1))


# What is of a plainer family too is written as that: it is found first.
SAME_AS = {"mistral-plain": "llama", "granitemoe-plain": "mixtral", "glm4_moe-as-dots1": "dots1"}


def next_token_loss(logits_BSV: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), TOKENS_BS[:, 1:].flatten())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_every_gradient_equal_those_of_transformers(variant: str, tmp_path: Path) -> None:
    hf = theirs(variant)
    hf.save_pretrained(tmp_path)
    logits_BSV = hf(TOKENS_BS).logits
    next_token_loss(logits_BSV).backward()
    expected = {name: p.grad for name, p in hf.named_parameters() if p.requires_grad}
    family, cfg, router = read_folder(tmp_path)
    assert family == VARIANTS[variant][0]
    assert family_of(cfg, router) == SAME_AS.get(variant, family)
    for backend in ("reference", "torch"):
        model = load(tmp_path)
        out = model(TOKENS_BS, backend=backend)
        assert all((each.count_E > 0).all() for each in out.routing)  # else an expert's weights would go untested
        assert error(out.logits_BSV, logits_BSV) < TOLERANCE
        next_token_loss(out.logits_BSV).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found = to_hf(grads, model.cfg, family, stacked=True)
        assert found.keys() == expected.keys()
        assert {name: e for name in found if (e := error(found[name], expected[name])) > TOLERANCE} == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_generation_with_a_cache_is_that_of_transformers(variant: str, tmp_path: Path) -> None:
    hf = theirs(variant).eval()
    hf.save_pretrained(tmp_path)
    hf.generation_config.eos_token_id = None  # to the end of the context
    prompt = TOKENS_BS[:1, :4]
    expected = hf.generate(prompt, max_new_tokens=27, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    model = load(tmp_path).eval()
    for use_cache in (True, False) if model.cfg.latent else (True,):
        said = generate(model, prompt[0].tolist(), 27, temperature=0, eot=-1, use_cache=use_cache)
        assert list(said) == expected


def selection_biases(model: Transformer) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("bias_E")]


def random_model(variant: str, dtype: torch.dtype = torch.float32) -> tuple[Transformer, RouterConfig]:
    """This project's model with the settings of a variant and weights of its own."""
    model_type, settings = VARIANTS[variant]
    tree = transformers.AutoConfig.for_model(model_type, **settings).to_dict()
    cfg, router = config_from_hf(tree, variant)
    model = Transformer(cfg, router).initialize(3).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for values in (*model.parameters(), *selection_biases(model)):
            values += 0.2 * torch.randn(values.shape, generator=generator)
    return model, router


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_folder_loads_in_transformers_and_computes_the_same(variant: str, tmp_path: Path) -> None:
    model, router = random_model(variant)
    save(model, router, None, tmp_path / "out")
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert hf.config.eos_token_id is hf.config.pad_token_id is None  # no default of theirs ends or masks our texts
    assert type(hf).__name__ == config_to_hf(model.cfg, router)["architectures"][0]
    learnt = [p for name, p in hf.named_parameters() if not name.endswith("e_score_correction_bias")]
    assert sum(p.numel() for p in learnt) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert error(model(TOKENS_BS).logits_BSV, hf.eval()(TOKENS_BS).logits) < TOLERANCE


TEXTS = ["To be, or not to be, that is the question.", "naïve café 漢字 😀 1234  \n\n x"] * 5


@pytest.mark.parametrize(
    "variant",
    ["gpt2", "llama-heads", "mistral", "qwen2", "qwen3", "olmo2", "mixtral", "granitemoe", "olmoe", "flex_olmo",
     "qwen2_moe", "qwen3_moe-first-dense", "dots1", "glm4_moe", "deepseek_v3", "ernie4_5_moe"],
)  # fmt: skip
def test_a_saved_folder_reads_and_says_in_transformers_what_it_does_here(variant: str, tmp_path: Path) -> None:
    """In the folder of each family, whose tokenizer's class transformers would otherwise choose by its name."""
    tokenizer = train(TokenizerConfig("bpe", 270), TEXTS)
    model_type, settings = VARIANTS[variant]
    cfg, router = config_from_hf(
        transformers.AutoConfig.for_model(model_type, **settings | {"vocab_size": 272}).to_dict(), variant
    )
    model = Transformer(dataclasses.replace(cfg, init_std=0.5), router).initialize(3).eval()
    save(model, router, tokenizer, tmp_path / "out")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert hf.config.eos_token_id == hf.generation_config.eos_token_id == theirs.eos_token_id == tokenizer.eot == 269
    assert hf.generation_config.bos_token_id == theirs.bos_token_id == tokenizer.eot
    assert theirs.model_max_length == cfg.context
    for text in (*TEXTS[:2], "<|endoftext|> in a text"):
        assert theirs(text).input_ids == tokenizer.encode(text)
    prompt = theirs("To be", return_tensors="pt")
    said = hf.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)[0]
    ours = list(generate(model, tokenizer.encode("To be"), 16, temperature=0, eot=tokenizer.eot))
    assert len(ours) > 3
    assert theirs.decode(said, skip_special_tokens=True) == tokenizer.decode([*tokenizer.encode("To be"), *ours])


def test_a_tokenizer_that_does_not_fit_or_has_no_counterpart_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    model, router = random_model("llama")
    ranks = {bytes([value]): value for value in range(256)}
    with pytest.raises(BadInput, match=r"tokenizer's 257 tokens are more than the model's 48\."):
        save(model, router, train(TokenizerConfig("byte"), []), tmp_path / "out")
    with pytest.raises(BadInput, match="not one of the patterns"):
        save(model, router, Tokenizer("mine", r"\w+", ranks, {END_OF_TEXT: 256}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_dead_process_left_half_written_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    model, router = random_model("llama")
    left = left_by_others(tmp_path / "out")
    del left["ours"]
    for path in left.values():
        path.mkdir()
    save(model, router, None, tmp_path / "out")
    assert {who for who, path in left.items() if not path.exists()} == {"dead", "again"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [20_000, 10**9])
@pytest.mark.parametrize("variant", ["gpt2", "qwen3_moe-first-dense", "mixtral"])
def test_saving_and_loading_is_bitwise(variant: str, shard_bytes: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model, router = random_model(variant, dtype)
    save(model, router, None, tmp_path / "out", shard_bytes)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    again = load(tmp_path / "out", dtype=None)
    state, restored = model.state_dict(), again.state_dict()
    assert state.keys() == restored.keys()
    for name in state:
        assert torch.equal(state[name], restored[name])
        assert restored[name].dtype == dtype
    assert again.head.weight is again.embed.weight or not model.cfg.tie_embeddings
    assert load(tmp_path / "out").embed.weight.dtype == torch.float32


def test_transformers_loads_our_shards_in_our_dtype(tmp_path: Path) -> None:
    model, router = random_model("mixtral", torch.bfloat16)
    save(model, router, None, tmp_path / "out", 20_000)
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert hf.dtype == torch.bfloat16
    state = hf.state_dict()
    for name, tensor in to_hf(model.state_dict(), model.cfg, "mixtral", stacked=True).items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("variant", ["gpt2", "mixtral", "olmoe"])
@pytest.mark.parametrize("how", [{"max_shard_size": "15KB"}, {"save_original_format": False}])
def test_shards_and_stacked_experts_of_transformers_load(variant: str, how: dict[str, Any], tmp_path: Path) -> None:
    hf = theirs(variant)
    hf.save_pretrained(tmp_path, **how)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("max_shard_size" in how)
    with torch.no_grad():
        assert error(load(tmp_path)(TOKENS_BS).logits_BSV, hf(TOKENS_BS).logits) < TOLERANCE


def test_tensors_of_a_model_in_memory_fill_ours_and_come_back() -> None:
    hf = theirs("qwen3_moe")
    model, _ = random_model("qwen3_moe")
    from_hf(hf.state_dict(), model, "qwen3_moe")
    with torch.no_grad():
        assert error(model(TOKENS_BS).logits_BSV, hf(TOKENS_BS).logits) < TOLERANCE
    again = to_hf(model.state_dict(), model.cfg, "qwen3_moe", stacked=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in hf.state_dict().items())


@pytest.mark.parametrize("variant", ["glm4_moe", "deepseek_v3"])
def test_layers_that_guess_further_tokens_are_left_aside(variant: str, tmp_path: Path) -> None:
    hf = theirs(variant)
    hf.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    n = hf.config.num_hidden_layers
    last, more = f"layers.{n - 1}.", f"layers.{n}."
    behind = {name.replace(last, more): value.clone() for name, value in tensors.items() if last in name}
    behind[f"model.{more}eh_proj.weight"] = torch.ones(32, 64)
    save_file(tensors | behind, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert error(load(tmp_path)(TOKENS_BS).logits_BSV, hf(TOKENS_BS).logits) < TOLERANCE


def test_a_folder_of_the_bare_gpt2_with_its_mask_buffers_loads(tmp_path: Path) -> None:
    """What the first GPT-2 folders look like: no prefix, and constants among the weights."""
    hf = theirs("gpt2")
    hf.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool)}, path)
    with torch.no_grad():
        assert error(load(tmp_path)(TOKENS_BS).logits_BSV, hf(TOKENS_BS).logits) < TOLERANCE


def test_the_balancing_loss_of_one_layer_times_k_is_that_of_transformers(tmp_path: Path) -> None:
    """Theirs counts a token's K choices where ours takes their share; over several layers theirs pools the tokens."""
    hf = theirs("qwen3_moe-one-layer")
    hf.save_pretrained(tmp_path)
    expected = hf(TOKENS_BS, output_router_logits=True).aux_loss
    (routing,) = load(tmp_path)(TOKENS_BS).routing
    assert expected > 3.01  # not the balanced case, in which everything agrees
    torch.testing.assert_close(3 * routing.aux, expected)


def test_every_tensor_is_mapped_exactly_once() -> None:
    """Writing 1 into every view of the map leaves no element of the model untouched and touches none twice."""
    for variant in VARIANTS:
        model, router = random_model(variant)
        state = {name: torch.zeros_like(p) for name, p in model.state_dict().items()}
        if model.cfg.tie_embeddings:
            del state["head.weight"]
        for stacked in (False, True):
            for _, views in tensor_map(state, model.cfg, family_of(model.cfg, router), stacked):
                for view in views:
                    view += 1
            assert all((tensor == 1 + stacked).all() for tensor in state.values()), variant


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, router = random_model("llama")
    save(model, router, None, tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path, *words: str) -> None:
    """Loading raises one sentence that has all the words."""
    with pytest.raises(BadInput) as caught:
        load(folder)
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).endswith(".")


def test_a_missing_unexpected_or_misshaped_tensor_is_refused_by_name(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    kept = load_file(folder / "model.safetensors")[name]
    rewrite(folder, lambda tensors: tensors.pop(name))
    refused(folder, name, "missing")
    rewrite(folder, lambda tensors: tensors.update({name: kept[:-1].clone()}))
    refused(folder, name, "(39, 32)", "(40, 32)")
    rewrite(
        folder, lambda tensors: tensors.update({name: kept, "model.layers.1.self_attn.q_proj.bias": torch.ones(32)})
    )
    refused(folder, "model.layers.1.self_attn.q_proj.bias", "not part of")


def test_a_quantised_tensor_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    refused(folder, "model.norm.weight", "I8", "BF16")


def test_a_head_that_is_not_the_embedding_is_refused_where_the_settings_tie_them(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refused(folder, "lm_head.weight", "tie_word_embeddings")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert load(folder).cfg.tie_embeddings


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(size: int, folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    refused(folder, "model.safetensors", "not a whole")


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "never opened")


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ("[]", "weight_map"),
        ('{"weight_map": 3}', "weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "'../model.safetensors' is not the name"),
        ('{"weight_map": {"a": "weights.bin"}}', "'weights.bin' is not the name"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors, and that file is not there"),
        ('{"weight_map": {}}', "missing"),
    ],
)
def test_an_index_that_is_not_one_is_refused(index: str, word: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, word)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    model, router = random_model("llama")
    save(model, router, None, tmp_path / "out", 15_000)
    first, second = sorted((tmp_path / "out").glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    refused(tmp_path / "out", name, second.name)


def test_saving_never_overwrites(folder: Path) -> None:
    model, router = random_model("llama")
    before = {each.name: each.read_bytes() for each in folder.iterdir()}
    with pytest.raises(BadInput, match=re.escape(f"{folder} exists already")):
        save(model, router, None, folder)
    assert before == {each.name: each.read_bytes() for each in folder.iterdir()}


def test_a_model_of_no_family_leaves_no_folder(tmp_path: Path) -> None:
    cfg = ModelConfig(vocab_size=16, d_model=16, n_heads=2, n_layers=1, moe=MoEConfig(4, 2, 8, n_shared=1))
    with pytest.raises(BadInput, match=r"model\.moe\.n_shared=1"):
        save(Transformer(cfg, RouterConfig()), RouterConfig(), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, router = random_model("llama")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe.convert.hf_weights.streamed.write", full)
    with pytest.raises(BadInput, match="No space left"):
        save(model, router, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())
