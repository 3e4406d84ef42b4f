"""What other programs recorded of routing, as a trace.

sglang    the expert distribution recorder's per_token file: .pt (tensors and plain values alone; a pickle of anything
          else is refused) or the same names in .npz. For every forward pass `topk_ids_of_layer` (L, T, K), -1 where
          nothing was recorded, `input_ids` and `positions`. Experts are physical: `last_physical_to_logical_map` is
          applied.
vllm      routed experts that a response returned, [token, layer, K]: .npy, .npz (`routed_experts`, and `input_ids` if
          they are known; what `export=true` writes), or JSON, also a line per response: base64 of int32 with its
          `shape`, as SGLang's responses have them too.
megatron  the router trace's JSONL: for every step and layer `top_indices` (T, K). Records of a step and a layer are
          joined in their order; of blocks `decoder` is read. Files beside it (hidden states, logits) are left alone.

None of them has weights, probabilities or losses: these columns are NaN. A token or position that is not known is -1. A
document is a run of positions that follow each other. A negative expert is none.

Letters beyond the glossary: L layers, P places of experts on devices.
"""

import base64
import binascii
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moe.analysis.trace import About, Batch, Writer
from moe.errors import BadInput
from moe.routing.contract import UNUSED

UNKNOWN = -1  # a token or a position
DOMAIN = "record"


class Pass(NamedTuple):
    """Tokens that went through a model together; `layers` by their numbers."""

    token_T: np.ndarray
    pos_T: np.ndarray
    expert_TLK: np.ndarray
    layers: list[int]


def write_trace(path: Path, kind: str, folder: Path, n_experts: int = 0) -> Writer:
    """Write the trace of a file of this kind. `n_experts` of a layer; 0: as many as its numbers tell. Raises `BadInput`
    for a file that is damaged, of another kind, a pickle of more than tensors, or names an expert that there is not."""
    try:
        passes = [trimmed(one) for one in READERS[kind](path)]
    except OSError as error:
        raise BadInput(f"records={path} cannot be read ({error.strerror or error}).") from error
    passes = [one for one in passes if len(one.token_T)]
    if not passes:
        raise BadInput(f"records={path} has no token that was routed.")
    about = about_of(path, kind, passes, n_experts)
    with Writer(folder, about) as writer:
        for n_docs, one in zip(documents(passes), passes, strict=True):
            writer.add(batch_of(one, n_docs, about.k))
    return writer


def about_of(path: Path, kind: str, passes: list[Pass], n_experts: int) -> About:
    """What is known of the model. Raises `BadInput` where passes are of different ones."""
    layers, k = passes[0].layers, max(one.expert_TLK.shape[2] for one in passes)
    if any(one.layers != layers for one in passes):
        raise BadInput(f"records={path} has layers {layers} in one pass and others in another: it is of two models.")
    largest = max(int(one.expert_TLK.max()) for one in passes)
    if n_experts and largest >= n_experts:
        raise BadInput(f"records={path} names expert {largest}, and n_experts={n_experts}.")
    return About(
        run=str(path),
        checkpoint="",
        tokenizer="",
        vocab_size=max(int(one.token_T.max()) for one in passes) + 1,
        context=max(len(one.token_T) for one in passes),
        layers=layers,
        n_experts=[n_experts or largest + 1] * len(layers),
        k=k,
        domains=[DOMAIN],
        sampling=f"{len(passes)} pass{'es' if len(passes) > 1 else ''} that {kind} recorded",
    )


def trimmed(one: Pass) -> Pass:
    """Without layers and choices that are nobody's: dense layers, and what a record has room for beyond K."""
    _, layers, places = np.nonzero(one.expert_TLK >= 0)
    kept, width = np.unique(layers), places.max(initial=-1) + 1
    return one._replace(expert_TLK=one.expert_TLK[:, kept, :width], layers=[one.layers[i] for i in kept])


def documents(passes: list[Pass]) -> Iterator[int]:
    """How many documents there are before each pass."""
    n_docs = 0
    for one in passes:
        yield n_docs
        n_docs += int(starts(one).sum())


def starts(one: Pass) -> np.ndarray:
    """Where a document begins, (T,) bool. Where positions are not known, with the pass alone."""
    return np.diff(one.pos_T, prepend=one.pos_T[0] - 2) != np.where(one.pos_T == UNKNOWN, 0, 1)


