"""Where a number that is not finite first appeared, in one sentence."""

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config.run import Config
from moe.data.loader import Batch, validation_windows
from moe.data.shards import Dataset
from moe.errors import BadInput
from moe.eval.evaluate import Evaluation, eval_mode
from moe.model.transformer import Transformer
from moe.parallel import launch
from moe.parallel.gradients import local, settle
from moe.run.checkpoint import last_good
from moe.run.machine import autocast
from moe.train.state import State


def explain_non_finite(state: State, batch: Batch, loss: float, cfg: Config, root: Path) -> str:
    """One sentence: the step, the place where a non-finite number first appears, the last good checkpoint."""
    place = first_non_finite(state.model, batch, loss, cfg)
    return (
        f"step {state.step + 1}: {place} is not finite; no parameter was changed by it and {last_good(root)}: "
        f"{_remedy(cfg)} leave such steps out."
    )


def check_validation(state: State, evaluation: Evaluation, cfg: Config, dataset: Dataset, root: Path) -> None:
    """Raise `BadInput` for a validation that is not finite, with the sentence of a training step, unless
    train.non_finite=skip: then it is recorded as null, and no checkpoint has it for a score."""
    bad = [i for i, nats in enumerate(evaluation.windows) if not math.isfinite(nats)]
    if not bad or cfg.train.non_finite == "skip":
        return
    # The first window that is not finite, looked into once more.
    split, context = dataset.split("val"), cfg.model.context
    windows = validation_windows(split, context, cfg.train.eval_tokens, cfg.data.whole())
    tokens_1S = torch.from_numpy(split.read(windows.start_W[bad[:1]], context)[0][:, :-1])
    with eval_mode(state.model):
        place = first_bad_parameter(state.model) or first_bad_output(state.model, [tokens_1S], cfg)
    raise BadInput(
        f"step {state.step}: {place or 'the loss'} is not finite in {len(bad)} of the {len(evaluation.windows)} "
        f"windows of the validation and {last_good(root)}: {_remedy(cfg)} record it as null and go on."
    )


def _remedy(cfg: Config) -> str:
    return f"lower optim.lr={cfg.optim.lr} or raise optim.warmup={cfg.optim.warmup}, or set train.non_finite=skip to"


def first_non_finite(model: Transformer, batch: Batch, loss: float, cfg: Config) -> str:
    """Where a non-finite number first appears: a parameter, else a module's output in the forward pass, else the loss,
    else (backward runs from the last layer) the last parameter in order whose gradient is not finite."""
    place = first_bad_parameter(model) or first_bad_output(model, batch.tokens_BS.chunk(cfg.train.accumulate), cfg)
    if place:
        return place

    # The forward pass is finite, so what comes after it is not.
    if not math.isfinite(loss):
        return "the loss"
    bad = [name for name, p in model.named_parameters() if p.grad is not None and is_bad(p.grad)]
    return f"the gradient of {bad[-1]}" if bad else "the gradients' norm"


def first_bad_parameter(model: Transformer) -> str | None:
    """The first parameter that is not finite, in words."""
    return next((f"the parameter {name}" for name, p in model.named_parameters() if is_bad(p)), None)


def is_bad(tensor: Tensor) -> bool:
    """Whether a tensor is not finite, in the part that this rank has or in another's; all ranks must ask."""
    return launch.any_rank(not local(tensor).isfinite().all())


def first_bad_output(model: Transformer, micro_batches: Iterable[Tensor], cfg: Config) -> str | None:
    """The first module, in the order they finish, whose output for tokens (B, S) is not finite, in words: the forward
    passes are run once more, with a look at each output."""
    bad_outputs: list[str] = []

    def hook(name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        values = output if isinstance(output, tuple) else (output,)
        tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        if not bad_outputs and not all(tensor.isfinite().all() for tensor in tensors):
            bad_outputs.append(f"the output of {name or 'the model'}")

    handles = [m.register_forward_hook(partial(hook, name)) for name, m in model.named_modules()]
    try:
        device = next(model.parameters()).device
        for tokens_BS in micro_batches:
            # Not compiled: for the hooks the model would be compiled anew.
            with torch.no_grad(), autocast(cfg), torch.compiler.set_stance("force_eager"):
                model(tokens_BS.to(device), backend=cfg.dispatch)
    finally:
        for handle in handles:
            handle.remove()
        settle(model)
    places = launch.shared(bad_outputs[0] if bad_outputs else None)
    return next((place for place in places if place), None)
