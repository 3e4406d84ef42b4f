"""Every setting of a run: typed dataclasses, filled by YAML or plain dicts, validated once, here.

`build(tree)` turns a nested dict into a `Config` or raises `BadInput` with one sentence that names the key, the value
and what would be accepted. Nothing else in the library re-checks a setting. No Hydra, no torch: cheap to import.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moe import routing_config
from moe.errors import BadInput
from moe.routing_config import BalanceConfig, MoEConfig, RouterConfig


@dataclass
class ModelConfig:
    """A decoder-only transformer. Zero means "derive it": n_kv_heads = n_heads, head_dim = d_model / n_heads, and
    vocab_size = the tokenizer's."""

    name: str = "cpu-small"
    vocab_size: int = 0  # V
    context: int = 256  # S, the longest sequence
    n_layers: int = 4  # L
    d_model: int = 256  # D
    n_heads: int = 4  # H
    n_kv_heads: int = 0
    head_dim: int = 0
    d_ff: int = 512  # width of a dense MLP
    activation: str = "swiglu"  # swiglu | gelu | gelu_tanh | relu2
    norm: str = "rms"  # rms | layer
    norm_eps: float = 1e-5
    position: str = "rope"  # rope | learned
    rope_theta: float = 10000.0
    qk_norm: str = "none"  # none | head (one weight per head channel, Qwen3) | full (over all heads, OLMoE)
    bias: bool = False  # biases on every linear map and norm (GPT-2)
    tie_embeddings: bool = True
    init_std: float = 0.02
    moe: MoEConfig | None = None


@dataclass
class TokenizerConfig:
    name: str = "bpe"  # byte | char | bpe | gpt2 | cl100k_base | o200k_base
    vocab_size: int = 4096  # of a bpe trained here; the others bring their own


@dataclass
class CleanConfig:
    """The cleaning pipeline's settings; every step counts documents and bytes in and out."""

    html: bool = True  # turn HTML documents into text
    unicode: str = "NFC"  # NFC | NFKC | none
    min_chars: int = 100
    max_chars: int = 0  # 0: no upper limit
    max_repetition: float = 0.5  # share of a document's characters in repeated lines above which it goes; 1: keep all
    exact: bool = True  # drop exact duplicates
    near: float = 0.8  # drop documents whose estimated Jaccard similarity with an earlier one is at least this; 0: off


@dataclass
class DataConfig:
    name: str = "blend"  # blend | text | huggingface
    path: str = ""  # text: a file, folder or glob; huggingface: a dataset name or folder
    domains: list[str] = field(default_factory=list)  # blend: which of its domains; empty means all
    max_mb: float = 4.0  # at most this much raw text per domain (decimal megabytes); 0: all of it
    text_field: str = "text"  # JSONL and huggingface: the field that holds the document
    domain_field: str = ""  # JSONL and huggingface: the field that holds the domain; "": file or dataset name
    subset: str = ""  # huggingface: the configuration name
    split: str = "train"  # huggingface: the split
    streaming: bool = True  # huggingface: do not download the whole set first
    val_fraction: float = 0.05  # share of documents, by hash, held out
    cache: str = ""  # prepared corpora; "": $SWITCHYARD_CACHE, else ~/.cache/switchyard
    workers: int = 0  # loader processes; the batches do not depend on it
    clean: CleanConfig = field(default_factory=CleanConfig)


@dataclass
class OptimConfig:
    """AdamW; warm-up, then a schedule."""

    lr: float = 2e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; never on norms, biases or selection biases
    clip: float = 1.0  # global gradient norm; 0: off
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, decay) | constant
    warmup: int = 50  # steps
    final: float = 0.1  # learning rate at the end, as a share of lr
    decay: float = 0.2  # wsd: share of the steps spent decaying


@dataclass
class TrainConfig:
    steps: int = 600
    batch_size: int = 8  # sequences per optimiser step, B
    accumulate: int = 1  # micro-batches a step is split into
    precision: str = "auto"  # auto | bf16 (autocast) | fp32; auto: bf16 where the processor multiplies it natively
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int = 0  # CPU threads; 0: torch's default. Recorded, because it can change the last bits
    checkpoint_activations: bool = False
    compile: bool = False
    non_finite: str = "stop"  # stop | skip (the step is not taken, and counted)
    eval_every: int = 100  # steps; 0: only at the end
    eval_tokens: int = 65536  # validation tokens per evaluation, spread evenly over the validation split


