"""The model families of transformers that this model contains, and their config.json.

Six are spoken: GPT-2, Llama, Qwen3, Mixtral, OLMoE and Qwen3-MoE. A setting that this model has no place for is refused
by name, never ignored. Left aside is what is no part of the function from tokens to logits: dropout rates, loss
coefficients, special token ids, generation defaults. transformers itself is not needed.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe.config.model import ROPE_READS, ModelConfig, MoEConfig, head_dim, moe_layers
from moe.config.parse import lookup, parse
from moe.config.router import RouterConfig
from moe.config.run import Config, validate
from moe.errors import BadInput


class Family(NamedTuple):
    """One architecture of transformers in this project's words."""

    architecture: str
    model: dict[str, Any]  # settings of ModelConfig that it fixes
    keys: dict[str, str]  # settings of ModelConfig that it leaves open -> their keys in config.json
    moe: dict[str, str]  # the same for MoEConfig; none for a dense family
    defaults: dict[str, Any]  # what a missing key means; one without a default must be there
    written: dict[str, Any]  # keys that are the same in every folder written


_ROPE = {"activation": "swiglu", "norm": "rms", "position": "rope", "bias": False}
_SILU = {"hidden_act": "silu"}
_SIZES = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings", "init_std": "initializer_range"}
_KEYS = _SIZES | {
    "context": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
_GPT2_KEYS = _SIZES | {
    "context": "n_positions",
    "n_layers": "n_layer",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "d_ff": "n_inner",
    "norm_eps": "layer_norm_epsilon",
}
_OLMOE_KEYS = {field: key for field, key in _KEYS.items() if field != "head_dim"}
_MIXTRAL_MOE = {"n_experts": "num_local_experts", "k": "num_experts_per_tok", "d_expert": "intermediate_size"}
_OLMOE_MOE = _MIXTRAL_MOE | {"n_experts": "num_experts"}
_QWEN3_MOE = _OLMOE_MOE | {"d_expert": "moe_intermediate_size", "every": "decoder_sparse_step"}
_LLAMA = {"head_dim": None, "tie_word_embeddings": False, "initializer_range": 0.02, "rope_theta": 10000.0}
_LLAMA |= {"rms_norm_eps": 1e-6, "num_key_value_heads": None}
_QWEN3 = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"} | {"use_sliding_window": False}

FAMILIES = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        model={"activation": "gelu_tanh", "norm": "layer", "position": "learned", "bias": True, "qk_norm": "none"},
        keys=_GPT2_KEYS,
        moe={},
        defaults={
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
        },
        written={"activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": Family("LlamaForCausalLM", _ROPE | {"qk_norm": "none"}, _KEYS, {}, _LLAMA, _SILU),
    "qwen3": Family("Qwen3ForCausalLM", _ROPE | {"qk_norm": "head"}, _KEYS, {}, _QWEN3 | {"head_dim": 128}, _SILU),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        model=_ROPE | {"qk_norm": "none"},
        keys=_KEYS,
        moe=_MIXTRAL_MOE,
        defaults=_QWEN3 | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "use_sliding_window": True},
        written=_SILU,
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        model=_ROPE | {"qk_norm": "full"},
        keys=_OLMOE_KEYS,
        moe=_OLMOE_MOE,
        defaults=_LLAMA | {"rms_norm_eps": 1e-5, "norm_topk_prob": False},
        written=_SILU,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        model=_ROPE | {"qk_norm": "head"},
        keys=_KEYS,
        moe=_QWEN3_MOE,
        defaults=_QWEN3 | {"decoder_sparse_step": 1, "norm_topk_prob": False},
        written=_SILU,
    ),
}
_ROPE_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}  # theirs -> ours
_NULLABLE = ("n_inner", "head_dim", "num_key_value_heads")  # null means: derive it

# Keys of config.json that say nothing of the function from tokens to logits. Any other unknown key must be off.
_BOOKKEEPING = re.compile(
    r"_.*|architectures|model_type|transformers_version|(torch_)?dtype|use_cache|return_dict|output_.*|problem_type"
    r"|id2label|label2id|num_labels|tokenizer_class|(bos|eos|pad|sep|unk)_token_id|task_specific_params|n_ctx|summary_.*"
    r"|attention_dropout|(resid|embd|attn)_pdrop|router_aux_loss_coef|pretraining_tp|max_window_layers"
)


