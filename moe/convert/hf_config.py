"""config.json of transformers' model families, to settings and back; hf_families.py has the families.

A setting that this model has no place for is refused by name, never ignored. Left aside is what is no part of the
function from tokens to logits: dropout rates, loss coefficients, special token ids, generation defaults. transformers
itself is not needed.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.config.model import ROPE_READS, LatentConfig, ModelConfig, MoEConfig, head_dim, moe_layers, window_of
from moe.config.parse import lookup, parse
from moe.config.router import RouterConfig
from moe.config.run import Config, validate
from moe.convert.hf_families import FAMILIES, PLAIN, USUAL, Family
from moe.convert.hf_gpt_oss import gpt_oss_to_hf, pop_gpt_oss
from moe.convert.hf_latent import latent_to_hf, pop_latent
from moe.convert.hf_stored import pop_method
from moe.errors import BadInput

_ROPE_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}  # theirs -> ours
LISTED = "decoder_sparse_step"  # families with this key also have a list of dense layers
LAST = "moe_layer_end_index"  # the last layer that may have experts
QK_NORM = "use_qk_norm"  # whether there is a norm per head
SHARED_WIDTH = "shared_expert_intermediate_size"  # the width of all shared experts together
ATTN_SCALE = "attention_multiplier"
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers
_NULLABLE = ("n_inner", "head_dim", "num_key_value_heads")  # null means: derive it

# Keys of config.json that say nothing of the function from tokens to logits. Any other unknown key must be off.
_BOOKKEEPING = re.compile(
    r"_.*|architectures|model_type|transformers_version|(torch_)?dtype|use_cache|return_dict|output_.*|problem_type"
    r"|id2label|label2id|num_labels|tokenizer_class|(bos|eos|pad|sep|unk)_token_id|task_specific_params|n_ctx|summary_.*"
    r"|attention_dropout|(resid|embd|attn)_pdrop|router_aux_loss_coef|pretraining_tp|num_nextn_predict_layers|num_mtp_layers"
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
                for path, needed in _required(name, cfg, router).items()
                if (value := lookup(settings, path)) != needed
            ]
    # Latent attention is a family's mark, and of two that are equally near the QK norm.
    far = lambda name: bool(FAMILIES[name].latent) != (cfg.latent is not None)
    nearest = min(
        differences,
        key=lambda name: (far(name), len(differences[name]), FAMILIES[name].model.get("qk_norm") != cfg.qk_norm),
    )
    if differences[nearest]:
        raise BadInput(differences[nearest][0])
    return nearest


def _required(name: str, cfg: ModelConfig, router: RouterConfig) -> dict[str, Any]:
    """What a model of cfg's sizes must have, by dotted path, to be of family `name`."""
    family = FAMILIES[name]
    required: dict[str, Any] = {"model.latent": (cfg.latent or LatentConfig()) if family.latent else None}
    if family.moe:
        # What it leaves open; leading dense layers may also be a list of them.
        left_open = {f"model.moe.{field}" for field in family.moe} | {f"router.{field}" for field in family.router}
        left_open |= {"model.moe.first_dense"} if LISTED in family.moe.values() else set()
        required |= {path: value for path, value in (USUAL | family.fixed).items() if path not in left_open}
        if router.groups == 1:  # nobody asks how a group's score is made
            required.pop("router.group_top", None)
        if {"n_shared_experts", SHARED_WIDTH} & {*family.moe.values()} and cfg.moe is not None:
            required["model.moe.n_shared"] = max(1, cfg.moe.n_shared)  # its classes have at least one
    if family.windows == "none":
        required["model.window"] = 0
    if family.windows in ("none", "all"):
        required["model.window_layers"] = []
    required |= {f"model.{field}": value for field, value in PLAIN.items() if field not in family.keys}
    if cfg.attn_bias != family.bias[1]:
        required["model.attn_bias"] = "none"
    if QK_NORM in family.keys.values() and cfg.qk_norm == "full":
        required["model.qk_norm"] = "head"
    required |= {f"model.{field}": value for field, value in family.model.items()}
    if name == "gpt2":
        required["model.n_kv_heads"] = cfg.n_heads
    if "head_dim" not in family.keys and not family.latent:
        required["model.head_dim"] = cfg.d_model // cfg.n_heads
    if name in ("llama", "deepseek_v2"):  # its config class insists, although the size of a head is free
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
        tree |= _rope_to_hf(cfg) | _windows_to_hf(cfg, family)
    if QK_NORM in tree:
        tree[QK_NORM] = cfg.qk_norm == "head"
    if name == "gpt_oss":
        tree |= gpt_oss_to_hf(cfg, tree)
    if tree.get(ATTN_SCALE) == 0:
        tree[ATTN_SCALE] = full.head_dim**-0.5
    if family.bias[0]:
        tree[family.bias[0]] = cfg.attn_bias != "none"
    if cfg.latent is not None:
        tree |= {key: getattr(cfg.latent, field) for field, key in family.latent.items()}
        tree |= latent_to_hf(cfg, router, name)
    if cfg.moe is not None:
        tree |= {key: getattr(cfg.moe, field) for field, key in family.moe.items()}
        tree |= {key: getattr(router, field) for field, key in family.router.items()}
        if SHARED_WIDTH in tree:
            tree[SHARED_WIDTH] *= cfg.moe.d_expert
        if LAST in tree:
            tree[LAST] = cfg.n_layers - 1 - cfg.moe.last_dense
        if LISTED in tree:
            tree["mlp_only_layers"] = list(range(min(cfg.moe.first_dense, cfg.n_layers)))
    return tree


