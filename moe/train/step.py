"""One optimiser step: forward and backward over the micro-batches, checks, update."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moe.analysis.metrics import layer_metrics
from moe.config.balance import SCHEDULED, BalanceConfig
from moe.config.model import layer_moe, moe_layers
from moe.config.router import facts
from moe.config.run import Config
from moe.data.answer_loader import Prompts
from moe.data.loader import NO_TARGET, Batch
from moe.errors import BadInput
from moe.model.layer import LayerRouting, MoELayer
from moe.model.transformer import Transformer, next_token_loss
from moe.parallel.collectives import all_summed_over_ranks, n_ranks, summed_over_ranks, this_rank
from moe.parallel.gradients import squared_norm, sum_gradients
from moe.routing import balance
from moe.routing.contract import Router, Step
from moe.run.machine import autocast, synchronize, to_host
from moe.run.summary import MetricsLine
from moe.train.average import is_averaged
from moe.train.distill import distill_loss
from moe.train.non_finite import explain_non_finite
from moe.train.objective import (
    Companions,
    Drawn,
    answer_loss,
    draw_answers,
    micro_batch,
    over_micro_batches,
    read,
    replayed,
)
from moe.train.optimizer import set_learning_rates
from moe.train.state import State

MAX_SKIPPED = 20  # steps in a row with train.non_finite=skip before the run stops all the same


@dataclass
class Gradients:
    """What one step's forward and backward passes gave; losses are means over the step's tokens."""

    lm_loss: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)  # unweighted: of the routers, over layers; of a teacher
    total: float = 0.0  # lm_loss and the losses with their coefficients
    norm: float = 0.0
    routing: list["LayerTotals"] = field(default_factory=list)  # of every MoE layer
    answers: dict[str, float] = field(default_factory=dict)  # figures of answers, as moe/train/objective.py has them


@dataclass
class LayerTotals:
    """What one MoE layer did in one step, summed over its micro-batches."""

    count_E: Tensor
    wanted_E: Tensor
    dropped: Tensor
    skipped: Tensor
    tokens: int
    observed: dict[str, Tensor]
    expert: list[Tensor] = field(default_factory=list)  # every micro-batch's choices, where they are recorded
    losses: dict[str, Tensor] = field(default_factory=dict)  # float64, unweighted; over the step their mean
    seen: dict[str, Tensor] = field(default_factory=dict)  # as `layer_metrics` takes it, where the layer is watched

    def add(self, other: "LayerTotals") -> None:
        """Another micro-batch of the layer."""
        for name in ("count_E", "wanted_E", "dropped", "skipped", "tokens", "expert"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("observed", "losses", "seen"):
            setattr(self, name, added(getattr(self, name), getattr(other, name)))

    def told(self) -> list[Tensor]:
        """What the host is told of the layer; what its router learns from stays on the device."""
        return [self.count_E, self.dropped, self.skipped, *self.losses.values(), *self.seen.values()]

    def shared(self) -> list[Tensor]:
        """What every rank has its share of."""
        counts = [self.count_E, self.wanted_E, self.dropped, self.skipped]
        return [*counts, *(value for name in ("observed", "losses", "seen") for value in getattr(self, name).values())]

    def over_ranks(self, summed: Iterator[Tensor]) -> None:
        """Take the sums over ranks of `shared`, in its order."""
        self.count_E, self.wanted_E, self.dropped, self.skipped = (next(summed) for _ in range(4))
        for name in ("observed", "losses", "seen"):
            setattr(self, name, {key: next(summed) for key in getattr(self, name)})
        self.tokens *= n_ranks()

    def on_host(self, told: Iterator[Tensor]) -> "LayerTotals":
        """The same with the host's copies of `told`, in its order."""
        count_E, dropped, skipped = (next(told).long() for _ in range(3))
        losses = {name: next(told) for name in self.losses}
        seen = {name: next(told) for name in self.seen}
        return dataclasses.replace(self, count_E=count_E, dropped=dropped, skipped=skipped, losses=losses, seen=seen)


