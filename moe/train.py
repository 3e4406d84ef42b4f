"""The one training loop: prepare or resume a run, take steps, evaluate, save, and leave a summary.

A run is resumed bitwise: model, optimiser, schedule, loader position, random generators and counters all come back from
the checkpoint, and the loader's batches are a function of (seed, step). SIGINT or SIGTERM finishes the step, saves, and
says how to go on. A loss or gradient that is not finite never reaches a parameter.
"""

import copy
import dataclasses
import itertools
import json
import math
import random
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe import checkpoint, machine, run, trackers
from moe.config.balance import BalanceConfig
from moe.config.model import moe_layers
from moe.config.parse import to_dict
from moe.config.run import Config
from moe.data.loader import Batch, Loader, validation_starts
from moe.data.prepare import prepare
from moe.data.shards import Dataset
from moe.distill import distill_loss, load_teacher
from moe.errors import BadInput
from moe.evaluate import Evaluation, evaluate
from moe.metrics import layer_metrics
from moe.model import cost, dispatch
from moe.model.layer import LayerRouting
from moe.model.transformer import Output, Transformer, load_model, model_tensors, next_token_loss
from moe.optim import build_optimizer, learning_rate, optimizer_tensors, restore_optimizer, set_learning_rate
from moe.progress import Watch
from moe.replay import Recording, Replay
from moe.routing import balance
from moe.routing.contract import Router

MAX_SKIPPED = 20  # steps in a row with train.non_finite=skip before the run stops all the same


@dataclass
class State:
    """What a step changes, and what it reads besides."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    loader: Loader
    teacher: Transformer | None = None  # of cfg.distill
    replay: Replay | None = None  # of cfg.balance.recorded
    step: int = 0
    seconds: float = 0.0  # of training: evaluation and saving left out
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass
class Gradients:
    """What one step's forward and backward passes gave; losses are means over the step's tokens."""

    lm_loss: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)  # unweighted: of the routers, over layers; of a teacher
    total: float = 0.0  # lm_loss and the losses with their coefficients
    norm: float = 0.0
    routing: list["LayerTotals"] = field(default_factory=list)  # of every MoE layer


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

    def add(self, other: "LayerTotals") -> None:
        """Another micro-batch of the layer."""
        for name in ("count_E", "wanted_E", "dropped", "skipped", "tokens", "expert"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.observed = {name: value + other.observed.get(name, 0) for name, value in self.observed.items()}


def train(cfg: Config, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, resume, or (if it is finished) only read the run of `cfg`. Returns its summary, as in summary.json.

    Raises `BadInput` for anything a person can correct; `SystemExit` with 128 + the signal's number after SIGINT or
    SIGTERM, once the step is saved."""
    cfg = copy.deepcopy(cfg)
    code = machine.git_state()  # now: by the end the files may be others than those imported
    trackers.check(cfg)
    folder = Path(cfg.run) if cfg.run else run.default_folder(cfg)
    started = folder.exists()
    if started and not cfg.resume:
        raise BadInput(f"run={folder} exists: add resume=true to go on with it, or choose another run.")
    device = machine.choose_device(cfg.train.device)
    threads = machine.set_threads(cfg.train)
    machine.keep_freed_memory()
    backend, why = dispatch.choose(cfg.dispatch, device)
    if cfg.dispatch == "auto" and cfg.model.moe:
        say(f"dispatch: {backend}, because {why}")
    cfg.dispatch = backend
    dataset = prepare(cfg.data, cfg.tokenizer, say)
    cfg = resolve(cfg, folder, dataset, device)
    if started:
        run.check_same(run.read_config(folder), cfg)
        run.check_tokenizer(folder, dataset.tokenizer)
        if (folder / "summary.json").exists():
            say(f"run: {folder} is finished")
            return json.loads((folder / "summary.json").read_text())
    loader = Loader(dataset.split("train"), cfg.train.batch_size, cfg.model.context, cfg.seed, cfg.data.workers)
    validation_starts(dataset.split("val"), cfg.model.context, cfg.train.eval_tokens)
    teacher = load_teacher(cfg, dataset.tokenizer.fingerprint, device)
    replay = Replay(cfg) if cfg.balance.recorded and cfg.model.moe else None
    if not started:
        run.create(folder, cfg, dataset.tokenizer)
    machine.reset_peak_memory(device)
    seed_everything(cfg.seed)
    model = Transformer(cfg.model, cfg.router, cfg.balance).initialize(cfg.seed).to(device)
    state = State(model, build_optimizer(model, cfg.optim), loader, teacher, replay)
    restore(state, folder, threads, say)
    if cfg.train.compile:
        model.compile()
    tracker = trackers.Trackers(cfg, folder, state.step)
    size = cost.size(cfg.model, cfg.router)
    say(
        f"run: {folder}  {size.total:,} parameters, {size.active:,} active  {cfg.train.precision} on {device}, "
        f"{threads} threads, dispatch={cfg.dispatch}  steps {state.step} to {cfg.train.steps}"
    )
    with closing(tracker), catch_signals() as stop:
        final = run_steps(state, cfg, folder, dataset, tracker, stop)
    if final is None:
        say(
            f"Stopped after step {state.step} of {cfg.train.steps}, saved in {folder}. "
            f"Go on with: python -m experiments.train {shlex.quote(f'run={folder}')} resume=true"
        )
        raise SystemExit(128 + stop.number)
    summary = summarize(state, cfg, dataset, final, device, threads) | code
    run.write_atomically(folder / "summary.json", json.dumps(summary, indent=1))
    say(f"run: {folder} is finished  val loss {final.val['loss']:.4f}  bits per byte {final.val['bpb']:.4f}")
    return summary


