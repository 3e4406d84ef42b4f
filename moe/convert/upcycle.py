"""Checkpoints turned into other models: dense to MoE and back, more experts, fewer experts, many models into one.

Every function takes named tensors, as `moe.model.transformer.model_tensors` gives them, with their config, and returns
new ones for the target: all of its names and nothing else, in the dtype of `embed.weight`. The tensors handed in are
never changed. What the target has and the source does not (a new router) is drawn as `Transformer.initialize` draws it.

A claim that a function is preserved is one of exact arithmetic, in evaluation and without capacity; it needs weights of
a token's K experts whose sum is known. That is `router.scale` where they are renormalised. For raw scores the sum is
taken at router logits of 0 (of probabilities scale · K / E, of other scores theirs), and the claim holds only there.

Letters beyond the glossary: U matrices of an MLP's first half, gate and up or up alone · R slices of its hidden width.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from moe.config.model import ModelConfig, MoEConfig, layer_moe, moe_layers
from moe.config.router import RouterConfig, facts, weight_sum
from moe.errors import BadInput
from moe.model.experts import up_width
from moe.model.transformer import Transformer, model_tensors

METHODS = ("copy", "noise", "split", "drop")
PER_EXPERT = re.compile(r"\.mlp\..*_E[A-Z]*$")  # tensors whose first dimension counts the experts

Tensors = dict[str, Tensor]


@torch.no_grad()
def upcycle(
    tensors: Tensors,
    dense: ModelConfig,
    target: ModelConfig,
    method: str,
    seed: int,
    noise: float = 0.0,
    drop: float = 0.5,
    router: RouterConfig | None = None,
) -> Tensors:
    """A dense checkpoint as the start of an MoE: every MoE layer's experts come from that layer's MLP, new routers are
    drawn, everything else is copied. With s the sum of a token's K weights:

    copy   every expert is the MLP, w_down / s: sum_k w_k · MLP(x) / s = MLP(x), exactly the dense model's logits
           (sparse upcycling, 2212.05055). Needs d_expert = d_ff. While the experts are
           equal the language-model loss gives renormalised weights, and so the router, no gradient
    noise  the same, and N(0, (noise · std)²) on every expert's weights, std that of the dense tensor
    split  the hidden width is cut into R = d_ff / d_expert slices; expert e = m·R + r holds slice r, and the R experts
           of group m have the same router row, so that the top K, a multiple of R, are whole groups:
           sum_m w_m · sum_r slice_r(x) · R / s = MLP(x), because sum_m R · w_m = s. w_down is scaled by R / s
           (virtual groups, 2410.07524). Needs a softmax or sigmoid router
    drop   the same as copy, and in every expert a share `drop` of the hidden channels, others in each, is drawn anew
           from N(mean, std²) of the entries of the dense gate, up and down (drop-upcycling, 2502.19261)

    `router`: the target's; renormalised softmax if None. Raises `BadInput` for shapes and settings that do not fit."""
    # What is asked for must make sense, and fit the checkpoint.
    router = router or RouterConfig()
    if method not in METHODS:
        raise BadInput(f"method={method} is not one of {', '.join(METHODS)}.")
    if not 0 <= noise < float("inf"):  # also refuses nan
        raise BadInput(f"noise={noise} must be at least 0.")
    if not 0 <= drop <= 1:
        raise BadInput(f"drop={drop} must be between 0 and 1.")
    _check_dense(tensors, dense)
    _check_target(dense, target, router)
    # All but the experts is the checkpoint's, or drawn.
    result = _start(tensors, target, router, seed)
    for layer in moe_layers(target):
        moe = layer_moe(target, layer)
        n_slices = _slices(dense, moe, router) if method == "split" else 1
        if method != "split" and moe.d_expert != dense.d_ff:
            raise BadInput(
                f"method={method} needs experts as wide as the dense MLP: set model.moe.d_expert={dense.d_ff} (it is "
                f"{moe.d_expert}), or method=split."
            )
        # Copies of the MLP, or of its slices in turn.
        name = f"blocks.{layer}.mlp"
        up, down = tensors[f"{name}.up.weight"], tensors[f"{name}.down.weight"]
        repeats, n_up = moe.n_experts // n_slices, up_width(dense, 1)
        up_EFD = rearrange(up, "(u r f) d -> r (u f) d", u=n_up, r=n_slices).repeat(repeats, 1, 1)
        down_EDF = rearrange(down, "d (r f) -> r d f", r=n_slices).repeat(repeats, 1, 1)
        # What parts the copies from each other.
        if method == "noise":
            up_EFD += noise * up.std() * _normal(up_EFD, seed, f"{name}.up/noise")
            down_EDF += noise * down.std() * _normal(down_EDF, seed, f"{name}.down/noise")
        if method == "drop":
            _redraw(up_EFD.unflatten(1, (n_up, -1)), down_EDF, drop, seed, name)
        # Scaled to the weights' sum, with one router row for all slices of a copy.
        result[f"{name}.experts.w_up_EFD"] = up_EFD
        result[f"{name}.experts.w_down_EDF"] = down_EDF * (n_slices / _weight_sum(router, moe))
        for weight in ("w_ED", "w_noise_ED"):
            key = f"{name}.router.{weight}"
            if key in result and n_slices > 1:
                result[key] = result[key][::n_slices].repeat_interleave(n_slices, 0)
    return result