def added(sums: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums by name; a name that only one of them has counts as 0 in the other."""
    return {name: sums.get(name, 0) + others.get(name, 0) for name in sums | others}  # type: ignore[misc]


def take_step(state: State, batch: Batch | Prompts, cfg: Config, root: Path) -> tuple[MetricsLine, Gradients]:
    """One optimiser step: forward and backward over the micro-batches, checks, update. Returns its metrics line."""
    start, step, device = time.perf_counter(), state.step + 1, next(state.model.parameters()).device
    lr = set_learning_rates(state.optimizer, cfg.optim, step, cfg.train.steps)
    progress = state.step / cfg.train.steps

    # Where answers are learnt from that the model gives itself, they are drawn now.
    if isinstance(batch, Prompts):
        assert state.companions is not None
        batch = draw_answers(state.model, batch, state.companions, cfg, step)

    # Gradients of the whole step, on the run's own experts or on those of the run that is replayed.
    recorded = state.replay.step(step, device) if state.replay else replayed(batch, cfg, device)
    if recorded is not None and n_ranks() > 1:
        recorded = [rows_of(expert, state.loader.batch_rows, cfg) for expert in recorded]
    measured = cfg.log.doctor and step % cfg.log.every == 0
    gradients = compute_gradients(
        state.model, batch, cfg, progress, state.teacher, recorded, measured, state.companions
    )
    loss = gradients.total

    # The update; or, where something is not finite, none at all.
    if math.isfinite(loss) and math.isfinite(gradients.norm):
        state.skipped_in_a_row = 0
        if cfg.optim.clip:
            clip(state.model, gradients.norm, cfg.optim.clip)
        state.optimizer.step()
        if "router" in cfg.tune.trained():
            update_routers(state.model, gradients.routing, cfg.balance, progress)
    else:
        state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
        if cfg.train.non_finite == "stop" or state.skipped_in_a_row > MAX_SKIPPED:
            raise BadInput(explain_non_finite(state, batch, loss, cfg, root))
    state.optimizer.zero_grad(set_to_none=True)

    # The mean over the last steps, which the model is from the last one on.
    if is_averaged(cfg.optim, step, cfg.train.steps):
        state.average.add(state.model)
        if step == cfg.train.steps:
            state.average.give(state.model)

    # What the step is told by. The optimiser's part of it may still be running.
    synchronize(device)
    seconds = time.perf_counter() - start
    state.step, state.seconds = step, state.seconds + seconds
    layers = moe_layers(cfg.model)
    line = MetricsLine(
        step=step,
        seconds=state.seconds,
        loss=loss,
        lm_loss=gradients.lm_loss,
        losses=gradients.losses,
        grad_norm=gradients.norm,
        lr=lr,
        tokens_per_s=batch.targets_BS.numel() * n_ranks() / seconds if seconds else math.nan,
        skipped=state.skipped,
        answers=gradients.answers or None,
        layers=[
            layer_metrics(
                layer,
                totals.count_E,
                int(totals.dropped),
                int(totals.skipped),
                totals.tokens,
                layer_moe(cfg.model, layer).work(),
                {name: value.item() for name, value in totals.losses.items()},
                totals.seen,
            )
            for layer, totals in zip(layers, gradients.routing, strict=True)
        ],
    )
    return line, gradients


def rows_of(expert: Tensor, rows: Sequence[int], cfg: Config) -> Tensor:
    """Of a whole batch's experts (B·S, K) those of these rows of it."""
    return expert.view(cfg.train.batch_size, -1, expert.shape[-1])[list(rows)].flatten(0, 1)


def compute_gradients(
    model: Transformer,
    batch: Batch,
    cfg: Config,
    progress: float = 0.0,
    teacher: Transformer | None = None,
    recorded: Sequence[Tensor] | None = None,
    measured: bool = False,
    companions: Companions | None = None,
) -> Gradients:
    """Forward and backward over the step's micro-batches. Losses of the routers are summed over layers, and weighted as
    the share `progress` of the run that is done has it. `recorded`: the step's experts (B·S, K) for every MoE layer,
    instead of the routers' choice. `measured`: whether to look at how decided the routers are, and at every expert's
    gradients. `companions`: what an objective other than the text's needs."""
    device, n_micro = next(model.parameters()).device, cfg.train.accumulate
    n_parts = n_micro * n_ranks()  # equal parts of the step, whose losses' mean is its loss
    steps, n_targets = whole_step(model, batch, cfg, recorded), targets_of_step(batch, n_micro)
    mean_losses: dict[str, Tensor] = {}  # over the micro-batches; "lm" is the text's
    layers: list[LayerTotals] = []
    figures: list[dict[str, Tensor]] = []
    for i, (tokens_BS, targets_BS, experts) in enumerate(micro_batches(batch, cfg, recorded)):
        # Forward.
        tokens_BS, targets_BS = tokens_BS.to(device), targets_BS.to(device)
        with autocast(cfg):
            output, reward_B = read(
                model,
                tokens_BS,
                targets_BS,
                cfg,
                backend=cfg.dispatch,
                checkpoint_activations=cfg.train.checkpoint_activations,
                steps=steps,
                recorded=experts,
                watched=measured,
            )

        # Losses by name: of the text, of the routers over all layers, of a teacher.
        lm_loss = text_loss(output.logits_BSV, targets_BS, n_targets)
        losses = {"aux": torch.zeros((), device=device), "z": torch.zeros((), device=device)}
        for routing in output.routing:
            losses |= {name: losses.get(name, 0.0) + value for name, value in routing.losses.items()}
        if teacher is not None:
            with torch.no_grad(), autocast(cfg):
                taught_BSV = teacher(tokens_BS, backend=cfg.dispatch).logits_BSV
            losses["distill"] = taught_loss(output.logits_BSV, taught_BSV, targets_BS, n_targets, cfg)
        if companions is not None:
            part = micro_batch(batch, i, n_micro, device)
            losses[cfg.objective.name], micro_figures = answer_loss(output, reward_B, part, companions, cfg)
            figures.append(micro_figures)

        # Backward, without the logits: what it needs of them autograd keeps by itself.
        layer_routing = output.routing
        del output
        weights = loss_weights(cfg, losses, progress)
        total = weights["lm"] * lm_loss + sum(weights[name] * value for name, value in losses.items())
        sum_gradients(model, i == n_micro - 1)
        (total / n_parts).backward()

        # Sums over the micro-batches, on the device.
        micro_losses = {name: value.detach().double() / n_parts for name, value in ({"lm": lm_loss} | losses).items()}
        mean_losses = added(mean_losses, micro_losses)
        totals = [layer_totals(routing, tokens_BS.numel(), cfg.log.experts, n_parts) for routing in layer_routing]
        for step_totals, micro_totals in zip(layers, totals, strict=False):
            step_totals.add(micro_totals)
        layers = layers or totals

    # Over the ranks, in one sum: what was minimised, the gradients' norm, and what the layers did.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if n_ranks() > 1:
        norm, mean_losses = over_ranks(squared_norm(gradients), mean_losses, layers)
    else:
        norm = torch.nn.utils.get_total_norm(gradients)

    # Of this moment: selection biases, and how much every expert learns.
    if cfg.log.doctor:
        look_at_experts(model, layers, measured)

    # The one time that the host waits for the device.
    told = iter(to_host([norm, *mean_losses.values(), *(value for layer in layers for value in layer.told())]))
    result = Gradients(norm=next(told).item(), losses={name: next(told).item() for name in mean_losses})
    result.lm_loss = result.losses.pop("lm")
    result.answers = (batch.figures if isinstance(batch, Drawn) else {}) | over_micro_batches(figures)
    result.routing = [layer.on_host(told) for layer in layers]
    weights = loss_weights(cfg, result.losses, progress)
    result.total = weights["lm"] * result.lm_loss + sum(weights[name] * value for name, value in result.losses.items())
    return result


def over_ranks(
    square: Tensor, losses: dict[str, Tensor], layers: list["LayerTotals"]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients' norm and the losses of the whole step, and every layer's totals in place, from each rank's share
    of them: by one transfer."""
    summed = iter(all_summed_over_ranks([square, *losses.values(), *(v for layer in layers for v in layer.shared())]))
    norm = next(summed).sqrt()
    losses = {name: next(summed) for name in losses}
    for layer in layers:
        layer.over_ranks(summed)
    return norm, losses


def targets_of_step(batch: Batch, n_micro: int) -> float | None:
    """How many targets there are to learn in a micro-batch, the mean of the step's over all ranks; None where every
    token has one."""
    n_targets: float = int((batch.targets_BS.numpy() != NO_TARGET).sum())  # on the host, where batches are
    if n_ranks() > 1:
        n_targets = summed_over_ranks(torch.tensor(n_targets)).item() / n_ranks()
    return None if n_targets == batch.targets_BS.numel() else n_targets / n_micro


def text_loss(logits_BSV: Tensor, targets_BS: Tensor, n_targets: float | None) -> Tensor:
    """A micro-batch's share of the step's loss in nats per target: the mean of the shares is the loss per target of the
    whole step. (The mean of the micro-batches' own means would weigh a target more where there are few.) `n_targets`:
    as from `targets_of_step`."""
    if n_targets is None:
        return next_token_loss(logits_BSV, targets_BS)
    return next_token_loss(logits_BSV, targets_BS, reduction="none").sum() / max(1.0, n_targets)


def taught_loss(
    logits_BSV: Tensor, taught_BSV: Tensor, targets_BS: Tensor, n_targets: float | None, cfg: Config
) -> Tensor:
    """A micro-batch's share of `distill_loss`, of the tokens that have a target, as `text_loss` is of theirs."""
    temperature = cfg.distill.temperature
    if n_targets is None:
        return distill_loss(logits_BSV, taught_BSV, temperature)
    counts_BS = targets_BS != NO_TARGET
    share = counts_BS.sum() / max(1.0, n_targets)
    return distill_loss(logits_BSV[counts_BS], taught_BSV[counts_BS], temperature) * share if share else share


def micro_batches(
    batch: Batch, cfg: Config, recorded: Sequence[Tensor] | None = None
) -> Iterator[tuple[Tensor, Tensor, list[Tensor] | None]]:
    """Tokens, targets and recorded experts of each micro-batch of a step."""
    n = cfg.train.accumulate
    parts = zip(*(expert.chunk(n) for expert in recorded), strict=True) if recorded else itertools.repeat(None, n)
    for tokens_BS, targets_BS, part in zip(batch.tokens_BS.chunk(n), batch.targets_BS.chunk(n), parts, strict=True):
        yield tokens_BS, targets_BS, None if part is None else list(part)


def layer_totals(routing: LayerRouting, tokens: int, keep_experts: bool = False, n_parts: int = 1) -> LayerTotals:
    """What of one forward pass, of `n_parts`, is summed over a step."""
    detached = {name: value.detach() for name, value in routing.observed.items()}
    losses = {name: value.detach().double() / n_parts for name, value in routing.losses.items()}
    counts = routing.count_E, routing.wanted_E, routing.dropped, routing.skipped, tokens, detached
    expert = [this_rank().gathered(routing.expert)] if keep_experts else []
    return LayerTotals(*counts, expert, losses, routing.seen or {})


@torch.no_grad()
def look_at_experts(model: Transformer, layers: list[LayerTotals], measured: bool) -> None:
    """Add to what is seen of every MoE layer the selection bias of its router, if it has one, and, where it is
    `measured`, the norms of its experts' gradients."""
    for router, layer in zip(model.routers(), layers, strict=True):
        bias_E = getattr(router, "bias_E", None)
        if bias_E is not None:
            layer.seen = layer.seen | {"bias": bias_E}
    moe_blocks = [block.mlp for block in model.blocks if isinstance(block.mlp, MoELayer)]
    for mlp, layer in zip(moe_blocks if measured else [], layers, strict=measured):
        layer.seen = layer.seen | {"gradient": mlp.experts.gradient_norms()}


def loss_weights(cfg: Config, names: Iterable[str], progress: float) -> dict[str, float]:
    """What each loss is multiplied with: a router's by its coefficient; "lm" by 1, or what a teacher's leaves of it."""
    weights = {"lm": float(cfg.objective.name == "lm")} | {
        name: coefficient(cfg.balance, name, progress) for name in names
    }
    return weights | ({"lm": 1 - cfg.distill.weight, "distill": cfg.distill.weight} if "distill" in weights else {})


def coefficient(cfg: BalanceConfig, name: str, progress: float) -> float:
    """What a loss, or the bias step, is multiplied with: a term of the balance its coefficient on its schedule; any
    other 1, whatever setting it is called like."""
    return balance.scheduled(getattr(cfg, name), cfg.schedule.get(name), progress) if name in SCHEDULED else 1.0


@torch.no_grad()
def whole_step(
    model: Transformer, batch: Batch, cfg: Config, recorded: Sequence[Tensor] | None = None
) -> list[Step] | None:
    """What every MoE layer is told of the step: who shares its micro-batches, and with balance.scope=global what its
    losses are functions of, summed over all micro-batches and ranks (2501.11873): with it every micro-batch's losses
    are the whole step's, which a mean of theirs is not. None where one process needs to be told nothing.

    The sums must be known before the first backward pass. So with several micro-batches (or ranks) the step's forward
    passes are run once more in advance, with the same random numbers."""
    if cfg.model.moe is None:
        return None
    ranks, n_layers = this_rank(), len(moe_layers(cfg.model))
    shared = [Step(ranks.n, None, ranks)] * n_layers if ranks.n > 1 else None
    n_parts = cfg.train.accumulate * ranks.n
    if cfg.balance.scope != "global" or n_parts == 1 or not facts(cfg.router).scored:
        return shared
    device = next(model.parameters()).device
    sums: list[dict[str, Tensor]] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for tokens_BS, _, experts in micro_batches(batch, cfg, recorded):
            with autocast(cfg):
                tokens_BS = tokens_BS.to(device)
                routing = model(tokens_BS, backend=cfg.dispatch, recorded=experts, steps=shared).routing
            micro_sums = [layer.observed | {"count": layer.wanted_E} for layer in routing]
            sums = list(map(added, sums, micro_sums)) if sums else micro_sums
    names = [(i, name) for i, layer_sums in enumerate(sums) for name in sorted(layer_sums)]
    for (i, name), value in zip(names, all_summed_over_ranks([sums[i][name] for i, name in names]), strict=True):
        sums[i][name] = value
    return [Step(n_parts, layer_sums, ranks) for layer_sums in sums]


def update_routers(model: Transformer, totals: list[LayerTotals], cfg: BalanceConfig, progress: float) -> None:
    """Let every router learn from the step's counts over all ranks; one shared between layers from their sum."""
    by_router: dict[Router, LayerTotals] = {}
    for router, layer in zip(model.routers(), totals, strict=True):
        if router in by_router:
            by_router[router].add(layer)
        else:
            by_router[router] = dataclasses.replace(layer)
    for router, layer in by_router.items():
        router.update(cfg, coefficient(cfg, "bias_rate", progress), layer.wanted_E, layer.observed)
    for depth, layer in zip(model.depths(), totals, strict=True):
        if depth is not None:
            depth.update(layer.observed)


def clip(model: Transformer, norm: float, limit: float) -> None:
    """Scale every gradient so that the global norm is at most `limit`."""
    if norm > limit:
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], limit / norm)