def batch_of(one: Pass, n_docs: int, k: int) -> Batch:
    """A pass as one window of a trace."""
    begins_T, (t, n_layers, width) = starts(one), one.expert_TLK.shape
    # The next token is known inside a document.
    next_T = np.where(np.append(begins_T[1:], True), UNKNOWN, np.append(one.token_T[1:], UNKNOWN))
    expert_TLK = np.pad(one.expert_TLK, ((0, 0), (0, 0), (0, k - width)), constant_values=UNUSED)
    nan = lambda *shape: np.full(shape, np.nan, np.float32)
    doc_T = n_docs + np.cumsum(begins_T) - 1
    return Batch(
        tokens_BS=one.token_T[None],
        targets_BS=next_T[None],
        domain_BS=np.zeros((1, t), np.int64),
        doc_BS=doc_T[None],
        pos_BS=one.pos_T[None],
        loss_BS=nan(1, t),
        expert_TLK=expert_TLK,
        weight_TLK=nan(t, n_layers, k),
        margin_TL=nan(t, n_layers),
        entropy_TL=nan(t, n_layers),
    )


def read_sglang(path: Path) -> Iterator[Pass]:
    """The passes of a per_token record."""
    tree = _pt(path) if path.suffix == ".pt" else {"records": [_npz(path)]}
    records = tree.get("records") if isinstance(tree, dict) else None
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise BadInput(f"records={path} is no record of sglang: it has no list of `records`.")
    for i, one in enumerate(records):
        where = f"records={path}, pass {i}"
        if "topk_ids_of_layer" not in one:
            raise BadInput(f"{where} has no topk_ids_of_layer: the recorder's mode must be per_token.")
        expert_LTK = _ids(where, "topk_ids_of_layer", one["topk_ids_of_layer"], 3)
        physical = one.get("last_physical_to_logical_map", tree.get("last_physical_to_logical_map"))
        if physical is not None:
            expert_LTK = _logical(where, expert_LTK, _ids(where, "last_physical_to_logical_map", physical, 2))
        expert_TLK = np.where(expert_LTK < 0, UNUSED, expert_LTK).transpose(1, 0, 2)
        yield _pass(where, one, expert_TLK, "input_ids", 0)


def _logical(where: str, expert_LTK: np.ndarray, logical_LP: np.ndarray) -> np.ndarray:
    """Experts by the numbers that the model has for them. Raises `BadInput` for a map of another model."""
    if len(logical_LP) != len(expert_LTK) or expert_LTK.max(initial=-1) >= logical_LP.shape[1]:
        raise BadInput(f"{where} has a last_physical_to_logical_map {logical_LP.shape} that does not fit its experts.")
    layer_L11 = np.arange(len(expert_LTK))[:, None, None]
    return np.where(expert_LTK < 0, expert_LTK, logical_LP[layer_L11, expert_LTK.clip(0)])


def read_vllm(path: Path) -> Iterator[Pass]:
    """The responses of a file, each a pass."""
    match path.suffix:
        case ".npy":
            yield _pass(f"records={path}", {}, _ids(f"records={path}", "it", _npz(path), 3), "", 0)
        case ".npz":
            yield _response(f"records={path}", _npz(path))
        case _:
            for number, tree in _json(path):
                yield _response(f"records={path}, line {number}", tree)