def resolve(cfg: Config, folder: Path, dataset: Dataset, device: torch.device) -> Config:
    """The config with every "auto" and "derive it" replaced. Raises `BadInput` for a vocabulary that does not fit."""
    vocab_size = dataset.tokenizer.vocab_size
    if cfg.model.vocab_size and cfg.model.vocab_size < vocab_size:
        raise BadInput(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the {vocab_size} of tokenizer.name="
            f"{cfg.tokenizer.name}: leave it 0 to take the tokenizer's, or choose a smaller tokenizer."
        )
    cfg.run = str(folder)
    cfg.model.vocab_size = cfg.model.vocab_size or vocab_size
    cfg.train.precision = machine.choose_precision(cfg.train.precision, device)
    cfg.train.device = str(device)
    return cfg


def run_steps(
    state: State, cfg: Config, folder: Path, dataset: Dataset, tracker: trackers.Trackers, stop: "Stop"
) -> Evaluation | None:
    """Step until the end. Returns the final evaluation, or None when a signal ended the run early (it is saved)."""
    root, last = folder / "checkpoints", None
    waiting = take_back_unevaluated(state, cfg, folder / "metrics.jsonl")
    lines, counts = run.Lines(folder / "metrics.jsonl"), run.Lines(folder / "routing" / "counts.jsonl")
    choices = Recording(folder, cfg)

    def validate() -> Evaluation | None:
        return evaluate(
            state.model,
            dataset,
            n_tokens=cfg.train.eval_tokens,
            batch_size=cfg.train.batch_size // cfg.train.accumulate,
            backend=cfg.dispatch,
            autocast=partial(autocast, cfg),
            stop=lambda: bool(stop.number),
        )

    name = folder.name if len(folder.name) <= 24 else f"{folder.name[:23]}…"
    with (
        closing(lines),
        closing(counts),
        closing(choices),
        Watch(name, cfg.train.steps, state.step, cfg.log.every) as watch,
    ):

        def record(line: dict[str, Any], loads: list[Tensor]) -> None:
            lines.write(line)
            tracker.log(line)
            watch.step(line, loads)

        def save(score: float | None) -> None:
            path = save_checkpoint(state, cfg, root, dataset, score, watch.say)
            if stop.number:
                watch.say(f"checkpoint: {path}")

        if waiting:
            last = validate()
            record(waiting | ({"val": last.val} if last else {}), [])
        with closing(state.loader.iterate(state.step)) as batches:
            for batch in batches if state.step < cfg.train.steps and not stop.number else ():
                line, gradients = take_step(state, batch, cfg, root)
                if evaluates(state.step, cfg):
                    last = validate()
                    line |= {"val": last.val} if last else {}
                loads = [each.count_E for each in gradients.routing]
                record(line, loads)
                if cfg.log.experts:
                    choices.write(state.step, [torch.cat(each.expert) for each in gradients.routing])
                if loads and state.step % cfg.log.every == 0:
                    counts.write({"step": state.step, "counts": [each.tolist() for each in loads]})
                at_end = state.step == cfg.train.steps
                if at_end or stop.number or (cfg.checkpoint.every and state.step % cfg.checkpoint.every == 0):
                    save(line["val"]["loss"] if "val" in line else None)
                    if at_end or stop.number:  # within: a signal since the line above must not end an unsaved step
                        break
        if stop.number:
            if state.step == 0:
                save(None)
            return None
        return last or validate()  # a run killed between its last checkpoint and its summary