@torch.no_grad()
def grow(
    tensors: Tensors,
    source: ModelConfig,
    target: ModelConfig,
    noise: float,
    seed: int,
    router: RouterConfig | None = None,
) -> Tensors:
    """E experts become m · E: expert j is a copy of expert j mod E, its weights and all that a router holds of it.

    The router rows of the new experts get N(0, (noise · std)²), std that of the layer's rows. With noise = 0 and m · K
    experts a token it computes the source's function: copies have equal scores, so the top m · K are the copies of the
    top K, each with 1/m of the weight (relu takes all copies in any case, and w_down is divided by m). But then copies
    have equal gradients as well and never part. For another K w_down is scaled so that the weights' sum is as it was,
    and the function is another. So it is, a little, where probabilities that E changes meet a number that it does not:
    softmax with a selection bias, top-p, raw threshold and sparsemixer.

    Raises `BadInput` where the target's E is no multiple of the source's, and for routers whose choice is no matter of
    a row per expert (hash, soft, groups > 1)."""
    router = router or RouterConfig()
    if not 0 <= noise < float("inf"):
        raise BadInput(f"noise={noise} is out of range: accepted is at least 0.")
    if router.groups > 1:
        raise BadInput(f"router.groups={router.groups}: copies of experts would come to stand in other groups.")
    _check_pair(tensors, source, target, router)
    choices: list[Tensor] = []
    for layer in moe_layers(target):
        old, new = layer_moe(source, layer), layer_moe(target, layer)
        if new.n_experts % old.n_experts:
            raise BadInput(
                f"the target's {new.n_experts} experts in layer {layer} are no multiple of the source's "
                f"{old.n_experts}."
            )
        choices.append(torch.arange(new.n_experts) % old.n_experts)
    result = _regroup(tensors, target, router, choices)
    for layer in moe_layers(target):
        old, new = layer_moe(source, layer), layer_moe(target, layer)
        result[f"blocks.{layer}.mlp.experts.w_down_EDF"] *= _weight_sum(router, old) / _weight_sum(router, new)
        key = f"blocks.{layer}.mlp.router.w_ED"
        if noise and key in result:
            rows = result[key][old.n_experts :]
            rows += noise * tensors[key].std() * _normal(rows, seed, f"{key}/noise")
    return result


