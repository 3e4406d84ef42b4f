"""Turn finished runs into the start of another model, in a new run's folder that training goes on with from step 0.

    python -m experiments.upcycle source=runs/DENSE run=runs/NEW                     # 8 experts, copies of the MLP
    python -m experiments.upcycle source=runs/DENSE run=runs/NEW method=drop drop=0.5 model.moe.k=2
    python -m experiments.upcycle source=runs/DENSE run=runs/NEW method=split model.moe.n_experts=16 model.moe.k=4 \\
        model.moe.d_expert=128                                                       # d_ff=512 in four slices
    python -m experiments.upcycle source=runs/A run=runs/NEW method=merge others=[runs/B,runs/C]   # an expert of each
    python -m experiments.upcycle source=runs/MOE run=runs/NEW method=grow noise=0.1 # twice the experts
    python -m experiments.upcycle source=runs/MOE run=runs/NEW method=prune model.moe.n_experts=4   # the 4 busiest
    python -m experiments.upcycle source=runs/MOE run=runs/NEW method=dense distill.teacher=runs/MOE
    python -m experiments.train run=runs/NEW resume=true

    from a dense run   copy, noise, split, drop   each MLP becomes a layer of experts
                       merge                      so do those of several dense runs, an expert of each
    from an MoE        grow                       experts are copied, the new ones' router rows with noise
                       prune                      the experts with the most rows in the source's validation stay
                       dense                      every layer's K busiest experts side by side, to be distilled

Settings that the command line does not give are the source's own, its learning rate and number of steps among them;
`seed` draws the routers, the noise and the batches (`seed_init` the first two, `seed_data` the last).
`moe.convert.upcycle` says what each method does and preserves.
"""

import copy
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli
from experiments.study.start import start_run
from moe.config.balance import BalanceConfig
from moe.config.model import ModelConfig, MoEConfig, layer_moe, moe_layers
from moe.config.router import RouterConfig
from moe.config.run import Config, validate
from moe.convert.upcycle import METHODS, Tensors, grow, merge, prune, to_dense, upcycle
from moe.data.prepare import prepare
from moe.data.tokenizer import Tokenizer
from moe.errors import BadInput
from moe.model.transformer import model_tensors
from moe.run import terminal
from moe.run.folder import check_tokenizer, command_to_resume
from moe.run.load import load_run
from moe.run.summary import read_summary

FROM_MOE = ("grow", "prune", "dense")
ALL_METHODS = (*METHODS, "merge", *FROM_MOE)
OWN = ("source", "others", "which", "method", "noise", "drop", "resume", "source_state", "trust")


@dataclass
class UpcycleConfig(Config):
    """The new run's settings, and how its weights come from the source's."""

    source: str = ""  # a run's folder
    others: list[str] = field(default_factory=list)  # merge: the folders of the other dense runs
    which: str = "best"  # of their checkpoints: best (lowest validation loss) | last | step-N
    method: str = "copy"  # copy | noise | split | drop | merge | grow | prune | dense
    noise: float = 0.0  # noise: deviation of what is added to the experts, as a share of the weights' own; grow: to the
    # router rows of the new experts
    drop: float = 0.5  # drop: share of the hidden channels that each expert draws anew

    def __post_init__(self) -> None:
        if not self.source:
            raise BadInput("source=... is needed: the folder of a finished run, such as runs/NAME.")
        if not self.run:
            raise BadInput("run=... is needed: the new run's folder, such as runs/NAME.")
        if self.method not in ALL_METHODS:
            raise BadInput(f"method={self.method} is not one of {', '.join(ALL_METHODS)}.")
        if self.noise and self.method not in ("noise", "grow"):
            raise BadInput(f"noise={self.noise} means nothing to method={self.method}: set method=noise or grow.")
        if bool(self.others) != (self.method == "merge"):
            raise BadInput(f"others={self.others} with method={self.method}: others and method=merge go together.")


def place_in_sweep(cfg: UpcycleConfig, sweep: str, job: str) -> tuple[UpcycleConfig, Path]:
    """The settings of a sweep's job: with a folder of its own in `run`."""
    run = Path(cfg.run, job)
    return dataclasses.replace(cfg, run=str(run)), run


@cli.command("upcycle", UpcycleConfig, verbatim=("source", "run"), complete=False, place=place_in_sweep)
def main(cfg: UpcycleConfig) -> None:
    """Write the new run's folder and say how to train it."""
    create(cfg, cli.keys_given())


def target_config(source: Config, cfg: UpcycleConfig, given: list[str]) -> Config:
    """The new run's settings: the source's, but for those that the command line names in `given`, and the experts:

    from a dense run, unless given, 8 with K = 2, or one of each run that is merged, as wide as the dense MLP;
    from an MoE its own, but twice (grow) or half (prune) as many, unless given; none for method=dense, whose model
    follows from the weights. Raises `BadInput`."""
    _check_given(source, cfg, given)
    keys = [key for key in given if key not in OWN]
    if "router" in keys:  # some routers come with a balance of their own
        keys.append("balance")
    target = copy.deepcopy(source)
    moe = target.model.moe
    if cfg.method == "dense":
        target.router, target.balance = RouterConfig(), BalanceConfig()
    elif moe is None:
        target.model.moe = moe = copy.deepcopy(cfg.model.moe or MoEConfig())
        if "model.moe.d_expert" not in given:
            moe.d_expert = source.model.d_ff
        if cfg.method == "merge" and "model.moe.n_experts" not in given:
            moe.n_experts = 1 + len(cfg.others)
    else:
        moe.n_experts = _resized(cfg.method, moe.n_experts)
        moe.n_experts_by_layer = [_resized(cfg.method, n_experts) for n_experts in moe.n_experts_by_layer]
    target = cli.overlay(target, cfg, keys)
    target.resume, target.source, target.source_state = False, "", "weights"
    if cfg.method == "dense":
        target.model.moe = None  # its d_ff is known once it is made
    validate(target)
    return target