def family_of(cfg: ModelConfig, router: RouterConfig) -> str:
    """The family whose architecture is this model's exactly; a dense model's router is not looked at.

    Raises `BadInput` naming the first setting in which the nearest family differs."""
    settings = Config(model=dataclasses.replace(cfg, n_kv_heads=_kv_heads(cfg), head_dim=head_dim(cfg)), router=router)
    differences: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        if bool(family.moe) == (cfg.moe is not None):
            differences[name] = [
                f"{path}={value} has no counterpart in transformers: the nearest family, {name}, has {path}={needed}."
                for path, needed in _required(name, cfg).items()
                if (value := lookup(settings, path)) != needed
            ]
    # The QK norm is a family's mark: of two that are equally near, the one that shares it.
    nearest = min(
        differences, key=lambda name: (len(differences[name]), FAMILIES[name].model["qk_norm"] != cfg.qk_norm)
    )
    if differences[nearest]:
        raise BadInput(differences[nearest][0])
    return nearest


def _required(name: str, cfg: ModelConfig) -> dict[str, Any]:
    """What a model of cfg's sizes must have, by dotted path, to be of family `name`."""
    family = FAMILIES[name]
    required: dict[str, Any] = {}
    if family.moe:
        required = {"model.moe.n_shared": 0, "router.name": "softmax", "router.selection_bias": False}
        required |= {"router.scale": 1.0, "router.groups": 1, "router.logits": "linear", "router.gradient": "exact"}
        required |= {"router.input": "own", "router.shared": False, "model.moe.shared_gate": False}
        required |= {f"model.moe.{key}": [] for key in ("widths", "n_experts_by_layer", "k_by_layer")}
        required |= {f"model.moe.{key}": 0 for key in ("n_null", "n_copy", "n_constant")} | {"model.moe.depth": 1.0}
        if name == "mixtral":
            required["router.renormalize"] = True
        if "every" not in family.moe:
            required |= {"model.moe.every": 1, "model.moe.first_dense": 0}
    required |= {f"model.{field}": value for field, value in family.model.items()}
    if name == "gpt2":
        required["model.n_kv_heads"] = cfg.n_heads
    if "head_dim" not in family.keys:
        required["model.head_dim"] = cfg.d_model // cfg.n_heads
    if name == "llama":  # its config class insists, although its head_dim is free
        required["model.d_model"] = cfg.d_model // cfg.n_heads * cfg.n_heads
    return required


def _kv_heads(cfg: ModelConfig) -> int:
    return cfg.n_kv_heads or cfg.n_heads


def config_to_hf(cfg: ModelConfig, router: RouterConfig) -> dict[str, Any]:
    """The config.json of this model, of the family that `family_of` finds; raises what that raises."""
    name = family_of(cfg, router)
    family = FAMILIES[name]
    full = dataclasses.replace(cfg, n_kv_heads=_kv_heads(cfg), head_dim=head_dim(cfg))
    # Special tokens are the tokenizer's business: the config classes' default ids would end a text at token 2.
    tree: dict[str, Any] = {"architectures": [family.architecture], "model_type": name}
    tree |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **family.written}
    tree |= {key: getattr(full, field) for field, key in family.keys.items()}
    if cfg.position == "rope":
        tree |= _rope_to_hf(cfg)
    if cfg.moe is not None:
        tree |= {key: getattr(cfg.moe, field) for field, key in family.moe.items()}
        if "norm_topk_prob" in family.defaults:
            tree["norm_topk_prob"] = router.renormalize
        if "every" in family.moe:
            tree["mlp_only_layers"] = list(range(min(cfg.moe.first_dense, cfg.n_layers)))
    return tree


