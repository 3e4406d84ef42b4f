"""What training changes: a state, where a checkpoint puts it, and what brings it back."""

import dataclasses
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.analysis.replay import Replay
from moe.config.parse import to_dict
from moe.config.run import Config
from moe.data.loader import Loader
from moe.data.shards import Dataset
from moe.errors import BadInput
from moe.model.adapt import merged, unmerged
from moe.model.transformer import Transformer, load_model, model_tensors
from moe.parallel import launch
from moe.parallel.collectives import n_ranks, rank
from moe.parallel.gradients import local
from moe.run import checkpoint, jsonl, machine, sharded, shards
from moe.run.load import load_source
from moe.train.average import Average
from moe.train.objective import Companions
from moe.train.optimizer import learning_rate, optimizer_tensors, restore_optimizer

REWARD = "reward.weight"  # of a reward model's head
AVERAGE = "average/"  # what the names of averaged weights begin with, among an optimiser's tensors


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every global random generator: torch's as uint8 tensors (`Snapshot.rng`), Python's and NumPy's as
    plain JSON. CUDA's are included once this process uses CUDA."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 — the global generator is what libraries draw from
    legacy["state"]["key"] = legacy["state"]["key"].tolist()
    return tensors, {"python": [version, list(words), gauss], "numpy": legacy}


