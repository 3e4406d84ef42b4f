"""Folders whose matrices are in fp8: what they are read as, with transformers and a formula as the oracles, and what is
refused. Those in MXFP4 are in test_hf_gpt_oss.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from experiments.suites.families import DEEPSEEK, MSCALE, QWEN3_MOE
from experiments.suites.timing import relative_error
from moe.convert.hf_config import config_from_hf
from moe.convert.hf_stored import packed, read
from moe.convert.hf_stream import Parts
from moe.convert.hf_weights import load, to_hf
from moe.errors import BadInput
from moe.model.transformer import model_tensors
from moe.run import streamed
from tests.packed_folders import FP8, in_fp8, pack_fp8

# transformers takes a block's size from the shapes: a side is of 128s, or of less than 128.
WIDE = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128}
HEADS = {"q_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": DEEPSEEK | MSCALE | WIDE | HEADS | {"n_group": 4, "topk_group": 2},
    "qwen3_moe": QWEN3_MOE | WIDE,
}


def published(folder: Path, family: str, powers_of_two: bool, scale_dtype: torch.dtype = torch.float32) -> Path:
    """A folder of transformers' own making in fp8, no two blocks of a matrix alike."""
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **MODELS[family]))
    with torch.no_grad():
        for p in hf.parameters():
            p += 0.05 * torch.randn(p.shape) * torch.linspace(0.3, 3.0, p.numel()).view(p.shape)
            p *= torch.linspace(0.5, 2.0, p.shape[-1])
    hf.save_pretrained(folder)
    return pack_fp8(folder, powers_of_two, scale_dtype)


@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_a_folder_in_fp8_is_the_model_that_transformers_widens(
    family: str, powers_of_two: bool, tmp_path: Path
) -> None:
    published(tmp_path, family, powers_of_two)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    narrow, tensors = load(tmp_path, None), Parts(tmp_path).tensors()
    assert {"F8_E4M3", "F32"} <= {place.dtype for place in streamed.places(tmp_path / "model.safetensors").values()}
    ours, theirs = to_hf(narrow.state_dict(), narrow.cfg, family, stacked=True), hf.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for name, tensor in model_tensors(narrow).items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors.dtype == torch.bfloat16
    tokens_BS = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_error(load(tmp_path)(tokens_BS).logits_BSV, hf.float()(tokens_BS).logits) < 1e-5


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(128, 128), (576, 200), (1, 300), (129, 1)])
def test_a_number_is_its_value_times_the_scale_of_its_block(
    shape: tuple[int, int], scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    """With blocks that are cut off, which transformers 5.24 does not load, and every type of scales."""
    generator = torch.Generator().manual_seed(0)
    values, scales = in_fp8(torch.randn(shape, generator=generator), scale_dtype == torch.float8_e8m0fnu)
    scales = scales.to(scale_dtype)
    save_file({"a.weight": values, "a.weight_scale_inv": scales}, tmp_path / "a.safetensors")
    (stored,) = (places := packed(streamed.places(tmp_path / "a.safetensors"))).values()
    assert list(places) == ["a.weight"]
    assert (stored.shape, stored.dtype) == (shape, "BF16")
    widened = read("a.weight", stored)
    row_N, column_M = (torch.arange(length) // 128 for length in shape)
    exact = values.double() * scales.double()[row_N[:, None], column_M]
    assert torch.equal(widened, exact.float().bfloat16())
    assert torch.equal(widened, _dequantize_fp8_weight(values, scales.float(), [128, 128], torch.float32).bfloat16())
    assert torch.equal(widened, exact) == (scale_dtype == torch.float8_e8m0fnu)


METHODS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": FP8,
    "DeepSeek-V3.1": FP8 | {"scale_fmt": "ue8m0"},
    "Qwen3-30B-A3B-FP8": FP8 | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]},
    "defaults": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", MODELS)
