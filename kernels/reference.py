"""Every op of an MoE layer in plain torch, in any dtype up to float64: the definition of correct.

Written to be obvious, not quick; the fast paths are tested against this file. Letters as in `moe/__init__.py`.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fp8, operands
from kernels.form import Form, form_of

ROUNDS = 16  # of maxima at most: for more experts a token a sort is quicker (on a CPU)
CACHED = 2**18  # logits that rounds of maxima go through at a time


def gate(
    logits_TE: Tensor,
    k: int,
    score: str,
    bias_E: Tensor | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    k_groups: int = 1,
    group_top: int = 2,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The K experts of every token and their weights, and what the balancing losses read:
    (T, E) -> expert (T, K) int64, weight (T, K), log-sum-exp of the logits (T,), probabilities summed over tokens (E,).

    Logits in bfloat16 and float16 are widened: whatever comes out is float32 at least, d(logits) of the logits' dtype.
    score: one of `scores`; a token's probabilities are its scores divided by their sum. `bias_E` takes part in the
    choice and not in the weight (loss-free balancing, Wang et al. 2408.15664). With `renormalize` a token's weights sum
    to `scale`. With groups > 1 a token chooses within its `k_groups` best of that many equal groups of neighbouring
    experts, a group scored by the sum of its `group_top` best experts (DeepSeek-V3, 2412.19437: 2; DeepSeek-V2,
    2405.04434: 1). Ties go to the lower expert index. A row with a NaN has undefined experts: check before. Raises
    `ValueError` for other dtypes and for a choice that cannot be made."""
    operands.choice("dispatch=reference", logits_TE, k, score, bias_E, groups, k_groups)
    logits_TE = logits_TE.to(wide(logits_TE.dtype))
    score_TE = scores(logits_TE, score)
    # Without a bias the logits order the experts as the scores do, and still tell apart scores that round to the same.
    rank_TE = score_TE.detach() + bias_E if bias_E is not None else logits_TE.detach()
    outside_TE = None
    if groups > 1:
        value_TE = rank_TE if bias_E is not None else score_TE.detach()
        n_members = logits_TE.shape[1] // groups
        best = value_TE.unflatten(-1, (groups, n_members)).topk(min(group_top, n_members)).values.sum(-1)
        outside = torch.ones_like(best, dtype=torch.bool).scatter(-1, _largest(best, k_groups), False)
        outside_TE = outside.repeat_interleave(n_members, -1)
    expert_TK = _largest(rank_TE, k, outside_TE)
    weight_TK = score_TE.gather(-1, expert_TK)
    tiny = torch.finfo(logits_TE.dtype).tiny
    if renormalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(tiny)
    prob_TE = score_TE if score == "softmax" else score_TE / score_TE.sum(-1, keepdim=True).clamp_min(tiny)
    return expert_TK, weight_TK * scale, logits_TE.logsumexp(-1), prob_TE.sum(0)


