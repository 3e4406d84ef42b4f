"""The settings of the router, and the table of what is true of each router by its name.

Whoever needs to know something of a router asks `facts`; nobody compares names. A new router is one entry in `FACTS`.
Letters beyond the glossary: P slots per expert and sequence of a soft router.
"""

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from moe.config.model import MoEConfig
from moe.config.parse import ANY, MANY, Between, OneOf
from moe.errors import BadInput


@dataclass
class RouterConfig:
    """Who goes where, and with what weight. `FACTS` says which router reads which of these."""

    name: str = "softmax"  # see ROUTERS; or module:Class, a router of your own

    # --- Logits and scores

    # linear | cosine (of state and expert vector, over a learned temperature)
    logits: Annotated[str, OneOf("linear", "cosine")] = "linear"
    # in what logits are computed and kept: fp32 | bf16 | fp16 (scores, weights and losses are float32 all the same)
    precision: Annotated[str, OneOf("fp32", "bf16", "fp16")] = "fp32"
    bias: bool = False  # a learned bias on every expert's logit
    noisy: bool = False  # Gaussian noise of learned size on the logits in training (Shazeer 2017)
    # in training the router reads x · u, u uniform in [1 − jitter, 1 + jitter] (Switch)
    jitter: Annotated[float, Between(0, 0.999)] = 0.0
    frozen: bool = False  # the router keeps its random initial weights
    renormalize: bool = True  # weights of a token's K experts sum to 1 (times scale)
    norm_min: Annotated[float, Between(0, 1)] = 0.0  # renormalize divides by no smaller sum than this (Ernie 4.5)
    selection_bias: bool = False  # a bias per expert that takes part in the choice only (loss-free balancing)
    scale: Annotated[float, Between(1e-09, ANY)] = 1.0  # factor on every weight (DeepSeek-V3's routed scaling factor)
    # equal groups of neighbouring experts; a token chooses within its k_groups best of them
    groups: Annotated[int, Between(1, MANY)] = 1
    k_groups: Annotated[int, Between(1, MANY)] = 1  # see groups
    # how many of its best experts' scores make a group's score (DeepSeek-V3: 2, DeepSeek-V2: 1)
    group_top: Annotated[int, Between(1, MANY)] = 2
    # best | random: the second expert is taken with probability min(1, 2 w_2) (GShard)
    second: Annotated[str, OneOf("best", "random")] = "best"
    # what reaches the router's weights; see moe.routing.token_choice
    gradient: Annotated[str, OneOf("exact", "straight-through", "sparsemixer", "default-vector")] = "exact"

    # --- Threshold and top-p

    # a token takes the experts whose probability is at least this / E, at least one
    threshold: Annotated[float, Between(0, ANY)] = 1.5
    top_p: Annotated[float, Between(0, 1)] = 0.4  # a token takes its best experts until their probabilities sum to this
    k_max: Annotated[int, Between(0, MANY)] = 0  # at most this many experts per token; 0: no limit

    # --- ReLU

    # initial coefficient of the L1 loss, which adapts to reach K experts per token on average
    l1: Annotated[float, Between(1e-20, 1e20)] = 1e-8
    l1_factor: Annotated[float, Between(1, 100)] = 1.2  # what it is multiplied or divided by after every step

    # --- Sinkhorn, expert choice, soft

    iterations: Annotated[int, Between(1, 10_000)] = 8  # of Sinkhorn's normalisation
    # whether expert-choice decides token by token in evaluation, and how
    causal: Annotated[str, OneOf("none", "threshold", "predictor")] = "none"
    decay: Annotated[float, Between(0, 1)] = 0.99  # threshold: of the running mean of every expert's cut-off
    # slots per expert and sequence of a soft router; 0: K·S/E, so that experts cost what K per token do
    slots: Annotated[int, Between(0, MANY)] = 0

    # --- Every router

    # own | previous: it reads the input of the previous MoE layer (lookahead)
    input: Annotated[str, OneOf("own", "previous")] = "own"
    shared: bool = False  # one router for all MoE layers
    options: dict[str, Any] = field(default_factory=dict)  # what a router of your own reads


