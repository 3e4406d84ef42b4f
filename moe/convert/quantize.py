"""Weights rounded to few bits, one scale for each group of neighbours in a row; arithmetic stays as it was.

    w ≈ q · s,   s = max|w| / m over the group,   q = round(w / s) in [−m, m],   m = 127 (int8) or 7 (int4)

A group is 32 to 64 neighbours along the input dimension, the most that divide it. Routers, gates, norms, biases and
learned positions are never rounded. `export_c` writes these int8 numbers, and `rounded` computes with them, or with
what another format of kernels/quantized.py stands for, as experts=mxfp4 of other commands stores it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config.model import layer_moe, moe_layers
from moe.errors import BadInput
from moe.model.experts import MixedExperts
from moe.model.quantized import FORMATS, round_trip
from moe.model.transformer import Transformer

LARGEST = {"int8": 127, "int4": 7}  # of q
DTYPES = (*LARGEST, *(name for name in FORMATS if name not in LARGEST))
GROUPS = range(64, 31, -1)  # weights that share a scale: as many of these as divide a matrix' width
MATRICES = ("weight", "w_up_EFD", "w_down_EDF")  # the last word of their names
KEPT = ("router", "shared_gate", "position", "cheap")  # modules whose matrices stay as they are


class Rounding(NamedTuple):
    """Which weights are rounded, and to what."""

    dtype: str  # one of `DTYPES`
    experts: Mapping[int, Sequence[int]] | None = None  # by layer among all layers; None: every matrix of the model

    @property
    def first(self) -> int:
        """The first block that computes otherwise."""
        return 0 if self.experts is None else min(self.experts)


def quantize(name: str, w: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """w (rows, columns) -> q (rows, columns) int8 and s (rows, columns / group) float32, computed in float32. A group
    of zeros has scale 0. Raises `BadInput` for a width that no group divides; `name` is the matrix' in the message."""
    columns, largest = w.shape[-1], LARGEST[dtype]
    size = next((size for size in GROUPS if columns % size == 0), None)
    if size is None:
        raise BadInput(f"dtype={dtype} needs groups of 32 to 64 weights, and none divides the {columns} of {name}.")
    groups = w.detach().float().unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1) / largest
    q = (groups / torch.where(scale > 0, scale, 1)[..., None]).round().clamp(-largest, largest)
    return q.to(torch.int8).flatten(-2), scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """(rows, columns) and (rows, columns / group) -> q · s, (rows, columns) float32."""
    return (q.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def nearest(name: str, w: Tensor, dtype: str) -> Tensor:
    """What a matrix, or a stack of them, becomes in one of `DTYPES`: (..., rows, columns), in float32. Raises
    `BadInput` as `quantize` does, and for what the format cannot hold."""
    if dtype in LARGEST:
        return dequantize(*quantize(name, w, dtype))
    try:
        return round_trip(w.reshape(-1, *w.shape[-2:]), dtype).view(w.shape)
    except ValueError as error:
        raise BadInput(f"dtype={dtype} cannot hold {name}: {error}") from error


@contextmanager
def rounded(model: Transformer, rounding: Rounding) -> Iterator[None]:
    """The model has rounded weights while inside, and afterwards what it had. Memory holds the weights that are rounded
    twice. Raises `BadInput` as `nearest` does, and for experts that the model has not."""
    matrices = list(_matrices(model, rounding))
    new = [nearest(name, w, rounding.dtype) for name, w in matrices]
    before = [w.clone() for _, w in matrices]
    try:
        _set(matrices, new)
        yield
    finally:
        _set(matrices, before)


@torch.no_grad()
def _set(matrices: list[tuple[str, Tensor]], values: list[Tensor]) -> None:
    for (_, w), value in zip(matrices, values, strict=True):
        w.copy_(value)


def _matrices(model: Transformer, rounding: Rounding) -> Iterator[tuple[str, Tensor]]:
    """The matrices that are rounded, by name: (rows, columns), or a stack of them for all experts of a layer."""
    if rounding.experts is None:
        for name, w in model.named_parameters():
            *modules, kind = name.split(".")
            if w.dim() > 1 and kind in MATRICES and not set(modules) & set(KEPT):
                yield name, w.detach()
        return
    for layer, experts in rounding.experts.items():
        n_experts = layer_moe(model.cfg, layer).n_experts if layer in moe_layers(model.cfg) else 0
        for expert in experts:
            if not 0 <= expert < n_experts:
                raise BadInput(f"{rounding.dtype}: layer {layer} has no expert {expert}: it has {n_experts}.")
            yield from _of_expert(model, layer, expert)


def _of_expert(model: Transformer, layer: int, expert: int) -> Iterator[tuple[str, Tensor]]:
    """The two matrices of an expert, views of its stack."""
    stack, number = model.blocks[layer].mlp.experts, expert  # type: ignore[union-attr]
    if isinstance(stack, MixedExperts):
        (width,) = torch.nonzero(stack.local_GE[:, expert] >= 0)[0].tolist()
        stack, number = stack.stacks[width], int(stack.local_GE[width, expert])
    for kind in MATRICES[1:]:
        yield f"blocks.{layer}.mlp.experts.{expert}.{kind}", getattr(stack, kind).detach()[number]