@torch.no_grad()
def merge(
    models: Sequence[Tensors], dense: ModelConfig, target: ModelConfig, seed: int, router: RouterConfig | None = None
) -> Tensors:
    """E dense models of one shape as one MoE of E experts (branch-train-mix, 2403.07816): in every MoE layer expert i
    is model i's MLP (w_down / s, s the sum of a token's weights), new routers are drawn, and everything else, dense
    MLPs included, is the models' mean. E equal models give the dense model's logits.

    Raises `BadInput` for models that are not of the shape `dense`, and for a target of another number of experts or of
    d_expert other than d_ff."""
    router = router or RouterConfig()
    if not models:
        raise BadInput("there is no model to merge: give at least one.")
    for tensors in models:
        _check_dense(tensors, dense)
    _check_target(dense, target, router)
    for layer in moe_layers(target):
        moe = layer_moe(target, layer)
        if moe.n_experts != len(models) or moe.d_expert != dense.d_ff:
            raise BadInput(
                f"{len(models)} models of model.d_ff={dense.d_ff} make as many experts of that width, and the target's "
                f"layer {layer} has {moe.n_experts} of model.moe.d_expert={moe.d_expert}."
            )
    mean = {name: torch.stack([tensors[name] for tensors in models]).mean(0) for name in models[0]}
    result = _start(mean, target, router, seed)
    for layer in moe_layers(target):
        name, total = f"blocks.{layer}.mlp", _weight_sum(router, layer_moe(target, layer))
        result[f"{name}.experts.w_up_EFD"] = torch.stack([tensors[f"{name}.up.weight"] for tensors in models])
        down_EDF = torch.stack([tensors[f"{name}.down.weight"] for tensors in models])
        result[f"{name}.experts.w_down_EDF"] = down_EDF / total
    return result


@torch.no_grad()
def prune(
    tensors: Tensors,
    source: ModelConfig,
    target: ModelConfig,
    keep: Sequence[Sequence[int]],
    router: RouterConfig | None = None,
) -> Tensors:
    """An MoE with some of its experts alone (2206.00277). `keep`: for every MoE layer the experts that stay, in their
    new order, such as the busiest by their counts. Their weights and all that the router holds of them, rows and
    selection biases, stay as they are. Where weights are renormalised, a token whose K experts all stay has them again,
    with the same weights. (Softmax with a selection bias may choose others: the probabilities that the biases are added
    to grow when experts go; so do the cut-offs of expert-choice, by E / E'.)

    Raises `BadInput` for experts that do not exist or are named twice, and for lists that do not fit the target."""
    router = router or RouterConfig()
    _check_pair(tensors, source, target, router)
    layers = moe_layers(target)
    if len(keep) != len(layers):
        raise BadInput(f"keep has {len(keep)} lists for {len(layers)} MoE layers: give one for each.")
    for layer, kept in zip(layers, keep, strict=True):
        e, e_new = layer_moe(source, layer).n_experts, layer_moe(target, layer).n_experts
        if len(set(kept)) != len(kept) or not all(0 <= expert < e for expert in kept):
            raise BadInput(f"keep={list(kept)} for layer {layer} must be distinct experts between 0 and {e - 1}.")
        if len(kept) != e_new:
            raise BadInput(f"keep has {len(kept)} experts for layer {layer}, and the target has {e_new} there.")
    if router.shared and any(list(kept) != list(keep[0]) for kept in keep):
        raise BadInput("router.shared=true has one row per expert for all layers: keep the same experts in each.")
    return _regroup(tensors, target, router, [torch.tensor(list(kept)) for kept in keep])


