"""The model families of transformers that this model contains: a table of what each fixes and what it leaves open.

A family is named by its model_type. hf_config.py reads and writes its config.json by this table, hf_weights.py its
tensors. A setting without a row is at its default in every family: what this model has beyond them has no counterpart.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One architecture of transformers in this project's words."""

    architecture: str
    model: dict[str, Any]  # settings of ModelConfig that it fixes
    keys: dict[str, str]  # settings of ModelConfig that it leaves open -> their keys in config.json
    moe: dict[str, str]  # the same for MoEConfig; none for a dense family
    defaults: dict[str, Any]  # what a missing key means; one without a default must be there
    written: dict[str, Any]  # keys that are the same in every folder written
    router: dict[str, str] = field(default_factory=dict)  # the same as keys, for RouterConfig
    latent: dict[str, str] = field(default_factory=dict)  # the same for LatentConfig; none without latent attention
    # settings of router and model.moe that are not as in `USUAL`, by their dotted keys
    fixed: dict[str, Any] = field(default_factory=dict)
    # which layers have a sliding window, where nothing else says so:
    # none | all | from (those from max_window_layers on) | every other (of those below max_window_layers)
    windows: str = "none"
    # the key that gives attention biases, and to which maps (`ModelConfig.attn_bias`); "": it has none, or fixes them
    bias: tuple[str, str] = ("", "none")


# What these settings of the model are unless a family fixes them otherwise or leaves them open.
PLAIN: dict[str, Any] = {"embed_scale": 1.0, "residual_scale": 1.0, "attn_scale": 0.0, "logit_divisor": 1.0}
PLAIN |= {"rope_fraction": 1.0, "norm_at": "before"}
PLAIN |= {"sinks": False, "expert_bias": False, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}

# What every setting of router and experts is unless a family fixes it otherwise or leaves it open.
USUAL: dict[str, Any] = {
    "router.name": "softmax",
    "router.selection_bias": False,
    "router.renormalize": True,
    "router.norm_min": 0.0,
    "router.scale": 1.0,
    "router.groups": 1,
    "router.logits": "linear",
    "router.bias": False,
    "router.gradient": "exact",
    "router.input": "own",
    "router.shared": False,
    "model.moe.n_shared": 0,
    "model.moe.shared_gate": False,
    "model.moe.weigh_input": False,
    "model.moe.precision": "same",
    "model.moe.widths": [],
    "model.moe.n_experts_by_layer": [],
    "model.moe.k_by_layer": [],
    "model.moe.n_null": 0,
    "model.moe.n_copy": 0,
    "model.moe.n_constant": 0,
    "model.moe.depth": 1.0,
    "model.moe.every": 1,
    "model.moe.first_dense": 0,
    "model.moe.last_dense": 0,
}

_BIAS = ("attention_bias", "all")
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
_CONSTANTS = {
    "embed_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attn_scale": "attention_multiplier",
    "logit_divisor": "logits_scaling",
}
_GPT2_KEYS = _SIZES | {
    "context": "n_positions",
    "n_layers": "n_layer",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "d_ff": "n_inner",
    "norm_eps": "layer_norm_epsilon",
}
_OLMOE_KEYS = {name: key for name, key in _KEYS.items() if name != "head_dim"}
_MIXTRAL_MOE = {"n_experts": "num_local_experts", "k": "num_experts_per_tok", "d_expert": "intermediate_size"}
_OLMOE_MOE = _MIXTRAL_MOE | {"n_experts": "num_experts"}
_QWEN3_MOE = _OLMOE_MOE | {"d_expert": "moe_intermediate_size", "every": "decoder_sparse_step"}
_DOTS1_MOE = _QWEN3_MOE | {"n_experts": "n_routed_experts", "n_shared": "n_shared_experts"}
_DOTS1_MOE = {name: key for name, key in _DOTS1_MOE.items() if name != "every"} | {
    "first_dense": "first_k_dense_replace"
}
_ERNIE_MOE = {
    "n_experts": "moe_num_experts",
    "k": "moe_k",
    "d_expert": "moe_intermediate_size",
    "n_shared": "moe_num_shared_experts",
    "every": "moe_layer_interval",
    "first_dense": "moe_layer_start_index",
    "last_dense": "moe_layer_end_index",  # there the last layer with experts, or -1
}
_RENORMALIZE = {"renormalize": "norm_topk_prob"}
_DOTS1_ROUTER = _RENORMALIZE | {"scale": "routed_scaling_factor", "groups": "n_group", "k_groups": "topk_group"}
_BIASED_SIGMOID = {"router.name": "sigmoid", "router.selection_bias": True, "router.group_top": 2}
_LATENT = {"kv_rank": "kv_lora_rank", "q_rank": "q_lora_rank", "nope_dim": "qk_nope_head_dim"}
_LATENT |= {"rope_dim": "qk_rope_head_dim", "v_dim": "v_head_dim"}

