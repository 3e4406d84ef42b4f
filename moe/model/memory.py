"""The memory that one training step asks for, found by walking it: nothing is allocated and nothing computed.

The model's own forward and backward passes run on fake tensors (torch's `FakeTensorMode`), which have shapes and no
data, and every storage that they would have is added up for as long as something holds it. So what autograd saves, what
the experts' matmuls need besides, activation checkpointing and bf16 copies of the weights are counted where they occur,
by no formula. What data alone decides is taken for its mean: every expert gets as many rows.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kernels import grouped
from kernels.form import Form
from moe.config.balance import BalanceConfig
from moe.config.model import ModelConfig
from moe.config.router import RouterConfig
from moe.model.transformer import Transformer, next_token_loss


class Memory(NamedTuple):
    """Bytes of one process that trains in float32 weights."""

    weights: int
    gradients: int
    optimizer: int  # its tensors, and the mean of the weights where one is kept
    saved: int  # by one micro-batch's forward pass for its backward pass, logits included
    logits: int  # of one micro-batch, in the dtype that the model gives them
    largest: int  # the largest single tensor beside weights, gradients and optimiser state
    copies: int  # of weights in bf16, which autocast keeps through a forward pass, and autograd for the backward pass
    # at their peak: without those copies, and every gradient gone the moment it is whole, as where devices share them
    activations: int
    # weights, optimiser state, and the most that gradients take together with activations, or with what an update makes
    peak: int
    written: int  # by all operations of one micro-batch, forward and backward
    operations: int  # how many those are, views among them


class Watcher(TorchDispatchMode):
    """Adds up the storages that operations make, until nothing holds them."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}  # counted elsewhere
        self.sizes: dict[int, int] = {}
        self.copied: set[int] = set()
        self.live = self.peak = self.largest = self.written = self.operations = 0
        self.copies = self.most_copies = self.peak_without_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = _INSIDE.get(str(func))
        if inside is not None:
            with self:  # what such an operation makes for itself is seen too
                return inside(*args, **(kwargs or {}))
        self.operations += 1
        out = func(*args, **(kwargs or {}))
        copies = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.known
        tree_map_only(Tensor, partial(self.note, copies), out)
        return out

    def note(self, copies: bool, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is a new one. `copies`: whether it is a weight in another dtype."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes or key in self.known:
            return
        self.sizes[key] = size
        if copies:
            self.copied.add(key)
            self.copies += size
        self.live, self.written = self.live + size, self.written + size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        self.most_copies = max(self.most_copies, self.copies)
        self.peak_without_copies = max(self.peak_without_copies, self.live - self.copies)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size = self.sizes.pop(key)
        self.live -= size
        if key in self.copied:
            self.copied.remove(key)
            self.copies -= size


def _adamw(model: Transformer) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


def walk(
    cfg: ModelConfig,
    router: RouterConfig,
    balance: BalanceConfig,
    batch_size: int,
    *,
    n_micro: int = 1,
    precision: str = "fp32",
    checkpoint_activations: bool = False,
    document_end: int | None = None,
    optimizer: Callable[[Transformer], torch.optim.Optimizer] = _adamw,
    average: bool = False,
) -> Memory:
    """The memory of a step of `n_micro` micro-batches of `batch_size` sequences each, on one device. `cfg.vocab_size`
    must be set. `optimizer` makes the model's optimiser, AdamW unless given; `average`: whether a mean of the weights
    is kept too. Raises whatever torch raises for a router whose rows only data can tell (`rows_vary`)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Transformer(cfg, router, balance, document_end).train()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        step = partial(_step, model, batch_size, precision, checkpoint_activations)
        kept = step(min(n_micro, 2))  # the second micro-batch finds the gradients there, and so do all after it
        for p in model.parameters():
            p.grad = None
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_let_go)
        gone = step(1)
        state, update = _update(model, optimizer(model))
    state += trained if average else 0
    peak = weights + state + max(kept.watcher.peak, trained + update)
    return Memory(
        weights, trained, state, gone.saved, gone.logits, gone.watcher.largest, gone.watcher.most_copies,
        gone.watcher.peak_without_copies, peak, gone.watcher.written, gone.watcher.operations,
    )  # fmt: skip


class _Walked(NamedTuple):
    """What a step was seen to take; `saved` and `logits` of its last micro-batch."""

    watcher: Watcher
    saved: int
    logits: int


def _step(model: Transformer, batch_size: int, precision: str, checkpoint_activations: bool, passes: int) -> _Walked:
    """Forward and backward of so many micro-batches, as `moe.train.step` takes them."""
    tokens_BS = torch.zeros(batch_size, model.cfg.context, dtype=torch.int64)
    saved = logits = 0
    with Watcher([*model.parameters(), *model.buffers(), tokens_BS]) as watcher:
        for _ in range(passes):
            before = watcher.live
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                output = model(tokens_BS, checkpoint_activations=checkpoint_activations)
            logits = output.logits_BSV.numel() * output.logits_BSV.element_size()
            total = next_token_loss(output.logits_BSV, tokens_BS)
            total = total + sum(value for layer in output.routing for value in layer.losses.values())
            del output  # as a training step does
            saved = watcher.live - before
            total.backward()
            del total
    return _Walked(watcher, saved, logits)


def _update(model: Transformer, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """What an optimiser keeps, and the most that one of its updates makes besides."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if value.dim()]  # not the step
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with Watcher([*model.parameters(), *gradients, *tensors]) as watcher:
        optimizer.step()
    return sum(value.numel() * value.element_size() for value in tensors), watcher.peak


def _let_go(p: Tensor) -> None:
    p.grad = None


def _spans(n_slots: int) -> list[grouped.Span]:
    """All slots as one expert's: how many experts share them out changes no size."""
    return [(0, 0, n_slots)] if n_slots else []


def _forward(*arguments: Any) -> Any:
    tensors, n_slots, form, keep_z = arguments[:8], arguments[9], Form(*arguments[10:-1]), arguments[-1]
    forward: Callable[..., Any] = grouped.forward
    return forward(_spans(n_slots), *tensors, n_slots, form, keep_z)


def _backward(*arguments: Any) -> Any:
    tensors, form, wanted = arguments[:10], Form(*arguments[11:-1]), arguments[-1]
    backward: Callable[..., Any] = grouped.backward
    return backward(_spans(len(tensors[2])), *tensors, form, wanted)


# Operations that are opaque to torch, by what computes them.
_INSIDE: dict[str, Callable[..., Any]] = {
    "switchyard.grouped_experts.default": _forward,
    "switchyard.grouped_experts_backward.default": _backward,
}