@torch.no_grad()
def to_dense(
    tensors: Tensors,
    source: ModelConfig,
    counts: Sequence[Sequence[int]] | None = None,
    router: RouterConfig | None = None,
) -> tuple[Tensors, ModelConfig]:
    """A dense model that starts near an MoE, to be distilled from it, and its config.

    Every MoE layer's MLP is its K busiest experts side by side (by `counts`, for every MoE layer the rows of each
    expert; without counts the first K), hidden width K · d_expert, down scaled by s / K, s the sum of a token's
    weights; shared experts stand behind them as they are. It is the MoE where every token takes those K experts with
    equal weights.

    Raises `BadInput` where the MLPs would differ in width, which one d_ff cannot say."""
    # What has no counterpart in a dense model.
    router = router or RouterConfig()
    if source.moe is None:
        raise BadInput("the model is dense already.")
    if source.bias:
        raise BadInput("model.bias=true: the biases of a dense MLP have nothing to come from.")
    if source.moe.depth < 1:
        raise BadInput(f"model.moe.depth={source.moe.depth}: every token enters the blocks of a dense model.")
    if source.moe.shared_gate:
        raise BadInput("model.moe.shared_gate=true: a dense MLP has no gate for the shared experts.")
    _check_plain(source.moe)
    _check_router(router)
    _check_shapes(tensors, source, router)
    # One width for all layers.
    layers = moe_layers(source)
    widths = {(layer_moe(source, layer).k + source.moe.n_shared) * source.moe.d_expert for layer in layers}
    if len(layers) < source.n_layers:
        widths.add(source.d_ff)
    if len(widths) > 1:
        raise BadInput(f"the dense MLPs would be of widths {sorted(widths)}: one model.d_ff cannot be all of them.")
    if counts is not None and [len(count) for count in counts] != [layer_moe(source, n).n_experts for n in layers]:
        raise BadInput("counts must have one list for every MoE layer, with one number for every expert.")
    target = dataclasses.replace(source, moe=None, d_ff=widths.pop())
    result = {name: tensor.clone() for name, tensor in tensors.items() if not _in_moe(name, layers)}
    # The busiest experts side by side, and the shared ones behind them.
    n_up = up_width(source, 1)
    for i, layer in enumerate(layers):
        moe, name = layer_moe(source, layer), f"blocks.{layer}.mlp"
        count_E = torch.tensor(counts[i]) if counts is not None else torch.zeros(moe.n_experts)
        chosen_K = count_E.argsort(descending=True, stable=True)[: moe.k]
        up_UFD = rearrange(tensors[f"{name}.experts.w_up_EFD"][chosen_K], "k (u f) d -> u (k f) d", u=n_up)
        down_DF = rearrange(tensors[f"{name}.experts.w_down_EDF"][chosen_K], "k d f -> d (k f)")
        down_DF = down_DF * (_weight_sum(router, moe) / moe.k)
        if moe.n_shared:
            shared_UFD = rearrange(tensors[f"{name}.shared.up.weight"], "(u f) d -> u f d", u=n_up)
            up_UFD = torch.cat((up_UFD, shared_UFD), 1)
            down_DF = torch.cat((down_DF, tensors[f"{name}.shared.down.weight"]), 1)
        result[f"{name}.up.weight"], result[f"{name}.down.weight"] = up_UFD.flatten(0, 1), down_DF
    return result, target


# What they share


def _start(tensors: Tensors, target: ModelConfig, router: RouterConfig, seed: int) -> Tensors:
    """The target's tensors as `initialize` gives them, and those that `tensors` has in the same shape copied."""
    dtype = tensors["embed.weight"].dtype
    result = model_tensors(Transformer(target, router).initialize(seed))
    for name, drawn in result.items():
        old = tensors.get(name)
        if old is not None and old.shape == drawn.shape:
            result[name] = old.clone()
        elif drawn.is_floating_point():
            result[name] = drawn.to(dtype)
    return {name: tensor.detach() for name, tensor in result.items()}


def _regroup(tensors: Tensors, target: ModelConfig, router: RouterConfig, choices: list[Tensor]) -> Tensors:
    """The target's tensors: for every MoE layer the experts `choices[layer]` (E',) of the source, the rest as it is."""
    result = {}
    chosen = dict(zip(moe_layers(target), choices, strict=True))
    for name in _shapes(target, router):
        index = chosen[int(name.split(".")[1])] if PER_EXPERT.search(name) else None
        result[name] = tensors[name].clone() if index is None else tensors[name][index.to(tensors[name].device)]
        if name.endswith("cutoff_E") and index is not None:
            result[name] *= len(tensors[name]) / len(index)  # of probabilities, which are about 1 / E
    return result