@dataclass
class DistillConfig:
    """Another run's model as a teacher (Hinton et al., 1503.02531). The loss is (1 − weight) · cross-entropy
    + weight · temperature² · KL(teacher || model), both in nats per token, beside the routers' losses."""

    teacher: str = ""  # a run's folder; "": none
    which: str = "best"  # of its checkpoints: best (lowest validation loss) | last | step-N
    weight: float = 0.5
    temperature: float = 1.0


@dataclass
class CheckpointConfig:
    every: int = 200  # steps; 0: only at the end and on interruption
    keep: int = 2  # the newest k; the best one by validation loss is kept besides


@dataclass
class LogConfig:
    every: int = 10  # steps between plain progress lines; metrics.jsonl has a line for every step
    experts: bool = False  # also write which experts every token took, at every step (moe/replay.py)
    tensorboard: bool = False
    wandb: str = ""  # project name; "": off
    trackio: str = ""  # project name; "": off


@dataclass
class Config:
    """One training run."""

    seed: int = 0
    run: str = ""  # the run's folder; "": runs/<model>-<router or dense>-<data>-<hash of this config>
    resume: bool = False  # continue the run if its folder exists; otherwise an existing folder is refused
    dispatch: str = "auto"  # auto | reference | torch | triton: the backend of the experts
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "dispatch": ("auto", "reference", "torch", "triton"),
    "model.activation": ("swiglu", "gelu", "gelu_tanh", "relu2"),
    "model.norm": ("rms", "layer"),
    "model.position": ("rope", "learned"),
    "model.qk_norm": ("none", "head", "full"),
    **routing_config.CHOICES,
    "tokenizer.name": ("byte", "char", "bpe", "gpt2", "cl100k_base", "o200k_base"),
    "data.name": ("blend", "text", "huggingface"),
    "data.clean.unicode": ("NFC", "NFKC", "none"),
    "optim.schedule": ("cosine", "wsd", "constant"),
    "train.precision": ("auto", "bf16", "fp32"),
    "train.non_finite": ("stop", "skip"),
}
# Where a run is kept, how it is watched and how fast it reads: no part of its result, and free to change on resuming.
FREE = ("run", "resume", "log", "data.cache", "data.workers")
BLEND_DOMAINS = ("drama", "verse", "code", "docs", "math")

# Inclusive lower and upper bounds of numbers.
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "model.vocab_size": (0, 2**31 - 1),
    "model.context": (1, 2**31 - 1),
    "model.n_layers": (1, 100_000),
    "model.d_model": (1, 10_000_000),
    "model.n_heads": (1, 100_000),
    "model.n_kv_heads": (0, 100_000),
    "model.head_dim": (0, 100_000),
    "model.d_ff": (1, 100_000_000),
    "model.norm_eps": (0, 1),
    "model.rope_theta": (1, math.inf),
    "model.init_std": (0, 10),
    **routing_config.BOUNDS,
    "tokenizer.vocab_size": (257, 2**31 - 1),
    "data.max_mb": (0, math.inf),
    "data.val_fraction": (0.0001, 0.5),
    "data.workers": (0, 256),
    "data.clean.min_chars": (0, 2**31 - 1),
    "data.clean.max_chars": (0, 2**31 - 1),
    "data.clean.max_repetition": (0, 1),
    "data.clean.near": (0, 1),
    "optim.lr": (0, math.inf),
    "optim.eps": (0, 1),
    "optim.weight_decay": (0, math.inf),
    "optim.clip": (0, math.inf),
    "optim.warmup": (0, 2**31 - 1),
    "optim.final": (0, 1),
    "optim.decay": (0, 1),
    "train.steps": (1, 2**62),
    "train.batch_size": (1, 2**31 - 1),
    "train.accumulate": (1, 2**31 - 1),
    "train.threads": (0, 4096),
    "train.eval_every": (0, 2**62),
    "train.eval_tokens": (1, 2**62),
    "distill.weight": (0, 1),
    "distill.temperature": (1e-3, 1e3),
    "checkpoint.every": (0, 2**62),
    "checkpoint.keep": (1, 1_000_000),
    "log.every": (1, 2**62),
}

T = TypeVar("T")
C = TypeVar("C", bound=Config)


def build(tree: dict[str, Any], cls: type[C] = Config) -> C:  # type: ignore[assignment]
    """A validated `Config` (or a command's extension of it) from a nested dict; missing keys take their defaults.

    Raises `BadInput` naming the key, the value and what would be accepted."""
    cfg = parse(cls, tree)
    validate(cfg)
    return cfg


