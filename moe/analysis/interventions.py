"""Another routing than the router's, while a model runs: experts masked, dropped, swapped, forced.

    with intervene(model, [Change("mask", 2, [5])]):
        output = model(tokens_BS)

What happens to the weights is said at `KINDS`. Earlier layers do not see a change: `remember` and `resume` run only the
blocks from the first changed one on. To take recorded experts instead, give a model's forward pass `recorded`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moe.config.model import moe_layers
from moe.config.router import facts
from moe.errors import BadInput
from moe.model.layer import LayerInput, LayerRouting, MoELayer
from moe.model.transformer import Transformer
from moe.routing.contract import DROPPED, UNUSED, Router, Routing

# mask   no token can choose these experts: the router sees a logit of -inf (and, where it has a selection bias, a bias
#        of -inf) and decides as always. Top-K routers take the next best; weights are normalised over the experts
#        that are left, as the router's rule has it. Where fewer than K are left, a token takes those. Numbers that the
#        rule counts stay: threshold / E, and the tokens that an expert of expert-choice takes
# drop   their rows are lost, as they are to a capacity: nothing takes their place, and no weight changes
# swap   of two experts each takes the other's rows with their weights; four experts are two such pairs
# force  every token takes these experts and no others. Its weights are its probabilities of them (even ones without
#        scores), times what makes their sum that of its own weights
# Default vectors (router.gradient=default-vector) follow a mask and nothing else.
KINDS = ("mask", "drop", "swap", "force")

# A batch of text as `moe.analysis.windows.Windows` gives it: tokens (n, S + 1), and domain, document, position (n, S)
Window = tuple[np.ndarray, ...]
Block = tuple[Tensor, LayerRouting | None]  # what one gives: states (B, S, D), and what its router did


class Change(NamedTuple):
    """What is done to some experts of one layer."""

    kind: str  # one of KINDS
    layer: int  # among all layers, from 0
    experts: list[int]


@contextmanager
def intervene(model: Transformer, changes: Sequence[Change]) -> Iterator[None]:
    """The model routes with these changes while inside; of one layer the first comes first, but a mask, which the
    router itself obeys, before all. Raises `BadInput` as `check` does."""
    check(model, changes)
    with ExitStack() as stack:
        for change in reversed(changes):  # the last to be set is the next to the router
            layer: MoELayer = model.blocks[change.layer].mlp  # type: ignore[assignment]
            stack.enter_context(replaced(layer, forward=partial(_run_layer, layer, layer.forward, change)))
        yield


def check(model: Transformer, changes: Sequence[Change]) -> None:
    """Raise `BadInput` for a model without experts, or with a soft router; for layers and experts that there are not;
    and for a mask where no expert is left, or the router has no scores."""
    if model.cfg.moe is None:
        raise BadInput("the model is dense: it has no experts to change.")
    if facts(model.router).choices == "mixture":
        raise BadInput("the router is soft: every token goes to every expert, and no choice can be changed.")
    layers, routers = moe_layers(model.cfg), model.routers()
    for change in changes:
        kind, number, experts = change
        if number not in layers:
            raise BadInput(f"{kind}: layer {number} has no experts; MoE layers are {_listed(layers)}.")
        layer: MoELayer = model.blocks[number].mlp  # type: ignore[assignment]
        _check_experts(change, layer.n_with_cheap)
        if layer.balance.force != "none":
            raise BadInput(f"{kind}: balance.force={layer.balance.force} decides where tokens go, whatever is changed.")
        if kind == "mask":
            _check_mask(routers[layers.index(number)], experts, f"{kind}: layer {number}")


def _check_experts(change: Change, n_experts: int) -> None:
    kind, layer, experts = change
    if kind not in KINDS:
        raise BadInput(f"{kind} is not one of {', '.join(KINDS)}.")
    for expert in experts:
        if not 0 <= expert < n_experts:
            raise BadInput(f"{kind}: layer {layer} has no expert {expert}: accepted is 0 to {n_experts - 1}.")
    if not experts or len(set(experts)) < len(experts) or (kind == "swap" and len(experts) % 2):
        wanted = "pairs of different experts" if kind == "swap" else "different experts"
        raise BadInput(f"{kind}: layer {layer} has {_listed(experts) or 'none'}, and accepted are {wanted}.")


def _check_mask(router: Router, experts: list[int], where: str) -> None:
    left = router.n_experts - len(experts)
    if not left:
        raise BadInput(f"{where} has no expert left: a mask has to leave one.")
    if not hasattr(router, "logits"):
        raise BadInput(f"{where} has a router without logits, and so without a next best expert: use drop instead.")
    if router.cfg.gradient == "sparsemixer" and left < router.k:
        raise BadInput(f"{where} has {left} experts left, and router.gradient=sparsemixer takes {router.k}.")


@contextmanager
def replaced(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """A module has these attributes (in place of methods, too) while inside, and afterwards what it had."""
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(module)[name]
        vars(module).update(before)


def _run_layer(
    layer: MoELayer,
    run: Callable[..., tuple[Tensor, LayerRouting]],
    change: Change,
    x_BSD: Tensor,
    backend: str,
    layer_input: LayerInput = LayerInput(),  # noqa: B008 — immutable
) -> tuple[Tensor, LayerRouting]:
    """`MoELayer.forward` with one change: of its own router, or of the one that layers share in this call alone."""
    router = layer_input.router or layer.router
    assert router is not None, "a layer without a router of its own must be handed one"
    decide: Callable[..., Routing] = router.forward  # type: ignore[assignment]
    attributes: dict[str, Callable[..., Any]] = {}
    if change.kind == "mask":
        attributes = _masked(router, change.experts)
    with replaced(router, forward=lambda x_TD, *rest: _rewritten(decide(x_TD, *rest), change, len(x_TD)), **attributes):
        return run(x_BSD, backend, layer_input)


def _masked(router: Any, experts: list[int]) -> dict[str, Callable[..., Any]]:
    """The methods of a router by which these experts have a logit, and a bias if there is one, of -inf."""

    def infinite(x: Tensor) -> Tensor:
        """(..., E) -> (..., E)"""
        return x.index_fill(-1, torch.tensor(experts, device=x.device), -torch.inf)

    logits = router.logits
    methods: dict[str, Callable[..., Any]] = {"logits": lambda x_TD, *ranks: infinite(logits(x_TD, *ranks))}
    if getattr(router, "bias_E", None) is not None:
        gate = router.gate
        methods["gate"] = lambda backend, logits_TE, k, score, bias_E, *rest: gate(
            backend, logits_TE, k, score, infinite(bias_E), *rest
        )
    return methods


def _rewritten(routing: Routing, change: Change, n_tokens: int) -> Routing:
    """A router's decision with one change, as `KINDS` has it."""
    expert, weight = routing.expert, routing.weight
    changed = torch.isin(expert, torch.tensor(change.experts, device=expert.device))
    match change.kind:
        case "mask":  # rows that it still has: there was no other expert, or the choice is not by logits
            return routing._replace(
                expert=torch.where(changed, UNUSED, expert), weight=torch.where(changed, 0.0, weight)
            )
        case "drop":
            return routing._replace(expert=torch.where(changed, DROPPED, expert))
        case "swap":
            new = expert.clone()
            for one, other in zip(change.experts[::2], change.experts[1::2], strict=True):
                new[expert == one], new[expert == other] = other, one
            return routing._replace(expert=new)
    return _forced(routing, change.experts, n_tokens)


