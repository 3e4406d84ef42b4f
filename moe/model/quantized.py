"""Routed experts stored in few bits, for inference: the formats of kernels/quantized.py in a model.

The two matrices of every routed expert are stored so, and nothing else: shared experts, dense layers, attention,
routers, embeddings and biases keep their type, and so do the activations, unless the model's own products are in fp8.
There is no backward.

Letters beyond the glossary: N rows of a matrix and M the width they sum over, as in kernels/quantized.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.hooks import RemovableHandle

from kernels.fp8 import widen
from kernels.quantized import FORMATS, Mxfp4, Quantized, dequantize
from moe.config.model import ModelConfig
from moe.config.parse import OneOf
from moe.errors import BadInput
from moe.model.experts import Experts

MATRICES = ("w_up_EFD", "w_down_EDF")  # of a stack


class Storage(NamedTuple):
    """What the matrices of a model's routed experts take."""

    format: str
    bits: float  # of a weight, with its share of the scales
    n_bytes: int
    wide_bytes: int  # what they would take in the type of the model's other weights

    def __str__(self) -> str:
        size = f"{self.n_bytes / 1e6:,.1f} MB in place of {self.wide_bytes / 1e6:,.1f} MB"
        return f"experts: {self.format}, {self.bits:.4g} bits a weight, {size}"


class QuantizedExperts(nn.Module):
    """`Experts` whose matrices are stored in the format `name`: buffers, beside the form and the biases of `experts`.
    `dispatch.apply` applies them on every backend."""

    up_values: Tensor
    up_scales: Tensor
    down_values: Tensor
    down_scales: Tensor

    def __init__(self, name: str, experts: Experts, w_up: Quantized, w_down: Quantized) -> None:
        super().__init__()
        self.format, self.form = name, experts.form
        self.up_bias_EF, self.down_bias_ED = experts.up_bias_EF, experts.down_bias_ED
        self._kind = type(w_up)
        for key, w in (("up", w_up), ("down", w_down)):
            self.register_buffer(f"{key}_values", w.values)
            self.register_buffer(f"{key}_scales", w.scales)

    def weights(self) -> tuple[Quantized, Quantized]:
        """w_up and w_down as they are at this moment, wherever the module was moved."""
        return self._kind(self.up_values, self.up_scales), self._kind(self.down_values, self.down_scales)


def check_storable(cfg: ModelConfig, name: str) -> None:
    """Raises `BadInput` for experts=`name` that is no format, and for a model whose routed experts do not fit into it,
    or that has none. Nothing is read for it."""
    OneOf(*FORMATS).check("experts", name)
    if cfg.moe is None:
        raise BadInput(f"experts={name} stores routed experts in few bits, and this model is dense: it has none.")
    expert = ("widths", set(cfg.moe.widths)) if cfg.moe.widths else ("d_expert", {cfg.moe.d_expert})
    if cfg.moe.precision == "fp8" and name != "fp8":
        raise BadInput(
            f"experts={name} has no products in fp8, and model.moe.precision is fp8: accepted is experts=fp8."
        )
    for key, widths in (("d_model", {cfg.d_model}), (f"moe.{expert[0]}", expert[1])):
        for width in sorted(widths):
            try:
                FORMATS[name](torch.zeros(1, 1, width))
            except ValueError as error:
                raise BadInput(f"experts={name} cannot store model.{key}={width}: {error}") from error


def stacks_on_meta() -> RemovableHandle:
    """In this context new `Experts` have the shapes of their matrices and no memory for them."""

    def forget(module: nn.Module, name: str, p: nn.Parameter) -> nn.Parameter | None:
        return nn.Parameter(p.to("meta")) if isinstance(module, Experts) and name in MATRICES else None

    return register_module_parameter_registration_hook(forget)  # type: ignore[arg-type]  # what it returns is taken


@torch.no_grad()
def store(model: nn.Module, name: str, read: Callable[[str], Tensor]) -> None:
    """Put quantised experts, in the format `name`, in place of all that `model` has; `read` gives a matrix stack (E, N,
    M) of theirs by its name in the model. One of them is in memory at a time, beside what is stored. Raises `BadInput`
    naming the weight that the format cannot hold."""
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    for path, experts in stacks.items():
        w_up, w_down = (_quantized(f"{path}.{matrix}", name, read) for matrix in MATRICES)
        model.set_submodule(path, QuantizedExperts(name, experts, w_up, w_down))


def _quantized(weight: str, name: str, read: Callable[[str], Tensor]) -> Quantized:
    """Expert by expert, because on its way a matrix takes many times its memory."""
    try:
        parts = [FORMATS[name](w_NM[None]) for w_NM in read(weight)]
    except ValueError as error:
        raise BadInput(f"experts={name} cannot store the weight {weight}: {error}") from error
    return type(parts[0])(*(torch.cat(column) for column in zip(*parts, strict=True)))


def storage(model: nn.Module) -> Storage | None:
    """What the experts' matrices take; None where they are stored as they were trained."""
    stacks = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    if not stacks:
        return None
    matrices = [w for stack in stacks for w in stack.weights()]
    n_weights = sum(w.shape.numel() for w in matrices)
    n_bytes = sum(tensor.nbytes for w in matrices for tensor in w)
    wide = next(model.parameters()).element_size()
    return Storage(stacks[0].format, 8 * n_bytes / n_weights, n_bytes, wide * n_weights)


def round_trip(w_ENM: Tensor, name: str) -> Tensor:
    """Stacked matrices as the format gives them back, in float32. Raises `ValueError` as the format does."""
    return dequantize(FORMATS[name](w_ENM), torch.float32)


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Stacked matrices of MXFP4 as checkpoints of gpt-oss have them, (E, N, G, 16) and (E, N, G) uint8, widened:
    -> (E, N, 32 G) bfloat16, exactly, where it holds them."""
    return dequantize(Mxfp4(blocks, scales), torch.bfloat16)


def from_fp8(values: Tensor, scales: Tensor) -> Tensor:
    """Matrices of E4M3 as checkpoints of DeepSeek-V3 have them, `weight` (..., N, M) and `weight_scale_inv` (...,
    ceil(N / 128), ceil(M / 128)), widened: -> (..., N, M) bfloat16, exactly where the scales are powers of two."""
    return widen(values, scales.float(), torch.bfloat16)
