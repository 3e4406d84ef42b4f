"""What config.json of DeepSeek-V2 and -V3 says of latent attention and groups of experts that is more than a name for a
setting, to settings and back.

Not the same in all releases of transformers: earlier ones mask the experts of V3's losing groups with 0, so that one of
them can be chosen where all others' biased scores are negative; here, and in transformers 5.24, it cannot. V3 divides
weights by their sum plus 1e-20, this model by the sum.
"""

from typing import Any

from moe.config.model import ModelConfig
from moe.config.router import RouterConfig
from moe.errors import BadInput

# Keys that have one value wherever this model computes the same; and those that are derived, or of training alone, or
# name code that stands beside the published weights, which transformers' own class does not need either.
_ALWAYS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True},
}
_ASIDE = ("qk_head_dim", "head_dim", "ep_size", "aux_loss_alpha", "seq_aux", "num_nextn_predict_layers", "auto_map")


def pop_latent(tree: dict[str, Any], model_type: str, latent: dict[str, Any], router: dict[str, Any]) -> dict[str, Any]:
    """Pop from a config.json what it says beyond names: the settings of latent attention, from those that have names
    (`latent`); those of the router are changed in place. Call it before the RoPE settings are popped.

    Raises `BadInput` naming a key whose value this model does not have."""
    for key, needed in _ALWAYS[model_type].items():
        if (value := tree.pop(key, needed)) != needed:
            raise BadInput(f"{key}={value!r} is not supported in a {model_type}: accepted is {needed!r}.")
    for key in _ASIDE:
        tree.pop(key, None)
    # Without groups there is one of all experts.
    method = tree.pop("topk_method", "greedy") if model_type == "deepseek_v2" else None
    if method not in (None, "greedy", "group_limited_greedy"):
        raise BadInput(f"topk_method={method!r} is not supported: accepted is greedy or group_limited_greedy.")
    for name in ("groups", "k_groups"):
        if router[name] is None or method == "greedy":
            router[name] = 1
    # Queries from the state itself; scores that YaRN stretches.
    if latent["q_rank"] == 0:
        raise BadInput("q_lora_rank=0 is out of range: accepted is at least 1, or null.")  # 0 means null here
    scaling = tree.get("rope_parameters") or tree.get("rope_scaling")
    mscale = (scaling.get("mscale_all_dim") if isinstance(scaling, dict) else None) or 0.0
    return latent | {"q_rank": latent["q_rank"] or 0, "mscale": mscale}


def latent_to_hf(cfg: ModelConfig, router: RouterConfig, model_type: str) -> dict[str, Any]:
    """The keys of config.json that are no name of a setting; `mscale` is among the RoPE settings."""
    assert cfg.latent is not None, "of latent attention"
    tree: dict[str, Any] = {"q_lora_rank": cfg.latent.q_rank or None}
    if model_type == "deepseek_v2":
        tree["topk_method"] = "group_limited_greedy" if router.groups > 1 else "greedy"
    return tree