def read_config(folder: Path) -> tuple[ModelConfig, RouterConfig]:
    """The settings in folder/config.json, whatever release of transformers wrote it, named after the folder.

    Raises `BadInput` for a model_type outside the six families and for every setting that this model does not have."""
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({error}): give a folder that save_pretrained wrote.") from error
    try:
        return config_from_hf(tree, folder.resolve().name)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def config_from_hf(tree: Any, name: str) -> tuple[ModelConfig, RouterConfig]:
    """The settings of a parsed config.json, the model called `name`. Raises `BadInput` as `read_config` does."""
    model_type = tree.get("model_type") if isinstance(tree, dict) else None
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise BadInput(f"model_type={model_type!r} is not one of {', '.join(FAMILIES)}.")
    # Every key that this model reads, under the spelling of the family; what is read is taken out of the tree.
    family, tree = FAMILIES[model_type], dict(tree)
    known = {*family.keys.values(), *family.moe.values()}
    for alias, key in (("num_local_experts", "num_experts"), ("num_experts", "num_local_experts")):
        if key in known and key not in tree and alias in tree:  # both spellings are written
            tree[key] = tree.pop(alias)

    def take(key: str) -> Any:
        if key not in tree and key not in family.defaults:
            raise BadInput(f"{key} is missing; every {model_type} has it.")
        return tree.pop(key, family.defaults.get(key))

    values = {key: take(key) for key in sorted(known)}
    for key in ("vocab_size", *_NULLABLE):
        if values.get(key) == 0:
            raise BadInput(f"{key}=0 is out of range: accepted is at least 1.")  # 0 means "derive it" here
    # What is more than a name for a setting: derived sizes, RoPE, windows, dense layers.
    model = {field: values[key] for field, key in family.keys.items() if (key not in _NULLABLE or values[key])}
    if model_type == "gpt2" and values["n_inner"] is None and isinstance(values["n_embd"], int):
        model["d_ff"] = 4 * values["n_embd"]
    if family.model["position"] == "rope":
        model |= _pop_rope(tree, take("rope_theta"), values["max_position_embeddings"])
    _check_windows(tree, values, family.defaults.get("use_sliding_window", True))
    router = {"renormalize": take("norm_topk_prob") if "norm_topk_prob" in family.defaults else True}
    dense = tree.pop("mlp_only_layers", None) if "every" in family.moe else None
    # Whatever is left must be off, and what was read must be valid settings.
    _check_off(tree, model_type)
    if family.moe:
        model["moe"] = parse(MoEConfig, {field: values[key] for field, key in family.moe.items()}, "model.moe.")
    parsed = parse(ModelConfig, model | family.model | {"name": name}, "model.")
    routing = parse(RouterConfig, router, "router.")
    validate(Config(model=parsed, router=routing))
    if parsed.moe is not None and dense:
        _set_first_dense(parsed, parsed.moe, dense)
    return parsed, routing


def _pop_rope(tree: dict[str, Any], theta: Any, context: Any) -> dict[str, Any]:
    """Pop the RoPE settings: the base, and how it is scaled. They moved into a group of their own in transformers 5,
    whose older name is still written; a folder may have both, if they say the same."""
    told = {
        group: _rope_group(group, rope, theta, context)
        for group in ("rope_scaling", "rope_parameters")
        if (rope := tree.pop(group, None)) is not None and rope != {}
    }
    if len(told) == 2 and told["rope_scaling"] != told["rope_parameters"]:
        raise BadInput("rope_scaling and rope_parameters say different things: leave one of them out.")
    partial = tree.pop("partial_rotary_factor", None)
    if partial not in (None, 1.0):
        raise BadInput(f"partial_rotary_factor={partial!r} is not supported: accepted is 1.0, RoPE on every channel.")
    return next(iter(told.values()), {"rope_theta": theta})


