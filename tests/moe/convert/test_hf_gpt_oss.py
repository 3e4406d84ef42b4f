"""gpt-oss: config.json both ways with transformers' config class as the oracle, its activation where it clips, and
folders as they are published, with experts in MXFP4."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from kernels.reference import activate
from moe.config.model import ModelConfig, MoEConfig, RopeScaling
from moe.config.router import RouterConfig
from moe.convert.hf_config import FAMILIES, config_from_hf, config_to_hf, family_of, read_config
from moe.convert.hf_stream import Parts
from moe.convert.hf_weights import load
from moe.errors import BadInput
from moe.model.transformer import model_tensors
from tests.packed_folders import METHOD, pack

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
        {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": []}},
        {"quantization_config": "mxfp4"},
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


PACKED = dataclasses.replace(MODELS["stretched"], d_ff=64, moe=MoEConfig(5, 2, 64))


def published(folder: Path) -> Path:
    """A folder of transformers' own making, packed."""
    torch.manual_seed(0)
    tree = config_to_hf(PACKED, ROUTER)
    hf = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**copy.deepcopy(tree)))
    with torch.no_grad():
        for p in hf.parameters():
            p += 0.2 * torch.randn(p.shape)
    hf.save_pretrained(folder)
    return pack(folder)


def test_a_folder_with_experts_in_mxfp4_is_the_model_that_transformers_widens(tmp_path: Path) -> None:
    published(tmp_path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in hf.parameters()} == {torch.bfloat16}
    model, narrow, tensors = load(tmp_path), load(tmp_path, None), Parts(tmp_path).tensors()
    theirs = hf.state_dict()
    for layer in range(3):
        for ours, name in (("w_up_EFD", "gate_up_proj"), ("w_down_EDF", "down_proj")):
            weight = f"blocks.{layer}.mlp.experts.{ours}"
            want = theirs[f"model.layers.{layer}.mlp.experts.{name}"].mT
            assert torch.equal(model.state_dict()[weight], want.float())
            assert torch.equal(tensors[weight], want)
    assert tensors.dtype == torch.bfloat16
    for name, tensor in model_tensors(narrow).items():
        assert torch.equal(tensor, tensors[name])
        assert torch.equal(tensor.float(), model_tensors(model)[name])
    tokens_BS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BS).logits_BSV, hf.float()(tokens_BS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["no scales", "no blocks", "another width", "fewer groups", "half the bytes", "int8"])
def test_blocks_and_scales_that_do_not_belong_together_are_refused_by_name(what: str, tmp_path: Path) -> None:
    published(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    files = {suffix: tmp_path / f"model-{1 + (suffix == 'scales')}.safetensors" for suffix in ("blocks", "scales")}
    tensors = {suffix: load_file(path) for suffix, path in files.items()}
    blocks, scales = (of_it[f"{name}_{suffix}"] for suffix, of_it in tensors.items())
    change: dict[str, dict[str, Any]] = {
        "no scales": {"scales": None},
        "no blocks": {"blocks": None},
        "another width": {"blocks": blocks[:, :, :1].contiguous(), "scales": scales[:, :, :1].contiguous()},
        "fewer groups": {"scales": scales[:, :, :1].contiguous()},
        "half the bytes": {"blocks": blocks[..., :8].contiguous()},
        "int8": {"blocks": blocks.view(torch.int8)},
    }
    for suffix, tensor in change[what].items():
        del tensors[suffix][f"{name}_{suffix}"]
        save_file(tensors[suffix] | ({} if tensor is None else {f"{name}_{suffix}": tensor}), files[suffix])
    sentence = {
        "no scales": f"tensor {name}_blocks is U8; accepted are F64, F32, F16, BF16",
        "no blocks": f"tensor {name}_scales is U8; accepted are F64, F32, F16, BF16",
        "another width": f"tensor {name} has shape (5, 32, 32), and the settings say (5, 64, 32)",
        "fewer groups": f"tensor {name}_blocks has shape (5, 32, 2, 16), and {name}_scales (5, 32, 1): accepted are",
        "half the bytes": f"tensor {name}_blocks has shape (5, 32, 2, 8), and {name}_scales (5, 32, 2): accepted are",
        "int8": f"tensor {name}_blocks is I8; accepted are",
    }
    for reading in (load, Parts):
        with pytest.raises(BadInput) as caught:
            reading(tmp_path)
        assert sentence[what] in str(caught.value)


def test_the_settings_of_a_packed_folder_are_those_of_a_wide_one() -> None:
    assert config_from_hf(TREE | {"quantization_config": METHOD}, "small") == config_from_hf(TREE, "small")
