"""MLPs: the dense one, which also serves as the shared expert, and the stacked weights of routed experts.

Letters beyond the glossary: G widths that experts have, with a stack of weights for each · Z cheap experts.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from kernels.form import NAMED, Form
from kernels.reference import activate
from moe.config.model import ModelConfig, MoEConfig
from moe.parallel.gradients import local, whole
from moe.routing.contract import UNUSED, Routing


class MLP(nn.Module):
    """down(act(up(x))): (..., D) -> (..., D). For swiglu, `up` holds the gate's rows, then the up projection's."""

    def __init__(self, cfg: ModelConfig, width: int) -> None:
        super().__init__()
        self.form = form(cfg)
        self.up = nn.Linear(cfg.d_model, up_width(cfg, width), bias=cfg.bias)
        self.down = nn.Linear(width, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activate(self.up(x), self.form))


class ExpertWeights(NamedTuple):
    """What computes routed experts, and nothing else."""

    w_up_EFD: Tensor
    w_down_EDF: Tensor
    up_bias_EF: Tensor | None
    down_bias_ED: Tensor | None
    form: Form

    def here(self) -> "ExpertWeights":
        """Those of this rank's experts, where ranks share them out."""
        up_bias_EF, down_bias_ED = (None if b is None else local(b) for b in (self.up_bias_EF, self.down_bias_ED))
        return ExpertWeights(local(self.w_up_EFD), local(self.w_down_EDF), up_bias_EF, down_bias_ED, self.form)


class Experts(nn.Module):
    """The weights of E routed experts, with biases where `model.expert_bias` says so; `dispatch.apply` applies them.
    `chosen`: the ones that are trained, where not all are (adapt.py). `exchange`: where ranks share the experts out,
    what sends rows to them and back (moe/parallel/exchange.py); weights are DTensors then."""

    chosen: list[int] | None = None
    exchange: Callable[..., Tensor] | None = None

    def __init__(self, cfg: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.form = form(cfg)._replace(weigh_input=moe.weigh_input, fp8="all" if moe.precision == "fp8" else "")
        self.w_up_EFD = nn.Parameter(torch.empty(moe.n_experts, up_width(cfg, moe.d_expert), cfg.d_model))
        self.w_down_EDF = nn.Parameter(torch.empty(moe.n_experts, cfg.d_model, moe.d_expert))
        self.up_bias_EF: nn.Parameter | None = None
        self.down_bias_ED: nn.Parameter | None = None
        if cfg.expert_bias:
            self.up_bias_EF = nn.Parameter(torch.empty(self.w_up_EFD.shape[:2]))
            self.down_bias_ED = nn.Parameter(torch.empty(self.w_down_EDF.shape[:2]))

    def weights(self) -> ExpertWeights:
        """The weights as they are at this moment."""
        return ExpertWeights(self.w_up_EFD, self.w_down_EDF, self.up_bias_EF, self.down_bias_ED, self.form)

    def gradient_norms(self) -> Tensor:
        """The norm of every expert's gradients, (E,) in float32 at least; 0 for those without any."""
        w_up_EFD = self.w_up_EFD
        dtype = torch.promote_types(w_up_EFD.dtype, torch.float32)
        squares_E = torch.zeros(len(w_up_EFD), dtype=dtype, device=w_up_EFD.device)
        for w in self.parameters():
            if w.grad is not None:
                squares = torch.linalg.vector_norm(whole(w.grad).flatten(1), dim=1, dtype=dtype).square()
                squares_E[slice(None) if self.chosen is None else self.chosen] += squares
        return squares_E.sqrt()


class MixedExperts(nn.Module):
    """Routed experts of several hidden widths (HMoE, 2408.10681): one stack of weights for each width, narrowest first.
    Expert e is number `local_GE[g, e]` of stack g, or `UNUSED` where it is of another width."""

    local_GE: Tensor

    def __init__(self, cfg: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        widths = torch.tensor(moe.widths, device="cpu")
        stacks, local = [], []
        for width in widths.unique().tolist():
            of_width_E = widths == width
            stack = dataclasses.replace(moe, n_experts=int(of_width_E.sum()), d_expert=width, widths=[])
            stacks.append(Experts(cfg, stack))
            local.append(torch.where(of_width_E, of_width_E.cumsum(0) - 1, UNUSED))
        self.stacks = nn.ModuleList(stacks)
        self.register_buffer("local_GE", torch.stack(local), persistent=False)

    def gradient_norms(self) -> Tensor:
        """As of `Experts`, in the experts' own order."""
        by_stack = [stack.gradient_norms() for stack in self.stacks]  # type: ignore[operator]
        norm_E = by_stack[0].new_zeros(self.local_GE.shape[1])
        for local_E, norms in zip(self.local_GE, by_stack, strict=True):
            norm_E[local_E >= 0] = norms[local_E[local_E >= 0]]
        return norm_E


class CheapExperts(nn.Module):
    """Experts that cost next to nothing, numbered behind the E real ones (MoE++, 2410.07348): null gives 0, copy gives
    x, constant gives a_1 x + a_2 v with v learned and (a_1, a_2) = softmax(W x). Z = null + copy + constant."""

    def __init__(self, cfg: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.first, self.n_null, self.n_copy, self.n_constant = moe.n_experts, moe.n_null, moe.n_copy, moe.n_constant
        if moe.n_constant:
            self.v_ZD = nn.Parameter(torch.empty(moe.n_constant, cfg.d_model))
            self.mix = nn.Linear(cfg.d_model, 2 * moe.n_constant, bias=False)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """What the routed rows of these experts add up to: (T, D) -> (T, D)."""
        token_N, expert_N, weight_N = routing.rows()
        n = self.n_null + self.n_copy + self.n_constant
        cheap_N = expert_N >= self.first
        flat_N = token_N * n + torch.where(cheap_N, expert_N - self.first, 0)
        weight_TZ = weight_N.new_zeros(len(x_TD) * n).scatter_add(0, flat_N, torch.where(cheap_N, weight_N, 0.0))
        _, copy_TZ, constant_TZ = weight_TZ.view(-1, n).split([self.n_null, self.n_copy, self.n_constant], -1)
        y_TD = copy_TZ.sum(-1, keepdim=True) * x_TD
        if self.n_constant:
            mix_TZ2 = rearrange(self.mix(x_TD), "t (z two) -> t z two", two=2).to(weight_N.dtype).softmax(-1)
            state_TZ, vector_TZ = (mix_TZ2 * constant_TZ[..., None]).unbind(-1)
            y_TD = y_TD + state_TZ.sum(-1, keepdim=True) * x_TD + vector_TZ.to(self.v_ZD.dtype) @ self.v_ZD
        return y_TD.to(x_TD.dtype)


def form(cfg: ModelConfig) -> Form:
    """What an MLP of this model computes."""
    if cfg.activation == "swiglu_clipped":
        return NAMED[cfg.activation]._replace(alpha=cfg.swiglu_alpha, limit=cfg.swiglu_limit)
    return Form(cfg.activation)


def up_width(cfg: ModelConfig, width: int) -> int:
    """Rows of the up projection: swiglu has a gate beside it."""
    return form(cfg).width(width)
