"""What gpt-oss has beside the other families: settings of config.json, and tensors of a block.

Its published files hold experts in MXFP4 (hf_stored.py); `load_run(..., experts="mxfp4")` has the same numbers in as
few bits.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from moe.config.model import ModelConfig
from moe.errors import BadInput

# What a missing group of RoPE settings means.
_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
_ASIDE = ("experts_per_token", "initial_context_length")  # other names of keys that are there


def pop_gpt_oss(tree: dict[str, Any]) -> None:
    """Pop from a config.json what is fixed here, and put in what a missing key means. Raises `BadInput` naming a key
    whose value this model does not have."""
    for key, needed in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if (value := tree.pop(key, needed)) != needed:
            raise BadInput(f"{key}={value!r} is not supported in a gpt_oss: accepted is {needed}.")
    for key in _ASIDE:
        tree.pop(key, None)
    if not tree.get("rope_parameters") and not tree.get("rope_scaling"):
        tree["rope_parameters"] = dict(_YARN)


def gpt_oss_to_hf(cfg: ModelConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that would mean something else if they were missing from a config.json that has those in `tree`."""
    plain = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    added: dict[str, Any] = {} if "rope_parameters" in tree else {"rope_parameters": plain}
    if not cfg.window:  # its class always makes windows: one as long as the context is none
        added |= {"sliding_window": cfg.context, "layer_types": ["full_attention"] * cfg.n_layers}
    return added


def gpt_oss_map(state: Mapping[str, Tensor], ours: str, theirs: str) -> Iterator[tuple[str, list[Tensor]]]:
    """The tensors of a block beside norms and attention's maps, as `tensor_map` gives them: experts as matrices (in,
    out), their gate and up channels in turns, as here."""
    yield f"{theirs}self_attn.sinks", [state[f"{ours}attn.sinks"]]
    yield f"{theirs}mlp.router.weight", [state[f"{ours}mlp.router.w_ED"]]
    yield f"{theirs}mlp.router.bias", [state[f"{ours}mlp.router.logit_bias"]]
    for name, matrix, bias in (("gate_up", "w_up_EFD", "up_bias_EF"), ("down", "w_down_EDF", "down_bias_ED")):
        yield f"{theirs}mlp.experts.{name}_proj", [state[f"{ours}mlp.experts.{matrix}"].transpose(1, 2)]
        yield f"{theirs}mlp.experts.{name}_proj_bias", [state[f"{ours}mlp.experts.{bias}"]]