def parse(cls: type[T], tree: Any, path: str = "") -> T:
    """Fill dataclass `cls` from a dict, refusing unknown keys and wrong types. `path` names the place in messages."""
    if not isinstance(tree, dict):
        raise BadInput(f"{path[:-1] or 'the configuration'}={tree!r} must be a group of settings, not a single value.")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise BadInput(f"{path}{key} is not a setting; {nearest(str(key), list(hints), path)}.")
    values = {key: _convert(hints[key], value, f"{path}{key}") for key, value in tree.items()}
    return cls(**values)


def nearest(key: str, valid: list[str], path: str = "") -> str:
    """The tail of a message about a misspelt `key`: the nearest valid one, else all of them."""
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"did you mean {path}{close[0]}" if close else f"accepted here: {', '.join(sorted(valid)) or 'none'}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else parse(hint, value, f"{path}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is dict:
        _, item = typing.get_args(hint)
        if not isinstance(value, dict):
            raise BadInput(f"{path}={value!r} must be a group of names and values, like {{a: 1}}.")
        return {str(key): _convert(item, each, f"{path}.{key}") for key, each in value.items()}
    if hint is Any:
        return value
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        if not isinstance(value, list | tuple):
            raise BadInput(f"{path}={value!r} must be a list of {item.__name__}, like [a,b].")
        return [_convert(item, each, f"{path}[{i}]") for i, each in enumerate(value)]
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    raise BadInput(f"{path}={value!r} must be of type {hint.__name__}.")


def validate(cfg: Config) -> None:
    """Check every value and every impossible pair. Raises `BadInput`."""
    for path, allowed in CHOICES.items():
        value = lookup(cfg, path)
        if value is not None and value not in allowed:
            hint = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
            tail = f"; did you mean {hint[0]}" if hint else ""
            raise BadInput(f"{path}={value} is not one of {', '.join(allowed)}{tail}.")
    for path, (low, high) in BOUNDS.items():
        value = lookup(cfg, path)
        if value is None:
            continue
        if not (low <= value <= high and math.isfinite(value)):
            accepted = f"a finite number of at least {low:g}" if high >= 2**31 - 1 else f"between {low:g} and {high:g}"
            raise BadInput(f"{path}={value} is out of range: accepted is {accepted}.")
    _validate_model(cfg.model)
    layers = [layer_moe(cfg.model, layer) for layer in moe_layers(cfg.model)]
    routing_config.validate(layers, cfg.router, cfg.balance)
    for moe in layers if cfg.balance.capacity else ():
        tokens = cfg.train.batch_size // cfg.train.accumulate * routing_config.entering(moe, cfg.model.context)
        if cfg.balance.capacity * moe.k * tokens < moe.n_experts:
            raise BadInput(
                f"balance.capacity={cfg.balance.capacity} leaves no expert room for one token: with {tokens} tokens in "
                f"a micro-batch, model.moe.k={moe.k} and {moe.n_experts} experts it must be at least "
                f"{moe.n_experts / (moe.k * tokens):.3g} (0 drops nothing)."
            )
    for moe in layers if cfg.balance.tile else ():
        rows = moe.k * cfg.train.batch_size // cfg.train.accumulate * routing_config.entering(moe, cfg.model.context)
        if 2 * rows < cfg.balance.tile * moe.n_experts:
            raise BadInput(
                f"balance.tile={cfg.balance.tile} is more than twice the {rows / moe.n_experts:.3g} rows of an expert "
                "in a micro-batch, and would round most to none: choose a smaller tile or a larger batch."
            )
    if cfg.log.experts and layers and (cfg.router.name in routing_config.WITHOUT_TK or cfg.balance.tile):
        key = f"balance.tile={cfg.balance.tile}" if cfg.balance.tile else f"router.name={cfg.router.name}"
        raise BadInput(f"log.experts=true needs as many choices for every token, which {key} does not give.")
    for name in cfg.data.domains:
        if cfg.data.name == "blend" and name not in BLEND_DOMAINS:
            raise BadInput(f"data.domains has {name!r}; the blend's domains are {', '.join(BLEND_DOMAINS)}.")
    if cfg.data.name == "blend" and cfg.data.path:
        raise BadInput(f"data.path={cfg.data.path} means nothing to data=blend: choose data=text or data=huggingface.")
    if cfg.data.name != "blend" and not cfg.data.path:
        raise BadInput(f"data.name={cfg.data.name} needs data.path: a file, a folder or a glob (or a dataset's name).")
    clean = cfg.data.clean
    if clean.max_chars and clean.max_chars < clean.min_chars:
        raise BadInput(
            f"data.clean.max_chars={clean.max_chars} is below data.clean.min_chars={clean.min_chars}: "
            "no document would be left (0 sets no upper limit)."
        )
    if len(cfg.optim.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.optim.betas):
        raise BadInput(f"optim.betas={cfg.optim.betas} must be two numbers in [0, 1).")
    if cfg.optim.warmup > cfg.train.steps:
        raise BadInput(f"optim.warmup={cfg.optim.warmup} is longer than train.steps={cfg.train.steps}.")
    if cfg.train.batch_size % cfg.train.accumulate:
        raise BadInput(
            f"train.accumulate={cfg.train.accumulate} must divide train.batch_size={cfg.train.batch_size} evenly."
        )
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", cfg.train.device):
        raise BadInput(f"train.device={cfg.train.device} is not one of auto, cpu, cuda, cuda:N.")


