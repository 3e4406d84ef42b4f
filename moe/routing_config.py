"""The settings of the routed experts, of the router and of the balance, and every check across them."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any

from moe.errors import BadInput


@dataclass
class MoEConfig:
    """The routed experts of one MoE layer."""

    n_experts: int = 16  # E
    k: int = 4  # K, experts per token
    d_expert: int = 128  # F, hidden width of one expert
    n_shared: int = 0  # experts that every token passes, each of width d_expert
    shared_gate: bool = False  # the shared experts' output times sigmoid(x w), one number per token (Qwen2-MoE)
    every: int = 1  # layer l is an MoE layer when (l + 1) % every == 0 ...
    first_dense: int = 0  # ... and l >= first_dense; the others are dense MLPs of width d_ff
    widths: list[int] = field(default_factory=list)  # a hidden width per expert; empty: d_expert for all (2408.10681)
    n_experts_by_layer: list[int] = field(default_factory=list)  # E of each MoE layer; empty: n_experts for all
    k_by_layer: list[int] = field(default_factory=list)  # K of each MoE layer; empty: k for all
    n_null: int = 0  # experts that cost nothing and give 0, numbered behind the real ones (MoE++, 2410.07348)
    n_copy: int = 0  # ... that give the token back
    n_constant: int = 0  # ... that give a mix of the token and a learned vector
    depth: float = 1.0  # share of a sequence's tokens that enter a block at all (Mixture-of-Depths, 2404.02258) ...
    depth_every: int = 2  # ... where the layer has experts and (l + 1) % depth_every == 0; elsewhere all do
    depth_causal: str = "threshold"  # threshold | predictor: how a token decides alone in evaluation

    @property
    def n_cheap(self) -> int:
        """Null, copy and constant experts together."""
        return self.n_null + self.n_copy + self.n_constant


def entering(moe: MoEConfig, length: int) -> int:
    """How many tokens of a sequence of this length enter a block in training: depth · length, rounded up, at least 1.

    A share is taken for the decimal it was written as: 0.07 · 100 is 7, although the float product lies above 7."""
    return max(1, math.ceil(moe.depth * length * (1 - 1e-12)))


@dataclass
class RouterConfig:
    """Who goes where, and with what weight. `READS` says which router reads which of these."""

    name: str = "softmax"  # see ROUTERS; or module:Class, a router of your own
    # logits and scores
    logits: str = "linear"  # linear | cosine (of state and expert vector, over a learned temperature)
    noisy: bool = False  # Gaussian noise of learned size on the logits in training (Shazeer 2017)
    jitter: float = 0.0  # in training the router reads x · u, u uniform in [1 − jitter, 1 + jitter] (Switch)
    frozen: bool = False  # the router keeps its random initial weights
    renormalize: bool = True  # weights of a token's K experts sum to 1 (times scale)
    selection_bias: bool = False  # a bias per expert that takes part in the choice only (loss-free balancing)
    scale: float = 1.0  # factor on every weight (DeepSeek-V3's routed scaling factor)
    groups: int = 1  # equal groups of neighbouring experts; a token chooses within its k_groups best of them
    k_groups: int = 1
    group_top: int = 2  # how many of its best experts' scores make a group's score (DeepSeek-V3: 2, DeepSeek-V2: 1)
    second: str = "best"  # best | random: the second expert is taken with probability min(1, 2 w_2) (GShard)
    gradient: str = "exact"  # exact | straight-through | sparsemixer | default-vector
    # threshold and top-p
    threshold: float = 1.5  # a token takes the experts whose probability is at least this / E, at least one
    top_p: float = 0.4  # a token takes its best experts until their probabilities sum to this
    k_max: int = 0  # at most this many experts per token; 0: no limit
    # relu
    l1: float = 1e-8  # initial coefficient of the L1 loss, which adapts to reach K experts per token on average
    l1_factor: float = 1.2  # what it is multiplied or divided by after every step
    # sinkhorn, base, expert-choice, soft
    iterations: int = 8  # of Sinkhorn's normalisation
    causal: str = "none"  # none | threshold | predictor: how expert-choice decides in evaluation, token by token
    decay: float = 0.99  # threshold: of the running mean of every expert's cut-off
    slots: int = 0  # slots per expert and sequence of a soft router; 0: K·S/E, so that experts cost what K per token do
    # every router
    input: str = "own"  # own | previous: it reads the input of the previous MoE layer (lookahead)
    shared: bool = False  # one router for all MoE layers
    options: dict[str, Any] = field(default_factory=dict)  # what a router of your own reads


@dataclass
class BalanceConfig:
    """What keeps the load even. Coefficients of the losses added to the language-model loss; 0 switches one off."""

    aux: float = 0.01  # load-balancing loss, E * sum_i f_i P_i
    scope: str = "batch"  # what aux is computed over: sequence | batch (a micro-batch) | global (the optimiser step)
    z: float = 0.001  # router z-loss
    importance: float = 0.0  # CV² of every expert's summed weights (Shazeer 2017)
    load: float = 0.0  # CV² of the smooth estimate of the load (Shazeer 2017); needs router.noisy
    entropy: float = 0.0  # mean entropy of a token's probabilities: lower is more decided
    spread: float = 0.0  # ln E minus the entropy of the mean probabilities: 0 when even
    bandpass: float = 0.0  # squared excess of E · P_i over the band [1 − band, 1 + band]
    band: float = 0.2
    bias_rate: float = 0.0  # step of the loss-free bias update; needs router.selection_bias
    bias_step: str = "sign"  # sign (2408.15664) | proportional (to the relative excess of load)
    # Factors on a coefficient (or bias_rate) at equal distances over the run, straight lines between: {aux: [1,1,0]}
    schedule: dict[str, list[float]] = field(default_factory=dict)
    capacity: float = 0.0  # in training an expert takes at most capacity · K · T / E rows, rounded up; 0: all
    priority: str = "position"  # position | score: which rows stay when an expert is full
    overflow: str = "residual"  # residual (the row is dropped) | next (the token's next best expert with room takes it)
    tile: int = 0  # in training round every expert's rows to a multiple of this (token rounding, 2512.14080); 0: off
    # For debugging and benchmarks, whatever capacity is. none | balanced: experts in turn | recorded: in training those
    force: str = "none"  # that the run `recorded`, trained with log.experts=true on the same batches, took at each step
    recorded: str = ""  # its folder


# What each router is, and which settings it reads beside those that every router reads.
_LINEAR = ("logits", "noisy", "jitter", "frozen", "scale", "gradient")
_TOP_K = (*_LINEAR, "renormalize", "selection_bias", "groups", "k_groups", "group_top", "second")
READS: dict[str, tuple[str, ...]] = {
    "softmax": _TOP_K,
    "sigmoid": _TOP_K,
    "threshold": ("logits", "jitter", "frozen", "renormalize", "scale", "threshold", "k_max"),
    "top-p": ("logits", "jitter", "frozen", "renormalize", "scale", "top_p", "k_max"),
    "relu": ("logits", "jitter", "scale", "l1", "l1_factor"),
    "sinkhorn": ("renormalize", "scale", "iterations"),
    "base": (),
    "hash": ("scale",),
    "expert-choice": ("scale", "causal", "decay"),
    "soft": ("slots",),
}
ROUTERS = tuple(READS)
ALWAYS = ("name", "input", "shared", "options")
SCORELESS = ("hash", "soft")  # no scores that a balance term could read
WITHOUT_TK = ("expert-choice", "soft")  # in training not K rows, or as many, for every token
SCORE_TERMS = ("aux", "z", "importance", "load", "entropy", "spread", "bandpass")
SCHEDULED = (*SCORE_TERMS, "bias_rate")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.moe.depth_causal": ("threshold", "predictor"),
    "router.logits": ("linear", "cosine"),
    "router.second": ("best", "random"),
    "router.gradient": ("exact", "straight-through", "sparsemixer", "default-vector"),
    "router.causal": ("none", "threshold", "predictor"),
    "router.input": ("own", "previous"),
    "balance.scope": ("sequence", "batch", "global"),
    "balance.bias_step": ("sign", "proportional"),
    "balance.priority": ("position", "score"),
    "balance.overflow": ("residual", "next"),
    "balance.force": ("none", "balanced", "recorded"),
}
_ANY, _COUNT = (0, float("inf")), (1, 2**31 - 1)
BOUNDS: dict[str, tuple[float, float]] = {
    "model.moe.n_experts": (1, 1_000_000),
    "model.moe.k": (1, 1_000_000),
    "model.moe.d_expert": (1, 100_000_000),
    "model.moe.n_shared": (0, 1_000_000),
    "model.moe.every": (1, 100_000),
    "model.moe.first_dense": (0, 100_000),
    "model.moe.n_null": (0, 1_000_000),
    "model.moe.n_copy": (0, 1_000_000),
    "model.moe.n_constant": (0, 1_000_000),
    "model.moe.depth": (1e-9, 1),
    "model.moe.depth_every": (1, 100_000),
    "router.jitter": (0, 0.999),
    "router.scale": (1e-9, float("inf")),
    "router.groups": _COUNT,
    "router.k_groups": _COUNT,
    "router.group_top": _COUNT,
    "router.threshold": _ANY,
    "router.top_p": (0, 1),
    "router.k_max": (0, 2**31 - 1),
    "router.l1": (1e-20, 1e20),
    "router.l1_factor": (1, 100),
    "router.iterations": (1, 10_000),
    "router.decay": (0, 1),
    "router.slots": (0, 2**31 - 1),
    **{f"balance.{name}": _ANY for name in (*SCORE_TERMS, "bias_rate", "capacity")},
    "balance.band": _ANY,
    "balance.tile": (0, 2**31 - 1),
}


def validate(layers: list[MoEConfig], router: RouterConfig, balance: BalanceConfig) -> None:
    """Check what does not go together. `layers`: the settings of every MoE layer; none for a dense model, of which
    nothing is asked. Raises `BadInput`."""
    _validate_name(router)
    if not layers:
        return
    for moe in layers:
        _validate_experts(moe, router)
    _validate_router(layers, router)
    _validate_balance(layers, router, balance)


def _validate_name(router: RouterConfig) -> None:
    own = ":" in router.name
    if not own and router.name not in ROUTERS:
        hint = difflib.get_close_matches(router.name, ROUTERS, n=1, cutoff=0.5)
        tail = f"; did you mean {hint[0]}" if hint else ""
        raise BadInput(
            f"router.name={router.name} is not one of {', '.join(ROUTERS)}, or module:Class for your own{tail}."
        )
    if router.options and not own:
        raise BadInput(f"router.options={router.options} is read by a router of your own only, not by {router.name}.")
    if own:
        return
    for name, default in dataclasses.asdict(RouterConfig()).items():
        value = getattr(router, name)
        if value != default and name not in (*READS[router.name], *ALWAYS):
            raise BadInput(
                f"router.{name}={value} means nothing to router.name={router.name}, which reads "
                f"{', '.join(sorted(READS[router.name])) or 'no setting of its own'}."
            )


def _validate_experts(moe: MoEConfig, router: RouterConfig) -> None:
    e = moe.n_experts + moe.n_cheap
    if moe.k > e:
        raise BadInput(
            f"model.moe.k={moe.k} exceeds model.moe.n_experts={moe.n_experts}: "
            "a token cannot choose more experts than exist."
        )
    if moe.widths and len(moe.widths) != moe.n_experts:
        raise BadInput(
            f"model.moe.widths has {len(moe.widths)} widths for model.moe.n_experts={moe.n_experts}: give one for each."
        )
    if any(width < 1 for width in moe.widths):
        raise BadInput(f"model.moe.widths={moe.widths} has a width below 1.")
    if moe.shared_gate and not moe.n_shared:
        raise BadInput("model.moe.shared_gate=true has no shared expert to gate: set model.moe.n_shared.")
    if moe.depth < 1 and (router.name == "soft" or router.input == "previous"):
        key = "name=soft, which mixes whole sequences" if router.name == "soft" else "input=previous, another block's"
        raise BadInput(
            f"model.moe.depth={moe.depth} lets tokens pass a block by and does not go with router.{key}: set it to 1."
        )
    if e > moe.n_experts and router.name == "soft":
        raise BadInput("model.moe.n_null, n_copy and n_constant need a router of rows, and router.name=soft mixes.")
    if router.k_groups > router.groups:
        raise BadInput(f"router.k_groups={router.k_groups} exceeds router.groups={router.groups}.")
    if router.groups == 1:
        return
    if e % router.groups:
        raise BadInput(f"router.groups={router.groups} must divide model.moe.n_experts={e} evenly.")
    size = e // router.groups
    if moe.k > router.k_groups * size:
        raise BadInput(
            f"model.moe.k={moe.k} exceeds the {router.k_groups * size} experts in router.k_groups={router.k_groups} "
            f"groups of {size}."
        )
    if router.group_top > size:
        raise BadInput(f"router.group_top={router.group_top} exceeds the {size} experts of a group.")


def _validate_router(layers: list[MoEConfig], router: RouterConfig) -> None:
    ks = sorted({moe.k for moe in layers})
    if router.name == "base" and ks != [1]:
        raise BadInput(f"router.name=base gives every token one expert: set model.moe.k=1 (it is {ks[-1]}).")
    top_k = router.name in ("softmax", "sigmoid", "sinkhorn") and not router.frozen
    if router.renormalize and top_k and any(moe.k == 1 < moe.n_experts + moe.n_cheap for moe in layers):
        raise BadInput(
            f"router.renormalize=true with model.moe.k=1 makes every weight {router.scale:g}, and router.name="
            f"{router.name} would learn nothing from the text: set router.renormalize=false."
        )
    if router.renormalize and router.k_max == 1:
        raise BadInput(
            f"router.renormalize=true with router.k_max=1 makes every weight {router.scale:g}, and router.name="
            f"{router.name} would learn nothing from the text: set router.renormalize=false."
        )
    if router.second == "random" and ks != [2]:
        raise BadInput(f"router.second=random needs model.moe.k=2, and it is {ks[-1]}.")
    if router.second == "random" and router.gradient in ("straight-through", "sparsemixer"):
        raise BadInput(
            f"router.second=random goes by the weights, which router.gradient={router.gradient} changes: choose one."
        )
    if router.groups > 1 and router.gradient == "sparsemixer":
        raise BadInput(f"router.groups={router.groups} has no meaning for router.gradient=sparsemixer, which samples.")
    if router.gradient == "sparsemixer" and (router.name != "softmax" or router.selection_bias or router.renormalize):
        raise BadInput(
            "router.gradient=sparsemixer needs router.name=softmax, router.renormalize=false and no selection bias."
        )
    if router.gradient == "default-vector" and router.second == "random":
        raise BadInput("router.second=random has no meaning for router.gradient=default-vector.")
    if router.gradient == "default-vector" and router.renormalize:
        raise BadInput(
            "router.gradient=default-vector weighs all experts by their scores: set router.renormalize=false."
        )
    if router.gradient == "default-vector" and layers[0].n_cheap:
        raise BadInput("router.gradient=default-vector has no vectors for null, copy and constant experts.")
    if router.shared and len({moe.n_experts for moe in layers}) + len(ks) > 2:
        raise BadInput("router.shared=true needs the same n_experts and k in every MoE layer.")


def _validate_balance(layers: list[MoEConfig], router: RouterConfig, balance: BalanceConfig) -> None:
    if balance.bias_rate > 0 and not router.selection_bias:
        raise BadInput(
            f"balance.bias_rate={balance.bias_rate} needs a selection bias to update: set router.selection_bias=true."
        )
    if router.name in SCORELESS:
        for name in SCORE_TERMS:
            if getattr(balance, name):
                raise BadInput(
                    f"balance.{name}={getattr(balance, name)} reads scores, and router.name={router.name} gives none: "
                    f"set balance.{name}=0 (or balance=none)."
                )
    if balance.load and not router.noisy:
        raise BadInput(
            f"balance.load={balance.load} needs router.noisy=true: without noise the load has no gradient "
            "(balance.importance and balance.aux do without)."
        )
    if balance.load and router.gradient == "sparsemixer":
        raise BadInput(f"balance.load={balance.load} has no estimate for router.gradient=sparsemixer.")
    policies = {"capacity": balance.capacity, "tile": balance.tile, "force": balance.force != "none"}
    for name, on in policies.items():
        if on and (router.name in WITHOUT_TK or (name != "capacity" and router.name == "hash")):
            raise BadInput(
                f"balance.{name}={getattr(balance, name)} has no meaning for router.name={router.name}: "
                f"set balance.{name}={'none' if name == 'force' else 0}."
            )
    if router.gradient == "default-vector":
        for name in ("tile", "force"):
            if policies[name]:
                raise BadInput(
                    f"balance.{name}={getattr(balance, name)} has no meaning for router.gradient=default-vector."
                )
        if balance.overflow == "next":
            raise BadInput("balance.overflow=next has no meaning for router.gradient=default-vector.")
    if (balance.force == "recorded") != bool(balance.recorded):
        raise BadInput(
            f"balance.force={balance.force} with balance.recorded={balance.recorded!r}: force=recorded and the folder "
            "of the recorded run go together."
        )
    if balance.force != "none" and balance.tile:
        raise BadInput(f"balance.tile={balance.tile} and balance.force={balance.force}: choose one of them.")
    if balance.capacity and balance.tile:
        raise BadInput(f"balance.capacity={balance.capacity} and balance.tile={balance.tile}: choose one of them.")
    if balance.overflow == "next" and (not balance.capacity or router.name in SCORELESS):
        raise BadInput("balance.overflow=next needs balance.capacity above 0 and a router with scores.")
    for name, factors in balance.schedule.items():
        if name not in SCHEDULED:
            raise BadInput(f"balance.schedule.{name} is not a coefficient; accepted here: {', '.join(SCHEDULED)}.")
        if not factors or not all(0 <= factor < float("inf") for factor in factors):
            raise BadInput(f"balance.schedule.{name}={factors} must be a list of factors of at least 0, like [1,0].")