def set_rng_state(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned. A CUDA state is set where that device exists: on other hardware a resumed run
    cannot be bitwise the same anyway."""
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda:{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda:{i}"], i)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": state["numpy"]["state"] | {"key": key}})  # noqa: NPY002


@dataclass
class State:
    """What a step changes, and what it reads besides."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    loader: Loader
    teacher: Transformer | None = None  # of cfg.distill
    replay: Replay | None = None  # of cfg.balance.recorded
    companions: Companions | None = None  # of cfg.objective
    step: int = 0
    seconds: float = 0.0  # of training: evaluation and saving left out
    skipped: int = 0
    skipped_in_a_row: int = 0
    saver: sharded.Saver | None = None  # of cfg.checkpoint.aside
    average: Average = field(default_factory=Average)  # of cfg.optim.average, once it is at those steps


def save_checkpoint(
    state: State, cfg: Config, root: Path, dataset: Dataset, score: float | None, say: Callable[[str], None]
) -> Path:
    """A verified checkpoint of this moment. A model with a non-finite parameter is refused."""
    # What is not finite is not kept.
    for name, p in state.model.named_parameters():
        if launch.any_rank(not local(p).isfinite().all()):
            good = checkpoint.latest(root, say)
            raise BadInput(
                f"step {state.step}: the parameter {name} is not finite after the update, and is not saved; the last "
                f"good checkpoint is {good}: lower optim.lr={cfg.optim.lr}."
            )

    # All that changes.
    rng, generators = rng_state()
    meta = {
        "config": to_dict(cfg),
        "loader": state.loader.state(state.step),
        "rng": generators,
        "tokenizer": dataset.tokenizer.fingerprint,
        "seconds": state.seconds,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        "averaged": state.average.count,
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
    }
    average = {f"{AVERAGE}{name}": value for name, value in state.average.weights.items()}
    optimizer = optimizer_tensors(state.model, state.optimizer) | average
    snapshot = checkpoint.Snapshot(state.step, model_tensors(state.model), optimizer, meta, rng)

    # Now, or aside.
    settings: dict[str, Any] = dict(keep=cfg.checkpoint.keep, score=score, warn=say)
    if state.saver is not None:
        state.saver.save(root, snapshot, **settings)
        return root / checkpoint.name_of(state.step)
    return sharded.save(root, snapshot, **settings)


def take_weights(
    model: Transformer, loader: Loader, cfg: Config, tokenizer: str, say: Callable[[str], None]
) -> checkpoint.Snapshot | None:
    """Give a new run's model, not yet shared out among ranks, the weights of the checkpoint in `cfg.source`; with
    `cfg.source_state` all, the snapshot for `go_on_from`. `tokenizer`: the fingerprint of this run's. Raises `BadInput`
    for a checkpoint that does not fit."""
    # A checkpoint of this tokenizer, model and place in the data.
    snapshot, about = load_source(cfg.source, tokenizer), f"source={cfg.source}"
    try:
        if cfg.source_state == "all":
            load_model(model, with_reward_head_of(model, snapshot.model))
            loader.check_state(snapshot.meta["loader"])
        else:
            load_model(model, unmerged(model, with_reward_head_of(model, merged(snapshot.model))))
    except BadInput as error:
        raise BadInput(f"{about} does not fit this run: {error}") from error
    if cfg.source_state == "weights":
        say(f"source: the weights of {cfg.source}")
        return None

    # All else, if there is a step to go on with.
    if snapshot.step >= cfg.train.steps:
        raise BadInput(
            f"train.steps={cfg.train.steps} is not above the step {snapshot.step} of {about}, from which "
            "source_state=all goes on: give more, or source_state=weights."
        )
    before = checkpoint.config_of(Path(cfg.source), snapshot.meta)
    if before.optim.name != cfg.optim.name:
        raise BadInput(
            f"optim.name={cfg.optim.name} cannot go on with the state of {about}, which is of optim.name="
            f"{before.optim.name}: give that one, or source_state=weights."
        )
    return snapshot


def go_on_from(state: State, snapshot: checkpoint.Snapshot, cfg: Config, say: Callable[[str], None]) -> None:
    """Give a run whose model has the weights of a snapshot all its other state, under the schedule given here."""
    if n_ranks() > 1:
        snapshot = dataclasses.replace(snapshot, optimizer=shared_tensors(Path(cfg.source), state.model)[1])
    _put_back(state, snapshot)
    state.average = Average()  # the mean is over steps of this run
    before = checkpoint.config_of(Path(cfg.source), snapshot.meta)
    was, now = (learning_rate(its.optim, state.step, its.train.steps) for its in (before, cfg))
    say(f"source: all of {cfg.source}, from step {state.step} on")
    if not math.isclose(was, now):
        say(f"warning: the learning rate was {was:g} at step {state.step}, and in this run's schedule it is {now:g}.")


def with_reward_head_of(model: Transformer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A source's tensors with the reward head that the model has, its own where the source has none, or without."""
    body = {name: value for name, value in tensors.items() if name != REWARD}
    if model.reward is None:
        return body
    return body | {REWARD: tensors.get(REWARD, model.reward.weight.detach().clone())}


def _put_back(state: State, snapshot: checkpoint.Snapshot) -> None:
    """All but the model's weights."""
    meta = snapshot.meta
    average = {name: value for name, value in snapshot.optimizer.items() if name.startswith(AVERAGE)}
    optimizer = {name: value for name, value in snapshot.optimizer.items() if name not in average}
    restore_optimizer(state.model, state.optimizer, optimizer)
    device = next(state.model.parameters()).device
    weights = {name.removeprefix(AVERAGE): value.clone().to(device) for name, value in average.items()}
    state.average = Average(meta.get("averaged", 0), weights)
    set_rng_state(snapshot.rng, meta["rng"])
    state.step, state.seconds = snapshot.step, meta["seconds"]
    state.skipped, state.skipped_in_a_row = meta["skipped"], meta["skipped_in_a_row"]


def load_onto(path: Path, model: Transformer) -> checkpoint.Snapshot:
    """Give a model the weights of a checkpoint in place, each rank its parts, and return the snapshot, whose
    optimiser's tensors are shared out as the weights are. Raises `BadInput` for one that is damaged or does not fit."""
    if n_ranks() == 1:
        snapshot = checkpoint.load(path)
        load_model(model, snapshot.model)
        return snapshot
    weights, optimizer = shared_tensors(path, model)
    return checkpoint.Snapshot(
        step=checkpoint.step_of(path), model=weights, optimizer=optimizer, **checkpoint.rest_of(path)
    )


def shared_tensors(path: Path, model: Transformer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a checkpoint as the ranks share them: the model's, filled in place, and the optimiser's, each like
    the parameter that it is of. Raises `BadInput` for a name or shape that is not the model's."""
    parameters, optimizer = dict(model.named_parameters()), {}
    for name, shape in shards.shapes(path).items():
        _, slash, of = name.partition("/")
        if slash and of not in parameters:
            raise BadInput(f"{path}: the optimiser's {name} is of a parameter that this model does not train.")
        if slash:
            p = parameters[of]
            is_like = tuple(p.shape) == shape
            optimizer[name] = torch.zeros_like(p, requires_grad=False) if is_like else torch.zeros(shape)
    weights = model_tensors(model)
    shards.read_into(path, weights | optimizer)
    return weights, optimizer


def restore(state: State, folder: Path, threads: int, say: Callable[[str], None]) -> None:
    """Put the newest good checkpoint of the run back, if there is one, and drop the log lines after it."""
    path = launch.first_then_tell(lambda: checkpoint.latest(folder / "checkpoints", say))
    if path is not None:
        snapshot = load_onto(path, state.model)
        meta = snapshot.meta
        state.loader.check_state(meta["loader"])
        _put_back(state, snapshot)
        for key, value in (("threads", threads), ("versions", machine.versions())):
            if meta[key] != value:
                say(f"warning: {key} was {meta[key]} and is {value}: the result may differ in its last bits.")
    if rank() > 0:
        return
    for name in ("metrics.jsonl", "routing/counts.jsonl", "routing/checksums.jsonl"):
        jsonl.keep_until(folder / name, state.step if path else -1)
    lines = jsonl.read_lines(folder / "metrics.jsonl")
    last = lines[-1]["step"] if lines else 0
    if path and last < state.step:
        say(f"warning: {folder / 'metrics.jsonl'} has no lines of the steps {last + 1} to {state.step}: they are lost.")


def seed_everything(seed: int) -> None:
    """Every global generator. The model's initial weights and the loader draw from generators of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 — the global generator is what libraries draw from
    torch.manual_seed(seed)
