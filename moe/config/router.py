"""The settings of the router, and what each of them means to which router."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Annotated, Any

from moe.config.model import MoEConfig
from moe.config.parse import ANY, MANY, Between, OneOf
from moe.errors import BadInput


@dataclass
class RouterConfig:
    """Who goes where, and with what weight. `READS` says which router reads which of these."""

    name: str = "softmax"  # see ROUTERS; or module:Class, a router of your own
    # logits and scores
    logits: Annotated[str, OneOf("linear", "cosine")] = (
        "linear"  # linear | cosine (of state and expert vector, over a learned temperature)
    )
    noisy: bool = False  # Gaussian noise of learned size on the logits in training (Shazeer 2017)
    jitter: Annotated[float, Between(0, 0.999)] = (
        0.0  # in training the router reads x · u, u uniform in [1 − jitter, 1 + jitter] (Switch)
    )
    frozen: bool = False  # the router keeps its random initial weights
    renormalize: bool = True  # weights of a token's K experts sum to 1 (times scale)
    selection_bias: bool = False  # a bias per expert that takes part in the choice only (loss-free balancing)
    scale: Annotated[float, Between(1e-09, ANY)] = 1.0  # factor on every weight (DeepSeek-V3's routed scaling factor)
    groups: Annotated[int, Between(1, MANY)] = (
        1  # equal groups of neighbouring experts; a token chooses within its k_groups best of them
    )
    k_groups: Annotated[int, Between(1, MANY)] = 1
    group_top: Annotated[int, Between(1, MANY)] = (
        2  # how many of its best experts' scores make a group's score (DeepSeek-V3: 2, DeepSeek-V2: 1)
    )
    second: Annotated[str, OneOf("best", "random")] = (
        "best"  # best | random: the second expert is taken with probability min(1, 2 w_2) (GShard)
    )
    gradient: Annotated[str, OneOf("exact", "straight-through", "sparsemixer", "default-vector")] = (
        "exact"  # exact | straight-through | sparsemixer | default-vector
    )
    # threshold and top-p
    threshold: Annotated[float, Between(0, ANY)] = (
        1.5  # a token takes the experts whose probability is at least this / E, at least one
    )
    top_p: Annotated[float, Between(0, 1)] = 0.4  # a token takes its best experts until their probabilities sum to this
    k_max: Annotated[int, Between(0, MANY)] = 0  # at most this many experts per token; 0: no limit
    # relu
    l1: Annotated[float, Between(1e-20, 1e20)] = (
        1e-8  # initial coefficient of the L1 loss, which adapts to reach K experts per token on average
    )
    l1_factor: Annotated[float, Between(1, 100)] = 1.2  # what it is multiplied or divided by after every step
    # sinkhorn, base, expert-choice, soft
    iterations: Annotated[int, Between(1, 10_000)] = 8  # of Sinkhorn's normalisation
    causal: Annotated[str, OneOf("none", "threshold", "predictor")] = (
        "none"  # none | threshold | predictor: how expert-choice decides in evaluation, token by token
    )
    decay: Annotated[float, Between(0, 1)] = 0.99  # threshold: of the running mean of every expert's cut-off
    slots: Annotated[int, Between(0, MANY)] = (
        0  # slots per expert and sequence of a soft router; 0: K·S/E, so that experts cost what K per token do
    )
    # every router
    input: Annotated[str, OneOf("own", "previous")] = (
        "own"  # own | previous: it reads the input of the previous MoE layer (lookahead)
    )
    shared: bool = False  # one router for all MoE layers
    options: dict[str, Any] = field(default_factory=dict)  # what a router of your own reads


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


def validate_router(layers: list[MoEConfig], router: RouterConfig) -> None:
    """Check what of a router does not go together, or not with its experts. `layers`: the settings of every MoE layer;
    none for a dense model, of which no more than a known name is asked. Raises `BadInput`."""
    _validate_name(router)
    for moe in layers:
        _validate_experts(moe, router)
    if layers:
        _validate_router(layers, router)


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
