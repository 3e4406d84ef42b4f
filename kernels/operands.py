"""What the kernels, and the torch and reference backends beside them, ask of their operands; a refusal is one sentence.

Types, shapes, devices and layout are looked at on every call: none of them waits for the device. What the rows say (an
expert that exists, tokens in order) is read in a debug build alone, TRITON_DEBUG=1, which does wait.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad

from kernels.form import Form

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCORES = ("softmax", "sigmoid", "sqrt_softplus")

Operand = tuple[Tensor | None, str, tuple[torch.dtype, ...]]  # a letter per dimension; the types it may have


def fit(name: str, **operands: Operand) -> None:
    """Raises `ValueError` unless all operands (None is not there) have the dimensions of their letters, which mean one
    size each, one of their types, and lie contiguously on one device. `name` is what takes them."""
    # Nearly always they have. That is seen first and without a word, because the host looks before every kernel.
    sizes: dict[str, int] = {}
    device = None
    for tensor, letters, dtypes in operands.values():
        if tensor is None:
            continue
        names, shape, device = letters.split(), tensor.shape, device or tensor.device
        if len(names) != len(shape) or tensor.dtype not in dtypes:
            return _refuse(name, operands)
        if not tensor.is_contiguous() or tensor.device != device:
            return _refuse(name, operands)
        for letter, size in zip(names, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return _refuse(name, operands)


def _refuse(name: str, operands: dict[str, Operand]) -> None:
    """`fit`'s sentence for what does not."""
    sizes: dict[str, int] = {}
    present = {key: (t, letters, dtypes) for key, (t, letters, dtypes) in operands.items() if t is not None}
    for tensor, letters, _ in present.values():
        names = letters.split()
        bound = [sizes.setdefault(letter, size) for letter, size in zip(names, tensor.shape, strict=False)]
        if len(names) != tensor.dim() or bound != list(tensor.shape):
            wanted = ", ".join(f"{key} ({', '.join(letters.split())})" for key, (_, letters, _) in present.items())
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor, _, _ in present.values())
            raise ValueError(f"{name} takes {wanted}; they are {shapes}.")
    for key, (tensor, _, dtypes) in present.items():
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} takes {key} in {_listed(dtypes)}; it is {tensor.dtype}.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} takes contiguous operands; {key} is not.")
    one_device(name, *(tensor for tensor, _, _ in present.values()))