def _validate_model(model: ModelConfig) -> None:
    if not model.head_dim and model.d_model % model.n_heads:
        raise BadInput(
            f"model.d_model={model.d_model} is not divisible by model.n_heads={model.n_heads}: "
            "choose heads that divide it, or set model.head_dim."
        )
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        raise BadInput(
            f"model.n_kv_heads={model.n_kv_heads} must divide model.n_heads={model.n_heads} (or be 0 for all of them)."
        )
    if model.position == "rope" and head_dim(model) % 2:
        raise BadInput(f"model.position=rope needs an even head dimension, and here it is {head_dim(model)}.")
    moe, n_layers = model.moe, len(moe_layers(model))
    if moe is None:
        return
    if not n_layers:
        raise BadInput(
            f"model.moe.every={moe.every} with model.moe.first_dense={moe.first_dense} leaves no MoE layer "
            f"among model.n_layers={model.n_layers}; for a dense model set model.moe=null."
        )
    for name, values in (("n_experts_by_layer", moe.n_experts_by_layer), ("k_by_layer", moe.k_by_layer)):
        if values and len(values) != n_layers:
            raise BadInput(f"model.moe.{name}={values} needs {n_layers} numbers, one for each MoE layer.")
        if any(value < 1 for value in values):
            raise BadInput(f"model.moe.{name}={values} has a number below 1.")
    if moe.depth < 1 and all(layer_moe(model, layer).depth == 1 for layer in moe_layers(model)):
        raise BadInput(
            f"model.moe.depth={moe.depth} with model.moe.depth_every={moe.depth_every} concerns none of the MoE layers "
            f"{moe_layers(model)} (from 0)."
        )


def head_dim(model: ModelConfig) -> int:
    """Channels of one attention head."""
    return model.head_dim or model.d_model // model.n_heads


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    """Whether layer `layer` (from 0) has routed experts."""
    moe = model.moe
    return moe is not None and layer >= moe.first_dense and (layer + 1) % moe.every == 0


def moe_layers(model: ModelConfig) -> list[int]:
    """The layers (from 0) that have routed experts."""
    return [layer for layer in range(model.n_layers) if is_moe_layer(model, layer)]


def layer_moe(model: ModelConfig, layer: int) -> MoEConfig:
    """The routed experts of MoE layer `layer` (from 0, among all layers): its own E, K and depth."""
    assert model.moe is not None, "a dense model has no MoE layer"
    moe, position = model.moe, moe_layers(model).index(layer)
    return dataclasses.replace(
        moe,
        n_experts=moe.n_experts_by_layer[position] if moe.n_experts_by_layer else moe.n_experts,
        k=moe.k_by_layer[position] if moe.k_by_layer else moe.k,
        n_experts_by_layer=[],
        k_by_layer=[],
        depth=moe.depth if (layer + 1) % moe.depth_every == 0 else 1.0,
    )


def lookup(cfg: Any, path: str) -> Any:
    """The value at a dotted path, or None where a group on the way is None."""
    for part in path.split("."):
        if cfg is None:
            return None
        cfg = getattr(cfg, part)
    return cfg


def to_dict(cfg: Any) -> dict[str, Any]:
    """A plain nested dict: what `build` takes back."""
    return dataclasses.asdict(cfg)


def fingerprint(cfg: Config) -> str:
    """Eight hex digits of the settings that decide a run's result (not where it is kept or how it is watched)."""
    tree = to_dict(cfg)
    for key in FREE:
        *groups, name = key.split(".")
        functools.reduce(dict.__getitem__, groups, tree).pop(name)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]