def test_the_settings_of_a_folder_in_fp8_are_those_of_a_wide_one(family: str, name: str) -> None:
    tree = transformers.AutoConfig.for_model(family, **MODELS[family]).to_dict()
    assert config_from_hf(tree | {"quantization_config": METHODS[name]}, "a") == config_from_hf(tree, "a")


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        *(
            ({"quant_method": name}, f"quantization_config.quant_method={name!r} is not supported in a qwen3_moe: "
             "accepted is fp8.")
            for name in ("bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4", "fbgemm_fp8", None)
        ),
        ("fp8", "quantization_config='fp8' must be a group of settings."),
        (FP8 | {"weight_block_size": [64, 128]}, "weight_block_size=[64, 128] is not supported: accepted is [128, 12"),
        (FP8 | {"weight_block_size": None}, "weight_block_size=None is not supported: accepted is [128, 128]."),
        (FP8 | {"fmt": "e5m2"}, "quantization_config.fmt='e5m2' is not supported: accepted is e4m3."),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme='static' is not supported: accepted is dynamic."),
        (FP8 | {"expert_dtype": "fp4"}, "quantization_config.expert_dtype='fp4' is not supported: accepted is fp8."),
        (FP8 | {"next": 1}, "quantization_config.next=1 is not supported: accepted is no such key."),
    ],
    ids=str,
)  # fmt: skip
def test_another_method_is_refused_by_name(method: Any, sentence: str) -> None:
    tree = transformers.AutoConfig.for_model("qwen3_moe", **MODELS["qwen3_moe"]).to_dict()
    with pytest.raises(BadInput) as caught:
        config_from_hf(tree | {"quantization_config": method}, "a")
    assert sentence in str(caught.value)


NAME = "model.layers.1.self_attn.o_proj.weight"  # (256, 64)
SCALE = f"{NAME}_scale_inv"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w, scale: {NAME: w}, f"tensor {NAME} is F8_E4M3, and {SCALE} is missing."),
        (lambda w, scale: {SCALE: scale}, f"tensor {SCALE} is there, and {NAME} is missing: accepted is F8_E4M3."),
        (
            lambda w, scale: {NAME: w.bfloat16(), SCALE: scale},
            f"tensor {SCALE} is there, and {NAME} is BF16: accepted is F8_E4M3.",
        ),
        (
            lambda w, scale: {NAME: w.float().to(torch.float8_e5m2), SCALE: scale},
            f"tensor {SCALE} is there, and {NAME} is F8_E5M2: accepted is F8_E4M3.",
        ),
        (
            lambda w, scale: {NAME: w.float().to(torch.float8_e5m2)},
            f"tensor {NAME} is F8_E5M2; accepted are F64, F32, F16, BF16",
        ),
        (
            lambda w, scale: {NAME: w, SCALE: scale[:1].contiguous()},
            f"tensor {SCALE} has shape (1, 1), and {NAME} (256, 64): accepted are matrices with a scale for every 128",
        ),
        (lambda w, scale: {NAME: w, SCALE: scale.mT.contiguous()}, f"tensor {SCALE} has shape (1, 2), and {NAME}"),
        (lambda w, scale: {NAME: w, SCALE: scale[0, 0].clone()}, f"tensor {SCALE} has shape (), and {NAME}"),
        (lambda w, scale: {NAME: w[0].clone(), SCALE: scale[0]}, f"tensor {SCALE} has shape (1,), and {NAME} (64,)"),
        (
            lambda w, scale: {NAME: w, SCALE: scale.to(torch.uint8)},
            f"tensor {SCALE} is U8; accepted are F32, BF16, F16, F8_E8M0.",
        ),
        (lambda w, scale: {NAME: w[:128].clone(), SCALE: scale[:1].clone()}, f"tensor {NAME} has shape (128, 64), and"),
        (
            lambda w, scale: {NAME: w, SCALE: scale, NAME.replace("weight", "input_scale"): torch.ones(())},
            "o_proj.input_scale is not part of a qwen3_moe",
        ),
    ],
)
def test_values_and_scales_that_do_not_belong_together_are_refused_by_name(
    change: Callable[[Tensor, Tensor], dict[str, Tensor]], sentence: str, tmp_path: Path
) -> None:
    path = published(tmp_path, "qwen3_moe", True) / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | change(tensors.pop(NAME), tensors.pop(SCALE)), path)
    for reading in (load, Parts):
        with pytest.raises(BadInput) as caught:
            reading(tmp_path)
        assert sentence in str(caught.value)


@pytest.mark.parametrize("name", ["a.weight", "a.weight_scale_inv"])
def test_a_file_that_is_cut_short_since_is_refused_by_the_tensor(name: str, tmp_path: Path) -> None:
    parts = dict(zip(("a.weight", "a.weight_scale_inv"), in_fp8(torch.ones(8, 8), True), strict=True))
    for part, tensor in parts.items():
        save_file({part: tensor}, tmp_path / part)
    (stored,) = packed({part: streamed.places(tmp_path / part)[part] for part in parts}).values()
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(BadInput, match=f"ends in the middle of the tensor {name}\\."):
        read("a.weight", stored)