def soft_slots(router: RouterConfig, moe: MoEConfig, context: int) -> int:
    """P, the slots per expert and sequence of a soft router."""
    return router.slots or max(1, -(-moe.k * context // moe.n_experts))


class RouterFlops(NamedTuple):
    """Floating-point operations of a router's matmuls per token; `backward` those of its gradients alone."""

    evaluation: float
    forward: float  # in training
    backward: float


def _flops_of_scores(router: RouterConfig, moe: MoEConfig, d_model: int, context: int) -> RouterFlops:
    """A matmul over the D·E (null, copy and constant experts have logits too) for each of these:

    - the logits; gradients to the state and, unless frozen, to the weights
    - in training the size of the noise (`noisy`), with the same gradients
    - the default vectors' share in the output, and what they are fitted by: one gradient each, as either the weights
      or the vectors are taken as given
    - the predictor that stands in for expert choice: no gradient to the state"""
    matmul, gradients = 2 * d_model * (moe.n_experts + moe.n_cheap), 1 if router.frozen else 2
    vectors, predictor = router.gradient == "default-vector", router.causal == "predictor"
    return RouterFlops(
        evaluation=matmul * (1 + 2 * vectors + predictor),
        forward=matmul * (1 + router.noisy + 2 * vectors + predictor),
        backward=matmul * (gradients * (1 + router.noisy) + 2 * vectors + predictor),
    )


def _flops_of_mixing(router: RouterConfig, moe: MoEConfig, d_model: int, context: int) -> RouterFlops:
    """6·D for every slot of the E·P: its logit, the token's part in it, and its part in the token."""
    forward = 6 * d_model * moe.n_experts * soft_slots(router, moe, context)
    return RouterFlops(forward, forward, 2 * forward)


def _no_flops(router: RouterConfig, moe: MoEConfig, d_model: int, context: int) -> RouterFlops:
    """A table is looked up."""
    return RouterFlops(0, 0, 0)


@dataclass(frozen=True)
class RouterFacts:
    """What is true of a router whatever its weights are. Held against the routers themselves by the tests."""

    # the settings it reads, beside those that every router reads
    reads: tuple[str, ...]
    # how logits become scores; none: it has no logits, and so nothing that a balance term could read
    score: Literal["softmax", "sigmoid", "sqrt_softplus", "relu", "none", "unknown"]
    # how many experts it names for every token in training, unused ones included:
    # k        K
    # k_max    that many, or E where it is 0
    # all      E
    # ragged   more for one token than for another, in rows
    # mixture  none: it mixes tokens into slots
    choices: Literal["k", "k_max", "all", "ragged", "mixture", "unknown"]
    # on whom it depends in training where a token goes
    decides: Literal["token", "batch", "sequence", "unknown"] = "token"
    # what routing one token costs, from (router, moe, D, S), S the model's context
    flops: Callable[[RouterConfig, MoEConfig, int, int], RouterFlops] = _flops_of_scores

    @property
    def scored(self) -> bool:
        """Whether every token has a logit for every expert."""
        return self.score != "none"

    @property
    def rectangular(self) -> bool:
        """Whether it names as many experts for every token in training, so that rows are (T, K) for some K."""
        return self.choices not in ("ragged", "mixture")


_LOGITS = ("logits", "precision", "bias", "jitter")
_LINEAR = (*_LOGITS, "noisy", "frozen", "scale", "gradient")
_TOP_K = (*_LINEAR, "renormalize", "norm_min", "selection_bias", "groups", "k_groups", "group_top", "second")
_THRESHOLD = (*_LOGITS, "frozen", "renormalize", "scale", "k_max")
FACTS = {
    "softmax": RouterFacts(_TOP_K, score="softmax", choices="k"),
    "sigmoid": RouterFacts(_TOP_K, score="sigmoid", choices="k"),
    "sqrt_softplus": RouterFacts(_TOP_K, score="sqrt_softplus", choices="k"),
    "threshold": RouterFacts((*_THRESHOLD, "threshold"), score="softmax", choices="k_max"),
    "top-p": RouterFacts((*_THRESHOLD, "top_p"), score="softmax", choices="k_max"),
    "relu": RouterFacts((*_LOGITS, "scale", "l1", "l1_factor"), score="relu", choices="all"),
    "sinkhorn": RouterFacts(("renormalize", "scale", "iterations"), score="softmax", choices="k", decides="batch"),
    "base": RouterFacts((), score="sigmoid", choices="k", decides="batch"),
    "hash": RouterFacts(("scale",), score="none", choices="k", flops=_no_flops),
    "expert-choice": RouterFacts(("scale", "causal", "decay"), score="softmax", choices="ragged", decides="batch"),
    "soft": RouterFacts(("slots",), score="none", choices="mixture", decides="sequence", flops=_flops_of_mixing),
}
# Of module:Class nothing is known. It is taken to have scores, and to cost what they cost.
OWN = RouterFacts((), score="unknown", choices="unknown", decides="unknown")
ROUTERS = tuple(FACTS)
ALWAYS = ("name", "input", "shared", "options")  # what every router reads


def facts(router: RouterConfig) -> RouterFacts:
    """What is true of this router; `OWN` for one of your own."""
    return FACTS.get(router.name, OWN)


def n_choices(router: RouterConfig, moe: MoEConfig) -> int | None:
    """How many experts, `UNUSED` ones included, a router names for every token in training. None where that differs
    from token to token, for a soft router, and for one of your own."""
    e = moe.n_experts + moe.n_cheap
    return {"k": moe.k, "k_max": min(router.k_max or e, e), "all": e}.get(facts(router).choices)


def rows_per_token(router: RouterConfig, moe: MoEConfig, context: int, length: int = 0) -> float:
    """Rows that experts compute for a token, on average: K, also of routers that come to about K by learning, or take
    as many as they like (`moe.config.balance.rows_vary`); of a soft one E·P/S, in sequences of `length` (0: the model's
    context)."""
    if facts(router).choices == "mixture":
        return moe.n_experts * soft_slots(router, moe, context) / (length or context)
    return moe.k


def weight_sum(router: RouterConfig) -> float | None:
    """What the weights of every token sum to in evaluation, whatever the logits are: scale, where they are renormalised
    or no scores of the token's. None where it differs from token to token, and for a router of your own."""
    about = facts(router)
    renormalized = router.renormalize and "renormalize" in about.reads and not router.norm_min
    return router.scale if renormalized or router.gradient == "straight-through" or not about.scored else None


def validate_router(layers: list[MoEConfig], router: RouterConfig) -> None:
    """Check what of a router does not go together, or not with its experts. `layers`: the settings of every MoE layer;
    none for a dense model, of which no more than a known name is asked. Raises `BadInput`."""
    _validate_name(router)
    for moe in layers:
        _validate_experts(moe, router)
        _validate_groups(moe, router)
    if layers:
        _validate_weights(layers, router)
        _validate_gradient(layers, router)
    if router.shared and len({(moe.n_experts, moe.k) for moe in layers}) > 1:
        raise BadInput("router.shared=true needs the same n_experts and k in every MoE layer.")


def _validate_name(router: RouterConfig) -> None:
    names_class = ":" in router.name
    if not names_class and router.name not in ROUTERS:
        hint = difflib.get_close_matches(router.name, ROUTERS, n=1, cutoff=0.5)
        tail = f"; did you mean {hint[0]}" if hint else ""
        raise BadInput(
            f"router.name={router.name} is not one of {', '.join(ROUTERS)}, or module:Class for your own{tail}."
        )
    if router.options and not names_class:
        raise BadInput(f"router.options={router.options} is read by a router of your own only, not by {router.name}.")
    if names_class:
        return
    reads = facts(router).reads
    for name, default in dataclasses.asdict(RouterConfig()).items():
        value = getattr(router, name)
        if value != default and name not in (*reads, *ALWAYS):
            raise BadInput(
                f"router.{name}={value} means nothing to router.name={router.name}, which reads "
                f"{', '.join(sorted(reads)) or 'no setting of its own'}."
            )


def _validate_experts(moe: MoEConfig, router: RouterConfig) -> None:
    if moe.k > moe.n_experts + moe.n_cheap:
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
    mixes = facts(router).choices == "mixture"
    if moe.depth < 1 and (mixes or router.input == "previous"):
        key = f"name={router.name}, which mixes whole sequences" if mixes else "input=previous, another block's"
        raise BadInput(
            f"model.moe.depth={moe.depth} lets tokens pass a block by and does not go with router.{key}: set it to 1."
        )
    if moe.n_cheap and mixes:
        raise BadInput(
            f"model.moe.n_null, n_copy and n_constant need a router of rows, and router.name={router.name} mixes."
        )


def _validate_groups(moe: MoEConfig, router: RouterConfig) -> None:
    e = moe.n_experts + moe.n_cheap
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


def _validate_weights(layers: list[MoEConfig], router: RouterConfig) -> None:
    """Refuse numbers of experts that the router does not give, and those at which its weights would be constants."""
    if router.norm_min and not router.renormalize:
        raise BadInput(f"router.norm_min={router.norm_min} means nothing to router.renormalize=false.")
    ks = sorted({moe.k for moe in layers})
    if router.name == "base" and ks != [1]:
        raise BadInput(f"router.name=base gives every token one expert: set model.moe.k=1 (it is {ks[-1]}).")
    about = facts(router)
    top_k = about.choices == "k" and "renormalize" in about.reads and not router.frozen
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


def _validate_gradient(layers: list[MoEConfig], router: RouterConfig) -> None:
    """Refuse what an estimator of the gradient cannot do."""
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
