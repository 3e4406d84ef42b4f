"""Matrices that a folder holds in few bits, as two tensors: which belong together, and what they are read as.

    mxfp4    X_blocks, X_scales              the experts of gpt-oss
    fp8      X.weight, X.weight_scale_inv    of other families (DeepSeek-V3, 2412.19437); a scale for 128 by 128

They are widened to bfloat16 as they are read, which is exact but for scales of fp8 that are no powers of two. No family
knows of it: its map has the wide tensor's name. `quantization_config` says how products are meant to be computed and
which modules are wide, and the tensors themselves say what they are.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from moe.errors import BadInput
from moe.model.quantized import from_fp8, from_mxfp4
from moe.run import streamed
from moe.run.streamed import Place

BLOCK = 128  # numbers of fp8 that share a scale, along either side
# What quantization_config of fp8 must say where it says something; and what changes no weight.
_FP8 = {"weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3", "activation_scheme": "dynamic", "expert_dtype": "fp8"}
_ASIDE = ("quant_method", "modules_to_not_convert", "ignored_layers", "modules_to_convert", "scale_fmt", "dequantize")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")  # of fp8


class Format(NamedTuple):
    """What the two tensors are called after the wide one, and how it is made of them."""

    values: str
    scales: str
    widen: Callable[[Tensor, Tensor], Tensor]


MXFP4 = Format("_blocks", "_scales", lambda blocks, scales: from_mxfp4(blocks, scales).mT)
FP8 = Format("", "_scale_inv", from_fp8)


class Packed(NamedTuple):
    """Where a matrix in few bits, or a stack of them, is; `shape` and `dtype` are of what it is read as."""

    values: Place
    scales: Place
    shape: tuple[int, ...]
    format: Format

    @property
    def dtype(self) -> str:
        """As a file names it."""
        return "BF16"

    @property
    def path(self) -> Path:
        """Of the file with its values."""
        return self.values.path


Stored: TypeAlias = Place | Packed


def pop_method(tree: dict[str, Any], model_type: str) -> None:
    """Pop `quantization_config` from a config.json. Raises `BadInput` naming what is not read here."""
    method, accepted = tree.pop("quantization_config", None), "mxfp4" if model_type == "gpt_oss" else "fp8"
    if method is None:
        return
    if not isinstance(method, dict):
        raise BadInput(f"quantization_config={method!r} must be a group of settings.")
    if (name := method.get("quant_method")) != accepted:
        raise BadInput(
            f"quantization_config.quant_method={name!r} is not supported in a {model_type}: accepted is {accepted}."
        )
    for key, value in method.items() if accepted == "fp8" else ():
        if value != _FP8.get(key, value) or (value and key not in (*_FP8, *_ASIDE)):
            needed = _FP8.get(key, "no such key")
            raise BadInput(f"quantization_config.{key}={value!r} is not supported: accepted is {needed}.")


def packed(places: Mapping[str, Place]) -> dict[str, Stored]:
    """The same places, with one for every two tensors that belong together, under the name of what they stand for.
    Raises `BadInput` for two that do not fit, and for one of fp8 without the other."""
    told: dict[str, Stored] = dict(places)
    for name, place in places.items():
        if (stem := name.removesuffix(MXFP4.values)) != name and (scales := places.get(stem + MXFP4.scales)):
            if place.dtype == scales.dtype == "U8":
                told[stem] = _mxfp4(stem, place, scales)
                del told[name], told[stem + MXFP4.scales]
        elif place.dtype == "F8_E4M3" and name + FP8.scales not in places:
            raise BadInput(f"{place.path}: tensor {name} is F8_E4M3, and {name}{FP8.scales} is missing.")
        elif (stem := name.removesuffix(FP8.scales)) != name:
            told[stem] = _fp8(stem, places.get(stem), place)
            del told[name]
    return told


def _mxfp4(stem: str, blocks: Place, scales: Place) -> Packed:
    """Of matrices (in, out), which are packed by (out, in)."""
    if len(scales.shape) != 3 or blocks.shape != (*scales.shape, 16):
        raise BadInput(
            f"{blocks.path}: tensor {stem}_blocks has shape {blocks.shape}, and {stem}_scales {scales.shape}: accepted "
            "are (E, N, G, 16) and (E, N, G), of MXFP4."
        )
    n_experts, n_rows, n_groups = scales.shape
    return Packed(blocks, scales, (n_experts, 32 * n_groups, n_rows), MXFP4)


def _fp8(stem: str, values: Place | None, scales: Place) -> Packed:
    name = stem + FP8.scales
    if values is None or values.dtype != "F8_E4M3":
        told = "is missing" if values is None else f"is {values.dtype}"
        raise BadInput(f"{scales.path}: tensor {name} is there, and {stem} {told}: accepted is F8_E4M3.")
    if scales.dtype not in _SCALES:
        raise BadInput(f"{scales.path}: tensor {name} is {scales.dtype}; accepted are {', '.join(_SCALES)}.")
    needed = (*values.shape[:-2], *(-(-length // BLOCK) for length in values.shape[-2:]))
    if len(needed) < 2 or scales.shape != needed:
        raise BadInput(
            f"{scales.path}: tensor {name} has shape {scales.shape}, and {stem} {values.shape}: accepted are matrices "
            f"with a scale for every {BLOCK} by {BLOCK} numbers."
        )
    return Packed(values, scales, values.shape, FP8)


def read(name: str, place: Stored) -> Tensor:
    """The tensor, in its own dtype, a packed one in bfloat16. Raises `BadInput` where the file ends before it does."""
    if isinstance(place, Place):
        return streamed.read(name, place)
    values, scales, _, form = place
    return form.widen(streamed.read(name + form.values, values), streamed.read(name + form.scales, scales))
