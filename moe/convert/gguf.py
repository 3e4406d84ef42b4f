"""A model and its tokenizer as one GGUF file, which llama.cpp and what is built on it read.

Weights are written one tensor at a time, by the package `gguf`. What llama.cpp would compute otherwise is refused by
name, for it would say nothing: whether the weights of the chosen experts are made to sum to 1 is fixed by architecture
there, and so is which layers have experts.

    ours          here                there
    llama         llama               q and k turn neighbouring channels, so their rows are put in that order
    mixtral       llama               with expert_count
    qwen2         qwen2
    qwen2_moe     qwen2moe            experts in every layer, their weights as the softmax has them, and shared ones
    qwen3         qwen3
    qwen3_moe     qwen3moe            experts in every layer, their weights summing to 1
    dots1         dots1               with one group of experts
    olmoe         olmoe               their weights as the softmax has them
    gpt2          gpt2                query, key and value as one
"""

import dataclasses
import importlib.util
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.config.model import ModelConfig, RopeScaling, head_dim, is_moe_layer
from moe.config.parse import lookup, to_dict
from moe.config.router import RouterConfig
from moe.convert import hf_tokenizer
from moe.convert.hf_config import family_of
from moe.convert.hf_tokenizer import last_merges, spelling
from moe.data.owner import remove_leftovers, temporary
from moe.data.tokenizer import ONE_CHARACTER, Tokenizer
from moe.errors import BadInput
from moe.model.rope import frequencies
from moe.run import streamed
from moe.run.folder import flat
from moe.run.streamed import Tensors

