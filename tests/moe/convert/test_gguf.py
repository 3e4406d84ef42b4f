"""Claims about GGUF files, held against llama.cpp itself: what it computes of them, and how it reads text."""

import dataclasses
import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rustbpe
import torch
import transformers
from gguf import GGUFReader

from experiments.suites.families import DOTS1, GPT2, LLAMA, OLMOE, QWEN3_MOE
from moe.config.data import TokenizerConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.convert import gguf, hf_tokenizer
from moe.convert.hf_config import config_from_hf
from moe.data.tokenizer import END_OF_TEXT, GPT4_LIKE, Tokenizer, train
from moe.errors import BadInput
from moe.model.transformer import Transformer, model_tensors
from moe.run.streamed import Tensors, in_memory
from tests.llama_cpp import Engine
from tests.small_runs import left_by_others

V = 260
QWEN2_MOE = QWEN3_MOE | {"norm_topk_prob": False, "shared_expert_intermediate_size": 48, "head_dim": 8}
ONE_GROUP = DOTS1 | {"n_group": 1, "topk_group": 1, "num_hidden_layers": 3, "num_key_value_heads": 4}
PLAIN_OLMOE = OLMOE | {"norm_topk_prob": False, "num_key_value_heads": 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied-narrow": ("gpt2", GPT2 | {"n_inner": 48, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    "llama": ("llama", LLAMA),
    "llama-tied-theta": ("llama", LLAMA | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 100.0}}),
    "llama-heads": ("llama", LLAMA | {"num_key_value_heads": 4, "head_dim": 12, "rms_norm_eps": 1e-2}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2_moe": ("qwen2_moe", QWEN2_MOE),
    "qwen2_moe-unbiased": ("qwen2_moe", QWEN2_MOE | {"qkv_bias": False, "shared_expert_intermediate_size": 24}),
    "dots1": ("dots1", ONE_GROUP),
    "dots1-raw": ("dots1", ONE_GROUP | {"norm_topk_prob": False, "n_shared_experts": 2, "first_k_dense_replace": 0}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 12}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", PLAIN_OLMOE),
    "olmoe-tied": ("olmoe", PLAIN_OLMOE | {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3_moe-tied": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True, "tie_word_embeddings": True}),
}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 100.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
UNROUNDED = YARN | {"truncate": False, "original_max_position_embeddings": 16, "beta_fast": 0.5, "beta_slow": 0.1}
VARIANTS |= {
    f"{family}-{scaling['rope_type']}{i}": (VARIANTS[family][0], VARIANTS[family][1] | {"rope_parameters": scaling})
    for i, (family, scaling) in enumerate(
        (
            ("llama", LINEAR),
            ("olmoe", LINEAR),
            ("llama", LLAMA3),
            ("qwen3_moe", YARN),
            ("mixtral", YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 0.5}),
        )
    )
}
BYTES = train(TokenizerConfig("byte"), [])
PROMPT = list(b"Mixture of experts")


def model_of(variant: str, **changes: Any) -> tuple[Transformer, RouterConfig]:
    """A random model in which every weight matters, norms and biases too."""
    model_type, settings = VARIANTS[variant]
    settings = settings | {"vocab_size": V, "bos_token_id": None, "eos_token_id": None} | changes
    tree = transformers.AutoConfig.for_model(model_type, **settings).to_dict()
    cfg, router = config_from_hf(tree, variant)
    model = Transformer(cfg, router).initialize(3).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return model, router


def save(model: Transformer, router: RouterConfig, path: Path, dtype: str = "", tokenizer: Tokenizer = BYTES) -> None:
    gguf.save(in_memory(model_tensors(model)), model.cfg, router, tokenizer, path, dtype)


@torch.no_grad()
def distance(model: Transformer, engine: Engine, prompt: list[int], n: int = 4) -> float:
    """The largest difference of a log-probability behind the prompt and the n tokens that follow it, in nats."""
    ids, worst = list(prompt), 0.0
    for _ in range(n):
        ours_V = torch.log_softmax(model(torch.tensor([ids])).logits_BSV[0, -1].double(), -1)
        worst = max(worst, (engine.log_probs(ids) - ours_V).abs().max().item())
        ids.append(int(ours_V.argmax()))
    assert engine.greedy(prompt, n) == ids[len(prompt) :]
    return worst


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_and_says_the_same(variant: str, tmp_path: Path) -> None:
    model, router = model_of(variant)
    save(model, router, tmp_path / "m.gguf")
    # ggml looks GELU up in a table of half-precision numbers.
    assert distance(model, Engine(tmp_path / "m.gguf", V), PROMPT) < (5e-3 if model.cfg.norm == "layer" else 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.2), ("q8_0", 0.2)])
