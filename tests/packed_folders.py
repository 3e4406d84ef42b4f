"""A folder of gpt-oss as it is published: experts in MXFP4, everything else in bfloat16."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kernels.quantized import quantize_mxfp4

METHOD = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}


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
