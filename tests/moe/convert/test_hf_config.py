"""config.json both ways, with transformers' own config classes and parameter counts as the oracle."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moe.config.model import ModelConfig, MoEConfig, RopeScaling, window_of
from moe.config.parse import parse
from moe.config.router import RouterConfig
from moe.convert.hf_config import FAMILIES, config_from_hf, config_to_hf, family_of, read_config
from moe.errors import BadInput
from moe.model.cost import dense_twin, size

CONF = Path(__file__).parents[3] / "conf" / "model"
PRESETS = {  # name: (family, parameters)
    "gpt2": ("gpt2", 124_439_808),
    "gpt2-medium": ("gpt2", 354_823_168),
    "gpt2-large": ("gpt2", 774_030_080),
    "gpt2-xl": ("gpt2", 1_557_611_200),
    "gpt3-175b": ("gpt2", 174_604_259_328),
    "llama3-8b": ("llama", 8_030_261_248),
    "llama3-70b": ("llama", 70_553_706_496),
    "llama3-405b": ("llama", 405_853_388_800),
    "mixtral-8x7b": ("mixtral", 46_702_792_704),
    "olmoe-1b-7b": ("olmoe", 6_919_161_856),
    "qwen3-30b-a3b": ("qwen3_moe", 30_532_122_624),
    "deepseek-v2-lite": ("deepseek_v2", 15_706_484_224),
    "deepseek-v3": ("deepseek_v3", 671_026_404_352),
    "gpt-oss-20b": ("gpt_oss", 20_914_757_184),
}
ROUTERS_OF_PRESETS = {
    "olmoe-1b-7b": RouterConfig(renormalize=False),
    "deepseek-v2-lite": RouterConfig(renormalize=False),
    "gpt-oss-20b": RouterConfig(bias=True),
    "deepseek-v3": RouterConfig("sigmoid", selection_bias=True, groups=8, k_groups=4, scale=2.5),
}


def preset(name: str) -> tuple[ModelConfig, RouterConfig]:
    cfg = parse(ModelConfig, yaml.safe_load((CONF / f"{name}.yaml").read_text()))
    return cfg, ROUTERS_OF_PRESETS.get(name, RouterConfig())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_in_transformers(name: str) -> None:
    family, parameters = PRESETS[name]
    cfg, router = preset(name)
    assert family_of(cfg, router) == family
    config = transformers.AutoConfig.for_model(**config_to_hf(cfg, router))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == FAMILIES[family].architecture
    assert sum(p.numel() for p in model.parameters()) == size(cfg, router).total == parameters


def test_every_preset_that_trains_here_can_leave_with_its_dense_twin() -> None:
    for path in CONF.glob("*.yaml"):
        if path.stem in PRESETS or path.stem == "cpu-latent":
            continue
        cfg = dataclasses.replace(preset(path.stem)[0], vocab_size=512)
        assert family_of(cfg, RouterConfig()) == "qwen3_moe"
        assert family_of(dense_twin(cfg, "active_params"), RouterConfig()) == "qwen3"


SMALL = ModelConfig(name="small", vocab_size=64, context=32, n_layers=4, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
GPT2 = {"activation": "gelu_tanh", "norm": "layer", "position": "learned", "bias": True, "n_kv_heads": 4}
MODELS = {
    "gpt2": dataclasses.replace(SMALL, **GPT2),
    "llama": dataclasses.replace(SMALL, rope_theta=500.0),
    "qwen3": dataclasses.replace(SMALL, qk_norm="head", head_dim=10, rope_scaling=RopeScaling("yarn", 4.0, 8)),
    "mistral": dataclasses.replace(SMALL, window=8, head_dim=10),
    "qwen2": dataclasses.replace(SMALL, attn_bias="qkv", window=8, window_layers=[0, 2]),
    "mixtral": dataclasses.replace(SMALL, moe=MoEConfig(4, 2, 48)),
    "olmo2": dataclasses.replace(SMALL, qk_norm="full", norm_at="after"),
    "flex_olmo": dataclasses.replace(SMALL, qk_norm="full", norm_at="after", moe=MoEConfig(4, 2, 48)),
    "granitemoe": dataclasses.replace(
        SMALL, embed_scale=12.0, residual_scale=0.22, attn_scale=0.015625, logit_divisor=6.0, moe=MoEConfig(4, 2, 48)
    ),
    "olmoe": dataclasses.replace(SMALL, qk_norm="full", moe=MoEConfig(4, 2, 48)),
    "qwen2_moe": dataclasses.replace(SMALL, attn_bias="qkv", moe=MoEConfig(4, 2, 24, n_shared=2, shared_gate=True)),
    "qwen3_moe": dataclasses.replace(SMALL, qk_norm="head", moe=MoEConfig(4, 2, 24, every=2, first_dense=3)),
    "dots1": dataclasses.replace(SMALL, qk_norm="head", moe=MoEConfig(8, 2, 24, n_shared=2, first_dense=1)),
    "ernie4_5_moe": dataclasses.replace(
        SMALL, moe=MoEConfig(8, 2, 24, n_shared=1, every=2, first_dense=1, last_dense=1), head_dim=10
    ),
    "glm4_moe": dataclasses.replace(
        SMALL,
        qk_norm="head",
        attn_bias="qkv",
        rope_fraction=0.5,
        rope_scaling=RopeScaling("linear", 2.0),
        moe=MoEConfig(8, 2, 24, n_shared=2, first_dense=2),
    ),
}

# The routers of families whose router is not softmax.
GROUPED = RouterConfig("sigmoid", selection_bias=True, scale=2.5, groups=4, k_groups=2)
ROUTERS = {"dots1": GROUPED, "glm4_moe": GROUPED, "ernie4_5_moe": RouterConfig(selection_bias=True, norm_min=1e-9)}


def router_of(family: str, renormalize: bool = True) -> RouterConfig:
    free = "renormalize" in FAMILIES[family].router
    return dataclasses.replace(ROUTERS.get(family, RouterConfig()), renormalize=renormalize or not free)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_settings_survive_config_json_and_the_config_class_of_transformers(
    family: str, renormalize: bool, tmp_path: Path
) -> None:
    cfg, router = MODELS[family], router_of(family, renormalize)
    tree = config_to_hf(cfg, router)
    transformers.AutoConfig.for_model(**copy.deepcopy(tree)).save_pretrained(tmp_path)  # which writes into groups
    for back, routing in (config_from_hf(tree, "small"), read_config(tmp_path)):
        full = dataclasses.replace(cfg, name=back.name, n_kv_heads=back.n_kv_heads, head_dim=back.head_dim)
        assert back == full
        assert config_to_hf(back, routing) == tree
        assert routing == router


GOES_WITH = {"n_group": "topk_group", "use_sliding_window": "layer_types"}  # what makes no sense without the other


@pytest.mark.parametrize("family", MODELS)
def test_every_default_of_the_config_class_is_our_default(family: str) -> None:
    """A key that is absent must mean what transformers takes it to mean."""
    tree = config_to_hf(MODELS[family], router_of(family))
    for key in FAMILIES[family].defaults.keys() & tree.keys():
        without = {key, GOES_WITH.get(key)}
        short = {each: value for each, value in tree.items() if each not in without}
        full = json.loads(transformers.AutoConfig.for_model(**short).to_json_string(use_diff=False))
        assert config_to_hf(*config_from_hf(short, "small")) == config_to_hf(*config_from_hf(full, "small")), key


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"activation_function": "gelu"}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"reorder_and_upcast_attn": True}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt2", {"n_positions": 0}),
    ("gpt2", {"rope_theta": 10000.0}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"attention_bias": 1}),
    ("qwen2", {"attention_bias": True}),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}),
    ("qwen2_moe", {"shared_expert_intermediate_size": 36}),
    ("mixtral", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 5.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "short_factor": [1.0]}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 10000.0}}),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}),
    ("llama", {"rope_scaling": 8}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("llama", {"rope_theta": "big"}),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}),
    ("llama", {"num_local_experts": 8}),
    ("llama", {"pruned_heads": {"0": [1]}}),
    ("llama", {"a_setting_of_next_year": 1}),
    ("llama", {"hidden_size": None}),
    ("llama", {"hidden_size": "32"}),
    ("llama", {"num_key_value_heads": 0}),
    ("llama", {"num_key_value_heads": 3}),
    ("llama", {"vocab_size": 0}),
    ("llama", {"model_type": "mamba"}),
    ("llama", {"model_type": ["llama"]}),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("qwen3", {"layer_types": 3}),
    ("qwen3", {"sliding_window": -1, "use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3", {"sliding_window": "16", "use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3", {"max_window_layers": "all", "sliding_window": 16, "use_sliding_window": True}),
    ("qwen3", {"sliding_window_pattern": 4}),
    ("llama", {"sliding_window": 16}),
    ("olmoe", {"sliding_window": 16}),
    ("qwen3_moe", {"max_window_layers": 2, "sliding_window": 16, "use_sliding_window": True}),
    ("mixtral", {"layer_types": ["sliding_attention", *["full_attention"] * 3], "sliding_window": 16}),
    ("mixtral", {"layer_types": ["chunked_attention"] * 4, "sliding_window": 16}),
    ("mixtral", {"router_jitter_noise": 0.1}),
    ("mixtral", {"num_experts_per_tok": 5}),
    ("mixtral", {"mlp_only_layers": [0]}),
    ("olmoe", {"clip_qkv": 8.0}),
    ("qwen3_moe", {"mlp_only_layers": [2], "decoder_sparse_step": 1}),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}),
    ("qwen3_moe", {"mlp_only_layers": ["0"]}),
    ("qwen3_moe", {"shared_expert_intermediate_size": 24}),
    ("granitemoe", {"logits_scaling": 0}),
    ("granitemoe", {"attention_multiplier": "0.1"}),
    ("granitemoe", {"sliding_window": 16}),
    ("mixtral", {"residual_multiplier": 0.5}),
    ("glm4_moe", {"partial_rotary_factor": 0.4, "rope_scaling": None, "rope_parameters": None}),
    ("glm4_moe", {"use_qk_norm": None}),
    ("olmo2", {"sliding_window": 16}),
    ("mistral", {"layer_types": ["sliding_attention", *["full_attention"] * 3]}),
    ("mistral", {"attention_bias": True}),
    ("flex_olmo", {"clip_qkv": 8.0}),
    ("ernie4_5_moe", {"moe_layer_end_index": -2}),
    ("ernie4_5_moe", {"moe_layer_end_index": 0}),
    ("ernie4_5_moe", {"moe_norm_min": -1}),
    ("ernie4_5_moe", {"use_bias": True}),
    ("dots1", {"n_shared_experts": None}),
    ("dots1", {"n_group": 3}),
    ("dots1", {"topk_group": 5}),
    ("dots1", {"n_routed_experts": 2}),
    ("dots1", {"scoring_func": "softmax"}),
    ("dots1", {"decoder_sparse_step": 2}),
]
WORDS = {  # where the sentence names this project's setting, not the key
    "n_positions": "model.context",
    "hidden_size": "model.d_model",
    "num_key_value_heads": "model.n_kv_heads",
    "num_experts_per_tok": "model.moe.k",
    "rope_scaling": "model.rope_scaling",
    "moe_layer_end_index": "model.moe.last_dense",
    "moe_norm_min": "router.norm_min",
    "partial_rotary_factor": "model.rope_fraction",
    "logits_scaling": "model.logit_divisor",
    "attention_multiplier": "model.attn_scale",
    "n_shared_experts": "model.moe.n_shared",
    "n_routed_experts": "router.groups",
    "n_group": "router.groups",
    "topk_group": "router.k_groups",
    "sliding_window": "model.window",
}


@pytest.mark.parametrize(("family", "change"), REFUSED, ids=lambda each: each if isinstance(each, str) else str(each))
def test_what_this_model_does_not_have_is_refused_by_name(family: str, change: dict[str, Any], tmp_path: Path) -> None:
    tree = config_to_hf(MODELS[family], router_of(family))
    config_from_hf(tree, "small")  # accepted without the change
    (tmp_path / "config.json").write_text(json.dumps(tree | change))
    with pytest.raises(BadInput) as caught:
        read_config(tmp_path)
    key = next(iter(change))
    assert key in str(caught.value) or WORDS.get(key, key) in str(caught.value), caught.value
    assert str(tmp_path / "config.json") in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": None}),
        ("llama", {"rope_scaling": None, "attention_bias": False, "pretraining_tp": 1, "quantization_config": None}),
        ("llama", {"_name_or_path": "somewhere", "torch_dtype": "bfloat16", "eos_token_id": [1, 2]}),
        ("mixtral", {"sliding_window": 32}),
        ("qwen3", {"sliding_window": 16}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2}),
        ("gpt2", {"activation_function": "gelu_pytorch_tanh", "summary_type": "cls_index", "resid_pdrop": 0.1}),
        ("olmoe", {"num_local_experts": 4, "num_experts": None}),
    ],
    ids=str,
)
def test_what_changes_no_function_is_accepted(family: str, change: dict[str, Any]) -> None:
    tree = config_to_hf(MODELS[family], router_of(family))
    changed = {key: value for key, value in (tree | change).items() if value is not None or key in ("rope_scaling",)}
    assert config_from_hf(changed, "small") == config_from_hf(tree, "small")


KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("family", "told", "layers"),
    [
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}, [2, 3]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, [0, 1, 2, 3]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 4}, None),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2, "layer_types": KINDS}, [0, 2]),
        ("qwen3", {"use_sliding_window": False, "max_window_layers": 2}, None),
        ("qwen3_moe", {"use_sliding_window": True}, [0, 1, 2, 3]),
        ("qwen3_moe", {}, None),
        ("mixtral", {}, [0, 1, 2, 3]),
        ("mistral", {}, [0, 1, 2, 3]),
        ("mixtral", {"sliding_window": None}, None),
    ],
    ids=str,
)
def test_the_layers_with_a_window_are_those_of_transformers(
    family: str, told: dict[str, Any], layers: list[int] | None
) -> None:
    tree = config_to_hf(MODELS[family], router_of(family)) | {"sliding_window": 16} | told
    cfg, router = config_from_hf(tree, "small")
    assert [layer for layer in range(4) if window_of(cfg, layer)] == (layers or [])
    assert {window_of(cfg, layer) for layer in layers or []} <= {16}
    written = config_to_hf(cfg, router)
    assert config_from_hf(written, "small") == (cfg, router)
    for of in (tree, written):
        theirs = transformers.AutoConfig.for_model(**copy.deepcopy(of))
        kinds = getattr(theirs, "layer_types", ["sliding_attention" if theirs.sliding_window else "full_attention"] * 4)
        assert [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"] == (layers or [])


SCALED = {"factor": 4.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"type": "linear", "factor": 2}, RopeScaling("linear", 2.0)),
        ({"type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | SCALED, RopeScaling("llama3", 4, 8)),
        ({"rope_type": "yarn", "rope_theta": 10000.0} | SCALED, RopeScaling("yarn", 4.0, 8)),
        ({"type": "yarn", "factor": None, "original_max_position_embeddings": 8}, RopeScaling("yarn", 4.0, 8)),
        ({"type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 32)),
        ({"type": "yarn", "beta_fast": 16, "truncate": False} | SCALED,
         RopeScaling("yarn", 4.0, 8, beta_fast=16.0, truncate=False)),
        ({"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0} | SCALED,
         RopeScaling("yarn", 4.0, 8, attention_factor=1.0)),
        ({"type": "yarn", "mscale": 2.0} | SCALED, RopeScaling("yarn", 4.0, 8)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("group", ["rope_scaling", "rope_parameters"])
def test_scaled_positions_are_read_in_either_place_and_written_in_both(
    group: str, rope: dict[str, Any], scaling: RopeScaling, tmp_path: Path
) -> None:
    """And what is written says the same to transformers' config class as what was read."""
    tree = config_to_hf(MODELS["llama"], RouterConfig()) | {"rope_theta": 10000.0}
    cfg, router = config_from_hf(tree | {group: rope}, "small")
    assert cfg.rope_scaling == scaling
    written = config_to_hf(cfg, router)
    assert config_from_hf(written, "small") == (cfg, router)
    only = {key: value for key, value in written.items() if key not in ("rope_scaling", "rope_parameters")}
    for name in ("rope_scaling", "rope_parameters"):
        assert config_from_hf(only | {name: written[name]}, "small") == (cfg, router)
    angles = [
        LlamaRotaryEmbedding(transformers.AutoConfig.for_model(**copy.deepcopy(of)))(
            torch.zeros(1), torch.arange(32)[None]
        )
        for of in (tree | {group: rope}, written)
    ]
    if rope.get("factor", 4.0) is not None:  # transformers' own check wants a number there
        assert torch.equal(angles[0][0], angles[1][0])
        assert torch.equal(angles[0][1], angles[1][1])


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '"llama"', "\udcff"])
def test_a_file_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_key_is_refused_by_name() -> None:
    for family, cfg in MODELS.items():
        tree = config_to_hf(cfg, router_of(family))
        for key in FAMILIES[family].keys.values() - FAMILIES[family].defaults.keys():
            with pytest.raises(BadInput, match=key):
                config_from_hf({each: value for each, value in tree.items() if each != key}, "small")


