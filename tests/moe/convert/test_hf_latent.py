"""config.json of DeepSeek-V2 and -V3 both ways, with transformers' own config classes as the oracle."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from moe.config.model import LatentConfig, ModelConfig, MoEConfig, RopeScaling
from moe.config.parse import parse
from moe.config.router import RouterConfig
from moe.convert.hf_config import FAMILIES, config_from_hf, config_to_hf, family_of, read_config
from moe.errors import BadInput

CONF = Path(__file__).parents[3] / "conf" / "model"
SMALL = ModelConfig(
    name="small", vocab_size=64, context=32, n_layers=3, d_model=32, n_heads=4, n_kv_heads=4, d_ff=48,
    latent=LatentConfig(12, 10, 6, 4, 5), moe=MoEConfig(8, 3, 24, n_shared=2, first_dense=1),
)  # fmt: skip
STRETCHED = dataclasses.replace(
    SMALL,
    latent=LatentConfig(12, 0, 6, 4, 5, mscale=0.7),
    rope_scaling=RopeScaling("yarn", 4.0, 8, attention_factor=0.9),
)
V2 = RouterConfig(renormalize=False, group_top=1)
V3 = RouterConfig("sigmoid", selection_bias=True)
MODELS = {
    "one group": ("deepseek_v2", SMALL, V2),
    "stretched, queries from the state": ("deepseek_v2", STRETCHED, V2),
    "groups by their best": ("deepseek_v2", SMALL, dataclasses.replace(V2, groups=4, k_groups=2, scale=16.0)),
    "one group, sigmoid": ("deepseek_v3", SMALL, V3),
    "groups by their best two": ("deepseek_v3", STRETCHED, dataclasses.replace(V3, groups=4, k_groups=2, scale=2.5)),
    "not renormalised": ("deepseek_v3", SMALL, dataclasses.replace(V3, renormalize=False)),
}
TREES = {"deepseek_v2": config_to_hf(SMALL, V2), "deepseek_v3": config_to_hf(STRETCHED, V3)}


@pytest.mark.parametrize("name", MODELS)
def test_settings_survive_config_json_and_the_config_class_of_transformers(name: str, tmp_path: Path) -> None:
    family, cfg, router = MODELS[name]
    tree = config_to_hf(cfg, router)
    assert tree["model_type"] == family_of(cfg, router) == family
    transformers.AutoConfig.for_model(**copy.deepcopy(tree)).save_pretrained(tmp_path)  # which writes into groups
    for back, routing in (config_from_hf(tree, "small"), read_config(tmp_path)):
        assert dataclasses.replace(back, name="small") == cfg
        assert routing == router
        assert config_to_hf(back, routing) == tree


@pytest.mark.parametrize("family", TREES)
def test_every_default_of_the_config_class_is_our_default(family: str) -> None:
    """A key that is absent must mean what transformers takes it to mean."""
    tree = TREES[family] | {"num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 64}
    tree |= {"num_hidden_layers": 5, "hidden_size": 128}
    tree |= {"n_group": 8, "topk_group": 2} if family == "deepseek_v3" else {}
    for key in FAMILIES[family].defaults.keys() & tree.keys():
        short = {name: value for name, value in tree.items() if name != key}
        full = json.loads(transformers.AutoConfig.for_model(**copy.deepcopy(short)).to_json_string(use_diff=False))
        assert config_to_hf(*config_from_hf(short, "small")) == config_to_hf(*config_from_hf(full, "small")), key


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v2", {"scoring_func": "sigmoid"}),
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
        ("deepseek_v2", {"moe_layer_freq": 2}),
        ("deepseek_v2", {"attention_bias": True}),
        ("deepseek_v2", {"q_lora_rank": 0}),
        ("deepseek_v2", {"qk_rope_head_dim": 3}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("deepseek_v3", {"num_key_value_heads": 2}),
        ("deepseek_v3", {"n_group": 3}),
        ("deepseek_v3", {"kv_lora_rank": "12"}),
        ("deepseek_v3", {"quantization_config": {"quant_method": "awq"}}),
        ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}}),
    ],
    ids=str,
)
def test_what_this_model_does_not_have_is_refused_by_name(family: str, change: dict[str, Any]) -> None:
    names = {"qk_rope_head_dim": "model.latent.rope_dim", "num_key_value_heads": "model.n_kv_heads=2"}
    names |= {"n_group": "router.groups=3", "kv_lora_rank": "model.latent.kv_rank"}
    (key,) = change
    tree = {name: value for name, value in TREES[family].items() if name != "rope_parameters"}
    with pytest.raises(BadInput) as caught:
        config_from_hf(tree | change, "small")
    assert names.get(key, key) in str(caught.value), caught.value
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("deepseek_v2", {"n_group": None, "topk_group": None}),
        ("deepseek_v2", {"n_group": 4, "topk_group": 2}),  # which greedy does not look at
        ("deepseek_v2", {"aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "pretraining_tp": 1}),
        ("deepseek_v2", {"auto_map": {"AutoModel": "x.Y"}, "attention_dropout": 0.1, "moe_layer_freq": 1}),
        ("deepseek_v3", {"num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    ],
    ids=str,
)
def test_what_changes_no_function_is_accepted(family: str, change: dict[str, Any]) -> None:
    assert config_from_hf(TREES[family] | change, "small") == config_from_hf(TREES[family], "small")


@pytest.mark.parametrize(
    ("model", "moe", "router", "words"),
    [
        ({}, {"n_shared": 0}, {}, "model.moe.n_shared=0 has no counterpart in transformers: the nearest family, deeps"),
        ({}, {"every": 2}, {}, "model.moe.every=2"),
        ({}, {}, {"renormalize": True}, "router.renormalize=True"),
        ({}, {"n_shared": 0}, {"renormalize": True, "group_top": 2}, "router.renormalize=True"),  # latents are its mark
        ({}, {}, {"groups": 4, "group_top": 2}, "router.group_top=2"),
        ({"window": 8}, {}, {}, "model.window=8"),
        ({"n_heads": 5, "n_kv_heads": 5}, {}, {}, "model.d_model=32"),
        ({"moe": None}, {}, {}, "model.latent=LatentConfig"),
    ],
)
def test_a_model_of_no_family_is_refused_by_its_first_foreign_setting(
    model: dict[str, Any], moe: dict[str, Any], router: dict[str, Any], words: str
) -> None:
    cfg = dataclasses.replace(SMALL, **{"moe": dataclasses.replace(MoEConfig(8, 3, 24, n_shared=1), **moe), **model})
    with pytest.raises(BadInput) as caught:
        config_to_hf(cfg, dataclasses.replace(V2, **router))
    assert str(caught.value).startswith(words)


def test_the_latent_preset_for_a_cpu_can_leave_with_a_shared_expert_and_raw_weights() -> None:
    cfg = parse(ModelConfig, yaml.safe_load((CONF / "cpu-latent.yaml").read_text()))
    cfg = dataclasses.replace(cfg, vocab_size=64, moe=dataclasses.replace(cfg.moe, n_shared=1))
    assert family_of(cfg, RouterConfig(renormalize=False)) == "deepseek_v2"
    assert family_of(dataclasses.replace(cfg, latent=None, moe=None), RouterConfig()) == "llama"