def _response(where: str, tree: Any) -> Pass:
    """A response's routed experts: an array, nested lists, or base64 and its shape. Raises `BadInput`."""
    if isinstance(tree, dict) and isinstance(tree.get("meta_info"), dict):  # where SGLang has them
        tree = tree | tree["meta_info"]
    if not isinstance(tree, dict) or tree.get("routed_experts") is None:
        raise BadInput(f"{where} has no routed_experts.")
    routed, shape = tree["routed_experts"], tree.get("shape")
    if isinstance(routed, str):
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n >= 0 for n in shape):
            raise BadInput(f"{where} has routed_experts in base64: `shape` must say [tokens, layers, K].")
        try:
            data = base64.b64decode(routed, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadInput(f"{where} has routed_experts that are no base64 ({error}).") from error
        if len(data) != 4 * np.prod(shape, dtype=object):
            raise BadInput(f"{where} has routed_experts of {len(data)} bytes, and int32 {shape} has other ones.")
        routed = np.frombuffer(data, "<i4").reshape(shape)
    start = tree.get("routed_experts_start_len", 0)
    if type(start) is not int or start < 0:
        raise BadInput(f"{where} has routed_experts_start_len={start!r}, which is no position.")
    return _pass(where, tree, _ids(where, "routed_experts", routed, 3), "input_ids", start)


def read_megatron(path: Path) -> Iterator[Pass]:
    """The steps of a router trace, each a pass."""
    steps: dict[int, dict[int, list[np.ndarray]]] = {}
    for number, tree in _json(path):
        where = f"records={path}, line {number}"
        match tree:
            case {"step": int(step), "layer": int(layer), "top_indices": list(rows)}:
                if tree.get("block", "decoder") != "decoder":
                    continue
                expert_TK = _ids(where, "top_indices", rows or np.zeros((0, tree.get("topk", 0)), np.int64), 2)
                if len(expert_TK) != tree.get("num_tokens", len(expert_TK)):
                    raise BadInput(f"{where} has {len(expert_TK)} top_indices, and num_tokens={tree['num_tokens']}.")
                steps.setdefault(step, {}).setdefault(layer, []).append(expert_TK)
            case _:
                raise BadInput(f"{where} is no record of megatron: it has not step, layer and top_indices.")
    for step, parts in steps.items():
        where, layers = f"records={path}, step {step}", sorted(parts)
        try:
            expert_TLK = np.stack([np.concatenate(parts[layer]) for layer in layers], 1)
        except ValueError as error:
            raise BadInput(f"{where} has not the same tokens and K in all of its layers.") from error
        yield _pass(where, {}, expert_TLK, "", 0)._replace(layers=layers)


READERS: dict[str, Callable[[Path], Iterator[Pass]]] = {
    "sglang": read_sglang,
    "vllm": read_vllm,
    "megatron": read_megatron,
}


def _pass(where: str, tree: dict[str, Any], expert_TLK: np.ndarray, tokens: str, start: int) -> Pass:
    """A pass whose token ids are under that name, if they are known, from position `start` on. Raises `BadInput` for
    ids or positions of other tokens."""
    t, n_layers, _ = expert_TLK.shape
    token_T = pos_T = np.full(t, UNKNOWN)
    if tree.get(tokens) is not None:
        token_T = _ids(where, tokens, tree[tokens], 1)[start : start + t]  # the last one that was generated has none
        pos_T = start + np.arange(t)
    if tree.get("positions") is not None:
        pos_T = _ids(where, "positions", tree["positions"], 1)
    if len(token_T) != t or len(pos_T) != t:
        raise BadInput(f"{where} has {t} routed tokens, {len(token_T)} {tokens} and {len(pos_T)} positions.")
    return Pass(token_T, pos_T, expert_TLK, list(range(n_layers)))


def _ids(where: str, name: str, values: Any, n_dims: int) -> np.ndarray:
    """Whole numbers as int64 of so many dimensions. Raises `BadInput` for anything else."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError, OverflowError):  # ragged lists; tensors that are no plain ones
        array = np.zeros(0)
    empty = isinstance(values, list) and not values
    if array.ndim != n_dims or not (empty or np.issubdtype(array.dtype, np.integer)):
        raise BadInput(f"{where}: {name} must be whole numbers of {n_dims} dimensions.")
    array = array.astype(np.int64)
    if array.size and (array.max() >= 2**31 or array.min() < -(2**31)):
        raise BadInput(f"{where}: {name} has {array.max()}, which is no number of a token or an expert.")
    return array


def _pt(path: Path) -> Any:
    """A .pt file of tensors and plain values. Raises `BadInput` for one that holds more, or is damaged."""
    path.stat()
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fails in every way that there is
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        weights = "Weights only load failed" in str(error)
        why = "it holds more than tensors and plain values, which is never opened" if weights else reason.rstrip(".")
        raise BadInput(f"records={path} is refused: {why}.") from None


def _npz(path: Path) -> Any:
    """The arrays of an .npz by name, or that of an .npy. Raises `BadInput` for a damaged one, and for pickles."""
    try:
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BadInput(f"records={path} is no whole file of arrays ({str(error).splitlines()[0]}).") from error


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a JSONL file by number from 1, or a JSON file's one value, or its list's. Raises `BadInput`."""
    if path.suffix == ".json":
        tree = _parsed(path, 1, path.read_bytes())
        yield from enumerate(tree if isinstance(tree, list) else [tree], 1)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parsed(path, number, line)


def _parsed(path: Path, number: int, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"records={path}, line {number} is no JSON ({error}).") from error
