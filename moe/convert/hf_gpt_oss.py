"""What gpt-oss has beside the other families: settings of config.json, tensors of a block, and experts in MXFP4.

Its published files hold experts in MXFP4 (`quantization_config`, tensors `*_blocks` and `*_scales`). They are widened
to bfloat16, which is exact, as they are read; `load_run(..., experts="mxfp4")` has the same numbers in as few bits.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from moe.config.model import ModelConfig
from moe.errors import BadInput
from moe.model.quantized import from_mxfp4
from moe.run import streamed
from moe.run.streamed import Place

# What a missing group of RoPE settings means.
_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
_ASIDE = ("experts_per_token", "initial_context_length")  # other names of keys that are there


def pop_gpt_oss(tree: dict[str, Any]) -> None:
    """Pop from a config.json what is fixed here, and put in what a missing key means. Raises `BadInput` naming a key
    whose value this model does not have."""
    for key, needed in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if (value := tree.pop(key, needed)) != needed:
            raise BadInput(f"{key}={value!r} is not supported in a gpt_oss: accepted is {needed}.")
    method = tree.pop("quantization_config", None)  # the tensors themselves say which are stored so
    if method is not None and not (isinstance(method, dict) and method.get("quant_method") == "mxfp4"):
        raise BadInput(f"quantization_config={method!r} is not supported in a gpt_oss: accepted is quant_method=mxfp4.")
    for key in _ASIDE:
        tree.pop(key, None)
    if not tree.get("rope_parameters") and not tree.get("rope_scaling"):
        tree["rope_parameters"] = dict(_YARN)


def gpt_oss_to_hf(cfg: ModelConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that would mean something else if they were missing from a config.json that has those in `tree`."""
    plain = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    added: dict[str, Any] = {} if "rope_parameters" in tree else {"rope_parameters": plain}
    if not cfg.window:  # its class always makes windows: one as long as the context is none
        added |= {"sliding_window": cfg.context, "layer_types": ["full_attention"] * cfg.n_layers}
    return added


def gpt_oss_map(state: Mapping[str, Tensor], ours: str, theirs: str) -> Iterator[tuple[str, list[Tensor]]]:
    """The tensors of a block beside norms and attention's maps, as `tensor_map` gives them: experts as matrices (in,
    out), their gate and up channels in turns, as here."""
    yield f"{theirs}self_attn.sinks", [state[f"{ours}attn.sinks"]]
    yield f"{theirs}mlp.router.weight", [state[f"{ours}mlp.router.w_ED"]]
    yield f"{theirs}mlp.router.bias", [state[f"{ours}mlp.router.logit_bias"]]
    for name, matrix, bias in (("gate_up", "w_up_EFD", "up_bias_EF"), ("down", "w_down_EDF", "down_bias_ED")):
        yield f"{theirs}mlp.experts.{name}_proj", [state[f"{ours}mlp.experts.{matrix}"].transpose(1, 2)]
        yield f"{theirs}mlp.experts.{name}_proj_bias", [state[f"{ours}mlp.experts.{bias}"]]


class Packed(NamedTuple):
    """Where a stack of matrices in MXFP4 is, and what it is read as: `shape` and `dtype` are of the wide one."""

    blocks: Place  # (E, N, G, 16)
    scales: Place  # (E, N, G)

    @property
    def dtype(self) -> str:
        """As a file names it."""
        return "BF16"

    @property
    def path(self) -> Path:
        """Of the file with its blocks."""
        return self.blocks.path

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, M, N): its folder's matrices are (in, out), and are packed by (out, in)."""
        *stack, n_rows, n_groups = self.scales.shape
        return (*stack, 32 * n_groups, n_rows)


Stored: TypeAlias = Place | Packed


def packed(places: Mapping[str, Place]) -> dict[str, Stored]:
    """The same places, with one for every pair of `*_blocks` and `*_scales` under the name of what they stand for.
    Raises `BadInput` for a pair that does not belong together."""
    told: dict[str, Stored] = dict(places)
    for name, blocks in places.items():
        stem, scales = name.removesuffix("_blocks"), places.get(name.removesuffix("_blocks") + "_scales")
        if stem == name or scales is None or {blocks.dtype, scales.dtype} != {"U8"}:
            continue
        if len(scales.shape) != 3 or blocks.shape != (*scales.shape, 16):
            raise BadInput(
                f"{blocks.path}: tensor {name} has shape {blocks.shape}, and {stem}_scales {scales.shape}: accepted "
                "are (E, N, G, 16) and (E, N, G), of MXFP4."
            )
        del told[name], told[f"{stem}_scales"]
        told[stem] = Packed(blocks, scales)
    return told


def read(name: str, place: Stored) -> Tensor:
    """The tensor, in its own dtype, a packed one in bfloat16. Raises `BadInput` where the file ends before it does."""
    if isinstance(place, Place):
        return streamed.read(name, place)
    blocks, scales = streamed.read(f"{name}_blocks", place.blocks), streamed.read(f"{name}_scales", place.scales)
    return from_mxfp4(blocks, scales).mT