INSTALL = "pip install 'moe-switchyard[gguf]'"
ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "mixtral": "llama", "qwen3": "qwen3", "olmoe": "olmoe"}
ARCHITECTURES |= {"qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "dots1": "dots1"}
RENORMALIZED = {"mixtral": True, "qwen3_moe": True, "qwen2_moe": False, "olmoe": False}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
LARGEST = {"F32": torch.finfo(torch.float32).max, "F16": 65504.0, "BF16": torch.finfo(torch.bfloat16).max}
LARGEST["Q8_0"] = 127 * LARGEST["F16"]  # a block's scale is a float16
# Settings that the file says, or that the family has fixed. Any other must be as it is by default.
_SAID = {"name", "vocab_size", "context", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff"}
_SAID |= {"norm_eps", "activation", "norm", "position", "rope_theta", "qk_norm", "bias", "tie_embeddings", "init_std"}
_SAID |= {"moe", "rope_scaling", "attn_bias"}


class Pre(NamedTuple):
    """A way of splitting text that llama.cpp knows."""

    name: str  # of tokenizer.ggml.pre
    whole: bool  # a piece that is a token is that token, as here
    differs: Callable[[bytes], bool]  # whether a token may span a place where the two split otherwise


def _nowhere(token: bytes) -> bool:
    return False


def _newline_then_space(token: bytes) -> bool:
    """At a text's end, whitespace behind a newline is a piece of its own there, and here it is one with the newline."""
    return re.search(rb"[\r\n][^\r\n]", token) is not None


def _two_digits(token: bytes) -> bool:
    """Numbers are cut into pieces of three there, and here of two. A part of a character may be of a number's."""
    characters = token.decode(errors="surrogateescape")
    number = [unicodedata.category(character) in ("Nd", "Nl", "No", "Cs") for character in characters]
    begins = [not "\udc80" <= character <= "\udcbf" for character in characters]
    return _newline_then_space(token) or any(number[i - 1] and number[i] and begins[i] for i in range(1, len(number)))


def _two_characters(token: bytes) -> bool:
    return any(byte & 0xC0 != 0x80 for byte in token[1:])


_PRES: dict[str, Pre] = {
    ONE_CHARACTER: Pre("gpt-2", False, _two_characters),  # tokens within a character, which is never cut there
    hf_tokenizer.GPT2: Pre("gpt-2", False, _nowhere),
    hf_tokenizer.LLAMA3: Pre("llama-bpe", True, _nowhere),
    hf_tokenizer.QWEN: Pre("qwen2", False, _nowhere),
    hf_tokenizer.O200K: Pre("gpt-4o", False, _two_characters),  # which tells capitals from small letters in ASCII only
    hf_tokenizer.CL100K: Pre("llama-bpe", True, _newline_then_space),
    hf_tokenizer.GPT4_LIKE: Pre("llama-bpe", True, _two_digits),
}


def check(cfg: ModelConfig, router: RouterConfig) -> str:
    """The family of a model that llama.cpp computes as it is computed here. Raises `BadInput` naming the setting."""
    family = family_of(cfg, router)
    if family not in ARCHITECTURES:
        raise BadInput(f"a {family} is not written as GGUF: accepted are {', '.join(ARCHITECTURES)}.")
    arch = ARCHITECTURES[family]
    for path, default in flat(to_dict(ModelConfig())).items():
        value = lookup(cfg, path)
        if path.partition(".")[0] not in _SAID and value != default:
            raise BadInput(f"model.{path}={value} has no counterpart in GGUF's {arch}: accepted is {default}.")
    required: dict[str, tuple[Any, Any]] = {}
    if cfg.moe is not None:
        required["router.renormalize"] = router.renormalize, RENORMALIZED.get(family, router.renormalize)
        required["router.groups"] = router.groups, 1
        required["model.moe.every"] = cfg.moe.every, 1
        required["model.moe.first_dense"] = cfg.moe.first_dense, cfg.moe.first_dense if family == "dots1" else 0
    if cfg.attn_bias == "all" or arch not in ("qwen2", "qwen2moe"):
        required["model.attn_bias"] = cfg.attn_bias, "none"
    if cfg.rope_scaling.type == "yarn":
        required["model.rope_scaling.truncate"] = cfg.rope_scaling.truncate, True
    if arch != "llama" and cfg.rope_scaling.type == "llama3":  # a tensor that the others have not
        required["model.rope_scaling.type"] = "llama3", "linear or yarn"
    if family in ("olmoe", "dots1"):
        required["model.n_kv_heads"] = cfg.n_kv_heads or cfg.n_heads, cfg.n_heads
    for path, (value, accepted) in required.items():
        if value != accepted:
            raise BadInput(f"{path}={value} has no counterpart in llama.cpp's {arch}: accepted is {accepted}.")
    return family


def split_of(tokenizer: Tokenizer) -> tuple[str, str | None]:
    """The name of the pattern by which llama.cpp splits text, and a sentence on what it does otherwise, if anything:
    with None, ids are equal for every text. Raises `BadInput` where no pattern comes near.

    Two patterns that cut at different places give the same ids where no token spans such a place, for then nothing is
    ever merged across it."""
    if tokenizer.pattern not in _PRES:
        raise BadInput(
            f"the tokenizer {tokenizer.name} splits text by {tokenizer.pattern!r}, which llama.cpp has no name for."
        )
    pre = _PRES[tokenizer.pattern]
    merged = last_merges(tokenizer.ranks)
    unmade = [token for token, last in merged.items() if last is None and not pre.whole]
    cut = [token for token in merged if pre.differs(token)]
    for tokens, what in ((unmade, "never gives"), (cut, "cuts text inside of")):
        if tokens:
            number = f"{len(tokens)} of the tokenizer's {tokenizer.vocab_size} tokens"
            return pre.name, f"llama.cpp {what} {number}, such as {tokens[0]!r}"
    return pre.name, None


def tensor_map(tensors: Mapping[str, Tensor], cfg: ModelConfig, family: str) -> Iterator[tuple[str, Tensor]]:
    """Name and content of every tensor of the file, from this model's tensors by name."""
    yield "token_embd.weight", tensors["embed.weight"]
    if cfg.rope_scaling.type == "llama3":  # what each frequency is divided by
        plain = dataclasses.replace(cfg, rope_scaling=RopeScaling())
        yield "rope_freqs.weight", frequencies(plain)[0] / frequencies(cfg)[0]
    parts = ("weight", "bias") if cfg.bias else ("weight",)
    if cfg.position == "learned":
        yield "position_embd.weight", tensors["position.weight"]
    for part in parts:
        yield f"output_norm.{part}", tensors[f"norm.{part}"]
    if not cfg.tie_embeddings:
        yield "output.weight", tensors["head.weight"]
    elif family == "olmoe":  # which has no tied one
        yield "output.weight", tensors["embed.weight"]
    for layer in range(cfg.n_layers):
        ours, theirs = f"blocks.{layer}.", f"blk.{layer}."
        for part in parts:
            yield f"{theirs}attn_norm.{part}", tensors[f"{ours}attn_norm.{part}"]
            yield f"{theirs}ffn_norm.{part}", tensors[f"{ours}mlp_norm.{part}"]
            yield from _attention(tensors, cfg, family, f"{ours}attn.", theirs, part)
        if cfg.qk_norm != "none":
            for name in "qk":
                yield f"{theirs}attn_{name}_norm.weight", tensors[f"{ours}attn.{name}_norm.weight"]
        if is_moe_layer(cfg, layer):
            yield f"{theirs}ffn_gate_inp.weight", tensors[f"{ours}mlp.router.w_ED"]
            if f"{ours}mlp.router.bias_E" in tensors:
                yield f"{theirs}exp_probs_b.bias", tensors[f"{ours}mlp.router.bias_E"]
            if f"{ours}mlp.shared_gate.weight" in tensors:
                yield f"{theirs}ffn_gate_inp_shexp.weight", tensors[f"{ours}mlp.shared_gate.weight"][0]
            if f"{ours}mlp.shared.up.weight" in tensors:
                gate, up = tensors[f"{ours}mlp.shared.up.weight"].chunk(2)
                yield f"{theirs}ffn_gate_shexp.weight", gate
                yield f"{theirs}ffn_up_shexp.weight", up
                yield f"{theirs}ffn_down_shexp.weight", tensors[f"{ours}mlp.shared.down.weight"]
            gate_EFD, up_EFD = tensors[f"{ours}mlp.experts.w_up_EFD"].chunk(2, dim=1)
            yield f"{theirs}ffn_gate_exps.weight", gate_EFD
            yield f"{theirs}ffn_up_exps.weight", up_EFD
            yield f"{theirs}ffn_down_exps.weight", tensors[f"{ours}mlp.experts.w_down_EDF"]
            continue
        for part in parts:
            up = tensors[f"{ours}mlp.up.{part}"]
            if cfg.activation == "swiglu":
                gate, up = up.chunk(2)
                yield f"{theirs}ffn_gate.{part}", gate
            yield f"{theirs}ffn_up.{part}", up
            yield f"{theirs}ffn_down.{part}", tensors[f"{ours}mlp.down.{part}"]


def _attention(
    tensors: Mapping[str, Tensor], cfg: ModelConfig, family: str, ours: str, theirs: str, part: str
) -> Iterator[tuple[str, Tensor]]:
    if family == "gpt2":
        yield f"{theirs}attn_qkv.{part}", torch.cat([tensors[f"{ours}{name}.{part}"] for name in "qkv"])
    else:
        for name in "qkv":
            w = tensors[f"{ours}{name}.{part}"]
            if ARCHITECTURES[family] == "llama" and name != "v":
                w = _neighbours(w, head_dim(cfg))
            yield f"{theirs}attn_{name}.{part}", w
            if f"{ours}{name}.bias" in tensors:
                yield f"{theirs}attn_{name}.bias", tensors[f"{ours}{name}.bias"]
    yield f"{theirs}attn_output.{part}", tensors[f"{ours}o.{part}"]


def _neighbours(w: Tensor, d: int) -> Tensor:
    """Rows of heads of d channels: channels i and i + d/2, which RoPE turns together, side by side."""
    return w.view(-1, 2, d // 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


@torch.no_grad()
def save(
    tensors: Tensors, cfg: ModelConfig, router: RouterConfig, tokenizer: Tokenizer, path: Path, dtype: str = ""
) -> None:
    """Write the file, whole or not at all. In memory are two tensors of the model at a time.

    dtype: of matrices, one of `DTYPES`, or empty: the tensors' own, of which float64 has none. Vectors, routers and
    positions are float32, and in q8_0 matrices whose width is no multiple of 32 as well. Raises `BadInput` for a model
    that `check` refuses, a tokenizer with more tokens than the model, a number too large for the dtype, a file that
    exists, a disk too full, and where the package gguf is not installed."""
    # What cannot be written is refused before anything is.
    if importlib.util.find_spec("gguf") is None:
        raise BadInput(f"to={path} needs the package gguf, which is not installed: {INSTALL}.")
    check(cfg, router)
    dtype = dtype or str(tensors.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise BadInput(f"the weights are {dtype}, which GGUF has not: dtype=... of {', '.join(DTYPES)} converts them.")
    if tokenizer.vocab_size > cfg.vocab_size:
        raise BadInput(f"the tokenizer's {tokenizer.vocab_size} tokens are more than the model's {cfg.vocab_size}.")
    if os.path.lexists(path):
        raise BadInput(f"{path} exists already: give a new file.")
    # Under a temporary name, which is renamed when all is there.
    beside = temporary(path)
    remove_leftovers(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(beside, tensors, cfg, router, tokenizer, dtype)
        os.rename(beside, path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror or error}).") from error
    finally:  # after the rename there is nothing left to remove
        beside.unlink(missing_ok=True)


def _write(
    path: Path, tensors: Tensors, cfg: ModelConfig, router: RouterConfig, tokenizer: Tokenizer, dtype: str
) -> None:
    import gguf

    family = check(cfg, router)

    writer = gguf.GGUFWriter(None, ARCHITECTURES[family])
    file_type = {"F32": "ALL_F32"}.get(DTYPES[dtype], f"MOSTLY_{DTYPES[dtype]}")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_settings(writer, cfg, router, family)
    _add_tokenizer(writer, tokenizer, cfg.vocab_size)
    # What each tensor will take, and then each.
    kinds: dict[str, Any] = {}
    needed = 0
    for name, like in tensor_map(tensors.meta, cfg, family):
        kinds[name] = gguf.GGMLQuantizationType[_kind(name, like, DTYPES[dtype])]
        n_values, n_bytes = gguf.GGML_QUANT_SIZES[kinds[name]]
        size = like.numel() // n_values * n_bytes
        needed += size
        writer.add_tensor_info(name, like.shape, np.dtype(np.float32), size, kinds[name])
    streamed.check_room(path, needed)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensor_map(tensors, cfg, family):
            values = tensor.float().contiguous().numpy()
            if np.abs(values).max(initial=0) > LARGEST[kinds[name].name]:
                raise BadInput(f"the weight {name} has a number that is too large for {dtype}.")
            writer.write_tensor_data(gguf.quants.quantize(values, kinds[name]))
    finally:
        if writer.fout:
            writer.close()


def _kind(name: str, like: Tensor, kind: str) -> str:
    """How a tensor's numbers are stored."""
    exact = like.dim() == 1 or "ffn_gate_inp" in name or name.startswith("position_embd")
    return "F32" if exact or (kind == "Q8_0" and like.shape[-1] % 32) else kind


def _add_settings(writer: Any, cfg: ModelConfig, router: RouterConfig, family: str) -> None:
    """The sizes of the model, under the names that llama.cpp reads."""
    import gguf

    moe = cfg.moe
    writer.add_name(cfg.name)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.context)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layers)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_kv_heads or cfg.n_heads)
    writer.add_feed_forward_length(moe.d_expert if family in ("mixtral", "olmoe") and moe else cfg.d_ff)
    if cfg.norm == "rms":
        writer.add_layer_norm_rms_eps(cfg.norm_eps)
    else:
        writer.add_layer_norm_eps(cfg.norm_eps)
    if cfg.position == "rope":
        writer.add_key_length(head_dim(cfg))
        writer.add_value_length(head_dim(cfg))
        writer.add_rope_dimension_count(head_dim(cfg))
        writer.add_rope_freq_base(cfg.rope_theta)
        _add_rope_scaling(writer, cfg.rope_scaling)
    if moe is not None:
        writer.add_expert_count(moe.n_experts)
        writer.add_expert_used_count(moe.k)
        writer.add_expert_feed_forward_length(moe.d_expert)
        if moe.n_shared:
            writer.add_expert_shared_feed_forward_length(moe.n_shared * moe.d_expert)
            writer.add_expert_shared_count(moe.n_shared)
        if family == "dots1":  # the only one that is asked
            writer.add_leading_dense_block_count(moe.first_dense)
            writer.add_expert_weights_norm(router.renormalize)
            writer.add_expert_weights_scale(router.scale)
            writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _add_rope_scaling(writer: Any, scaling: RopeScaling) -> None:
    """How the frequencies are changed, where they are not a tensor. Yarn's attention factor is one more there."""
    import gguf

    if scaling.type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.type))
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling.type == "yarn":
        usual = 1.0 + 0.1 * math.log(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        writer.add_rope_scaling_attn_factors((scaling.attention_factor or usual) / usual)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, n_tokens: int) -> None:
    """Tokens, merges and the name of the pattern; ids that the tokenizer leaves unused are said to be."""
    import gguf

    texts = [f"[unused {i}]" for i in range(n_tokens)]
    kinds = [gguf.TokenType.UNUSED] * n_tokens
    for token, rank in tokenizer.ranks.items():
        texts[rank], kinds[rank] = spelling(token), gguf.TokenType.NORMAL
    for text, rank in tokenizer.specials.items():
        texts[rank], kinds[rank] = text, gguf.TokenType.CONTROL
    merges = [" ".join(map(spelling, pair)) for pair in last_merges(tokenizer.ranks).values() if pair]
    never = spelling(b"\0\0") + " " + spelling(b"\0")  # the list may not be empty, and nothing makes the left one
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_of(tokenizer)[0])
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or [never])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