def evaluates(step: int, cfg: Config) -> bool:
    """Whether the metrics line of `step` has a validation: the first, the last, and every `train.eval_every`."""
    return step in (0, cfg.train.steps) or bool(cfg.train.eval_every and step % cfg.train.eval_every == 0)


def take_back_unevaluated(state: State, cfg: Config, path: Path) -> dict[str, Any] | None:
    """The metrics line of this moment if it should have a validation and has none (the run begins, or a signal cut the
    evaluation short), taken out of the file at `path`; else None."""
    written = run.read_lines(path)
    at_step = bool(written) and written[-1]["step"] == state.step
    line = written[-1] if at_step else {"step": state.step, "seconds": state.seconds}
    if "val" in line or not evaluates(state.step, cfg):
        return None
    run.keep_until(path, state.step - 1)
    return line


def take_step(state: State, batch: Batch, cfg: Config, root: Path) -> tuple[dict[str, Any], Gradients]:
    """One optimiser step: forward and backward over the micro-batches, checks, update. Returns its metrics line."""
    start, step = time.perf_counter(), state.step + 1
    lr = learning_rate(cfg.optim, step, cfg.train.steps)
    progress = state.step / cfg.train.steps
    recorded = state.replay.step(step, next(state.model.parameters()).device) if state.replay else None
    gradients = compute_gradients(state.model, batch, cfg, progress, state.teacher, recorded)
    loss = gradients.total
    if math.isfinite(loss) and math.isfinite(gradients.norm):
        state.skipped_in_a_row = 0
        if cfg.optim.clip:
            clip(state.model, gradients.norm, cfg.optim.clip)
        set_learning_rate(state.optimizer, lr)
        state.optimizer.step()
        update_routers(state.model, gradients.routing, cfg.balance, progress)
    else:
        state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
        if cfg.train.non_finite == "stop" or state.skipped_in_a_row > MAX_SKIPPED:
            raise BadInput(explain_non_finite(state, batch, loss, cfg, root))
    state.optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    state.step, state.seconds = step, state.seconds + seconds
    layers = moe_layers(cfg.model)
    return {
        "step": step,
        "loss": loss,
        "lm_loss": gradients.lm_loss,
        **gradients.losses,
        "grad_norm": gradients.norm,
        "lr": lr,
        "tokens_per_s": batch.targets_BS.numel() / seconds,
        "seconds": state.seconds,
        "skipped": state.skipped,
        "layers": [
            layer_metrics(layer, each.count_E, int(each.dropped), int(each.skipped), each.tokens)
            for layer, each in zip(layers, gradients.routing, strict=True)
        ],
    }, gradients  # fmt: skip


def compute_gradients(
    model: Transformer,
    batch: Batch,
    cfg: Config,
    progress: float = 0.0,
    teacher: Transformer | None = None,
    recorded: Sequence[Tensor] | None = None,
) -> Gradients:
    """Forward and backward over the step's micro-batches. Losses of the routers are summed over layers, and weighted as
    the share `progress` of the run that is done has it. `recorded`: the step's experts (B·S, K) for every MoE layer,
    instead of the routers' choice."""
    device, n = next(model.parameters()).device, cfg.train.accumulate
    result, loads = Gradients(), global_loads(model, batch, cfg, recorded)
    for tokens_BS, targets_BS, experts in micro_batches(batch, cfg, recorded):
        tokens_BS = tokens_BS.to(device)
        with autocast(cfg):
            output: Output = model(
                tokens_BS,
                backend=cfg.dispatch,
                checkpoint_activations=cfg.train.checkpoint_activations,
                loads=loads,
                recorded=experts,
            )
        lm_loss = next_token_loss(output.logits_BSV, targets_BS.to(device))
        losses = {"aux": torch.zeros((), device=device), "z": torch.zeros((), device=device)}
        for each in output.routing:
            losses |= {name: losses.get(name, 0.0) + value for name, value in each.losses.items()}
        if teacher is not None:
            with torch.no_grad(), autocast(cfg):
                taught_BSV = teacher(tokens_BS, backend=cfg.dispatch).logits_BSV
            losses["distill"] = distill_loss(output.logits_BSV, taught_BSV, cfg.distill.temperature)
        weights = loss_weights(cfg, losses, progress)
        total = weights["lm"] * lm_loss + sum(weights[name] * value for name, value in losses.items())
        (total / n).backward()
        result.lm_loss += lm_loss.item() / n
        for name, value in losses.items():
            result.losses[name] = result.losses.get(name, 0.0) + value.item() / n
        totals = [layer_totals(each, tokens_BS.numel(), cfg.log.experts) for each in output.routing]
        for mine, other in zip(result.routing, totals, strict=False):
            mine.add(other)
        result.routing = result.routing or totals
    weights = loss_weights(cfg, result.losses, progress)
    result.total = weights["lm"] * result.lm_loss + sum(weights[name] * each for name, each in result.losses.items())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    result.norm = torch.nn.utils.get_total_norm(grads).item()
    return result


