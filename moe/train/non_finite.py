"""Where a number that is not finite first appeared, in one sentence."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config.run import Config
from moe.data.loader import Batch
from moe.model.transformer import Transformer
from moe.run import checkpoint
from moe.run.machine import autocast
from moe.train.state import State


def explain_non_finite(state: State, batch: Batch, loss: float, cfg: Config, root: Path) -> str:
    """One sentence: the step, the place where a non-finite number first appears, the last good checkpoint."""
    place = first_non_finite(state.model, batch, loss, cfg)
    good = checkpoint.latest(root, lambda _: None)
    keep = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
    return (
        f"step {state.step + 1}: {place} is not finite; no parameter was changed by it and {keep}: "
        f"lower optim.lr={cfg.optim.lr} or raise optim.warmup={cfg.optim.warmup}, or set train.non_finite=skip to "
        "leave such steps out."
    )


def first_non_finite(model: Transformer, batch: Batch, loss: float, cfg: Config) -> str:
    """Where a non-finite number first appears: a parameter, else a module's output in the forward pass, else the loss,
    else (backward runs from the last layer) the last parameter in order whose gradient is not finite."""
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            return f"the parameter {name}"

    # The forward pass once more, with a look at the output of every module in the order they finish.
    bad_outputs: list[str] = []

    def hook(name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        values = output if isinstance(output, tuple) else (output,)
        tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        if not bad_outputs and not all(tensor.isfinite().all() for tensor in tensors):
            bad_outputs.append(f"the output of {name or 'the model'}")

    handles = [m.register_forward_hook(partial(hook, name)) for name, m in model.named_modules()]
    try:
        device = next(model.parameters()).device
        for tokens_BS in batch.tokens_BS.chunk(cfg.train.accumulate):
            # Not compiled: for the hooks the model would be compiled anew.
            with torch.no_grad(), autocast(cfg), torch.compiler.set_stance("force_eager"):
                model(tokens_BS.to(device), backend=cfg.dispatch)
    finally:
        for handle in handles:
            handle.remove()
    if bad_outputs:
        return bad_outputs[0]

    # It is finite, so what comes after it is not.
    if not math.isfinite(loss):
        return "the loss"
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of {bad[-1]}" if bad else "the gradients' norm"
