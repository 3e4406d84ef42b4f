"""Validation: loss and bits per byte in total and by domain, which expert served which domain, and whether a model
sees later tokens."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.analysis.metrics import layer_metrics
from moe.config.model import moe_layers
from moe.data.loader import validation_starts
from moe.data.shards import Dataset
from moe.model.transformer import Transformer, next_token_loss
from moe.routing.contract import rows


class Evaluation(NamedTuple):
    """`val`: loss (nats per token), bpb (bits per byte) and the same by domain. `windows`: mean nats per token of each
    validation window. `load`: routed rows by (MoE layer, domain, expert), and for every MoE layer the
    `moe.analysis.metrics.layer_metrics` of the whole validation set as "routing"; None for a dense model.

    E counts null, copy and constant experts too. A soft router's rows are every token at every expert."""

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
    context. The model is in eval mode meanwhile: routers explore, and limit capacity, in training alone. None if
    `stop()` turns true on the way.

    Bits per byte count the text's own bytes: the end-of-text token has none, and its loss counts."""
    context, split = model.cfg.context, dataset.split("val")
    device = next(model.parameters()).device
    byte_V = torch.from_numpy(dataset.tokenizer.token_bytes).to(device)
    n_domains = len(dataset.domains)
    nats, tokens, size = (torch.zeros(n_domains, dtype=torch.float64, device=device) for _ in range(3))
    windows: list[Tensor] = []
    loads: list[Tensor] = []
    totals: list[tuple[Tensor, Tensor, Tensor]] = []  # of every MoE layer: rows per expert, dropped, skipped
    starts = validation_starts(split, context, n_tokens)
    for chunk in np.array_split(starts, math.ceil(len(starts) / batch_size)):
        if stop():
            return None
        read_BS1, domain_BS = (torch.from_numpy(each).to(device) for each in split.read(chunk, context))
        domain_T, targets_BS = domain_BS.flatten().long(), read_BS1[:, 1:]
        with eval_mode(model), autocast():
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
            own = routing.count_E, routing.dropped, routing.skipped
            if position == len(totals):
                totals.append(own)
            else:
                totals[position] = tuple(a + b for a, b in zip(totals[position], own, strict=True))  # type: ignore[assignment]

    def score(nats: float, tokens: float, size: float) -> dict[str, float]:
        return {"loss": nats / tokens, "bpb": nats / math.log(2) / max(1.0, size)}

    domains = {
        name: score(nats[i].item(), tokens[i].item(), size[i].item()) | {"tokens": int(tokens[i])}
        for i, name in enumerate(dataset.domains)
        if tokens[i]
    }
    load = None
    if loads:
        layers, n_tokens = moe_layers(model.cfg), int(tokens.sum())
        load = {
            "layers": layers,
            "domains": dataset.domains,
            "counts": [each.tolist() for each in loads],
            "routing": [
                layer_metrics(layer, count_E, int(dropped), int(skipped), n_tokens)
                for layer, (count_E, dropped, skipped) in zip(layers, totals, strict=True)
            ],
        }
    val = score(nats.sum().item(), tokens.sum().item(), size.sum().item()) | {"domains": domains}
    return Evaluation(val, torch.cat(windows).tolist(), load)


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The whole model in eval mode while inside; afterwards every module in the mode it was in."""
    training = [each for each in model.modules() if each.training]
    model.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


@torch.no_grad()
def causal_leak(model: Transformer, tokens_BS: Tensor, backend: str = "torch") -> float:
    """How far logits move when only later tokens change: tokens (B, S) -> max |logit − logit with another suffix|, over
    every position before the cut, all sequences and cuts at 1/4, 1/2 and 3/4 of the sequence. At a cut every token from
    there on becomes another one, in all sequences at once. Of a copy of the model, in float64 and eval mode.

    0 means that no later token has a say in a prediction, and that the validation loss is one of predicting. Sums in
    another order may leave about 1e-13. Much more means that the model may read what it is to predict, as where experts
    choose among the whole batch (2202.09368; on the leak: 2408.15664)."""
    model = copy.deepcopy(model).double().eval()
    n_positions, vocab_size = tokens_BS.shape[1], model.cfg.vocab_size
    logits_BSV = model(tokens_BS, backend=backend).logits_BSV
    generator = torch.Generator().manual_seed(0)
    leak = 0.0
    for cut in sorted({max(1, n_positions * quarter // 4) for quarter in (1, 2, 3)}):
        shift_BS = torch.randint(1, vocab_size, tokens_BS[:, cut:].shape, generator=generator).to(tokens_BS.device)
        other_BS = torch.cat([tokens_BS[:, :cut], (tokens_BS[:, cut:] + shift_BS) % vocab_size], dim=1)
        moved_BSV = model(other_BS, backend=backend).logits_BSV[:, :cut] - logits_BSV[:, :cut]
        leak = max(leak, moved_BSV.abs().max().item())
    return leak
