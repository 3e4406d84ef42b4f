"""A run as two files: `model.bin`, its weights and tokenizer, and `run.c`, the program that continues text with it.

`run.c` is one C99 file that needs a C library, POSIX mmap and libm; `model.bin` is what it maps into memory:

    header   256 bytes: magic, version, CRC-32 of all behind it, size, sizes and settings of the model
    table    128 bytes per tensor: name, dtype, rows, columns, offset
    tensors  each at a multiple of 64 bytes, an expert's two matrices side by side

All is little-endian. Settings that run.c has no place for are refused by name before anything is written.
"""

import dataclasses
import os
import shutil
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.config.model import ModelConfig, attn_bias, head_dim, layer_moe, moe_layers
from moe.config.parse import lookup
from moe.config.router import RouterConfig
from moe.config.run import Config
from moe.convert.hf_weights import refuse_existing
from moe.convert.quantize import quantize
from moe.convert.turns import around, spelt
from moe.data.chat import template_of
from moe.data.owner import remove_leftovers, temporary
from moe.data.tokenizer import GPT4_LIKE, ONE_CHARACTER, Tokenizer
from moe.errors import BadInput
from moe.model.transformer import Transformer

MAGIC, VERSION, ALIGNMENT = b"SWITCHYD", 2, 64
HEADER = struct.Struct("<8sIIQQ29i2f100x")
ENTRY = struct.Struct("<96sIIQQQ")
CHECKED_FROM = 16  # the first byte that the checksum is of
DTYPES = {"float32": 0, "int8": 1, "uint8": 2, "uint32": 3}

_ACTIVATIONS, _NORMS, _POSITIONS = ("swiglu", "gelu", "gelu_tanh", "relu2"), ("rms", "layer"), ("rope", "learned")
_QK_NORMS, _SCORES, _ATTN_BIASES = ("none", "head", "full"), ("softmax", "sigmoid"), ("none", "qkv", "all")
_IDS_ONLY, _CHARACTERS, _WORDS = range(3)
_SPLITS = {ONE_CHARACTER: _CHARACTERS, GPT4_LIKE: _WORDS}
# Settings that run.c has, and those that change nothing of what a trained model computes. All others, and whoever adds
# one, are refused by name where they are not their default.
_HAS = {
    "model": (
        "name vocab_size context n_layers d_model n_heads n_kv_heads head_dim d_ff activation norm norm_eps position "
        "rope_theta rope_scaling qk_norm bias attn_bias tie_embeddings init_std moe"
    ),
    "model.moe": (
        "n_experts k d_expert n_shared shared_gate every first_dense last_dense n_experts_by_layer k_by_layer "
        "depth_every depth_causal"
    ),
    "router": (
        "name noisy jitter frozen renormalize selection_bias scale groups k_groups group_top second threshold top_p "
        "k_max l1 l1_factor iterations causal decay slots options"
    ),
}
# What is accepted of a setting that is not the default alone.
_ACCEPTED: dict[str, tuple[Any, ...]] = {"router.name": _SCORES, "balance.force": ("none", "recorded")}
_CLASSES = {"L": 1, "N": 2}
# \s of a split pattern: Unicode's White_Space
_SPACES = [(0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)]
_SPACES += [(0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)]


class Stored(NamedTuple):
    """One tensor of the file."""

    name: str
    array: np.ndarray  # (rows, columns), of a dtype in DTYPES


def check(cfg: Config) -> None:
    """Refuse a run whose model run.c does not compute. Raises `BadInput` naming the first such setting."""
    accepted = {"model.activation": _ACTIVATIONS} | (_ACCEPTED if cfg.model.moe else {})
    for group, names in _HAS.items():
        settings = cfg.model if group == "model" else cfg.router if group == "router" else cfg.model.moe
        if settings is None or (group == "router" and not cfg.model.moe):
            continue  # of a dense model the router is not looked at
        defaults = type(settings)()
        others = {field.name for field in dataclasses.fields(settings)} - {*names.split()}
        accepted |= {f"{group}.{name}": (getattr(defaults, name),) for name in sorted(others)}
    for path, values in accepted.items():
        value = lookup(cfg, path)
        if value not in values:
            choices = " or ".join(str(choice).lower() for choice in values)
            raise BadInput(f"{path}={value} has no counterpart in run.c: accepted is {choices}.")


def encodes_text(tokenizer: Tokenizer) -> bool:
    """Whether run.c turns text into this tokenizer's ids; of another it takes ids only."""
    return tokenizer.pattern in _SPLITS


def why_no_chat(tokenizer: Tokenizer) -> str:
    """Why run.c cannot hold a conversation with this tokenizer, or "": it needs a chat template of plain turns."""
    if tokenizer.template is None:
        return "the tokenizer has no chat template"
    if not encodes_text(tokenizer):
        return "run.c does not split text as the tokenizer does"
    try:
        around(template_of("", tokenizer))
    except BadInput as error:
        return str(error).rstrip(".")
    return ""


