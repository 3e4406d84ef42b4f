"""A training run: every group of settings, filled from YAML or a plain dict and validated once, here.

`build(tree)` turns a nested dict into a `Config` or raises `BadInput` with one sentence that names the key, the value
and what would be accepted. Nothing else in the library re-checks a setting. No Hydra, no torch: cheap to import.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from moe.config import balance, data, model, objective, train, tune
from moe.config.balance import BalanceConfig
from moe.config.data import DataConfig, TokenizerConfig
from moe.config.model import ModelConfig, MoEConfig, entering, layer_moe, moe_layers
from moe.config.objective import ObjectiveConfig
from moe.config.parallel import ParallelConfig
from moe.config.parse import Between, OneOf, check_values, lookup, parse, to_dict
from moe.config.router import RouterConfig, facts
from moe.config.train import CheckpointConfig, DistillConfig, LogConfig, OptimConfig, TrainConfig
from moe.config.tune import TuneConfig
from moe.errors import BadInput

# Where a run is kept, what it may import, how it is watched, how fast it reads, what it does about a document that it
# cannot read, and which ranks share its work: no part of its result, and free to change on resuming.
FREE = (
    "run",
    "resume",
    "trust",
    "log",
    "data.cache",
    "data.workers",
    "data.on_error",
    "parallel.replicate",
    "parallel.shard",
    "parallel.ep",
    "parallel.timeout",
)
# What else may change on resuming, as no step already taken depends on it; the run says so and keeps the new value. A
# teacher, a recording or the run that a tokenizer is taken from may have moved.
RESUMABLE = (
    "train.non_finite",
    "train.eval_every",
    "train.threads",
    "train.device",
    "train.checkpoint_activations",
    "parallel.weights",
    "parallel.gradients",
    "checkpoint",
    "distill.teacher",
    "balance.recorded",
    "objective.judge",
    "tokenizer.path",
)
# Settings younger than some runs: at their defaults no part of the hash, so that those runs' folders keep their names.
YOUNGER = (
    "source",
    "source_state",
    "model.moe.last_dense",
    "model.norm_at",
    "model.rope_fraction",
    "model.rope_scaling",
    "model.window",
    "model.window_layers",
    "model.attn_bias",
    "model.embed_scale",
    "model.residual_scale",
    "model.attn_scale",
    "model.logit_divisor",
    "model.latent",
    "model.sinks",
    "model.expert_bias",
    "model.swiglu_alpha",
    "model.swiglu_limit",
    "model.moe.weigh_input",
    "model.moe.precision",
    "router.bias",
    "data.max_document_mb",
    "data.documents",
    "data.template",
    "router.norm_min",
    "router.precision",
    "tokenizer.path",
    "seed_init",
    "seed_data",
    "optim.name",
    "optim.muon_lr",
    "optim.momentum",
    "optim.ns_steps",
    "optim.adjust",
    "optim.average",
    "tune.parts",
    "tune.experts",
    "tune.rank",
    "tune.alpha",
    "objective",
    "checkpoint.aside",
    "parallel.weights",
    "parallel.gradients",
)


@dataclass
class Config:
    """One training run."""

    seed: Annotated[int, Between(0, 2**63 - 1)] = 0  # of initial weights, batches and noise
    seed_init: Annotated[int, Between(-1, 2**63 - 1)] = -1  # of initial weights alone; -1: `seed`
    seed_data: Annotated[int, Between(-1, 2**63 - 1)] = -1  # of the order of batches alone; -1: `seed`
    run: str = ""  # the run's folder; "": runs/<model>-<router or dense>-<data>-<hash of this config>
    resume: bool = False  # continue the run if its folder exists; otherwise an existing folder is refused
    # import the routers of one's own (module:Class) that runs read by this command name; false: only the one that
    # router.name gives here. Never taken from a run's config.yaml
    trust: bool = False
    # a run's folder (its newest checkpoint) or one checkpoint's, whose weights a new run starts from; "": none
    source: str = ""
    # weights (optimiser, data and schedule begin anew) | all (the step, optimiser, place in the data and random
    # generators too: the source, continued under the schedule given here)
    source_state: Annotated[str, OneOf("weights", "all")] = "weights"
    dispatch: Annotated[str, OneOf("auto", "reference", "torch", "triton")] = "auto"  # the backend of the experts
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def init_seed(self) -> int:
        """The seed of the initial weights."""
        return self.seed if self.seed_init < 0 else self.seed_init

    def data_seed(self) -> int:
        """The seed of the order of batches."""
        return self.seed if self.seed_data < 0 else self.seed_data


C = TypeVar("C", bound=Config)


def build(tree: dict[str, Any], cls: type[C] = Config) -> C:  # type: ignore[assignment]
    """A validated `Config` (or a command's extension of it) from a nested dict; missing keys take their defaults.

    Raises `BadInput` naming the key, the value and what would be accepted."""
    cfg = parse(cls, tree)
    validate(cfg)
    return cfg


def validate(cfg: Config) -> None:
    """Check every value and every impossible pair. Raises `BadInput`."""
    # Each value, and each group within itself.
    check_values(cfg)
    if cfg.source_state != "weights" and not cfg.source:
        raise BadInput(f"source_state={cfg.source_state} needs source: a run's folder or a checkpoint's.")
    model.validate(cfg.model)
    layers = [layer_moe(cfg.model, layer) for layer in moe_layers(cfg.model)]
    balance.validate(layers, cfg.router, cfg.balance)
    data.validate(cfg.data)
    data.validate_tokenizer(cfg.tokenizer)
    train.validate(cfg.optim, cfg.train)
    tune.validate(cfg.tune, cfg.model)
    if cfg.optim.name == "muon" and (cfg.tune.rank or cfg.tune.experts):
        raise BadInput("optim.name=muon orthogonalises whole matrices: with tune.rank or tune.experts take adamw.")
    objective.validate(cfg.objective, cfg.source, cfg.model, cfg.router, cfg.balance, cfg.data, cfg.train)
    if cfg.objective.name != "lm" and (cfg.distill.teacher or cfg.log.experts):
        key = f"distill.teacher={cfg.distill.teacher}" if cfg.distill.teacher else "log.experts=true"
        raise BadInput(f"{key} has no meaning for objective.name={cfg.objective.name}: leave it out.")

    # A micro-batch must have room for the tokens of every expert.
    for moe in layers if cfg.balance.capacity else ():
        tokens = cfg.train.batch_size // cfg.train.accumulate * entering(moe, cfg.model.context)
        if cfg.balance.capacity * moe.k * tokens < moe.n_experts:
            raise BadInput(
                f"balance.capacity={cfg.balance.capacity} leaves no expert room for one token: with {tokens} tokens in "
                f"a micro-batch, model.moe.k={moe.k} and {moe.n_experts} experts it must be at least "
                f"{moe.n_experts / (moe.k * tokens):.3g} (0 drops nothing)."
            )
    for moe in layers if cfg.balance.tile else ():
        rows = moe.k * cfg.train.batch_size // cfg.train.accumulate * entering(moe, cfg.model.context)
        if 2 * rows < cfg.balance.tile * moe.n_experts:
            raise BadInput(
                f"balance.tile={cfg.balance.tile} is more than twice the {rows / moe.n_experts:.3g} rows of an expert "
                "in a micro-batch, and would round most to none: choose a smaller tile or a larger batch."
            )

    # A record has a place for each choice.
    if cfg.log.experts and layers and (not facts(cfg.router).rectangular or cfg.balance.tile):
        key = f"balance.tile={cfg.balance.tile}" if cfg.balance.tile else f"router.name={cfg.router.name}"
        raise BadInput(f"log.experts=true needs as many choices for every token, which {key} does not give.")


def is_among(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of `keys`, or lies in a group that is."""
    return any(key == name or key.startswith(f"{name}.") for name in keys)


def may_change(key: str, cfg: Config) -> bool:
    """Whether the run of `cfg` may go on with another value of the setting `key`."""
    return is_among(key, (*FREE, *RESUMABLE)) or (key == "train.accumulate" and splits_freely(cfg))


def splits_freely(cfg: Config) -> bool:
    """Whether a step is the same, but for rounding, however many micro-batches it is split into: no token's way and no
    loss depends on the tokens beside it in a micro-batch, and nothing is drawn at random."""
    if not cfg.model.moe:
        return True
    router, terms, about = cfg.router, cfg.balance, facts(cfg.router)
    drawn = router.noisy or router.jitter > 0 or router.second == "random"
    if about.decides != "token" or drawn or terms.capacity or terms.tile:
        return False
    # Losses of a whole micro-batch; with balance.scope=global they are the whole step's. The ReLU router has one.
    of_a_batch = terms.importance or terms.load or terms.spread or terms.bandpass or about.score == "relu"
    return terms.scope == "global" or not (of_a_batch or (terms.aux and terms.scope == "batch"))


def fingerprint(cfg: Config, younger: tuple[str, ...] = (), digits: int = 8) -> str:
    """Hex digits, eight of them, of the settings that decide a run's result (not where it is kept or how it is
    watched). `younger`: beside YOUNGER, those of a command's extension of the settings."""
    tree, defaults = to_dict(cfg), to_dict(type(cfg)())
    defaults["model"]["moe"] = to_dict(MoEConfig())
    tree["optim"]["warmup"] = train.warmup_steps(cfg.optim, cfg.train.steps)  # given or derived: the same run
    for key in (*FREE, *YOUNGER, *younger):
        *groups, name = key.split(".")
        group, group_defaults = (
            lookup(settings, ".".join(groups)) if groups else settings for settings in (tree, defaults)
        )
        if group is None:  # a dense model has no experts
            continue
        if key in FREE or group[name] == group_defaults[name]:
            del group[name]
    tree = {name: value for name, value in tree.items() if value != {}}  # a whole group that is younger
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:digits]
