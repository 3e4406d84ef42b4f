"""Whether experts do the same: what they give for the same tokens, whoever was routed where, and their weights.

Everything is of the real experts of one MoE layer; null, copy and constant ones have no weights. T tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe.analysis.interventions import Window
from moe.config.model import moe_layers
from moe.errors import BadInput
from moe.model import dispatch
from moe.model.experts import Experts, MixedExperts
from moe.model.layer import MoELayer
from moe.model.transformer import Transformer
from moe.routing.contract import Routing


@dataclass(frozen=True)
class Redundancy:
    """How alike the experts of one layer are, (E, E) each, 1 on the diagonal."""

    layer: int  # among all layers
    tokens: int
    cosine_EE: np.ndarray  # `output_cosine`: would the other's output do
    cka_EE: np.ndarray  # `linear_cka`: do both tell the same tokens apart
    weights_EE: np.ndarray  # `weight_cosine`: a control
    chance_cosine: float  # the mean over pairs, one expert reading the tokens in another order
    chance_cka: float

    @property
    def twin_E(self) -> np.ndarray:
        """The expert whose output is nearest to each one's, by cosine; -1 where there is no other."""
        other_EE = self.cosine_EE - 3 * np.eye(len(self.cosine_EE))
        return other_EE.argmax(1) if len(other_EE) > 1 else np.full(len(other_EE), -1)


@torch.inference_mode()
def redundancy(model: Transformer, windows: Sequence[Window], most: int = 1024) -> list[Redundancy]:
    """Of every MoE layer how alike its experts are, on the states (T, D) that enter it, of at most `most` tokens spread
    evenly over the text. All experts read all of them. CKA costs E² · T · D · min(T, D). Raises `BadInput` for a dense
    model."""
    if model.cfg.moe is None:
        raise BadInput("the model is dense: it has no experts that could be alike.")
    told, states = [], layer_states(model, windows)
    for number, state_TD in zip(moe_layers(model.cfg), states, strict=True):
        layer: MoELayer = model.blocks[number].mlp  # type: ignore[assignment]
        row = torch.linspace(0, len(state_TD) - 1, min(most, len(state_TD))).round().long()
        y_ETD = outputs(layer, state_TD[row.to(state_TD.device)])
        # What is alike by chance: all experts but the one that is compared read the tokens in another order.
        shuffled = torch.randperm(len(row), generator=torch.Generator().manual_seed(number)).to(y_ETD.device)
        off_EE = ~torch.eye(len(y_ETD), dtype=torch.bool)
        chance = [compare(y_ETD, y_ETD[:, shuffled])[off_EE].mean().item() for compare in (output_cosine, linear_cka)]
        cosine_EE, cka_EE = output_cosine(y_ETD, y_ETD).numpy(), linear_cka(y_ETD, y_ETD).numpy()
        told.append(Redundancy(number, len(row), cosine_EE, cka_EE, weight_cosine(layer).numpy(), *chance))
    return told


def layer_states(model: Transformer, windows: Iterable[Window]) -> list[Tensor]:
    """The states that enter every MoE layer, after its norm: (T, D) each, of the tokens that enter its block."""
    layers: list[MoELayer] = [model.blocks[number].mlp for number in moe_layers(model.cfg)]  # type: ignore[misc]
    device = next(model.parameters()).device
    states: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda module, given, kept=kept: kept.append(given[0].flatten(0, 1)))
        for layer, kept in zip(layers, states, strict=True)
    ]
    try:
        for read_BS1, *_ in windows:
            model(torch.from_numpy(read_BS1[:, :-1]).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept) for kept in states]


def outputs(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """What every real expert gives for every token: (T, D) -> (E, T, D)."""
    one_T1 = torch.ones(len(x_TD), 1, dtype=x_TD.dtype, device=x_TD.device)
    routing = lambda e: Routing(torch.full_like(one_T1, e, dtype=torch.int64), one_T1, None)
    return torch.stack([dispatch.apply(layer.experts, x_TD, routing(e), "torch")[0] for e in range(layer.n_experts)])


def output_cosine(y_ETD: Tensor, other_ETD: Tensor) -> Tensor:
    """mean_t cos(y_i(t), y_j(t)) of all pairs: (E, T, D) twice -> (E, E) float64. 1: the one gives what the other does,
    up to a positive factor. About 0 for experts that have nothing to do with each other, if they have no mean."""
    unit_ETD, other_ETD = (torch.nn.functional.normalize(y.double(), dim=-1) for y in (y_ETD, other_ETD))
    return torch.einsum("itd,jtd->ij", unit_ETD, other_ETD).cpu() / y_ETD.shape[1]


def linear_cka(y_ETD: Tensor, other_ETD: Tensor) -> Tensor:
    """|Y_i^T Y_j|² / (|Y_i^T Y_i| · |Y_j^T Y_j|), outputs centred over tokens, of all pairs: (E, T, D) twice ->
    (E, E) float64 (Kornblith et al. 1905.00414). 1: the same up to a rotation, a shift and a factor. Chance is above 0,
    the more so the fewer tokens there are for D."""
    y_ETD, other_ETD = (y.double() - y.double().mean(1, keepdim=True) for y in (y_ETD, other_ETD))
    (_, t, d), tiny = y_ETD.shape, torch.finfo(torch.float64).tiny
    if d <= t:
        cross = lambda y, z: torch.stack([(y_TD.T @ z).square().sum((-2, -1)) for y_TD in y])
        square = lambda y: (y.transpose(1, 2) @ y).square().sum((-2, -1))
    else:  # the same by Gram matrices (T, T)
        gram = lambda y: (y @ y.transpose(1, 2)).flatten(1)
        cross, square = lambda y, z: gram(y) @ gram(z).T, lambda y: gram(y).square().sum(-1)
    norm_EE = (square(y_ETD)[:, None] * square(other_ETD)[None]).sqrt()
    return (cross(y_ETD, other_ETD) / norm_EE.clamp_min(tiny)).cpu()


def weight_cosine(layer: MoELayer) -> Tensor:
    """The cosine of all weights of two experts, (E, E) float64; NaN for different widths. It is near 1 for experts that
    were copied from one another, and says nothing where it is near 0: the same function may have its hidden units in
    another order."""
    n = layer.n_experts
    cosine_EE = torch.full((n, n), torch.nan, dtype=torch.float64)
    stacks: list[tuple[Tensor, Experts]] = [(torch.arange(n), layer.experts)]  # type: ignore[list-item]
    if isinstance(layer.experts, MixedExperts):
        of_width_GN = [torch.nonzero(local_E >= 0)[:, 0].cpu() for local_E in layer.experts.local_GE]
        stacks = list(zip(of_width_GN, layer.experts.stacks, strict=True))  # type: ignore[arg-type]
    for expert_N, stack in stacks:
        flat = torch.cat([w.detach().cpu().double().flatten(1) for w in (stack.w_up_EFD, stack.w_down_EDF)], 1)
        unit = torch.nn.functional.normalize(flat, dim=-1)
        cosine_EE[expert_N[:, None], expert_N[None]] = unit @ unit.T
    return cosine_EE