def _forced(routing: Routing, experts: list[int], n_tokens: int) -> Routing:
    """Every token at these F experts: (T, F) rows."""
    token_N, expert_N, weight_N = routing.rows()
    mass_T = weight_N.new_zeros(n_tokens).index_add(0, token_N, torch.where(expert_N < 0, 0.0, weight_N))
    expert_F = torch.tensor(experts, device=expert_N.device)
    even_TF = weight_N.new_full((n_tokens, len(experts)), 1 / len(experts))
    share_TF = even_TF
    if routing.logits_TE is not None:
        prob_TF = routing.prob_TE()[:, expert_F].to(weight_N.dtype)
        total_T1 = prob_TF.sum(-1, keepdim=True)
        share_TF = torch.where(total_T1 > torch.finfo(prob_TF.dtype).tiny, prob_TF / total_T1, even_TF)
    return routing._replace(
        expert=expert_F.expand(n_tokens, -1).contiguous(), weight=mass_T[:, None] * share_TF, token_N=None
    )


@contextmanager
def remember(model: Transformer) -> Iterator[list[Block]]:
    """What every block of the next forward pass gives, for `resume`."""
    blocks: list[Block] = []
    hooks = [
        block.register_forward_hook(lambda block, arguments, result: blocks.append(result)) for block in model.blocks
    ]
    try:
        yield blocks
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def resume(model: Transformer, blocks: Sequence[Block], layer: int) -> Iterator[None]:
    """A forward pass over the same tokens takes what the blocks below `layer` gave as remembered, and runs the others:
    the same output to the last bit, in less time."""
    with ExitStack() as stack:
        for block, result in zip(model.blocks[:layer], blocks, strict=False):
            stack.enter_context(replaced(block, forward=lambda *arguments, result=result: result))
        yield


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
