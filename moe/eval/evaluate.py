"""Validation: loss and bits per byte in total and by domain, which expert served which domain, and whether a model
sees later tokens.

Y counts the text's domains.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.analysis.metrics import layer_metrics
from moe.config.model import ModelConfig, layer_moe, moe_layers
from moe.data.loader import NO_TARGET, read_windows, validation_windows
from moe.data.shards import Dataset
from moe.model.layer import LayerRouting
from moe.model.transformer import Transformer, next_token_loss
from moe.parallel import launch
from moe.parallel.collectives import Ranks, all_summed_over_ranks, this_rank
from moe.parallel.gradients import settle
from moe.routing.contract import rows
from moe.run.summary import DomainScore, ExpertLoad, LayerMetrics, Validation


class Evaluation(NamedTuple):
    """What a validation found: the scores, the mean nats per token of each window of the text, and where the experts'
    rows went (None for a dense model)."""

    val: Validation
    windows: list[float]
    load: ExpertLoad | None


@torch.no_grad()  # not inference mode, whose tensors FSDP would keep and then not train with
def evaluate(
    model: Transformer,
    dataset: Dataset,
    *,
    n_tokens: int,
    batch_size: int,
    backend: str,
    autocast: Callable[[], AbstractContextManager[Any]],
    whole: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on `n_tokens` of the validation split, spread evenly over it: the same windows for every model with this
    context; with `whole` they hold whole documents. Of conversations only what the assistant says is scored. The model
    is in eval mode meanwhile: routers explore, and limit capacity, in training alone. None if `stop()` turns true on
    the way.

    Bits per byte count the text's own bytes: the end-of-text token has none, and its loss counts."""
    context, split = model.cfg.context, dataset.split("val")
    device = next(model.parameters()).device
    text = TextTally(dataset.domains, dataset.tokenizer.token_bytes, device)
    layers = [LayerTally(layer, model.cfg, dataset, device) for layer in moe_layers(model.cfg)]
    windows, ranks = validation_windows(split, context, n_tokens, whole), this_rank()
    chunks = np.array_split(np.arange(len(windows.start_W)), math.ceil(len(windows.start_W) / batch_size))
    # Every rank takes its turn of the batches, and all as many: one that has none left reads the first again.
    for turn in range(0, len(chunks), ranks.n):
        if stop():
            settle(model)
            return None
        is_mine = turn + ranks.rank < len(chunks)
        chunk = chunks[turn + ranks.rank if is_mine else 0]
        columns = read_windows(split, windows.take(chunk), context)
        read_BS1, targets_BS, domain_BS = (torch.from_numpy(array).to(device) for array in columns)
        with eval_mode(model), autocast():
            output = model(read_BS1[:, :-1], backend=backend)
        if not is_mine:
            continue
        text.add(output.logits_BSV, targets_BS, domain_BS)
        for layer, routing in zip(layers, output.routing, strict=True):
            layer.add(routing, domain_BS)
    settle(model)
    text.over_ranks(ranks, len(chunks))
    for layer in layers:
        layer.over_ranks()
    return Evaluation(
        text.validation(), torch.cat(text.windows).tolist(), expert_load(layers, dataset, text.n_tokens())
    )