def test_llama_cpp_computes_nearly_the_same_of_fewer_bits(dtype: str, tolerance: float, tmp_path: Path) -> None:
    model, router = model_of("mixtral", intermediate_size=64, num_experts_per_tok=4)  # no choice that could flip
    for kind in ("float32", dtype):
        save(model, router, tmp_path / f"{kind}.gguf", kind)
    with torch.no_grad():
        ours_V = torch.log_softmax(model(torch.tensor([PROMPT])).logits_BSV[0, -1], -1)
    away_V = (Engine(tmp_path / f"{dtype}.gguf", V).log_probs(PROMPT) - ours_V).abs()
    assert 1e-5 < away_V.mean() < tolerance  # nats, of a spread of 7
    sizes = [(tmp_path / f"{kind}.gguf").stat().st_size for kind in (dtype, "float32")]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_reader_of_the_package_finds_every_weight_as_it_is(tmp_path: Path) -> None:
    model, router = model_of("qwen3_moe")
    save(model, router, tmp_path / "m.gguf")
    reader, state = GGUFReader(tmp_path / "m.gguf"), dict(model_tensors(model))
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    assert sum(data.size for data in stored.values()) == sum(tensor.numel() for tensor in state.values())
    for name, ours in (
        ("attn_q", "attn.q.weight"),
        ("attn_k_norm", "attn.k_norm.weight"),
        ("ffn_norm", "mlp_norm.weight"),
    ):
        assert np.array_equal(stored[f"blk.1.{name}.weight"], state[f"blocks.1.{ours}"].numpy())
    gate_up = np.concatenate([stored[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up")], axis=1)
    assert np.array_equal(gate_up, state["blocks.1.mlp.experts.w_up_EFD"].numpy())


def test_transformers_reads_the_file_too(tmp_path: Path) -> None:
    """Its reader of GGUF undoes the order of a llama's rows, and says which weights it missed."""
    model, router = model_of("llama")
    save(model, router, tmp_path / "m.gguf")
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    with torch.no_grad():
        logits = hf(torch.tensor([PROMPT])).logits
        torch.testing.assert_close(logits, model(torch.tensor([PROMPT])).logits_BSV, rtol=1e-4, atol=1e-4)


def test_a_model_in_memory_by_no_more_than_two_tensors_gives_the_same_file(tmp_path: Path) -> None:
    model, router = model_of("mixtral")
    whole, held = in_memory(model_tensors(model)), []
    lazy = Tensors(whole.meta, lambda name: held.append(name) or whole[name].clone())
    for name, tensors in (("whole", whole), ("lazy", lazy)):
        gguf.save(tensors, model.cfg, router, BYTES, tmp_path / name)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "lazy").read_bytes()
    assert sorted(held) == sorted(whole)  # each is read once


# What llama.cpp would compute otherwise


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (
            "olmoe",
            {"norm_topk_prob": True},
            "router.renormalize=True has no counterpart in llama.cpp's olmoe: accepted is False.",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "router.renormalize=False has no counterpart in llama.cpp's qwen3moe"),
        ("qwen2_moe", {"norm_topk_prob": True}, "router.renormalize=True has no counterpart in llama.cpp's qwen2moe"),
        ("llama", {"attention_bias": True}, "model.attn_bias=all has no counterpart in llama.cpp's llama: accepted is"),
        ("dots1", {"n_group": 2, "topk_group": 1}, "router.groups=2 has no counterpart in llama.cpp's dots1"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "model.moe.every=2 has no counterpart"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "model.moe.first_dense=1 has no counterpart"),
        (
            "olmoe",
            {"num_key_value_heads": 2},
            "model.n_kv_heads=2 has no counterpart in llama.cpp's olmoe: accepted is 4.",
        ),
        (
            "qwen3",
            {"rope_parameters": LLAMA3},
            "model.rope_scaling.type=llama3 has no counterpart in llama.cpp's qwen3",
        ),
        ("qwen3_moe", {"rope_parameters": UNROUNDED}, "model.rope_scaling.truncate=False has no"),
        ("mixtral", {"sliding_window": 5}, "model.window=5 has no counterpart in GGUF's llama: accepted is 0."),
    ],
)
def test_what_llama_cpp_has_not_is_refused_by_the_setting_and_would_be_wrong(
    variant: str, changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, router = model_of(variant, **changes)
    with pytest.raises(BadInput) as refused:
        save(model, router, tmp_path / "m.gguf")
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())
    # With the check taken away there is a file that llama.cpp does not load, or computes otherwise.
    monkeypatch.setattr(gguf, "check", lambda *_: VARIANTS[variant][0])
    save(model, router, tmp_path / "m.gguf")
    try:
        engine = Engine(tmp_path / "m.gguf", V)
    except RuntimeError:
        return
    with torch.no_grad():
        ours_V = torch.log_softmax(model(torch.tensor([PROMPT])).logits_BSV[0, -1], -1)
    assert (engine.log_probs(PROMPT) - ours_V).abs().max() > 0.01


