"""Weights to and from folders in transformers' format, which itself is not needed.

A folder holds `config.json` (see hf_config.py), safetensors, whole or in shards, and a tokenizer (hf_tokenizer.py). A
tensor that is missing, of another shape or not part of the model is refused by name. So a model that loads computes the
same function as transformers'.

One map serves both directions: `tensor_map` names, for every tensor of the folder, the views into this model's tensors
that hold it. Reading copies into the views, writing copies out of them.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config.model import ModelConfig, head_dim, is_moe_layer
from moe.config.router import RouterConfig
from moe.convert import hf_tokenizer
from moe.convert.hf_config import config_to_hf, read_folder
from moe.convert.hf_gpt_oss import gpt_oss_map
from moe.convert.hf_stored import Stored, packed, read
from moe.data.owner import remove_leftovers, temporary
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model.rope import rotary
from moe.model.transformer import Transformer
from moe.run import streamed
from moe.run.jsonl import to_text
from moe.run.streamed import Place, Tensors

SHARD_BYTES = 5_000_000_000
DTYPES = {name: dtype for name, dtype in streamed.DTYPES.items() if dtype.is_floating_point}

# What a family calls the shared experts, if not shared_experts.
_SHARED = {"qwen2_moe": "shared_expert"}

# What DeepSeek-V2 and -V3 call the parts of latent attention, and those of queries that are made from a latent too.
_LATENT = {"attn.kv_down": "self_attn.kv_a_proj_with_mqa", "attn.kv_norm": "self_attn.kv_a_layernorm"}
_LATENT |= {"attn.kv": "self_attn.kv_b_proj", "attn.q": "self_attn.q_proj", "attn.o": "self_attn.o_proj"}
_LATENT_QUERIES = {"attn.q_down": "self_attn.q_a_proj", "attn.q_norm": "self_attn.q_a_layernorm"}
_LATENT_QUERIES |= {"attn.q": "self_attn.q_b_proj"}

# Constants that old folders hold among the weights.
_CONSTANT = re.compile(r".*\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")


def tensor_map(
    state: Mapping[str, Tensor], cfg: ModelConfig, family: str, stacked: bool = False
) -> Iterator[tuple[str, list[Tensor]]]:
    """For every tensor of the family's folders: its name, and the views into `state` that, joined along their last
    dimension, are it. A view of four dimensions is a matrix whose rows are counted by the first three.

    state: this model's tensors by name (weights, or gradients). `stacked`: the experts of a layer as two tensors
    (E, 2F, D) and (E, D, F), as transformers 5 holds them in memory; otherwise as folders hold them, which is one by
    one, but for Granite's, where they are stacked under names of their own."""
    # Outside of the blocks.
    if not cfg.tie_embeddings:
        yield "lm_head.weight", [state["head.weight"]]
    if family == "gpt2":
        yield from _gpt2_map(state, cfg)
        return
    yield "model.embed_tokens.weight", [state["embed.weight"]]
    yield "model.norm.weight", [state["norm.weight"]]
    # What the families call the parts of a block.
    names = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if cfg.norm_at == "after":
        names = {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
    if cfg.latent is None:
        names |= {f"attn.{part}": f"self_attn.{part}_proj" for part in "qkvo"}
    else:
        names |= _LATENT | (_LATENT_QUERIES if cfg.latent.q_rank else {})
    if cfg.qk_norm != "none":
        names |= {f"attn.{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
    mixtral, granite = family == "mixtral" and not stacked, family == "granitemoe"
    mlp = "block_sparse_moe" if mixtral or granite else "mlp"
    router = "gate" if not granite else "router" if stacked else "router.layer"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    turned = ("attn.q", "attn.k") if family == "ernie4_5_moe" else ()
    for layer in range(cfg.n_layers):
        a, b = f"blocks.{layer}.", f"model.layers.{layer}."
        for ours, theirs in names.items():
            w = state[f"{a}{ours}.weight"]
            yield f"{b}{theirs}.weight", [_side_by_side(w, cfg) if ours in turned else w]
            if f"{a}{ours}.bias" in state:
                yield f"{b}{theirs}.bias", [state[f"{a}{ours}.bias"]]
        if family == "gpt_oss":
            yield from gpt_oss_map(state, a, b)
            continue
        if not is_moe_layer(cfg, layer):
            yield from _mlp_map(state, f"{a}mlp", f"{b}mlp")
            continue
        # The router, experts for every token, and the routed ones, stacked or one by one.
        yield f"{b}{mlp}.{router}.weight", [state[f"{a}mlp.router.w_ED"]]
        if f"{a}mlp.router.bias_E" in state:  # no gradient has it
            bias_E = state[f"{a}mlp.router.bias_E"]
            if family == "ernie4_5_moe":
                yield f"{b}mlp.{'gate.' if stacked else ''}moe_statics.e_score_correction_bias", [bias_E[None]]
            else:
                yield f"{b}{mlp}.gate.e_score_correction_bias", [bias_E]
        if f"{a}mlp.shared.up.weight" in state:
            yield from _mlp_map(state, f"{a}mlp.shared", f"{b}{mlp}.{_SHARED.get(family, 'shared_experts')}")
        if cfg.moe is not None and cfg.moe.shared_gate:
            yield f"{b}{mlp}.shared_expert_gate.weight", [state[f"{a}mlp.shared_gate.weight"]]
        up_stack, down_stack = f"{a}mlp.experts.w_up_EFD", f"{a}mlp.experts.w_down_EDF"
        if stacked or granite:
            yield f"{b}{mlp}.{'experts.gate_up_proj' if stacked else 'input_linear.weight'}", [state[up_stack]]
            yield f"{b}{mlp}.{'experts.down_proj' if stacked else 'output_linear.weight'}", [state[down_stack]]
            continue
        yield from _experts_map(state, up_stack, f"{b}{mlp}.experts", (gate, up))
        yield from _experts_map(state, down_stack, f"{b}{mlp}.experts", (down,))


def _experts_map(
    state: Mapping[str, Tensor], ours: str, theirs: str, projections: tuple[str, ...]
) -> Iterator[tuple[str, list[Tensor]]]:
    """A stack of experts one by one: one matrix of each, or several that lie below one another. Only one stack is held
    here, so that no more of a state that is read from a file is in memory."""
    for projection, w in zip(projections, state[ours].chunk(len(projections), dim=1), strict=True):
        for e in range(len(w)):
            yield f"{theirs}.{e}.{projection}.weight", [w[e]]


def _side_by_side(w_HD: Tensor, cfg: ModelConfig) -> Tensor:
    """Rows of queries or keys, whose pairs of channels (i, i + d/2) turn together, with each pair side by side."""
    return w_HD.unflatten(0, (-1, 2, head_dim(cfg) // 2)).transpose(1, 2)


def joined(views: list[Tensor]) -> Tensor:
    """The tensor of a folder that views of `tensor_map` are; a copy."""
    whole = torch.cat(views, dim=-1)
    return whole.flatten(0, 2) if whole.dim() == 4 else whole


def _mlp_map(state: Mapping[str, Tensor], ours: str, theirs: str) -> Iterator[tuple[str, list[Tensor]]]:
    """A dense MLP, whose gate and up projection are one tensor here and two there."""
    w_gate_FD, w_up_FD = state[f"{ours}.up.weight"].chunk(2)
    yield f"{theirs}.gate_proj.weight", [w_gate_FD]
    yield f"{theirs}.up_proj.weight", [w_up_FD]
    yield f"{theirs}.down_proj.weight", [state[f"{ours}.down.weight"]]


def _gpt2_map(state: Mapping[str, Tensor], cfg: ModelConfig) -> Iterator[tuple[str, list[Tensor]]]:
    """GPT-2's linear maps are stored (in, out), and its query, key and value as one."""
    yield "transformer.wte.weight", [state["embed.weight"]]
    yield "transformer.wpe.weight", [state["position.weight"]]
    for part in ("weight", "bias"):
        yield f"transformer.ln_f.{part}", [state[f"norm.{part}"]]
    linear = {"attn.c_attn": ["attn.q", "attn.k", "attn.v"], "attn.c_proj": ["attn.o"]}
    linear |= {"mlp.c_fc": ["mlp.up"], "mlp.c_proj": ["mlp.down"]}
    for layer in range(cfg.n_layers):
        a, b = f"blocks.{layer}.", f"transformer.h.{layer}."
        for ours, theirs in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for part in ("weight", "bias"):
                yield f"{b}{theirs}.{part}", [state[f"{a}{ours}.{part}"]]
        for theirs, fused in linear.items():
            yield f"{b}{theirs}.weight", [state[f"{a}{ours}.weight"].T for ours in fused]
            yield f"{b}{theirs}.bias", [state[f"{a}{ours}.bias"] for ours in fused]


def to_hf(state: Mapping[str, Tensor], cfg: ModelConfig, family: str, stacked: bool = False) -> dict[str, Tensor]:
    """This model's tensors (weights, or gradients) in the family's names and layouts; `stacked` as in `tensor_map`."""
    return {name: joined(views) for name, views in tensor_map(state, cfg, family, stacked)}


@torch.no_grad()
def from_hf(tensors: Mapping[str, Tensor], model: Transformer, family: str) -> None:
    """Fill `model` in place from tensors in the family's names: a folder's, or a transformers model's `state_dict()`.

    Raises `BadInput` naming the first tensor that is missing, not part of the model, or of another shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not _CONSTANT.fullmatch("." + name)}
    targets = views_of(shapes, model, family)
    for name, views in targets.items():
        copy_into(tensors[name], views)
    check_tied(targets, model)


def views_of(shapes: Mapping[str, tuple[int, ...]], model: Transformer, family: str) -> dict[str, list[Tensor]]:
    """The views into `model` that each named tensor of a folder fills. Raises `BadInput` as `from_hf` does."""
    stacked = any(name.endswith("experts.gate_up_proj") for name in shapes)
    missing = dict(tensor_map(model.state_dict(), model.cfg, family, stacked))
    if model.cfg.tie_embeddings and "lm_head.weight" in shapes:  # the embedding again: kept aside, to be compared
        missing["lm_head.weight"] = [torch.empty_like(model.embed.weight)]
    prefix = "transformer." if family == "gpt2" else "model."
    targets = {}
    for name, shape in shapes.items():
        if _predicts_further(name, model.cfg, family):
            continue
        # A folder of the bare model, without the language-model head's class around it, has no prefix.
        full = name if name.startswith((prefix, "lm_head.")) else prefix + name
        views = missing.pop(full, None)
        if views is None:
            raise BadInput(f"tensor {name} is not part of a {family} with these settings.")
        expected = tuple(joined([view.to("meta") for view in views]).shape)
        if shape != expected:
            raise BadInput(f"tensor {name} has shape {shape}, and the settings say {expected}.")
        targets[name] = views
    if missing:
        raise BadInput(f"tensor {next(iter(missing))} is missing; a {family} with these settings has it.")
    return targets


def _predicts_further(name: str, cfg: ModelConfig, family: str) -> bool:
    """Whether a tensor is of the layers that some folders have behind the last one, to guess the token after the next:
    no part of the function from tokens to logits."""
    layer = re.match(r"(model\.)?layers\.(\d+)\.", name)
    if family == "ernie4_5_moe":
        return "mtp" in name
    return family in ("glm4_moe", "deepseek_v3") and layer is not None and int(layer[2]) >= cfg.n_layers


def copy_into(tensor: Tensor, views: list[Tensor]) -> None:
    """Fill the views, joined along their last dimension, from a folder's tensor."""
    for view, piece in zip(views, tensor.split([view.shape[-1] for view in views], dim=-1), strict=True):
        view.copy_(piece.reshape(view.shape))


def check_tied(targets: Mapping[str, list[Tensor]], model: Transformer) -> None:
    """Raise `BadInput` where a folder's head is not the embedding, although the settings say so."""
    if model.cfg.tie_embeddings and "lm_head.weight" in targets:
        check_equal(targets["lm_head.weight"][0], model.embed.weight)


def check_equal(head_VD: Tensor, embed_VD: Tensor) -> None:
    """Raise `BadInput` where a head is not the embedding that it is tied to."""
    if not torch.equal(head_VD, embed_VD):
        raise BadInput("tensor lm_head.weight differs from the embedding, although tie_word_embeddings is true.")


@torch.no_grad()
def load(folder: Path, dtype: torch.dtype | None = torch.float32) -> Transformer:
    """The model in a folder that transformers (or `save`) wrote, on the CPU; its settings are `read_folder`'s.

    Tensors are read one at a time into the model's own memory, so the peak is the model and one tensor. dtype None
    keeps the folder's (the widest, where it mixes several). Everything is checked against the files' headers before
    memory is asked for. Raises `BadInput` naming the setting, file or tensor; pickled weights are never opened."""
    family, cfg, router = read_folder(folder)
    told = places(weight_files(folder))
    shapes = {name: place.shape for name, place in told.items()}
    try:
        with torch.device("meta"):
            model = Transformer(cfg, router)
        views_of(shapes, model, family)
        model.to(widest(told) if dtype is None else dtype).to_empty(device="cpu")
        if cfg.tie_embeddings:  # to_empty unties
            model.head.weight = model.embed.weight
        if cfg.position == "rope":
            model.cos_Sd, model.sin_Sd = rotary(cfg)
        targets = views_of(shapes, model, family)
        for name, views in targets.items():
            copy_into(read(name, told[name]), views)
        check_tied(targets, model)
    except BadInput as error:
        raise BadInput(f"{folder}: {error}") from error
    return model


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files. Raises `BadInput` for a folder without, and for an index that is none."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        tail = f" (it has {pickles[0]}, a pickle, which is never opened)" if pickles else ""
        raise BadInput(f"{folder} has no model.safetensors and no model.safetensors.index.json{tail}.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index} is not an index of safetensors: it must be JSON with a weight_map.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index}: {name!r} is not the name of a .safetensors file in the same folder.")
        if not (folder / name).is_file():
            raise BadInput(f"{index} names {name}, and that file is not there.")
    return [folder / name for name in names]


def places(files: list[Path]) -> dict[str, Stored]:
    """Where every tensor of the files is, without reading one. Raises `BadInput` for a file that is not whole, a dtype
    that is not in `DTYPES`, a tensor that stands in two files, and files without any."""
    told: dict[str, Place] = {}
    for path in files:
        for name, place in streamed.places(path).items():
            if _CONSTANT.fullmatch("." + name):
                continue
            if name in told:
                raise BadInput(f"{path}: tensor {name} is in an earlier file too.")
            told[name] = place
    stored = packed(told)
    for name, of_it in stored.items():
        if of_it.dtype not in DTYPES:
            raise BadInput(f"{of_it.path}: tensor {name} is {of_it.dtype}; accepted are {', '.join(DTYPES)}.")
    return stored


def widest(places: Mapping[str, Stored]) -> torch.dtype:
    """The narrowest dtype that holds all these tensors, at least one."""
    return functools.reduce(torch.promote_types, [DTYPES[place.dtype] for place in places.values()])


def save(
    model: Transformer,
    router: RouterConfig,
    tokenizer: Tokenizer | None,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`save_tensors` of a model in memory."""
    save_tensors(streamed.in_memory(model.state_dict()), model.cfg, router, tokenizer, folder, shard_bytes)


@torch.no_grad()
def save_tensors(
    tensors: Tensors,
    cfg: ModelConfig,
    router: RouterConfig,
    tokenizer: Tokenizer | None,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads and that `load` reads back bit by
    bit, in the tensors' own dtype, in files of at most `shard_bytes` or of one tensor; and `tokenizer`, which
    AutoTokenizer loads. In memory are a tensor or two.

    tokenizer None: a folder without one, for which AutoTokenizer makes an empty one without a word. The folder appears
    whole or not at all. Raises `BadInput` for a model of no family, a tokenizer that transformers cannot have or that
    has more tokens than the model, a folder that exists and is not empty, or one that cannot be written."""
    # What cannot be written is refused before anything is.
    tree = config_to_hf(cfg, router) | {"torch_dtype": str(tensors.dtype).removeprefix("torch.")}
    ends: dict[str, int] = {}
    if tokenizer:
        hf_tokenizer.check(tokenizer)
        if tokenizer.vocab_size > cfg.vocab_size:
            raise BadInput(f"the tokenizer's {tokenizer.vocab_size} tokens are more than the model's {cfg.vocab_size}.")
        ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    refuse_existing(folder)
    # Everything under a temporary name, which is renamed when all is there.
    beside = temporary(folder)
    remove_leftovers(folder.parent)
    try:
        beside.mkdir(parents=True)
        _write_shards(beside, tensors, cfg, tree["model_type"], shard_bytes)
        _write_json(beside / "config.json", tree | ends)
        if tokenizer:
            _write_json(beside / "generation_config.json", ends)
            hf_tokenizer.save_tokenizer(tokenizer, beside, cfg.context)
        os.rename(beside, folder)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror or error}).") from error
    finally:  # after the rename there is nothing left to remove
        shutil.rmtree(beside, ignore_errors=True)


def refuse_existing(folder: Path) -> None:
    """Refuse to write where something is. Raises `BadInput`."""
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} exists already: give a new folder, or an empty one.")


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(to_text(dict(tree), indent=2) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: Tensors, cfg: ModelConfig, family: str, shard_bytes: int) -> None:
    """model.safetensors, or numbered shards and their index."""
    # Which tensor goes into which file; the files' order is the map's.
    meta = {name: joined(views) for name, views in tensor_map(tensors.meta, cfg, family)}
    total = sum(tensor.nbytes for tensor in meta.values())
    streamed.check_room(folder, total)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in meta.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    # File by file, and the index.
    mapped = tensor_map(tensors, cfg, family)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        whole = (joined(views) for _, views in islice(mapped, len(names)))
        streamed.write(folder / file, {name: meta[name] for name in names}, whole)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