def save(model: Transformer, tokenizer: Tokenizer, folder: Path, dtype: str = "fp32") -> None:
    """Write `model.bin` and `run.c` into `folder`, which appears whole or not at all.

    dtype: fp32, or int8: matrices as q · s (moe/convert/quantize.py); the router, gates, norms, biases and learned
    positions stay float32. The model must have passed `check`.

    Raises `BadInput` for a tokenizer with more tokens than the model, weights that are not finite, a width that no
    group divides, a folder that exists and is not empty, or one that cannot be written."""
    # What cannot be written is refused before anything is.
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise BadInput(
            f"the tokenizer's {tokenizer.vocab_size} tokens are more than the model's {model.cfg.vocab_size}."
        )
    refuse_existing(folder)
    stored = [*_model_tensors(model, dtype == "int8"), *_tokenizer_tensors(tokenizer)]
    # Both under a temporary name, which is renamed when all is there.
    beside = temporary(folder)
    remove_leftovers(folder.parent)
    try:
        beside.mkdir(parents=True)
        _write(beside / "model.bin", stored, _settings(model, tokenizer, dtype == "int8"))
        (beside / "run.c").write_bytes(resources.files("moe.convert").joinpath("run.c").read_bytes())
        os.rename(beside, folder)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error}).") from error
    finally:  # after the rename there is nothing left to remove
        shutil.rmtree(beside, ignore_errors=True)


def seal(content: bytes) -> bytes:
    """`content` of a model.bin with its size and checksum made right."""
    content = content[:16] + struct.pack("<Q", len(content)) + content[24:]
    return content[:12] + struct.pack("<I", zlib.crc32(content[CHECKED_FROM:])) + content[CHECKED_FROM:]


def _settings(model: Transformer, tokenizer: Tokenizer, int8: bool) -> tuple[int | float, ...]:
    """The header's 29 integers and 2 numbers, in the order of run.c's struct."""
    cfg, router = model.cfg, model.router
    moe, n_kv_heads = cfg.moe, cfg.n_kv_heads or cfg.n_heads
    if moe is None:
        router = RouterConfig()
    n_shared, shared_gate = (moe.n_shared, moe.shared_gate) if moe else (0, False)
    return (
        *(cfg.vocab_size, cfg.context, cfg.n_layers, cfg.d_model, cfg.n_heads, n_kv_heads, head_dim(cfg), cfg.d_ff),
        *(_ACTIVATIONS.index(cfg.activation), _NORMS.index(cfg.norm), _POSITIONS.index(cfg.position)),
        *(_QK_NORMS.index(cfg.qk_norm), cfg.bias, cfg.tie_embeddings),
        *(moe.d_expert if moe else 1, n_shared, shared_gate),
        *(_SCORES.index(router.name), router.renormalize, router.selection_bias),
        *(router.groups, router.k_groups, router.group_top),
        *(
            _ATTN_BIASES.index(attn_bias(cfg)),
            int8,
            tokenizer.eot,
            -1 if model.document_end is None else model.document_end,
        ),
        *(tokenizer.vocab_size, _SPLITS.get(tokenizer.pattern, _IDS_ONLY)),
        *(cfg.norm_eps, router.scale),
    )


def _write(path: Path, stored: list[Stored], settings: tuple[int | float, ...]) -> None:
    """Header, table and tensors. The checksum is known last and put into the header."""
    # Where each tensor will lie.
    end = HEADER.size + ENTRY.size * len(stored)
    table, starts = b"", []
    for name, array in stored:
        starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = starts[-1] + array.nbytes
        table += ENTRY.pack(name.encode(), DTYPES[array.dtype.name], 0, *array.shape, starts[-1])
    header = HEADER.pack(MAGIC, VERSION, 0, end, len(stored), *settings)
    # All of it, and the sum of what was written.
    with path.open("wb") as file:
        file.write(header + table)
        crc = zlib.crc32(header[CHECKED_FROM:] + table)
        for start, (_, array) in zip(starts, stored, strict=True):
            gap, content = bytes(start - file.tell()), np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            file.write(gap)
            file.write(content)
            crc = zlib.crc32(content, zlib.crc32(gap, crc))
        file.seek(12)
        file.write(struct.pack("<I", crc))


def _model_tensors(model: Transformer, int8: bool) -> Iterator[Stored]:
    """The model's, in the order in which run.c takes them."""
    cfg, state = model.cfg, dict(model.state_dict()) | dict(model.named_buffers())
    yield Stored("experts_and_chosen", _experts_and_chosen(cfg))
    yield from _matrix("embed", state["embed.weight"], int8)
    for name in ("position.weight",) if cfg.position == "learned" else ("cos_Sd", "sin_Sd"):
        yield Stored(name.removesuffix("_Sd"), _float32(name, state[name]))
    for layer in range(cfg.n_layers):
        yield from _layer_tensors(state, cfg, layer, int8)
    yield from _vectors("norm", state)
    if not cfg.tie_embeddings:
        yield from _matrix("head", state["head.weight"], int8)