def _rope_group(group: str, rope: Any, theta: Any, context: Any) -> dict[str, Any]:
    """What rope_scaling or rope_parameters says, in this project's words."""
    if not isinstance(rope, dict):
        raise BadInput(f"{group}={rope!r} must be a group of settings.")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.pop("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    if kind not in _ROPE_KINDS:
        raise BadInput(f"{group}.rope_type={kind!r} is not supported: accepted is {', '.join(_ROPE_KINDS)}.")
    theta = rope.pop("rope_theta", theta)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise BadInput(f"{group}.partial_rotary_factor is not supported: accepted is 1.0, RoPE on every channel.")
    # The settings have the same names here, but for two that are one number and one that may be left out.
    read = set(ROPE_READS[_ROPE_KINDS[kind]])
    scaling = {"type": _ROPE_KINDS[kind]}
    if "original_context" in read:
        scaling["original_context"] = rope.pop("original_max_position_embeddings", context)
    if kind == "yarn":
        scaling |= _yarn_defaults(rope, scaling["original_context"], context)
    for key in rope.keys() & read:
        scaling[key] = rope.pop(key)
    if rope:
        key, value = next(iter(rope.items()))
        raise BadInput(f"{group}.{key}={value!r} means nothing to rope_type={kind}.")
    if kind != "default" and "factor" not in scaling:
        raise BadInput(f"{group}.factor is missing; every rope_type={kind} has it.")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _yarn_defaults(rope: dict[str, Any], original: Any, context: Any) -> dict[str, Any]:
    """What yarn takes from other settings: the factor where it is left out, and the attention factor of DeepSeek's
    mscale and mscale_all_dim, which are popped."""
    numbers = {key: rope.pop(key, 0) for key in ("mscale", "mscale_all_dim")}
    factor = rope.get("factor", context / original if isinstance(original, int) and original > 0 else None)
    scale, scale_all = (value if isinstance(value, int | float) else 0 for value in numbers.values())
    defaults = {} if factor is None else {"factor": factor}
    if rope.get("attention_factor") == 0:
        raise BadInput("attention_factor=0 of rope_type=yarn is not supported: accepted is a number above 0, or none.")
    if scale and scale_all and "attention_factor" not in rope and isinstance(factor, int | float) and factor > 1:
        grown = [0.1 * number * math.log(factor) + 1.0 for number in (scale, scale_all)]
        defaults["attention_factor"] = grown[0] / grown[1]
    return defaults


def _rope_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The RoPE settings as both of transformers' releases read them."""
    scaling = cfg.rope_scaling
    if scaling.type == "none":
        return {"rope_theta": cfg.rope_theta}
    told = {"rope_type": scaling.type, **{key: getattr(scaling, key) for key in ROPE_READS[scaling.type][1:]}}
    if "original_context" in told:
        told["original_max_position_embeddings"] = told.pop("original_context")
    if not told.get("attention_factor", 1):
        del told["attention_factor"]
    both = {"rope_scaling": told, "rope_parameters": told | {"rope_theta": cfg.rope_theta}}
    return {"rope_theta": cfg.rope_theta, **both}


def _check_windows(tree: dict[str, Any], values: Mapping[str, Any], used: bool) -> None:
    """Pop the sliding-window settings; a window is refused unless it is switched off or as long as the context.

    used: what a missing use_sliding_window means."""
    window, used = tree.pop("sliding_window", None), tree.pop("use_sliding_window", used)
    context = values.get("max_position_embeddings")
    if used and window is not None and not (isinstance(context, int) and isinstance(window, int) and window >= context):
        raise BadInput(
            f"sliding_window={window!r} is not supported: accepted is null, or at least the context of {context}."
        )
    kinds = tree.pop("layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise BadInput(f"layer_types={kinds!r} is not supported: accepted is full_attention in every layer.")


def _check_off(tree: Mapping[str, Any], model_type: str) -> None:
    """Refuse what is left of config.json unless it is bookkeeping, switched off, or what this model does anyway."""
    always = {
        "hidden_act": ("silu",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one approximation
        "scale_attn_weights": (True,),
    }
    for key, value in tree.items():
        if key in always and value not in always[key]:
            raise BadInput(f"{key}={value!r} is not supported in a {model_type}: accepted is {always[key][0]}.")
        if key not in always and value and not _BOOKKEEPING.fullmatch(key):
            raise BadInput(f"{key}={value!r} is not supported in a {model_type}: accepted is null, false, 0 or no key.")


def _set_first_dense(cfg: ModelConfig, moe: MoEConfig, dense: Any) -> None:
    """Express a list of dense layers by the number of leading ones, where that is what it is."""
    if isinstance(dense, list) and all(type(layer) is int for layer in dense):
        routed = [i for i in range(cfg.n_layers) if i not in dense and (i + 1) % moe.every == 0]
        moe.first_dense = min(routed, default=0)
        if routed == moe_layers(cfg):
            return
    raise BadInput(
        f"mlp_only_layers={dense!r} is not supported: accepted are leading layers, like [0, 1], and not all."
    )