@pytest.mark.parametrize(
    ("model", "moe", "router", "path"),
    [
        ({}, {"n_shared": 2}, {}, "model.moe.n_shared=2"),
        ({}, {"depth": 0.5}, {}, "model.moe.depth=0.5"),
        ({}, {"last_dense": 1}, {}, "model.moe.last_dense=1"),
        ({}, {}, {"norm_min": 0.1}, "router.norm_min=0.1"),
        ({"norm_at": "after"}, {"every": 2}, {}, "model.norm_at=after"),
        ({"rope_fraction": 0.5}, {}, {}, "model.rope_fraction=0.5"),
        ({"residual_scale": 0.5}, {}, {}, "model.residual_scale=0.5"),
        ({"qk_norm": "none", "attn_bias": "qkv"}, {"shared_gate": True}, {}, "model.moe.n_shared=0"),
        ({"qk_norm": "none", "attn_bias": "qkv"}, {}, {}, "model.attn_bias=qkv"),
        ({}, {}, {"name": "sigmoid"}, "router.name=sigmoid"),
        ({}, {}, {"selection_bias": True}, "router.selection_bias=True"),
        ({}, {}, {"scale": 2.5}, "router.scale=2.5"),
        ({"activation": "relu2"}, {}, {}, "model.activation=relu2"),
        ({"bias": True}, {}, {}, "model.bias=True"),
        ({"norm": "layer"}, {}, {}, "model.norm=layer"),
        ({"position": "learned"}, {}, {}, "model.position=learned"),
        ({"qk_norm": "full"}, {"every": 2}, {}, "model.moe.every=2"),
        ({"qk_norm": "full", "window": 8}, {}, {}, "model.window=8"),
        ({"window": 8, "window_layers": [1]}, {}, {}, r"model.window_layers=\[1\]"),
        ({"qk_norm": "full", "head_dim": 16}, {}, {}, "model.head_dim=16"),
        ({"qk_norm": "none"}, {}, {"renormalize": False}, "router.renormalize=False"),
        ({}, {"precision": "fp8"}, {}, "model.moe.precision=fp8"),
    ],
)
def test_a_model_of_no_family_is_refused_by_its_first_foreign_setting(
    model: dict[str, Any], moe: dict[str, Any], router: dict[str, Any], path: str
) -> None:
    experts = dataclasses.replace(MoEConfig(4, 2, 24), **moe)
    cfg = dataclasses.replace(SMALL, moe=experts, **({"qk_norm": "head"} | model))
    with pytest.raises(BadInput, match=path):
        config_to_hf(cfg, RouterConfig(**router))


def test_a_dense_model_of_no_family_is_refused() -> None:
    for change in ({"qk_norm": "full"}, {"norm": "layer"}):
        with pytest.raises(BadInput, match=r"no counterpart in transformers: the nearest family, (llama|olmo2)"):
            family_of(dataclasses.replace(SMALL, **change), RouterConfig())
