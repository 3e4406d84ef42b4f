"""Every op of an MoE layer in plain torch, in any dtype up to float64: the definition of correct.

Written to be obvious, not quick; the fast paths are tested against this file. Letters as in `moe/__init__.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gate(
    logits_TE: Tensor, k: int, score: str, bias_E: Tensor | None, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The K experts of every token and their weights: (T, E) -> expert (T, K) int64, weight (T, K), score (T, E).

    score: "softmax" (over the experts) or "sigmoid" (each expert on its own). `bias_E` takes part in the choice and not
    in the weight (loss-free balancing, Wang et al. 2408.15664). With `renormalize` a token's weights sum to `scale`.
    Ties go to the lower expert index. A row with a NaN or an infinite logit has undefined experts: check before."""
    if score == "softmax":
        score_TE = logits_TE.softmax(-1)
    elif score == "sigmoid":
        score_TE = logits_TE.sigmoid()
    else:
        raise ValueError(f"score={score!r} is not one of softmax, sigmoid")
    choice_TE = score_TE.detach() if bias_E is None else score_TE.detach() + bias_E
    expert_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weight_TK = score_TE.gather(-1, expert_TK)
    if renormalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(weight_TK.dtype).tiny)
    return expert_TK, weight_TK * scale, score_TE


def plan(expert_N: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the routed rows by expert, stably: (N,) -> order (N,), slot (N,), offset (E + 1,), all int64.

    order_N[s] is the row in slot s and slot_N[r] the slot of row r; expert e owns the slots offset_E1[e] to
    offset_E1[e + 1]. Rows with expert -1 (no expert) lie behind the last expert's."""
    key_N = torch.where(expert_N < 0, n_experts, expert_N)
    order_N = torch.argsort(key_N, stable=True)
    slot_N = torch.empty_like(order_N)
    slot_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    offset_E1 = torch.searchsorted(key_N[order_N], torch.arange(n_experts + 1, device=order_N.device))
    return order_N, slot_N, offset_E1


def activate(z_NF: Tensor, activation: str) -> Tensor:
    """An MLP's nonlinearity on its pre-activation. swiglu (Shazeer 2002.05202): (N, 2F) -> (N, F), gate columns first;
    gelu (exact), gelu_tanh (GPT-2's approximation), relu2 (squared ReLU, 2109.08668): (N, F) -> (N, F)."""
    match activation:
        case "swiglu":
            gate_NF, up_NF = z_NF.chunk(2, dim=-1)
            return F.silu(gate_NF) * up_NF
        case "gelu":
            return F.gelu(z_NF)
        case "gelu_tanh":
            return F.gelu(z_NF, approximate="tanh")
        case "relu2":
            return F.relu(z_NF).square()
    raise ValueError(f"activation={activation!r} is not one of swiglu, gelu, gelu_tanh, relu2")


def experts(
    x_TD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    activation: str,
) -> Tensor:
    """The weighted sum over every token's rows of its experts' MLPs: (T, D) -> (T, D).

    Row n sends token token_N[n] to expert expert_N[n] (-1: to none) with weight weight_N[n]. For swiglu the F of
    w_up_EFD counts gate and up channels (2F), gate first."""
    out_TD = torch.zeros_like(x_TD)
    for e in range(len(w_up_EFD)):
        row = torch.nonzero(expert_N == e).squeeze(-1)
        h = activate(x_TD[token_N[row]] @ w_up_EFD[e].T, activation)
        y = (h @ w_down_EDF[e].T) * weight_N[row, None].to(h.dtype)
        out_TD = out_TD.index_add(0, token_N[row], y.to(out_TD.dtype))  # under autocast y is narrower
    return out_TD