def _check_given(source: Config, cfg: UpcycleConfig, given: list[str]) -> None:
    """Refuse settings that follow from the source, and a split without a width. Raises `BadInput`."""
    for key in given:
        if key.split(".")[0] == "model" and not (key.startswith("model.moe.") and cfg.method != "dense"):
            raise BadInput(f"{key} cannot be given: the new model has the shape of the one in {cfg.source}.")
        if cfg.method == "dense" and key.split(".")[0] in ("router", "balance"):
            raise BadInput(f"{key} cannot be given: method=dense leaves no router.")
    if cfg.method == "split" and "model.moe.d_expert" not in given:
        raise BadInput(
            f"method=split needs model.moe.d_expert=..., a part of the dense model's d_ff={source.model.d_ff}."
        )


def _resized(method: str, n_experts: int) -> int:
    return 2 * n_experts if method == "grow" else -(-n_experts // 2)


def convert(
    cfg: UpcycleConfig, target: Config, sources: Sequence[tuple[Tensors, Config]]
) -> tuple[Tensors, ModelConfig]:
    """The new model's tensors, and its config. Raises `BadInput` for sources that the method does not fit."""
    tensors, source = sources[0]
    model, router, seed = target.model, target.router, target.init_seed()
    match cfg.method:
        case "merge":
            return merge([state for state, _ in sources], source.model, model, seed, router), model
        case "grow":
            return grow(tensors, source.model, model, cfg.noise, seed, router), model
        case "prune":
            return prune(tensors, source.model, model, _busiest(Path(cfg.source), model), router), model
        case "dense":
            return to_dense(tensors, source.model, _validation_counts(Path(cfg.source)), source.router)
    return upcycle(tensors, source.model, model, cfg.method, seed, cfg.noise, cfg.drop, router), model


def _validation_counts(folder: Path) -> list[list[int]]:
    """For every MoE layer, the rows of each expert in the last validation of a finished run."""
    if not (folder / "summary.json").is_file():
        raise BadInput(f"source={folder} is not finished: which experts are busy is in its summary.json.")
    load = read_summary(folder).load
    assert load is not None, "only a Mixture of Experts gets here"
    return load.expert_counts()


def _busiest(folder: Path, target: ModelConfig) -> list[list[int]]:
    """The experts of every MoE layer with the most rows, as many as `target` has there, in their old order."""
    kept = []
    for layer, counts in zip(moe_layers(target), _validation_counts(folder), strict=True):
        order = sorted(range(len(counts)), key=lambda e: (-counts[e], e))
        kept.append(sorted(order[: layer_moe(target, layer).n_experts]))
    return kept


def create(cfg: UpcycleConfig, given: list[str]) -> Config:
    """Make the run's folder: config.yaml, tokenizer and a checkpoint of step 0, all of it or nothing. Returns the new
    run's config. Raises `BadInput` for a folder that exists and sources that the method does not fit."""
    folder = Path(cfg.run)
    if os.path.lexists(folder):
        raise BadInput(f"run={folder} exists: choose another folder.")
    # What the sources are, and what becomes of them.
    sources, tokenizer = _read_sources(cfg)
    target = target_config(sources[0][1], cfg, given)
    tensors, target.model = convert(cfg, target, sources)
    # The text that training will go on with, in the sources' own tokens.
    dataset = prepare(target.data, target.tokenizer, terminal.say)
    for name in (cfg.source, *cfg.others):
        check_tokenizer(Path(name), dataset.tokenizer)
    # The state before the first step, in a folder that appears whole.
    target.run = str(folder)
    target, state = start_run(target, tensors, dataset, tokenizer, terminal.say)
    n_parameters, n_layers = sum(weight.numel() for weight in state.model.parameters()), len(moe_layers(target.model))
    terminal.say(
        f"run: {folder}  {n_parameters:,} parameters, {n_layers} MoE layers by method={cfg.method} "
        f"from {', '.join((cfg.source, *cfg.others))}. Train it with: {command_to_resume(folder, target)}"
    )
    return target


def _read_sources(cfg: UpcycleConfig) -> tuple[list[tuple[Tensors, Config]], Tokenizer]:
    """Every source's tensors and settings, and a tokenizer of theirs. Raises `BadInput` for a kind of model that the
    method does not start from."""
    sources = []
    for name in (cfg.source, *cfg.others):
        model, tokenizer, source = load_run(Path(name), cfg.which, cfg.trust or cfg.router.name)
        if (source.model.moe is not None) != (cfg.method in FROM_MOE):
            kind = "a dense run" if source.model.moe is None else "an MoE"
            raise BadInput(
                f"source={name} is {kind}: choose {'an MoE' if source.model.moe is None else 'a dense run'} for "
                f"method={cfg.method}."
            )
        sources.append((model_tensors(model), source))
    return sources, tokenizer


if __name__ == "__main__":
    main()
