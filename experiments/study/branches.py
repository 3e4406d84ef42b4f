"""A dense model, a copy of it per domain, all of them as the experts of one model, and what that is compared with.

Branch-train-mix (2403.07816) after branch-train-merge (2208.03306). The runs of one seed, each in a folder of its own:

    dense           the seed model, on all domains
    copy-DOMAIN     it, trained on with one domain alone; one for each
    average         the copies' mean: one dense model, not trained (branch-train-merge's average)
    uniform         the copies' MLPs as experts, every token at all of them with equal weights, not trained
    merged          the copies' MLPs as experts behind a new router, all else their mean, not trained
    routed          merged, with its router alone trained on all domains
    mixed           merged, trained on all domains
    upcycled-start  dense, every expert a copy of its MLP (2212.05055), not trained
    upcycled        that, trained on all domains
    scratch         the same shape as merged from new weights, trained on all domains
    continued       dense, trained on with all domains

`mixed` has cost the training FLOPs of the dense model, of all copies and of its own steps. `upcycled`, `scratch` and
`continued` get as many in all, to the nearest step. A finished run is not repeated, one that was cut off goes on.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.study.start import start_run
from moe.config.balance import BalanceConfig, rows_vary
from moe.config.data import TokenizerConfig
from moe.config.router import RouterConfig
from moe.config.run import Config, validate
from moe.config.tune import TuneConfig
from moe.convert.upcycle import Tensors, merge, upcycle
from moe.data.shards import Dataset
from moe.errors import BadInput
from moe.model import cost
from moe.model.transformer import model_tensors
from moe.run import machine
from moe.run.folder import check_same, read_config
from moe.run.load import load_run
from moe.train.loop import resolve, train

BRANCHED = ("average", "uniform", "merged", "routed", "mixed")  # what has cost the copies
CONTROLS = ("upcycled", "scratch", "continued")  # at the FLOPs of `mixed`
ARMS = ("dense", *BRANCHED, *CONTROLS)
SEED_OF_BATCHES = 1_000_003  # what a stage adds to a seed, so that none reads the batches of the one before it

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is trained: settings of a dense run and of an MoE's, but for folder, source and seed."""

    domains: list[str]
    dense: Config  # its steps are the seed model's
    moe: Config  # its steps are those of `routed` and `mixed`
    copy_steps: int  # of each domain's copy
    steps: dict[str, int]  # of an arm, those of its own last stage
    flops: dict[str, float]  # of an arm, in training and in all


def plan(cfg: Config, domains: list[str], vocab_size: int, copy_steps: int, mix_steps: int) -> Plan:
    """The plan of a run's settings `cfg`, with an expert for each domain, as wide as the dense model's MLP. Raises
    `BadInput` for fewer than two domains, for an expert's size that is another, and for a router that takes as many
    experts as it likes, so that its FLOPs are not known before."""
    # The two models.
    if len(domains) < 2:
        raise BadInput(f"data has {len(domains)} domain ({', '.join(domains)}): a model for each needs two or more.")
    if cfg.model.moe is None:
        raise BadInput("model.moe=null: the copies have to become experts; set model.moe.k.")
    moe, dense = copy.deepcopy(cfg), copy.deepcopy(cfg)
    moe.model.vocab_size = dense.model.vocab_size = vocab_size
    moe.model.moe = dataclasses.replace(cfg.model.moe, n_experts=len(domains), d_expert=cfg.model.d_ff)
    moe.train.steps = mix_steps
    dense.model.moe, dense.router, dense.balance = None, RouterConfig(), BalanceConfig()
    for settings in (moe, dense):
        validate(settings)
    if uncertain := rows_vary(moe.model.moe, moe.router, moe.balance):
        raise BadInput(f"with {uncertain} a token takes as many experts as it likes: equal FLOPs need a fixed number.")

    # As many training FLOPs for every arm.
    tokens = cfg.train.batch_size * cfg.model.context
    of_dense = tokens * cost.flops(dense.model).training
    of_moe = tokens * cost.flops(moe.model, moe.router).training
    before = cfg.train.steps * of_dense
    branched = before + len(domains) * copy_steps * of_dense
    total = branched + mix_steps * of_moe
    steps = {
        "dense": cfg.train.steps,
        **dict.fromkeys(("average", "uniform", "merged"), 0),
        **dict.fromkeys(("routed", "mixed"), mix_steps),
        "upcycled": round((total - before) / of_moe),
        "scratch": round(total / of_moe),
        "continued": round((total - before) / of_dense),
    }
    base = {"dense": 0.0, "scratch": 0.0, "upcycled": before, "continued": before}
    per_step = {"dense": of_dense, "continued": of_dense}
    flops = {arm: float(base.get(arm, branched) + steps[arm] * per_step.get(arm, of_moe)) for arm in ARMS}
    return Plan(domains, dense, moe, copy_steps, steps, flops)