def test_a_setting_that_the_file_does_not_say_is_refused_whatever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, router = model_of("llama")[0].cfg, RouterConfig()
    assert gguf.check(cfg, router) == "llama"
    monkeypatch.setattr(gguf, "_SAID", gguf._SAID - {"rope_theta"})
    assert gguf.check(cfg, router) == "llama"
    with pytest.raises(BadInput, match=r"model\.rope_theta=7\.0 has no counterpart in GGUF's llama: accepted is 10000"):
        gguf.check(dataclasses.replace(cfg, rope_theta=7.0), router)


def test_a_model_of_no_family_is_refused_and_a_family_without_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = ModelConfig(vocab_size=16, d_model=16, n_heads=2, n_layers=1, moe=MoEConfig(4, 2, 8, n_shared=1))
    with pytest.raises(BadInput, match=r"model\.moe\.n_shared=1"):
        gguf.check(cfg, RouterConfig())
    monkeypatch.setattr(gguf, "family_of", lambda *_: "mamba")
    with pytest.raises(BadInput, match="a mamba is not written as GGUF: accepted are gpt2, llama"):
        gguf.check(cfg, RouterConfig())


# Tokenizers


SOURCE = Path(__file__).parents[3]
TEXTS = [(SOURCE / name).read_text() for name in ("README.md", "docs/models.md", "moe/convert/hf_tokenizer.py")]
TEXTS += ["naïve café 漢字 漢字仮名 😀👩‍👩‍👧 Привет мир 你好世界 مرحبا ١٢٣٤٥ नमस्ते é́ \u0301x ñ ǅ ª ²³½Ⅷ " * 3]
NASTY = [
    "It's I'M we'LL they've 'sx ''s 'S’s don't",
    "1 12 123 1234 12345678 3.14 1,000,000 ²³½ Ⅷ9 ١٢٣٤٥ x1y22z333",
    " a  b   c\td\t\te\n\nf \n g\r\nh \r\n\r\n  i",
    "end  ", "end\n", "end \n ", "end\n\n  ", "end\n\t", "\n  ", " \n", "\t\t", "  ", "",
    "a\u00a0b\u2003 c\u3000\u3000d \u200b\u200de\ufeff \x85 \x1c\x1d x",
    "!!! ?!\n\n...\r\n--- (x) [y]\n{z} /path//to\n// #@%&* ~`",
    "\x00\x01\x02 nul\x00 \x7f",
    "naïve NAÏVE Straße ǅungla İi̇ ﬁ é e\u0301 \u0301 ñandú",
    "漢字とかな交じり文。한국어 텍스트 ไทย नमस्ते مرحبا שלום",
    "😀👩‍👩‍👧🏽 ♥️ ☃ ∑∫√ → ©®™ €£¥",
    "HTTPServer camelCase snake_case kebab-case ALLCAPS MixedUP iPhone's",
    "<|endoftext|> <|endoftext|>x",
]  # fmt: skip