def one_device(name: str, *tensors: Tensor | None) -> None:
    """Raises `ValueError` for tensors on several devices."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"{name} takes operands on one device; they are on {sorted(map(str, devices))}.")


def ids(name: str, expert: Tensor, token_N: Tensor | None = None) -> None:
    """Raises `ValueError` for numbers of experts and tokens that are not int64."""
    if expert.dtype != torch.int64 or (token_N is not None and token_N.dtype != torch.int64):
        tokens = "" if token_N is None else f", {token_N.dtype}"
        raise ValueError(
            f"{name} takes expert{' and token_N' if tokens else ''} in torch.int64; they are {expert.dtype}{tokens}."
        )


def choice(name: str, logits_TE: Tensor, k: int, score: str, bias_E: Tensor | None, groups: int, k_groups: int) -> None:
    """What every gate asks, as `reference.gate` has them. Raises `ValueError`."""
    if score not in SCORES:
        raise ValueError(f"score={score!r} is not one of {', '.join(SCORES)}")
    if logits_TE.dim() != 2 or (bias_E is not None and bias_E.shape != logits_TE.shape[1:]):
        shapes = f"{tuple(logits_TE.shape)}, {None if bias_E is None else tuple(bias_E.shape)}"
        raise ValueError(f"{name} takes logits (T, E) and a bias (E,) or None; they are {shapes}.")
    if logits_TE.dtype not in FLOATS or (bias_E is not None and bias_E.dtype not in FLOATS):
        kinds = f"{logits_TE.dtype}, {None if bias_E is None else bias_E.dtype}"
        raise ValueError(f"{name} takes logits and a bias in one of {_listed(FLOATS)}; they are {kinds}.")
    one_device(name, logits_TE, bias_E)
    n_experts = logits_TE.shape[1]
    if groups < 1 or n_experts % groups or not 0 < k <= min(k_groups, groups) * (n_experts // groups):
        raise ValueError(f"k={k} cannot be chosen in {k_groups} of {groups} equal groups of {n_experts} experts.")


def layer(
    name: str, x_TD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, token_N: Tensor | None, expert: Tensor,
    weight: Tensor, form: Form, b_up_EF: Tensor | None, b_down_ED: Tensor | None, mixed: bool = False,
) -> None:  # fmt: skip
    """What every backend asks of a layer's operands, as `fused.experts` has them; mixed: x, the weights and the biases
    may be of different types. Raises `ValueError`."""
    # What kind of operands they are, wherever they lie.
    present = [t for t in (b_up_EF, b_down_ED) if t is not None]
    kinds = (x_TD.dtype, w_up_EFD.dtype, w_down_EDF.dtype, *(bias.dtype for bias in present))
    if not set(kinds) <= set(FLOATS) or not (mixed or len(set(kinds)) == 1):
        raise ValueError(
            f"{name} takes x and both weights{', and biases' if present else ''} in one of {_listed(FLOATS)}; they are "
            f"{', '.join(map(str, kinds))}."
        )
    ids(name, expert, token_N)
    if weight.dtype not in FLOATS:
        raise ValueError(f"{name} takes the rows' weights in one of {_listed(FLOATS)}; they are {weight.dtype}.")
    one_device(name, x_TD, w_up_EFD, w_down_EDF, expert, weight, token_N, *present)
    if form.weigh_input and b_up_EF is not None:
        raise ValueError(f"{name} takes weights on the experts' input (weigh_input) without biases of w_up.")

    # Shapes: of the layer and its weights, then of the routing.
    e, d, f = w_up_EFD.shape[:1], x_TD.shape[1:], w_down_EDF.shape[2:]
    gate = form.width(1)
    width = tuple(gate * size for size in f)
    if (len(d), len(f)) != (1, 1) or w_up_EFD.shape != (*e, *width, *d) or w_down_EDF.shape != (*e, *d, *f):
        raise ValueError(
            f"{name} takes x (T, D), w_up (E, {gate}F, D), w_down (E, D, F); they are {tuple(x_TD.shape)}, "
            f"{tuple(w_up_EFD.shape)}, {tuple(w_down_EDF.shape)}."
        )
    for key, bias, size in (("b_up", b_up_EF, (*e, *width)), ("b_down", b_down_ED, (*e, *d))):
        if bias is not None and bias.shape != size:
            raise ValueError(f"{name} takes {key} {size}, a number for each row; it is {tuple(bias.shape)}.")
    rows = (len(x_TD), *expert.shape[-1:]) if token_N is None else (token_N.numel(),)
    if expert.shape != weight.shape or expert.shape != rows or (token_N is not None and token_N.dim() != 1):
        raise ValueError(
            f"{name} takes expert and weight (T, K), or (N,) with token_N (N,); they are "
            f"{tuple(expert.shape)}, {tuple(weight.shape)}, {None if token_N is None else tuple(token_N.shape)}."
        )


def contiguous(name: str, **biases: Tensor | None) -> None:
    """Raises `ValueError` for a bias whose numbers do not lie side by side."""
    for key, bias in biases.items():
        if bias is not None and not bias.is_contiguous():
            raise ValueError(f"{name} takes a contiguous {key}; its strides are {tuple(bias.stride())}.")


def starts(token_N: Tensor, n_tokens: int) -> Tensor:
    """Where every token's rows begin among rows in token order, and where the last ones end: (N,) -> (T + 1,) int64."""
    return torch.searchsorted(token_N, torch.arange(n_tokens + 1, device=token_N.device))