def run_seed(planned: Plan, seed: int, folder: Path, dataset: Dataset, say: Say) -> dict[str, Path]:
    """Train, or go on with, every run of a seed in `folder`. Returns the runs' folders by name, the copies in the
    order of the experts. Raises `BadInput` for runs of other settings, `SystemExit` after a signal."""

    def trained(name: str, base: Config, steps: int, source: str = "", stage: int = 0) -> None:
        cfg = copy.deepcopy(base)
        cfg.run, cfg.resume, cfg.seed = str(folder / name), True, seed
        cfg.seed_init, cfg.seed_data = seed, seed + stage * SEED_OF_BATCHES
        cfg.source = str(folder / source) if source else ""
        cfg.train.steps = steps
        train(cfg, say)

    def started(name: str, base: Config, make: Callable[[], Tensors]) -> None:
        cfg = copy.deepcopy(base)
        cfg.run, cfg.seed, cfg.seed_init, cfg.seed_data = str(folder / name), seed, seed, seed
        start_once(cfg, make, dataset, say)

    # The seed model, and its copies, each with the text of one domain in the seed model's tokens.
    trained("dense", planned.dense, planned.dense.train.steps)
    copies = [f"copy-{domain}" for domain in planned.domains]
    for i, (name, domain) in enumerate(zip(copies, planned.domains, strict=True)):
        cfg = copy.deepcopy(planned.dense)
        cfg.data.domains = [domain]
        cfg.tokenizer = TokenizerConfig("saved", cfg.tokenizer.vocab_size, str(folder / "dense"))
        trained(name, cfg, planned.copy_steps, "dense", 1 + i)

    # The copies as one model, in three ways without training.
    moe, everywhere, dense = planned.moe, copy.deepcopy(planned.moe), planned.dense.model
    assert everywhere.model.moe is not None, "the plan has made it"
    everywhere.model.moe.k = len(copies)
    tensors = lambda: [tensors_of(folder / name) for name in copies]
    started("average", planned.dense, lambda: mean(tensors()))
    started("uniform", everywhere, lambda: indifferent(
        merge(tensors(), dense, everywhere.model, seed, everywhere.router)
    ))  # fmt: skip
    started("merged", moe, lambda: merge(tensors(), dense, moe.model, seed, moe.router))

    # Trained on all domains; then what had as many FLOPs without copies.
    last = len(copies) + 1
    router_alone = dataclasses.replace(moe, tune=TuneConfig(parts=["router"]))
    trained("routed", router_alone, planned.steps["routed"], "merged", last)
    trained("mixed", moe, planned.steps["mixed"], "merged", last)
    of_dense = lambda: tensors_of(folder / "dense")
    started("upcycled-start", moe, lambda: upcycle(of_dense(), dense, moe.model, "copy", seed, router=moe.router))
    trained("upcycled", moe, planned.steps["upcycled"], "upcycled-start", last)
    trained("scratch", moe, planned.steps["scratch"])
    trained("continued", planned.dense, planned.steps["continued"], "dense", last)
    return {name: folder / name for name in ("dense", *copies, *BRANCHED, *CONTROLS)}


def start_once(cfg: Config, make: Callable[[], Tensors], dataset: Dataset, say: Say) -> None:
    """`start_run` with the tensors that `make` gives, where the folder is not there yet. Raises `BadInput` where it is,
    with other settings."""
    folder = Path(cfg.run)
    if not folder.exists():
        start_run(cfg, make(), dataset, dataset.tokenizer, say)
        return
    cfg = resolve(cfg, folder, dataset, machine.choose_device(cfg.train.device), say)
    check_same(read_config(folder, cfg.router.name), cfg)


def tensors_of(folder: Path) -> Tensors:
    """The weights at the end of a run."""
    return model_tensors(load_run(folder, "last")[0])


def mean(models: list[Tensors]) -> Tensors:
    """The mean of models of one shape."""
    return {name: torch.stack([tensors[name] for tensors in models]).mean(0) for name in models[0]}


def indifferent(tensors: Mapping[str, Tensor]) -> Tensors:
    """The model with routers whose scores are all equal."""
    return {
        name: torch.zeros_like(tensor) if name.endswith("router.w_ED") else tensor for name, tensor in tensors.items()
    }