def micro_batches(
    batch: Batch, cfg: Config, recorded: Sequence[Tensor] | None = None
) -> Iterator[tuple[Tensor, Tensor, list[Tensor] | None]]:
    """Tokens, targets and recorded experts of each micro-batch of a step."""
    n = cfg.train.accumulate
    parts = zip(*(each.chunk(n) for each in recorded), strict=True) if recorded else itertools.repeat(None, n)
    for tokens_BS, targets_BS, part in zip(batch.tokens_BS.chunk(n), batch.targets_BS.chunk(n), parts, strict=True):
        yield tokens_BS, targets_BS, None if part is None else list(part)


def layer_totals(routing: LayerRouting, tokens: int, keep_experts: bool = False) -> LayerTotals:
    """What of one forward pass is summed over a step."""
    detached = {name: value.detach() for name, value in routing.observed.items()}
    own = routing.count_E, routing.wanted_E, routing.dropped, routing.skipped, tokens, detached
    return LayerTotals(*own, [routing.expert] if keep_experts else [])


def loss_weights(cfg: Config, names: Iterable[str], progress: float) -> dict[str, float]:
    """What each loss is multiplied with: a router's by its coefficient; "lm" by 1, or what a teacher's leaves of it."""
    weights = {"lm": 1.0} | {name: coefficient(cfg.balance, name, progress) for name in names}
    return weights | ({"lm": 1 - cfg.distill.weight, "distill": cfg.distill.weight} if "distill" in weights else {})


def coefficient(cfg: BalanceConfig, name: str, progress: float) -> float:
    """What a router's loss is multiplied with: its coefficient on its schedule; 1 for a loss that has none."""
    return balance.scheduled(getattr(cfg, name, 1.0), cfg.schedule.get(name), progress)


@torch.no_grad()
def global_loads(
    model: Transformer, batch: Batch, cfg: Config, recorded: Sequence[Tensor] | None = None
) -> list[Tensor] | None:
    """With balance.scope=global, how many rows the whole step, over all its micro-batches and ranks, wants of every
    expert, for each MoE layer (2501.11873). E · sum f_i P_i is linear in P: with f of the whole step, the mean of the
    micro-batches' losses is the whole step's loss, which it is not with f of each.

    f must be known before the first backward pass. So with several micro-batches (or ranks) the step's forward passes
    are run once more in advance, with the same random numbers; None where a pass knows f by itself."""
    ranks = n_ranks()
    if cfg.balance.scope != "global" or not cfg.balance.aux or (cfg.train.accumulate == 1 and ranks == 1):
        return None
    device = next(model.parameters()).device
    loads: list[Tensor] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for tokens_BS, _, experts in micro_batches(batch, cfg, recorded):
            with autocast(cfg):
                routing = model(tokens_BS.to(device), backend=cfg.dispatch, recorded=experts).routing
            wanted = [each.wanted_E for each in routing]
            loads = [mine + other for mine, other in zip(loads, wanted, strict=True)] if loads else wanted
    return [summed_over_ranks(each) for each in loads]


def n_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's; a tensor of its own where there are several."""
    if n_ranks() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def _summed(observed: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: summed_over_ranks(value) for name, value in sorted(observed.items())}


def update_routers(model: Transformer, totals: list[LayerTotals], cfg: BalanceConfig, progress: float) -> None:
    """Let every router learn from the step's counts over all ranks; one shared between layers from their sum."""
    found: dict[Router, LayerTotals] = {}
    for router, each in zip(model.routers(), totals, strict=True):
        if router in found:
            found[router].add(each)
        else:
            found[router] = dataclasses.replace(each)
    for each in found.values():
        each.wanted_E, each.observed = summed_over_ranks(each.wanted_E), _summed(each.observed)
    for router, each in found.items():
        router.update(cfg, coefficient(cfg, "bias_rate", progress), each.wanted_E, each.observed)
    for depth, each in zip(model.depths(), totals, strict=True):
        if depth is not None:
            depth.update(_summed(each.observed))


def clip(model: Transformer, norm: float, limit: float) -> None:
    """Scale every gradient so that the global norm is at most `limit`."""
    if norm > limit:
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], limit / norm)