def texts(seed: int = 0) -> list[str]:
    """The nasty ones, and as many put together at random of their pieces."""
    rng = random.Random(seed)
    pieces = [piece for text in NASTY for piece in (text[i : i + 3] for i in range(0, len(text), 3))]
    return [*NASTY, *("".join(rng.choices(pieces, k=25)) for _ in range(60))]


def learned(pattern: str, vocab_size: int = 900) -> Tokenizer:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(TEXTS + NASTY * 20), vocab_size=vocab_size, pattern=pattern)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return Tokenizer("bpe", pattern, ranks, {END_OF_TEXT: len(ranks)})


def engine_of(tokenizer: Tokenizer, folder: Path) -> Engine:
    cfg = dataclasses.replace(model_of("llama")[0].cfg, vocab_size=tokenizer.vocab_size + 3, n_layers=1)
    save(Transformer(cfg, RouterConfig()).initialize(0), RouterConfig(), folder / "t.gguf", tokenizer=tokenizer)
    return Engine(folder / "t.gguf", cfg.vocab_size)


PATTERNS = {"gpt2": hf_tokenizer.GPT2, "llama3": hf_tokenizer.LLAMA3, "qwen": hf_tokenizer.QWEN}


@pytest.mark.parametrize("kind", [*PATTERNS, "byte", "char"])
def test_llama_cpp_gives_the_ids_of_the_tokenizer_for_every_text(kind: str, tmp_path: Path) -> None:
    tokenizer = learned(PATTERNS[kind]) if kind in PATTERNS else train(TokenizerConfig(kind), ["Привет ñandú é"])
    assert gguf.split_of(tokenizer)[1] is None
    engine = engine_of(tokenizer, tmp_path)
    assert {text: ids for text in texts() if (ids := engine.encode(text)) != tokenizer.encode(text)} == {}


def test_nothing_is_put_around_a_text_and_a_special_token_is_known_as_one(tmp_path: Path) -> None:
    engine = engine_of(BYTES, tmp_path)
    assert engine.encode("ab", special=True) == BYTES.encode("ab")
    assert engine.encode(f"a{END_OF_TEXT}b", special=True) == [97, BYTES.eot, 98]
    fields = GGUFReader(tmp_path / "t.gguf").fields
    told = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()}
    assert told["bos_token_id"] == told["eos_token_id"] == BYTES.eot
    assert told["token_type"] == [1] * 256 + [3] + [5] * 3  # normal, control, unused


def without(tokenizer: Tokenizer, spans: Any) -> Tokenizer:
    """The tokenizer as if it had never learned a token that spans a place where llama.cpp cuts, nor one made of it."""
    kept: dict[bytes, int] = {}
    for token in sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__):
        if len(token) == 1 or not spans(token):
            kept[token] = len(kept)
    return Tokenizer("bpe", tokenizer.pattern, kept, {END_OF_TEXT: len(kept)})


@pytest.mark.parametrize("pattern", [GPT4_LIKE, hf_tokenizer.CL100K], ids=["GPT4_LIKE", "cl100k"])
def test_patterns_that_differ_give_equal_ids_where_no_token_spans_the_difference(pattern: str, tmp_path: Path) -> None:
    tokenizer = learned(pattern)
    name, said = gguf.split_of(tokenizer)
    assert (name, str(said)[:29]) == ("llama-bpe", "llama.cpp cuts text inside of")
    engine = engine_of(tokenizer, tmp_path)
    assert any(engine.encode(text) != tokenizer.encode(text) for text in texts()), "the difference is real"
    narrow = without(tokenizer, gguf._PRES[pattern].differs)
    assert gguf.split_of(narrow) == ("llama-bpe", None)
    assert narrow.vocab_size > 700
    (tmp_path / "t.gguf").unlink()
    engine = engine_of(narrow, tmp_path)
    assert {text: ids for text in texts() if (ids := engine.encode(text)) != narrow.encode(text)} == {}