def _redraw(up_EUFD: Tensor, down_EDF: Tensor, share: float, seed: int, name: str) -> None:
    """In place: a share of every expert's hidden channels gets new weights, of the mean and deviation of all of them in
    the gate, the up projection and the down projection. The experts are equal before, so all have the same ones."""
    n = round(share * up_EUFD.shape[2])
    std_U, mean_U = torch.std_mean(up_EUFD[0], dim=(1, 2), keepdim=True)
    std, mean = torch.std_mean(down_EDF[0])
    for e in range(len(up_EUFD)):
        generator = _generator(seed, f"{name}/drop/{e}")
        index = torch.randperm(up_EUFD.shape[2], generator=generator)[:n].to(up_EUFD.device)
        up_UFD, down_DF = up_EUFD[e], down_EDF[e]
        up_UFD[:, index] = mean_U + std_U * _normal(up_UFD[:, index], seed, f"{name}.up/drop/{e}")
        down_DF[:, index] = mean + std * _normal(down_DF[:, index], seed, f"{name}.down/drop/{e}")


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator for (seed, name) alone, as in `Transformer.initialize`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _normal(like: Tensor, seed: int, name: str) -> Tensor:
    """N(0, 1) of the shape, dtype and device of `like`; the numbers depend on (seed, name) alone."""
    return torch.empty(like.shape).normal_(generator=_generator(seed, name)).to(like)


def _weight_sum(router: RouterConfig, moe: MoEConfig) -> float:
    """What a token's weights sum to: router.scale where they are renormalised, and of a hash; for raw scores what it is
    at logits of 0, on average over tokens (scale · E for relu, all of whose experts are taken at the same logit)."""
    always, about = weight_sum(router), facts(router)
    if always is not None:
        return always
    if router.gradient == "sparsemixer":
        return router.scale * sum(1 / (moe.n_experts - taken) for taken in range(moe.k))
    n_taken = moe.n_experts if about.choices in ("k_max", "all") else moe.k  # by score alone: all, where they are equal
    match about.score:
        case "softmax":
            return router.scale * n_taken / moe.n_experts
        case "sigmoid":
            return router.scale * n_taken / 2
        case "sqrt_softplus":
            return router.scale * n_taken * math.log(2) ** 0.5
    return router.scale * (n_taken if about.score == "relu" else 1)


def _slices(dense: ModelConfig, moe: MoEConfig, router: RouterConfig) -> int:
    """R, the slices that method=split cuts an MLP into. Raises `BadInput` unless whole groups of R are chosen."""
    about = facts(router)
    by_score = about.scored and about.choices == "k" and about.decides == "token"
    if not by_score or router.gradient == "sparsemixer":
        raise BadInput(
            f"method=split needs a router that takes the best K by score: router.name={router.name} with "
            f"router.gradient={router.gradient} would take parts of an MLP."
        )
    if dense.d_ff % moe.d_expert:
        raise BadInput(f"model.moe.d_expert={moe.d_expert} must divide the dense model's d_ff={dense.d_ff} evenly.")
    n_slices = dense.d_ff // moe.d_expert
    if moe.n_experts // router.groups % n_slices or moe.k % n_slices:
        raise BadInput(
            f"method=split cuts each MLP into {n_slices} slices: model.moe.n_experts={moe.n_experts} (in each of "
            f"router.groups={router.groups}) and model.moe.k={moe.k} must be multiples of that."
        )
    return n_slices


# Checks


def _shapes(cfg: ModelConfig, router: RouterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model_tensors(Transformer(cfg, router)).items()}