def autocast(cfg: Config) -> AbstractContextManager[Any]:
    """bf16 autocast, or nothing for fp32."""
    kind = cfg.train.device.split(":")[0]
    return torch.autocast(kind, torch.bfloat16) if cfg.train.precision == "bf16" else nullcontext()


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
    found: list[str] = []

    def hook(name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tensors = [each for each in (output if isinstance(output, tuple) else (output,)) if isinstance(each, Tensor)]
        if not found and not all(each.isfinite().all() for each in tensors if each.is_floating_point()):
            found.append(f"the output of {name or 'the model'}")

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
    if found:
        return found[0]
    if not math.isfinite(loss):
        return "the loss"
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of {bad[-1]}" if bad else "the gradients' norm"


def save_checkpoint(
    state: State, cfg: Config, root: Path, dataset: Dataset, score: float | None, say: Callable[[str], None]
) -> Path:
    """A verified checkpoint of this moment. A model with a non-finite parameter is refused."""
    for name, p in state.model.named_parameters():
        if not p.isfinite().all():
            good = checkpoint.latest(root, say)
            raise BadInput(
                f"step {state.step}: the parameter {name} is not finite after the update, and is not saved; the last "
                f"good checkpoint is {good}: lower optim.lr={cfg.optim.lr}."
            )
    rng, generators = checkpoint.rng_state()
    meta = {
        "config": to_dict(cfg),
        "loader": state.loader.state(state.step),
        "rng": generators,
        "tokenizer": dataset.tokenizer.fingerprint,
        "seconds": state.seconds,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
    }
    snapshot = checkpoint.Snapshot(
        state.step, model_tensors(state.model), optimizer_tensors(state.model, state.optimizer), meta, rng
    )
    return checkpoint.save(root, snapshot, keep=cfg.checkpoint.keep, score=score, warn=say)


def restore(state: State, folder: Path, threads: int, say: Callable[[str], None]) -> None:
    """Put the newest good checkpoint of the run back, if there is one, and drop the log lines after it."""
    path = checkpoint.latest(folder / "checkpoints", say)
    if path is not None:
        snapshot = checkpoint.load(path)
        meta = snapshot.meta
        state.loader.check_state(meta["loader"])
        load_model(state.model, snapshot.model)
        restore_optimizer(state.model, state.optimizer, snapshot.optimizer)
        checkpoint.set_rng_state(snapshot.rng, meta["rng"])
        state.step, state.seconds = snapshot.step, meta["seconds"]
        state.skipped, state.skipped_in_a_row = meta["skipped"], meta["skipped_in_a_row"]
        for key, here in (("threads", threads), ("versions", machine.versions())):
            if meta[key] != here:
                say(f"warning: {key} was {meta[key]} and is {here}: the result may differ in its last bits.")
    for name in ("metrics.jsonl", "routing/counts.jsonl"):
        run.keep_until(folder / name, state.step if path else -1)


def summarize(
    state: State, cfg: Config, dataset: Dataset, final: Evaluation, device: torch.device, threads: int
) -> dict[str, Any]:
    """The numbers of a finished run, and what they came from."""
    tokens = cfg.train.steps * cfg.train.batch_size * cfg.model.context
    return {
        "name": Path(cfg.run).name,
        "seed": cfg.seed,
        "model": to_dict(cfg.model),
        "params": cost.size(cfg.model, cfg.router)._asdict(),
        "flops": cost.flops(cfg.model, cfg.router)._asdict(),
        "steps": state.step,
        "tokens": tokens,
        "seconds": state.seconds,
        "tokens_per_s": tokens / state.seconds,
        "peak_memory_bytes": machine.peak_memory(device),
        "val": final.val,
        "val_windows": final.windows,
        "load": final.load,
        "dataset": dataset.split("train").dataset,
        "tokenizer": dataset.tokenizer.fingerprint,
        "precision": cfg.train.precision,
        "dispatch": cfg.dispatch,
        "device": machine.device_name(device),
        "threads": threads,
        "versions": machine.versions(),
        "skipped": state.skipped,
    }


def seed_everything(seed: int) -> None:
    """Every global generator. The model's initial weights and the loader draw from generators of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 — the global generator is what libraries draw from
    torch.manual_seed(seed)


@dataclass
class Stop:
    """The signal that asks for an end, 0 while there is none."""

    number: int = 0


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """While inside, the first SIGINT or SIGTERM only sets `Stop.number`; the second acts as it always did."""
    stop, before = Stop(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        stop.number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in before:
            signal.signal(number, handle)
    except ValueError:  # not the main thread: its owner handles signals
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
