"""Folders as they are published, everything else in bfloat16: gpt-oss with experts in MXFP4, DeepSeek-V3 and others
with matrices in fp8."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.quantized import quantize_mxfp4

METHOD = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
WIDE = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")  # beside vectors


def pack(folder: Path) -> Path:
    """Store the experts of a folder that transformers wrote as the published ones are, in two files; returns it."""
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = quantize_mxfp4(tensors.pop(name).mT.contiguous())
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    (folder / "model.safetensors").unlink()
    placed = {name: f"model-{1 + name.endswith('_scales')}.safetensors" for name in tensors}
    for file in set(placed.values()):
        of_it = {name: tensor.contiguous() for name, tensor in tensors.items() if placed[name] == file}
        save_file(of_it, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"dtype": "bfloat16", "quantization_config": METHOD}))
    assert torch.uint8 in {tensor.dtype for tensor in tensors.values()}
    return folder


def in_fp8(w_NM: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor]:
    """Values (N, M) of E4M3, and the float32 scale of every 128 by 128: a block's largest magnitude as 448 (V3), or
    that scale's next power of two (V3.1)."""
    n, m = w_NM.shape
    values = torch.zeros(n, m, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(-(-n // 128), -(-m // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            scale = w_NM[here].float().abs().max() / 448
            scales[i, j] = scale.log2().ceil().exp2() if powers_of_two else scale
            values[here] = (w_NM[here].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def pack_fp8(folder: Path, powers_of_two: bool, scale_dtype: torch.dtype = torch.float32) -> Path:
    """Store the matrices of a folder, in whatever files, as the published ones are; returns it."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        for name in [name for name, w in tensors.items() if w.dim() == 2 and not name.endswith(WIDE)]:
            tensors[name], scales = in_fp8(tensors[name], powers_of_two)
            tensors[f"{name}_scale_inv"] = scales.to(scale_dtype)
        save_file(tensors, path, {"format": "pt"})
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"dtype": "bfloat16", "quantization_config": FP8}))
    return folder
