"""gpt-oss: config.json both ways with transformers' config class as the oracle, and its activation where it clips."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from kernels.reference import activate
from moe.config.model import ModelConfig, MoEConfig, RopeScaling
from moe.config.router import RouterConfig
from moe.convert.hf_config import FAMILIES, config_from_hf, config_to_hf, family_of, read_config
from moe.errors import BadInput

SMALL = ModelConfig(
    name="small", vocab_size=64, context=32, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=24,
    moe=MoEConfig(5, 2, 24), activation="swiglu_clipped", sinks=True, expert_bias=True, attn_bias="all",
)  # fmt: skip
ROUTER = RouterConfig(bias=True)
MODELS = {
    "plain": SMALL,
    "alternating": dataclasses.replace(SMALL, window=8, window_layers=[0, 2]),
    "stretched": dataclasses.replace(SMALL, rope_scaling=RopeScaling("yarn", 4.0, 8, truncate=False), window=8),
    "without biases of attention": dataclasses.replace(SMALL, attn_bias="none"),
}
TREE = config_to_hf(MODELS["stretched"], ROUTER)


@pytest.mark.parametrize("name", MODELS)
def test_settings_survive_config_json_and_the_config_class_of_transformers(name: str, tmp_path: Path) -> None:
    cfg = MODELS[name]
    assert family_of(cfg, ROUTER) == "gpt_oss"
    tree = config_to_hf(cfg, ROUTER)
    transformers.AutoConfig.for_model(**copy.deepcopy(tree)).save_pretrained(tmp_path)  # which writes into groups
    for back, routing in (config_from_hf(tree, "small"), read_config(tmp_path)):
        assert dataclasses.replace(back, name="small") == cfg
        assert routing == ROUTER
        assert config_to_hf(back, routing) == tree


def test_every_default_of_the_config_class_is_our_default() -> None:
    """A key that is absent must mean what transformers takes it to mean: YaRN and windows in every other layer too."""
    tree = config_to_hf(MODELS["alternating"], ROUTER) | {"max_position_embeddings": 512, "num_attention_heads": 8}
    together = [("rope_parameters", "rope_theta"), ("layer_types",), ("layer_types", "sliding_window")]
    for keys in [*together, *((key,) for key in FAMILIES["gpt_oss"].defaults.keys() & tree.keys())]:
        short = {name: value for name, value in tree.items() if name not in keys}
        full = json.loads(transformers.AutoConfig.for_model(**copy.deepcopy(short)).to_json_string(use_diff=False))
        assert config_to_hf(*config_from_hf(short, "small")) == config_to_hf(*config_from_hf(full, "small")), keys


@pytest.mark.parametrize(
    "change",
    [
        {"swiglu_limit": 5.0},
        {"swiglu_alpha": 1.0},
        {"hidden_act": "gelu"},
        {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}},
        {"attention_bias": None},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ],
    ids=str,
)
def test_what_this_model_does_not_have_is_refused_by_name(change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(BadInput, match=key):
        config_from_hf(TREE | change, "small")


@pytest.mark.parametrize(
    ("model", "router", "words"),
    [
        ({"sinks": False}, {}, "model.sinks=False"),
        ({"expert_bias": False}, {}, "model.expert_bias=False"),
        ({}, {"bias": False}, "router.bias=False"),
        ({}, {"scale": 2.0}, "router.scale=2.0"),
        ({"attn_bias": "qkv"}, {}, "model.attn_bias=qkv"),
    ],
)
def test_a_model_of_no_family_is_refused_by_its_first_foreign_setting(
    model: dict[str, Any], router: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput) as caught:
        config_to_hf(dataclasses.replace(SMALL, **model), dataclasses.replace(ROUTER, **router))
    assert str(caught.value).startswith(words)


def test_the_activation_is_that_of_transformers_where_it_clips_too() -> None:
    theirs = GptOssExperts(transformers.GptOssConfig(num_local_experts=1, hidden_size=4, intermediate_size=4))
    z = 10 * torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (z.abs() > 7).double().mean() > 0.3
    torch.testing.assert_close(activate(z, "swiglu_clipped"), theirs._apply_gate(z))
