"""Turn the model of a dense run into an MoE, in a new run's folder that training goes on with from step 0.

    python -m experiments.upcycle source=runs/DENSE run=runs/NEW                     # 8 experts, copies of the MLP
    python -m experiments.upcycle source=runs/DENSE run=runs/NEW method=drop drop=0.5 model.moe.k=2
    python -m experiments.upcycle source=runs/DENSE run=runs/NEW method=split model.moe.n_experts=16 model.moe.k=4 \\
        model.moe.d_expert=128                                                       # d_ff=512 in four slices
    python -m experiments.train run=runs/NEW resume=true

Settings that the command line does not give are the dense run's own, its learning rate and number of steps among
them; `seed` draws the routers, the noise and the batches. `moe.upcycle.upcycle` says what each method does.
"""

import copy
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from experiments import cli
from experiments.train import overlay
from moe import data, machine, run
from moe.config import BadInput, Config, MoEConfig, moe_layers, validate
from moe.generate import load_run
from moe.model import Transformer, load_model, model_tensors
from moe.optim import build_optimizer
from moe.train import State, resolve, save_checkpoint, seed_everything
from moe.upcycle import METHODS, upcycle

OWN = ("source", "which", "method", "noise", "drop", "resume")


@dataclass
class UpcycleConfig(Config):
    """The new run's settings, and how its weights come from the dense run's."""

    source: str = ""  # the dense run's folder
    which: str = "best"  # of its checkpoints: best (lowest validation loss) | last | step-N
    method: str = "copy"  # copy | noise | split | drop
    noise: float = 0.0  # noise: deviation of what is added to the experts, as a share of the weights' own
    drop: float = 0.5  # drop: share of the hidden channels that each expert draws anew

    def __post_init__(self) -> None:
        if not self.source:
            raise BadInput("source=... is needed: the folder of a dense run, such as runs/NAME.")
        if not self.run:
            raise BadInput("run=... is needed: the new run's folder, such as runs/NAME.")
        if self.method not in METHODS:
            raise BadInput(f"method={self.method} is not one of {', '.join(METHODS)}.")
        if self.noise and self.method != "noise":
            raise BadInput(f"noise={self.noise} means nothing to method={self.method}: set method=noise.")


@cli.command("upcycle", UpcycleConfig, verbatim=("source", "run"))
def main(cfg: UpcycleConfig) -> None:
    """Write the new run's folder and say how to train it."""
    given = [each.lstrip("+~").partition("=")[0] for each in HydraConfig.get().overrides.task]
    create(cfg, given)


def target_config(dense: Config, cfg: UpcycleConfig, given: list[str]) -> Config:
    """The new run's settings: the dense run's, but for those that the command line names in `given`, and the experts,
    of which there are 8 with K = 2, as wide as the dense MLP, unless given. Raises `BadInput`."""
    for key in given:
        if key.split(".")[0] == "model" and not key.startswith("model.moe."):
            raise BadInput(f"{key} cannot be given: a new model has the shape of the dense one in {cfg.source}.")
    if cfg.method == "split" and "model.moe.d_expert" not in given:
        raise BadInput(
            f"method=split needs model.moe.d_expert=..., a part of the dense model's d_ff={dense.model.d_ff}."
        )
    keys = [key for key in given if key not in OWN]
    if "router" in keys:  # some routers come with a balance of their own
        keys.append("balance")
    own = copy.deepcopy(dense)
    own.model.moe = copy.deepcopy(cfg.model.moe or MoEConfig())
    if "model.moe.d_expert" not in given:
        own.model.moe.d_expert = dense.model.d_ff
    own = overlay(own, cfg, keys)
    own.resume = False
    validate(own)
    return own


def create(cfg: UpcycleConfig, given: list[str]) -> Config:
    """Make the run's folder: config.yaml, tokenizer and a checkpoint of step 0, all of it or nothing. Returns the new
    run's config. Raises `BadInput` for a folder that exists and a source that is no dense run."""
    folder = Path(cfg.run)
    if os.path.lexists(folder):
        raise BadInput(f"run={folder} exists: choose another folder.")
    dense, tokenizer, source = load_run(Path(cfg.source), cfg.which)
    if source.model.moe is not None:
        raise BadInput(f"source={cfg.source} is an MoE already: choose a dense run.")
    own = target_config(source, cfg, given)
    tensors = upcycle(
        model_tensors(dense), source.model, own.model, cfg.method, own.seed, cfg.noise, cfg.drop, own.router
    )
    dataset = data.prepare(own.data, own.tokenizer, print)
    run.check_tokenizer(Path(cfg.source), dataset.tokenizer)
    own = resolve(own, folder, dataset, machine.choose_device(own.train.device))
    machine.set_threads(own.train)
    seed_everything(own.seed)
    model = Transformer(own.model, own.router, own.balance)
    load_model(model, tensors)
    loader = data.Loader(dataset.split("train"), own.train.batch_size, own.model.context, own.seed, own.data.workers)
    state = State(model, build_optimizer(model, own.optim), loader)
    temporary = folder.with_name(f"{folder.name}.new-{os.getpid()}")
    try:
        run.create(temporary, own, tokenizer)
        save_checkpoint(state, own, temporary / "checkpoints", dataset, None, print)
        temporary.rename(folder)
    except OSError as error:
        raise BadInput(f"run={folder} cannot be created ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    n_parameters = sum(each.numel() for each in model.parameters())
    print(
        f"run: {folder}  {n_parameters:,} parameters, {len(moe_layers(own.model))} MoE layers by method={cfg.method} "
        f"from {cfg.source}. Train it with: python -m experiments.train {shlex.quote(f'run={folder}')} resume=true"
    )
    return own


if __name__ == "__main__":
    main()