def _check_shapes(tensors: Tensors, cfg: ModelConfig, router: RouterConfig) -> None:
    if cfg.expert_bias or router.bias or cfg.activation == "swiglu_clipped":
        raise BadInput("model.expert_bias, router.bias and model.activation=swiglu_clipped are not converted.")
    expected = _shapes(cfg, router)
    held = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in [*expected, *held]:
        if expected.get(name) != held.get(name):
            raise BadInput(
                f"the checkpoint does not hold the weights of its config: {name} is "
                f"{held.get(name, 'missing')} and should be {expected.get(name, 'absent')}."
            )


def _check_dense(tensors: Tensors, dense: ModelConfig) -> None:
    if dense.moe is not None:
        raise BadInput("the source must be a dense model, and it has model.moe.")
    if dense.bias:
        raise BadInput("model.bias=true: experts have no biases, so those of the dense MLPs have nowhere to go.")
    _check_shapes(tensors, dense, RouterConfig())


def _check_target(dense: ModelConfig, target: ModelConfig, router: RouterConfig) -> None:
    """Whether an MoE `target` is the dense model but for its MoE layers' MLPs."""
    _check_router(router)
    if target.moe is None:
        raise BadInput("the target must be an MoE: set model.moe.")
    _check_body(dense, target)
    if target.moe.depth < 1:
        raise BadInput(f"model.moe.depth={target.moe.depth}: where tokens pass a block by, it gives them nothing.")
    if target.moe.n_shared:
        raise BadInput(f"model.moe.n_shared={target.moe.n_shared}: a shared expert would add to what the MLP gives.")
    _check_plain(target.moe)


def _check_router(router: RouterConfig) -> None:
    """Refuse a router of whose weights nobody knows what they sum to."""
    about = facts(router)
    as_it_likes = about.choices in ("k_max", "all") and weight_sum(router) is None
    if as_it_likes or about.choices == "mixture":
        tail = " with router.renormalize=false" if "renormalize" in about.reads else ""
        raise BadInput(
            f"router.name={router.name}{tail}: what a token's weights will sum to is not known, and so not how to "
            "scale the MLP; choose another router."
        )


def _check_plain(moe: MoEConfig) -> None:
    for key in ("widths", "n_null", "n_copy", "n_constant", "weigh_input"):
        if getattr(moe, key):
            raise BadInput(f"model.moe.{key}={getattr(moe, key)}: only plain experts of one width are converted.")


def _check_body(source: ModelConfig, target: ModelConfig) -> None:
    for key in (field.name for field in dataclasses.fields(ModelConfig)):
        before, after = getattr(source, key), getattr(target, key)
        if key not in ("name", "moe", "init_std") and before != after:
            raise BadInput(
                f"model.{key}={after} of the target differs from the source's {before}: it must be the same."
            )


def _check_pair(tensors: Tensors, source: ModelConfig, target: ModelConfig, router: RouterConfig) -> None:
    """Whether two MoEs differ in the numbers of experts alone."""
    if source.moe is None or target.moe is None:
        raise BadInput("the source and the target must both have model.moe.")
    if not facts(router).scored:
        raise BadInput(f"router.name={router.name} has no row per expert that could be kept or copied.")
    _check_body(source, target)
    _check_plain(source.moe)
    for key in (field.name for field in dataclasses.fields(MoEConfig)):
        before, after = getattr(source.moe, key), getattr(target.moe, key)
        if key not in ("n_experts", "k", "n_experts_by_layer", "k_by_layer") and before != after:
            raise BadInput(f"model.moe.{key}={after} of the target differs from the source's {before}.")
    _check_shapes(tensors, source, router)


def _in_moe(name: str, layers: Sequence[int]) -> bool:
    """Whether a tensor belongs to the MLP of one of these layers."""
    parts = name.split(".")
    return parts[0] == "blocks" and int(parts[1]) in layers and parts[2] == "mlp"