def dense(w: Tensor) -> bool:
    """Whether a stack of matrices (E, ., .) lies without gaps, each stored by rows or by columns."""
    return w.is_contiguous() or w.mT.is_contiguous()


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def under_autocast(x: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    """x and these as autocast would have them for a matmul, in its dtype; without it, as they are."""
    kind, tensors = x.device.type, (x, *rest)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def refuse_tangents(name: str, *tensors: Tensor | None) -> None:
    """Raises `NotImplementedError` for tensors with a forward-mode tangent, which a custom op would lose."""
    if _has_tangent(*(tensor for tensor in tensors if tensor is not None)):
        raise NotImplementedError(f"{name} has no forward-mode derivative; dispatch=reference does.")


def _has_tangent(*tensors: Tensor) -> bool:
    """At any level: within torch.func.jvp of one thing, tensors may belong to a jvp of another around it."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return True
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    inner = pyfunctorch.retrieve_current_functorch_interpreter()
    with inner.lower():
        wrapped = [functorch.maybe_get_level(tensor) == inner.level() for tensor in tensors]
        unwrapped = (
            functorch.get_unwrapped(tensor) if of_inner else tensor
            for of_inner, tensor in zip(wrapped, tensors, strict=True)
        )
        return _has_tangent(*unwrapped)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow, so that something has to be kept for it."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def gradients_like(tensors: tuple[Tensor | None, ...], wanted: Sequence[bool]) -> tuple[Any, ...]:
    """Tensors as these where they are wanted, and empty ones elsewhere."""
    (first, *_) = tensors
    assert first is not None
    return tuple(
        torch.empty_like(tensor) if want and tensor is not None else (first if tensor is None else tensor).new_empty(0)
        for tensor, want in zip(tensors, wanted, strict=True)
    )


def debug() -> bool:
    """Whether this is a debug build: what the rows say is read, on every backend."""
    return os.environ.get("TRITON_DEBUG", "").lower() in ("1", "true", "on", "yes", "y")


debug._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in moe.model.dispatch: the answer is traced


def rows(name: str, expert: Tensor, token_N: Tensor | None, n_tokens: int, n_experts: int) -> Tensor:
    """The expert of every row, as given. Raises `ValueError` in a debug build for an id of E or more, for tokens that
    do not ascend, and for one that is not there; negative ids are no expert."""
    reads = debug() and not expert.is_meta
    return _read_rows(name, expert, token_N, n_tokens, n_experts) if reads else expert


@torch.library.custom_op("switchyard::read_rows", mutates_args=())
def _read_rows(name: str, expert: Tensor, token_N: Tensor | None, n_tokens: int, n_experts: int) -> Tensor:
    # An op, so that a compiled graph reads them too: it takes what comes out of here, a copy.
    if (row := _first(expert.flatten() >= n_experts)) is not None:
        raise ValueError(f"{name} takes experts below {n_experts}; row {row} has {int(expert.flatten()[row])}.")
    if token_N is not None and (row := _first(token_N.diff() < 0)) is not None:
        before, token = token_N[row : row + 2].tolist()
        raise ValueError(f"{name} takes token_N ascending; row {row + 1} has token {token} after {before}.")
    if token_N is not None and (row := _first((token_N < 0) | (token_N >= n_tokens))) is not None:
        raise ValueError(f"{name} takes tokens 0 to {n_tokens - 1}; row {row} has {int(token_N[row])}.")
    return expert.clone()


def _first(mask_N: Tensor) -> int | None:
    """The first row that is marked."""
    return int(mask_N.int().argmax()) if mask_N.any() else None


@_read_rows.register_fake
def _(name, expert, token_N, n_tokens, n_experts):  # type: ignore[no-untyped-def]
    return torch.empty_like(expert)