# What missing keys mean.
_ALWAYS = {"head_dim": None, "tie_word_embeddings": False, "initializer_range": 0.02, "rope_theta": 10000.0}
_ALWAYS |= {"rms_norm_eps": 1e-6}
_LLAMA = _ALWAYS | {"num_key_value_heads": None}
_QWEN3 = _ALWAYS | {"use_sliding_window": False, "sliding_window": 4096}
_MAX_WINDOW_LAYERS = {"max_window_layers": 28}
_DEEPSEEK = {key: value for key, value in _LLAMA.items() if key != "head_dim"} | {"q_lora_rank": 1536}

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
    "llama": Family("LlamaForCausalLM", _ROPE | {"qk_norm": "none"}, _KEYS, {}, _LLAMA, _SILU, bias=_BIAS),
    "mistral": Family(
        architecture="MistralForCausalLM",
        model=_ROPE | {"qk_norm": "none"},
        keys=_KEYS,
        moe={},
        defaults=_ALWAYS | {"sliding_window": 4096},
        written=_SILU,
        windows="all",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        model=_ROPE | {"qk_norm": "none", "attn_bias": "qkv"},
        keys=_KEYS,
        moe={},
        defaults=_QWEN3 | _MAX_WINDOW_LAYERS,
        written=_SILU,
        windows="from",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        model=_ROPE | {"qk_norm": "head"},
        keys=_KEYS,
        moe={},
        defaults=_QWEN3 | _MAX_WINDOW_LAYERS | {"head_dim": 128},
        written=_SILU,
        windows="from",
        bias=_BIAS,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        model=_ROPE | {"qk_norm": "full", "norm_at": "after"},
        keys=_OLMOE_KEYS,
        moe={},
        defaults=_LLAMA | {"rms_norm_eps": 1e-5},
        written=_SILU,
        bias=_BIAS,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        model=_ROPE | {"qk_norm": "none"},
        keys=_KEYS,
        moe=_MIXTRAL_MOE,
        defaults=_ALWAYS | {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        written=_SILU,
        windows="all",
    ),
    "granitemoe": Family(
        architecture="GraniteMoeForCausalLM",
        model=_ROPE | {"qk_norm": "none"},
        keys=_KEYS | _CONSTANTS,
        moe=_MIXTRAL_MOE,
        defaults=_LLAMA | dict.fromkeys(_CONSTANTS.values(), 1.0),
        written=_SILU,
        bias=_BIAS,
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        model=_ROPE | {"qk_norm": "full"},
        keys=_OLMOE_KEYS,
        moe=_OLMOE_MOE,
        defaults=_LLAMA | {"rms_norm_eps": 1e-5, "norm_topk_prob": False},
        written=_SILU,
        router=_RENORMALIZE,
        bias=_BIAS,
    ),
    "flex_olmo": Family(
        architecture="FlexOlmoForCausalLM",
        model=_ROPE | {"qk_norm": "full", "norm_at": "after"},
        keys=_OLMOE_KEYS,
        moe=_OLMOE_MOE,
        defaults=_LLAMA | {"rope_theta": 5e5, "norm_topk_prob": False},
        written=_SILU,
        router=_RENORMALIZE,
        bias=_BIAS,
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        model=_ROPE | {"qk_norm": "none"},
        keys=_KEYS,
        moe=_QWEN3_MOE | {"n_shared": "shared_expert_intermediate_size"},  # there a width, a multiple of F
        defaults=_QWEN3 | _MAX_WINDOW_LAYERS | {"decoder_sparse_step": 1, "norm_topk_prob": False, "qkv_bias": True},
        written=_SILU,
        router=_RENORMALIZE,
        fixed={"model.moe.shared_gate": True},
        windows="every other",
        bias=("qkv_bias", "qkv"),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        model=_ROPE | {"qk_norm": "head"},
        keys=_KEYS,
        moe=_QWEN3_MOE,
        defaults=_QWEN3 | {"decoder_sparse_step": 1, "norm_topk_prob": False},
        written=_SILU,
        router=_RENORMALIZE,
        windows="all",
        bias=_BIAS,
    ),
    # DeepSeek-V3's experts on Qwen3's attention. Like ours, the release that the tests install chooses within a token's
    # groups alone; older ones gave the experts of the other groups a score of 0, which is above a negative biased one.
    "dots1": Family(
        architecture="Dots1ForCausalLM",
        model=_ROPE | {"qk_norm": "head"},
        keys=_KEYS,
        moe=_DOTS1_MOE,
        defaults=_ALWAYS
        | {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
        | {"norm_topk_prob": False, "sliding_window": 4096, "max_window_layers": 62},
        written=_SILU,
        router=_DOTS1_ROUTER,
        fixed=_BIASED_SIGMOID,
        windows="from",
        bias=_BIAS,
    ),
    # Dots1's experts; its attention has a norm and biases where told, and turns half of the channels unless told.
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        model=_ROPE,
        keys=_KEYS | {"rope_fraction": "partial_rotary_factor", "qk_norm": "use_qk_norm"},
        moe=_DOTS1_MOE,
        defaults=_ALWAYS
        | {"partial_rotary_factor": 0.5, "use_qk_norm": False, "rms_norm_eps": 1e-5, "norm_topk_prob": True}
        | {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"n_shared_experts": 1},
        written=_SILU | {"num_nextn_predict_layers": 0},
        router=_DOTS1_ROUTER,
        fixed=_BIASED_SIGMOID,
        bias=("attention_bias", "qkv"),
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        model=_ROPE | {"qk_norm": "none"},
        keys=_OLMOE_KEYS,
        moe=_DOTS1_MOE,
        defaults=_DEEPSEEK
        | {"routed_scaling_factor": 1.0, "n_group": None, "topk_group": None}
        | {"n_shared_experts": 2, "first_k_dense_replace": 0},
        written=_SILU,
        router={name: key for name, key in _DOTS1_ROUTER.items() if name != "renormalize"},
        latent=_LATENT,
        fixed={"router.renormalize": False, "router.group_top": 1},
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        model=_ROPE | {"qk_norm": "none"},
        keys=_OLMOE_KEYS,
        moe=_DOTS1_MOE,
        defaults=_DEEPSEEK
        | {"num_key_value_heads": 128, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4}
        | {"n_shared_experts": 1, "first_k_dense_replace": 3, "norm_topk_prob": True},
        written=_SILU,
        router=_DOTS1_ROUTER,
        latent=_LATENT,
        fixed=_BIASED_SIGMOID,
    ),
    # Its pairs of channels that turn lie side by side: the rows of q and k are put in our order as they are read, which
    # changes no bit of what they compute with (`tensor_map` of hf_weights.py).
    "ernie4_5_moe": Family(
        architecture="Ernie4_5_MoeForCausalLM",
        model=_ROPE | {"qk_norm": "none"},
        keys=_KEYS,
        moe=_ERNIE_MOE,
        defaults=_ALWAYS
        | {"tie_word_embeddings": True, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "moe_norm_min": 1e-12}
        | {"moe_num_shared_experts": 2, "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": -1},
        written=_SILU,
        router={"norm_min": "moe_norm_min"},
        fixed={"router.selection_bias": True},
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        model=_ROPE | {"qk_norm": "none", "activation": "swiglu_clipped", "sinks": True, "expert_bias": True},
        keys=_KEYS,
        moe=_MIXTRAL_MOE,
        defaults=_ALWAYS
        | {"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "head_dim": 64, "num_key_value_heads": 8}
        | {"sliding_window": 128, "max_window_layers": 2**31, "attention_bias": True},
        written={"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "hidden_act": "silu"},
        fixed={"router.bias": True},
        windows="every other",
        bias=_BIAS,
    ),
}
