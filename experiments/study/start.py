"""A run's folder whose weights come from elsewhere: a state before its first step, from which training goes on."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from moe.config.run import Config
from moe.data.shards import Dataset
from moe.data.tokenizer import Tokenizer
from moe.model.transformer import Transformer, load_model
from moe.run import machine
from moe.run.folder import create_folder
from moe.train.loop import loader_of, resolve
from moe.train.optimizer import build_optimizer
from moe.train.state import State, save_checkpoint, seed_everything


def start_run(
    cfg: Config, tensors: Mapping[str, Tensor], dataset: Dataset, tokenizer: Tokenizer, say: Callable[[str], None]
) -> tuple[Config, State]:
    """Make the folder `cfg.run`, which must not exist, all of it or nothing: settings, tokenizer, and a checkpoint of
    step 0 with these tensors. Returns the settings as they are there, with nothing left open, and what was saved.
    Raises `BadInput`."""
    machine.set_threads(cfg.train)
    folder = Path(cfg.run)
    cfg = resolve(cfg, folder, dataset, machine.choose_device(cfg.train.device), say)
    state = initial_state(cfg, tensors, dataset)
    create_folder(
        folder, cfg, tokenizer,
        lambda beside: save_checkpoint(state, cfg, beside / "checkpoints", dataset, None, say),
    )  # fmt: skip
    return cfg, state


def initial_state(cfg: Config, tensors: Mapping[str, Tensor], dataset: Dataset) -> State:
    """What training starts from: the model with these tensors, an optimiser without a past, the first batch."""
    seed_everything(cfg.seed)
    model = Transformer(cfg.model, cfg.router, cfg.balance, cfg.data.document_end(dataset.tokenizer.eot))
    load_model(model, dict(tensors))
    return State(model, build_optimizer(model, cfg.optim), loader_of(cfg, dataset))