def _layer_tensors(state: dict[str, Tensor], cfg: ModelConfig, layer: int, int8: bool) -> Iterator[Stored]:
    """A block's: attention's, then the dense MLP's or the router's, experts' and shared experts'."""
    block = f"blocks.{layer}."
    yield from _vectors(f"{block}attn_norm", state)
    for part in "qkvo":
        yield from _linear(f"{block}attn.{part}", state, int8)
    if cfg.qk_norm != "none":
        for part in "qk":
            yield from _vectors(f"{block}attn.{part}_norm", state)
    yield from _vectors(f"{block}mlp_norm", state)
    if layer not in moe_layers(cfg):
        yield from _linear(f"{block}mlp.up", state, int8)
        yield from _linear(f"{block}mlp.down", state, int8)
        return
    yield from _matrix(f"{block}mlp.router", state[f"{block}mlp.router.w_ED"], False)
    bias_E = state.get(f"{block}mlp.router.bias_E")
    if bias_E is not None:
        yield Stored(f"{block}mlp.router.bias", _float32("selection bias", bias_E[None]))
    if f"{block}mlp.shared_gate.weight" in state:
        yield from _matrix(f"{block}mlp.shared_gate", state[f"{block}mlp.shared_gate.weight"], False)
    for expert in range(layer_moe(cfg, layer).n_experts):
        for part, stack in (("up", "w_up_EFD"), ("down", "w_down_EDF")):
            w = state[f"{block}mlp.experts.{stack}"][expert]
            yield from _matrix(f"{block}mlp.experts.{expert}.{part}", w, int8)
    if f"{block}mlp.shared.up.weight" in state:
        yield from _linear(f"{block}mlp.shared.up", state, int8)
        yield from _linear(f"{block}mlp.shared.down", state, int8)


def _linear(name: str, state: dict[str, Tensor], int8: bool) -> Iterator[Stored]:
    yield from _matrix(name, state[f"{name}.weight"], int8)
    if f"{name}.bias" in state:
        yield Stored(f"{name}.bias", _float32(name, state[f"{name}.bias"][None]))


def _vectors(name: str, state: dict[str, Tensor]) -> Iterator[Stored]:
    """A norm's weight, and its bias where it has one."""
    for part in ("weight", "bias"):
        if f"{name}.{part}" in state:
            yield Stored(f"{name}.{part}", _float32(name, state[f"{name}.{part}"][None]))


def _matrix(name: str, w: Tensor, int8: bool) -> Iterator[Stored]:
    """w (rows, columns) as it is, or as int8 and the scales of its groups (rows, columns / group)."""
    array = _float32(name, w)
    if not int8:
        yield Stored(f"{name}.weight", array)
        return
    q, scale = quantize(name, torch.from_numpy(array), "int8")
    yield Stored(f"{name}.weight", q.numpy())
    yield Stored(f"{name}.scale", scale.numpy())


def _float32(name: str, values: Tensor) -> np.ndarray:
    array = np.ascontiguousarray(values.detach().float().cpu().numpy())
    if not np.isfinite(array).all():
        raise BadInput(f"the model's {name} has NaN or infinity in it: choose another checkpoint (which=...).")
    return array


def _experts_and_chosen(cfg: ModelConfig) -> np.ndarray:
    """E and K of every layer, (L, 2); 0 and 0 for a dense one."""
    pairs = np.zeros((cfg.n_layers, 2), np.uint32)
    for layer in moe_layers(cfg):
        moe = layer_moe(cfg, layer)
        pairs[layer] = moe.n_experts, moe.k
    return pairs


def _tokenizer_tensors(tokenizer: Tokenizer) -> Iterator[Stored]:
    """Where each token's bytes end, the bytes, the tokens that text can be merged into, by their bytes, and the classes
    of characters."""
    tokens = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
    mergeable = sorted(tokenizer.ranks.values(), key=lambda token: tokens[token])
    classes = _character_classes() if _SPLITS.get(tokenizer.pattern) == _WORDS else np.zeros((0, 3), np.uint32)
    yield Stored("tokenizer.ends", np.cumsum([[len(token) for token in tokens]], axis=1).astype(np.uint32))
    yield Stored("tokenizer.bytes", np.frombuffer(b"".join(tokens), np.uint8)[None])
    yield Stored("tokenizer.sorted", np.array(mergeable, np.uint32)[:, None])
    yield Stored("tokenizer.classes", classes)
    turns = b"" if why_no_chat(tokenizer) else spelt(around(template_of("", tokenizer)), tokenizer)
    yield Stored("chat", np.frombuffer(turns, np.uint8)[None])


def _character_classes() -> np.ndarray:
    """First and last character and class (letter 1, number 2, space 3) of every stretch of one class, uint32."""
    rows: list[list[int]] = [[first, last, 3] for first, last in _SPACES]
    stretch: list[int] = []
    for code in range(0x110000):
        kind = _CLASSES.get(unicodedata.category(chr(code))[0], 0)
        if stretch and stretch[1] == code - 1 and stretch[2] == kind:
            stretch[1] = code
        elif kind:
            stretch = [code, code, kind]
            rows.append(stretch)
    return np.array(rows, np.uint32)
