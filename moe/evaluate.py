"""Validation: loss and bits per byte in total and by domain, and which expert served which domain."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.config import moe_layers
from moe.data import validation_starts
from moe.model import Transformer, next_token_loss
from moe.router import rows
from moe.shards import Dataset


class Evaluation(NamedTuple):
    """`val`: loss (nats per token), bpb (bits per byte) and the same by domain. `windows`: mean nats per token of each
    validation window. `load`: routed rows (MoE layer, domain, expert), or None for a dense model."""

    val: dict[str, Any]
    windows: list[float]
    load: dict[str, Any] | None


@torch.inference_mode()
def evaluate(
    model: Transformer,
    dataset: Dataset,
    *,
    n_tokens: int,
    batch_size: int,
    backend: str,
    autocast: Callable[[], AbstractContextManager[Any]],
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on `n_tokens` of the validation split, spread evenly over it: the same windows for every model with this
    context. None if `stop()` turns true on the way.

    Bits per byte count the text's own bytes: the end-of-text token has none, and its loss counts."""
    context, split = model.cfg.context, dataset.split("val")
    device = next(model.parameters()).device
    byte_V = torch.from_numpy(dataset.tokenizer.token_bytes).to(device)
    n_domains = len(dataset.domains)
    nats, tokens, size = (torch.zeros(n_domains, dtype=torch.float64, device=device) for _ in range(3))
    windows: list[Tensor] = []
    loads: list[Tensor] = []
    starts = validation_starts(split, context, n_tokens)
    for chunk in np.array_split(starts, math.ceil(len(starts) / batch_size)):
        if stop():
            return None
        read_BS1, domain_BS = (torch.from_numpy(each).to(device) for each in split.read(chunk, context))
        domain_T, targets_BS = domain_BS.flatten().long(), read_BS1[:, 1:]
        with autocast():
            output = model(read_BS1[:, :-1], backend=backend)
        loss_BS = next_token_loss(output.logits_BSV, targets_BS, reduction="none").double()
        windows.append(loss_BS.mean(-1))
        nats.index_add_(0, domain_T, loss_BS.flatten())
        tokens.index_add_(0, domain_T, torch.ones_like(domain_T, dtype=torch.float64))
        size.index_add_(0, domain_T, byte_V[targets_BS.flatten()].double())
        for position, routing in enumerate(output.routing):
            if position == len(loads):
                loads.append(torch.zeros(n_domains, routing.count_E.numel(), dtype=torch.int64, device=device))
            token_N, expert_N, _ = rows(routing.token_N, routing.expert, routing.weight)
            routed = expert_N >= 0
            index = (domain_T[token_N[routed]], expert_N[routed])
            loads[position].index_put_(index, torch.ones_like(index[1]), accumulate=True)

    def score(nats: float, tokens: float, size: float) -> dict[str, float]:
        return {"loss": nats / tokens, "bpb": nats / math.log(2) / max(1.0, size)}

    domains = {
        name: score(nats[i].item(), tokens[i].item(), size[i].item()) | {"tokens": int(tokens[i])}
        for i, name in enumerate(dataset.domains)
        if tokens[i]
    }
    load = None
    if loads:
        load = {
            "layers": moe_layers(model.cfg),
            "domains": dataset.domains,
            "counts": [each.tolist() for each in loads],
        }
    val = score(nats.sum().item(), tokens.sum().item(), size.sum().item()) | {"domains": domains}
    return Evaluation(val, torch.cat(windows).tolist(), load)