def read_config(folder: Path) -> tuple[ModelConfig, RouterConfig]:
    """The settings of `read_folder`, which raises the same."""
    return read_folder(folder)[1:]


def read_folder(folder: Path) -> tuple[str, ModelConfig, RouterConfig]:
    """The family of folder/config.json and its settings, whatever release of transformers wrote it, named after the
    folder. The family is what names the folder's tensors, also where the settings are those of a plainer one.

    Raises `BadInput` for a model_type outside the families and for every setting that this model does not have."""
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({error}): give a folder that save_pretrained wrote.") from error
    try:
        cfg, router = config_from_hf(tree, folder.resolve().name)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    return tree["model_type"], cfg, router


def config_from_hf(tree: Any, name: str) -> tuple[ModelConfig, RouterConfig]:
    """The settings of a parsed config.json, the model called `name`. Raises `BadInput` as `read_config` does."""
    model_type = tree.get("model_type") if isinstance(tree, dict) else None
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise BadInput(f"model_type={model_type!r} is not one of {', '.join(FAMILIES)}.")
    # Every key that this model reads, under the spelling of the family; what is read is taken out of the tree.
    family, tree = FAMILIES[model_type], dict(tree)
    pop_method(tree, model_type)
    if model_type == "gpt_oss":
        pop_gpt_oss(tree)
    known = {*family.keys.values(), *family.moe.values(), *family.router.values(), *family.latent.values()}
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
    router = {path.removeprefix("router."): value for path, value in family.fixed.items() if path.startswith("router.")}
    router |= {field: values[key] for field, key in family.router.items()}
    if family.latent:
        latent = {field: values[key] for field, key in family.latent.items()}
        model["latent"] = pop_latent(tree, model_type, latent, router)
    if family.model["position"] == "rope":
        model |= _pop_rope(tree, take("rope_theta"), model)
    if QK_NORM in values:
        model["qk_norm"] = _switched(QK_NORM, values[QK_NORM], "head")
    model |= _pop_windows(tree, model, family)
    if family.bias[0]:
        key, where = family.bias
        model["attn_bias"] = _switched(key, tree.pop(key, family.defaults.get(key, False)), where)
    dense = tree.pop("mlp_only_layers", None) if LISTED in values else None
    # Whatever is left must be off, and what was read must be valid settings.
    _check_off(tree, model_type)
    if family.moe:
        moe = {path.removeprefix("model.moe."): value for path, value in family.fixed.items() if "moe" in path}
        moe |= {field: values[key] for field, key in family.moe.items()}
        if LAST in values:
            moe["last_dense"] = _last_dense(values[LAST], model["n_layers"])
        if SHARED_WIDTH in values:
            moe["n_shared"] = _n_shared(values[SHARED_WIDTH], moe["d_expert"])
        model["moe"] = parse(MoEConfig, moe, "model.moe.")
    parsed = parse(ModelConfig, model | family.model | {"name": name}, "model.")
    routing = parse(RouterConfig, router, "router.")
    if parsed.attn_scale == head_dim(parsed) ** -0.5:
        parsed.attn_scale = 0.0  # as it is without
    validate(Config(model=parsed, router=routing))
    if parsed.moe is not None and dense:
        _set_first_dense(parsed, parsed.moe, dense)
    return parsed, routing