def _largest(rank_TE: Tensor, k: int, outside_TE: Tensor | None = None) -> Tensor:
    """The first k of every row's stable, descending sort: (T, E) -> (T, k) int64. Columns marked in `outside_TE` come
    last."""
    n_experts = rank_TE.shape[1]
    if k > min(ROUNDS, n_experts // 4) or n_experts > 2**15:
        order_TE = rank_TE.sort(dim=-1, descending=True, stable=True).indices
        if outside_TE is not None:
            order_TE = order_TE.gather(-1, outside_TE.gather(-1, order_TE).byte().sort(dim=-1, stable=True).indices)
        return order_TE[:, :k]
    # By parts that stay in a CPU's cache; a compiler fuses the rounds, and a GPU would rather have one large kernel.
    rows = max(CACHED // n_experts, 1)
    if rank_TE.device.type != "cpu" or torch.compiler.is_compiling() or len(rank_TE) <= rows:
        return _rounds(rank_TE, k, outside_TE)
    outside = itertools.repeat(None) if outside_TE is None else outside_TE.split(rows)
    return torch.cat([_rounds(rank, k, out) for rank, out in zip(rank_TE.split(rows), outside, strict=False)])


def _rounds(rank_TE: Tensor, k: int, outside_TE: Tensor | None) -> Tensor:
    """`_largest` by k rounds of maxima.

    argmax and topk leave the order of equals to the device. Here a column's place, counted from the last, says which of
    a row's maxima comes first; taken columns have place 0, so that a row of -inf goes on to those that are left."""
    n_experts = rank_TE.shape[1]
    place_TE = torch.arange(n_experts - 1, -1, -1, dtype=torch.int16, device=rank_TE.device)[None]
    if outside_TE is not None:
        rank_TE, place_TE = rank_TE.masked_fill(outside_TE, -math.inf), place_TE.masked_fill(outside_TE, 0)
    elif k > 1:
        rank_TE, place_TE = rank_TE.clone(), place_TE.repeat(len(rank_TE), 1)
    chosen: list[Tensor] = []
    while True:
        place = ((rank_TE == rank_TE.amax(-1, keepdim=True)) * place_TE).amax(-1, keepdim=True)
        chosen.append(n_experts - 1 - place.long())
        if len(chosen) == k:
            return torch.cat(chosen, -1)
        rank_TE.scatter_(-1, chosen[-1], -math.inf)
        place_TE.scatter_(-1, chosen[-1], 0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for the 16-bit types, any other itself: what scores are computed in."""
    return torch.promote_types(dtype, torch.float32)


FAR = -40.0  # below, ln(1 + e^z) is e^z to the last bit, in float64 too


def scores(logits_TE: Tensor, score: str) -> Tensor:
    """(T, E) -> (T, E): "softmax" over the experts; or of each expert on its own, "sigmoid" (DeepSeek-V3, 2412.19437)
    or "sqrt_softplus", the square root of ln(1 + e^z) (DeepSeek-V4).

    The last has the derivative sigmoid(z) / (2 · score). Far below 0 score and derivative go like e^(z/2) and
    e^(z/2) / 2: both are finite for every z, and 0 where e^(z/2) underflows, not where e^z has."""
    match score:
        case "softmax":
            return logits_TE.softmax(-1)
        case "sigmoid":
            return logits_TE.sigmoid()
        case "sqrt_softplus":  # both branches have finite derivatives, also where the other is taken
            far_TE = (logits_TE.clamp(max=FAR) / 2).exp()
            return torch.where(logits_TE < FAR, far_TE, (-F.logsigmoid(-logits_TE.clamp(min=FAR))).sqrt())
    raise ValueError(f"score={score!r} is not one of {', '.join(operands.SCORES)}")


def plan(expert_N: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the routed rows by expert, stably: (N,) -> order (N,), slot (N,), offset (E + 1,), all int64.

    order_N[s] is the row in slot s and slot_N[r] the slot of row r; expert e owns the slots offset_E1[e] to
    offset_E1[e + 1]. Rows with expert -1 (no expert) lie behind the last expert's."""
    operands.ids("plan", expert_N)
    key_N = torch.where(expert_N < 0, n_experts, expert_N)
    order_N = torch.argsort(key_N, stable=True)
    slot_N = torch.empty_like(order_N)
    slot_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    offset_E1 = torch.searchsorted(key_N[order_N], torch.arange(n_experts + 1, device=order_N.device))
    return order_N, slot_N, offset_E1


def count(expert_N: Tensor, n_experts: int) -> Tensor:
    """Routed rows of every expert: (N,) -> (E,) int64; -1 is no expert."""
    operands.ids("count", expert_N)
    bucket_N = torch.where(expert_N < 0, n_experts, expert_N)  # one more for the rows with no expert
    count_E1 = torch.zeros(n_experts + 1, dtype=torch.int64, device=expert_N.device)
    return count_E1.scatter_add(0, bucket_N, torch.ones_like(bucket_N))[:-1]


def activate(z_NF: Tensor, form: Form | str) -> Tensor:
    """An MLP's nonlinearity on its pre-activation: (N, 2F) -> (N, F) for swiglu, (N, F) -> (N, F) for the others; see
    `Form`. Raises `ValueError` for a form that there is not."""
    form = form_of(form)
    match form.activation:
        case "swiglu":
            gate_NF, up_NF = gates(z_NF, form)
            if form.limit:
                gate_NF, up_NF = gate_NF.clamp(max=form.limit), up_NF.clamp(-form.limit, form.limit)
            share = F.silu(gate_NF) if form.alpha == 1 else gate_NF * torch.sigmoid(form.alpha * gate_NF)
            return share * (up_NF + form.shift if form.shift else up_NF)
        case "gelu":
            return F.gelu(z_NF)
        case "gelu_tanh":
            return F.gelu(z_NF, approximate="tanh")
    assert form.activation == "relu2"
    return F.relu(z_NF).square()


def gates(z: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """The gate and the other columns of a swiglu's z, views: (N, 2F) -> (N, F), (N, F)."""
    return (z[..., ::2], z[..., 1::2]) if form.interleaved else z.chunk(2, dim=-1)  # type: ignore[return-value]


def _rounding(x: Tensor, w: Tensor, form: Form) -> Tensor:
    """What a product x @ w^T gains by the rounding of its operands, a constant to every derivative."""
    if not form.fp8:
        return x.new_zeros(())
    x, w = operands.under_autocast(x.detach(), w.detach())
    rounded_x, rounded_w = fp8.operands(x, w, form)
    return rounded_x @ rounded_w.T - x @ w.T


def experts(
    x_TD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    form: Form | str,
    b_up_EF: Tensor | None = None,
    b_down_ED: Tensor | None = None,
) -> Tensor:
    """The weighted sum over every token's rows of its experts' MLPs: (T, D) -> (T, D).

    Row n sends token token_N[n] to expert expert_N[n] (-1: to none) with weight weight_N[n]. For swiglu the F of
    w_up_EFD and b_up_EF counts gate and up channels (2F). Raises `ValueError` for operands of other types and shapes,
    in a debug build (TRITON_DEBUG=1) for wrong rows too."""
    name, mixed, form = "dispatch=reference", torch.is_autocast_enabled(x_TD.device.type), form_of(form)
    operands.layer(
        name, x_TD, w_up_EFD, w_down_EDF, token_N, expert_N, weight_N, form, b_up_EF, b_down_ED, mixed
    )  # fmt: skip
    expert_N = operands.rows(name, expert_N, token_N, len(x_TD), len(w_up_EFD))
    return forward(x_TD, w_up_EFD, w_down_EDF, token_N, expert_N, weight_N, form, b_up_EF, b_down_ED)


def forward(  # type: ignore[no-untyped-def]
    x_TD: Tensor, w_up_EFD, w_down_EDF, token_N: Tensor, expert_N: Tensor, weight_N: Tensor, form: Form,
    b_up_EF: Tensor | None, b_down_ED: Tensor | None,
) -> Tensor:  # fmt: skip
    """`experts` of operands that fit; a stack of matrices may be what gives one when it is asked for it."""
    out_TD = torch.zeros_like(x_TD)
    for e in range(len(w_up_EFD)):
        row = torch.nonzero(expert_N == e).squeeze(-1)
        x, w = x_TD[token_N[row]], weight_N[row, None]
        z = x @ w_up_EFD[e].T + _rounding(x, w_up_EFD[e], form)
        z = z * w.to(z.dtype) if form.weigh_input else z
        h = activate(z if b_up_EF is None else z + b_up_EF[e].to(z.dtype), form)
        y = h @ w_down_EDF[e].T
        y = y if b_down_ED is None else y + b_down_ED[e].to(y.dtype)
        factor = torch.ones_like(w) if form.weigh_input else w
        y = y * factor.to(y.dtype) + _rounding(h, w_down_EDF[e], form) * factor.detach().to(y.dtype)
        out_TD = out_TD.index_add(0, token_N[row], y.to(out_TD.dtype))  # under autocast y is narrower
    return out_TD