def test_a_pattern_that_llama_cpp_only_comes_near_is_said_to_differ(tmp_path: Path) -> None:
    """Its name for o200k's tells capitals from small letters, and marks from letters, in ASCII only."""
    tokenizer = learned(hf_tokenizer.O200K)
    name, said = gguf.split_of(tokenizer)
    assert (name, "cuts text inside of" in str(said)) == ("gpt-4o", True)
    assert engine_of(tokenizer, tmp_path).encode("İi̇ é é") != tokenizer.encode("İi̇ é é")


def test_a_token_that_is_not_merged_of_two_is_one_that_llama_cpp_never_gives(tmp_path: Path) -> None:
    tokenizer = train(TokenizerConfig("char"), ["漢"])  # three bytes, of which no two are a token
    name, said = gguf.split_of(tokenizer)
    assert name == "gpt-2"
    assert said == "llama.cpp never gives 1 of the tokenizer's 258 tokens, such as b'\\xe6\\xbc\\xa2'"
    assert engine_of(tokenizer, tmp_path).encode("漢") == [0xE6, 0xBC, 0xA2] != tokenizer.encode("漢")


def test_a_pattern_that_llama_cpp_has_no_name_for_is_refused() -> None:
    ranks = {bytes([value]): value for value in range(256)}
    with pytest.raises(BadInput, match=r"the tokenizer mine splits text by '\\\\w\+', which llama.cpp has no name for"):
        gguf.split_of(Tokenizer("mine", r"\w+", ranks, {END_OF_TEXT: 256}))


def test_an_end_of_text_ends_what_llama_cpp_says(tmp_path: Path) -> None:
    model, router = model_of("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.head.weight[BYTES.eot] = 3 * model.norm.weight.sign()
    ours, ids = [], list(PROMPT)
    while BYTES.eot not in ours and len(ours) < 8:
        with torch.no_grad():
            ours.append(int(model(torch.tensor([ids + ours])).logits_BSV[0, -1].argmax()))
    save(model, router, tmp_path / "m.gguf")
    said = Engine(tmp_path / "m.gguf", V).greedy(PROMPT, 8)
    assert list(itertools.takewhile(lambda token: token != BYTES.eot, said)) == [i for i in ours if i != BYTES.eot]
    assert len(said) < 8 or BYTES.eot not in ours


# What cannot be written


def test_a_file_that_exists_is_left_alone_and_a_dead_processes_leftover_removed(tmp_path: Path) -> None:
    model, router = model_of("llama")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(BadInput, match=r"m\.gguf exists already"):
        save(model, router, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    left = left_by_others(tmp_path / "new.gguf")
    for path in left.values():
        path.write_text("")
    save(model, router, tmp_path / "new.gguf")
    assert not left["dead"].exists()


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, router = model_of("llama")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    usage = shutil.disk_usage(tmp_path)
    for what, instead, message in (
        ("gguf.GGUFWriter.write_tensor_data", full, "No space left"),
        ("shutil.disk_usage", lambda path: usage._replace(free=10), r"it needs [\d,]+ bytes and 10 are free"),
        ("importlib.util.find_spec", lambda name: None, r"needs the package gguf.*moe-switchyard\[gguf\]"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(what, instead)
            with pytest.raises(BadInput, match=message):
                save(model, router, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_number_too_large_for_the_dtype_is_refused_by_name(dtype: str, tmp_path: Path) -> None:
    model, router = model_of("llama")
    with torch.no_grad():
        model.blocks[1].attn.v.weight[0, 0] = torch.finfo(torch.float32).max
    with pytest.raises(BadInput, match=rf"blk\.1\.attn_v\.weight has a number that is too large for {dtype}\."):
        save(model, router, tmp_path / "m.gguf", dtype)
    model, router = model_of("llama")
    with pytest.raises(BadInput, match=r"the weights are float64, which GGUF has not: dtype=\.\.\. of float32, "):
        save(model.double(), router, tmp_path / "m.gguf")
    with pytest.raises(BadInput, match="tokenizer's 257 tokens are more than the model's 48"):
        save(*model_of("llama", vocab_size=48), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