class TextTally:
    """Nats, tokens and bytes by domain, and the loss of every window, summed over batches on the device."""

    def __init__(self, domains: list[str], bytes_V: np.ndarray, device: torch.device) -> None:
        """`bytes_V`: how many bytes of text each token is."""
        self.domains = domains
        self.bytes_V = torch.from_numpy(bytes_V).to(device)
        zeros = lambda: torch.zeros(len(domains), dtype=torch.float64, device=device)
        self.nats, self.tokens, self.bytes = zeros(), zeros(), zeros()  # by domain
        self.windows: list[Tensor] = []

    def add(self, logits_BSV: Tensor, targets_BS: Tensor, domain_BS: Tensor) -> Tensor:
        """A batch; `domain_BS` says whose text each target is. Returns every target's nats, (B, S) float64, 0 where
        there is none to predict."""
        domain_T, counts_BS = domain_BS.flatten().long(), (targets_BS != NO_TARGET).double()
        loss_BS = next_token_loss(logits_BSV, targets_BS, reduction="none").double()
        self.windows.append(loss_BS.sum(-1) / counts_BS.sum(-1).clamp(min=1))
        self.nats.index_add_(0, domain_T, loss_BS.flatten())
        self.tokens.index_add_(0, domain_T, counts_BS.flatten())
        self.bytes.index_add_(0, domain_T, (self.bytes_V[targets_BS.clamp(min=0)] * counts_BS).flatten())
        return loss_BS

    def over_ranks(self, ranks: Ranks, n_batches: int) -> None:
        """Take in what the other ranks have read, in turns of the batches."""
        if ranks.n == 1:
            return
        self.nats, self.tokens, self.bytes = all_summed_over_ranks([self.nats, self.tokens, self.bytes])
        by_rank = launch.shared([losses.cpu() for losses in self.windows])
        self.windows = [by_rank[batch % ranks.n][batch // ranks.n] for batch in range(n_batches)]

    def n_tokens(self) -> int:
        """Targets so far."""
        return int(self.tokens.sum())

    def validation(self) -> Validation:
        """The scores of all the text, and of each domain that it had."""
        columns = zip(self.domains, self.nats.tolist(), self.tokens.tolist(), self.bytes.tolist(), strict=True)
        domains = {
            name: DomainScore(*_score(nats, tokens, n_bytes), int(tokens))
            for name, nats, tokens, n_bytes in columns
            if tokens
        }
        return Validation(*_score(*(sums.sum().item() for sums in (self.nats, self.tokens, self.bytes))), domains)


def _score(nats: float, tokens: float, n_bytes: float) -> tuple[float, float]:
    """(nats per token, bits per byte)."""
    return nats / tokens, nats / math.log(2) / max(1.0, n_bytes)


class LayerTally:
    """One MoE layer's rows by domain and expert, summed over batches on the device."""

    def __init__(self, layer: int, cfg: ModelConfig, dataset: Dataset, device: torch.device) -> None:
        self.layer, self.work, self.n_domains = layer, layer_moe(cfg, layer).work(), len(dataset.domains)
        self.rows_YE: Tensor | None = None
        self.count_E = self.dropped = self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, routing: LayerRouting, domain_BS: Tensor) -> None:
        """A batch; `domain_BS` says whose text each token is followed by."""
        if self.rows_YE is None:
            self.rows_YE = torch.zeros_like(routing.count_E).repeat(self.n_domains, 1)
        token_N, expert_N, _ = rows(routing.token_N, routing.expert, routing.weight)
        routed = expert_N >= 0
        index = domain_BS.flatten().long()[token_N[routed]], expert_N[routed]
        self.rows_YE.index_put_(index, torch.ones_like(index[1]), accumulate=True)
        self.count_E = self.count_E + routing.count_E
        self.dropped, self.skipped = self.dropped + routing.dropped, self.skipped + routing.skipped

    def over_ranks(self) -> None:
        """Take in what the layer did with the other ranks' batches."""
        if self.rows_YE is None:
            self.rows_YE = torch.zeros(self.n_domains, len(self.work), dtype=torch.int64, device=self.count_E.device)
            self.count_E = self.rows_YE[0]
        sums = [self.rows_YE, self.count_E, self.dropped, self.skipped]
        self.rows_YE, self.count_E, self.dropped, self.skipped = all_summed_over_ranks(sums)

    def metrics(self, n_tokens: int) -> LayerMetrics:
        """What to say of the layer over all the text."""
        counts = self.count_E.cpu(), int(self.dropped), int(self.skipped)
        return layer_metrics(self.layer, *counts, n_tokens, self.work)


def expert_load(layers: list[LayerTally], dataset: Dataset, n_tokens: int) -> ExpertLoad | None:
    """Where the rows of all MoE layers went; None for a dense model."""
    if not layers:
        return None
    return ExpertLoad(
        layers=[tally.layer for tally in layers],
        domains=dataset.domains,
        counts=[tally.rows_YE.tolist() for tally in layers if tally.rows_YE is not None],
        routing=[tally.metrics(n_tokens) for tally in layers],
    )


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The whole model in eval mode while inside; afterwards every module in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