def _pop_rope(tree: dict[str, Any], theta: Any, model: Mapping[str, Any]) -> dict[str, Any]:
    """Pop the RoPE settings: the base, how it is scaled, and of how many channels. They moved into a group of their own
    in transformers 5, whose older name is still written; a folder may have both, if they say the same.

    model: what was read already, with a rope_fraction where the family has one."""
    told = {
        group: _rope_group(group, rope, theta, model)
        for group in ("rope_scaling", "rope_parameters")
        if (rope := tree.pop(group, None)) is not None and rope != {}
    }
    if len(told) == 2 and told["rope_scaling"] != told["rope_parameters"]:
        raise BadInput("rope_scaling and rope_parameters say different things: leave one of them out.")
    partial = tree.pop("partial_rotary_factor", None)
    if partial not in (None, 1.0):
        raise BadInput(f"partial_rotary_factor={partial!r} is not supported: accepted is 1.0, RoPE on every channel.")
    return next(iter(told.values()), {"rope_theta": theta})


def _rope_group(group: str, rope: Any, theta: Any, model: Mapping[str, Any]) -> dict[str, Any]:
    """What rope_scaling or rope_parameters says, in this project's words."""
    if not isinstance(rope, dict):
        raise BadInput(f"{group}={rope!r} must be a group of settings.")
    rope, context = {key: value for key, value in rope.items() if value is not None}, model["context"]
    kind = rope.pop("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    if kind not in _ROPE_KINDS:
        raise BadInput(f"{group}.rope_type={kind!r} is not supported: accepted is {', '.join(_ROPE_KINDS)}.")
    theta, fraction = rope.pop("rope_theta", theta), rope.pop("partial_rotary_factor", model.get("rope_fraction", 1.0))
    if "rope_fraction" not in model and fraction != 1.0:
        raise BadInput(f"{group}.partial_rotary_factor={fraction!r} is not supported: accepted is 1.0, every channel.")
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
    partial = {"rope_fraction": fraction} if "rope_fraction" in model else {}
    return {"rope_theta": theta, "rope_scaling": scaling} | partial


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
    if cfg.rope_fraction != 1:
        told["partial_rotary_factor"] = cfg.rope_fraction
    if cfg.latent is not None and cfg.latent.mscale:
        told["mscale_all_dim"] = cfg.latent.mscale
    both = {"rope_scaling": told, "rope_parameters": told | {"rope_theta": cfg.rope_theta}}
    return {"rope_theta": cfg.rope_theta, **both}


def _pop_windows(tree: dict[str, Any], model: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Pop the sliding-window settings: the window, and the layers that have it. One that is switched off, or as long as
    the context, is none."""
    names = ("sliding_window", "use_sliding_window", "max_window_layers")
    usual = family.defaults.get
    window, used, bound = (
        tree.pop(key, usual(key, default)) for key, default in zip(names, (None, True, 0), strict=True)
    )
    kinds, n_layers, context = tree.pop("layer_types", None), model["n_layers"], model["context"]
    if not isinstance(n_layers, int):
        return {}  # refused when it is parsed
    # Which layers: by a list of kinds, or by the family's rule.
    on = bool(used and window)
    if kinds is not None and not (isinstance(kinds, list) and len(kinds) == n_layers and set(kinds) <= {FULL, SLIDING}):
        raise BadInput(f"layer_types={kinds!r} is not supported: accepted is {FULL} or {SLIDING} for every layer.")
    if kinds is not None:
        layers = [layer for layer, kind in enumerate(kinds) if kind == SLIDING]
    else:
        layers = _windowed(family.windows, n_layers, bound) if on else []
    if layers and not on:
        raise BadInput(f"layer_types={kinds!r} has {SLIDING}, and sliding_window={window!r} is switched off.")
    if not on or (isinstance(window, int) and isinstance(context, int) and window >= context):
        return {}
    # What the family cannot have.
    if layers and family.windows == "none":
        raise BadInput(
            f"sliding_window={window!r} is not supported: accepted is null, or at least the context of {context}."
        )
    if family.windows == "all" and bound:
        raise BadInput(
            f"max_window_layers={bound!r} means another thing in every release of transformers: accepted is 0."
        )
    if family.windows == "all" and len(layers) < n_layers:
        raise BadInput(f"layer_types={kinds!r} is not supported: accepted is {SLIDING} in every layer.")
    return {"window": window, "window_layers": [] if len(layers) == n_layers else layers} if layers else {}


def _switched(key: str, given: Any, word: str) -> str:
    """What is switched on by a key, or none."""
    if not isinstance(given, bool):
        raise BadInput(f"{key}={given!r} must be true or false.")
    return word if given else "none"


def _n_shared(width: Any, d_expert: Any) -> int:
    """How many shared experts of the routed ones' width are one of this width."""
    if not isinstance(width, int) or not isinstance(d_expert, int) or width < 1 or d_expert < 1 or width % d_expert:
        raise BadInput(
            f"{SHARED_WIDTH}={width!r} is not supported: accepted is a multiple of moe_intermediate_size={d_expert!r}."
        )
    return width // d_expert


def _last_dense(last: Any, n_layers: Any) -> int:
    """How many layers are behind the last one with experts."""
    if type(last) is not int or last < -1:
        raise BadInput(f"{LAST}={last!r} must be the number of a layer, or -1 for the last one.")
    return max(0, n_layers - 1 - last) if last >= 0 and isinstance(n_layers, int) else 0


def _windowed(windows: str, n_layers: int, bound: Any) -> list[int]:
    """The layers that have a window where no list says so. Raises `BadInput` for a bound that is no number."""
    if type(bound) is not int:
        raise BadInput(f"max_window_layers={bound!r} must be a whole number.")
    match windows:
        case "from":
            return list(range(bound, n_layers))
        case "every other":
            return list(range(0, min(bound, n_layers), 2))
        case _:
            return list(range(n_layers))


def _windows_to_hf(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    """The sliding-window settings, for releases that read lists of layers and for older ones."""
    if family.windows == "none":
        return {}
    switch = "use_sliding_window" in family.defaults
    if not cfg.window:
        return {} if switch else {"sliding_window": None}
    told = {"sliding_window": cfg.window} | ({"use_sliding_window": True} if switch else {})
    if family.windows == "all":
        return told
    kinds = [SLIDING if window_of(cfg, layer) else FULL for layer in range(cfg.n_layers)]
    return (
        told
        | {"layer_types": kinds}
        | ({"max_window_layers": kinds.index(SLIDING)} if family.windows == "from" else {})
    )


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
