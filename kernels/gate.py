"""Router logits to the chosen experts: scores, top-k and what the balancing losses read, in one pass each way.

A program holds a block of tokens' rows of logits in registers, all experts wide, in float32 at least: scores, the
selection bias, group-limited choice, K rounds of argmax on integer keys (any K, every id in range and distinct whatever
the logits), weights, log-sum-exp, and the block's column sums of probabilities. Rounds are a loop of the program, so
that its size does not depend on K. Backward recomputes the scores and writes d(logits) from all three gradients at
once. Meaning as in `reference.gate`.
"""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import operands, reference

NAME = "dispatch=triton"
CELLS = 2048  # logits that one program holds: 8 to a thread, or the rounds of argmax spill
WARPS = 8
# Choices that backward reads at a time: their loads do not wait for each other. Forward's rounds do, and are never
# unrolled: nothing of one can begin before the last has ended.
AT_ONCE = tl.constexpr(8)


@triton.jit
def _load(logits, t, n_tokens, E: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, MEMBERS: tl.constexpr):
    """Logits of tokens t, widened, laid out as WIDE groups of MEMBERS experts, both padded to powers of two; -> also
    expert ids and which columns are experts."""
    column = tl.arange(0, WIDE * MEMBERS)
    PER_GROUP: tl.constexpr = E // GROUPS
    e = column // MEMBERS * PER_GROUP + column % MEMBERS
    real = (column // MEMBERS < GROUPS) & (column % MEMBERS < PER_GROUP)
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    value = tl.load(logits + at, mask=(t < n_tokens)[:, None] & real[None, :], other=0.0)
    if value.dtype != tl.float64:
        value = value.to(tl.float32)
    return value, tl.where(real, e, E), real


@triton.jit
def _alone(value, SCORE: tl.constexpr):
    """(score, its derivative) of every expert on its own, as `reference.scores` has them."""
    if SCORE == "sigmoid":
        score = 1 / (1 + tl.exp(-value))
        return score, score * (1 - score)
    else:
        tl.static_assert(SCORE == "sqrt_softplus")
        # With u = e^-|z|, softplus(z) is ln(1 + u), for z > 0 plus z. ln(1 + u) / u keeps its digits for a small u if
        # the divisor is what was added; and for z < 0 the root of u is taken first, as it underflows later.
        root_u = tl.exp(-tl.abs(value) / 2)
        u = root_u * root_u
        above = 1 + u
        ratio = tl.where(above == 1, 1.0, tl.log(above) / tl.where(above == 1, 1.0, above - 1))
        root = tl.sqrt(tl.where(value > 0, value + u * ratio, ratio))
        outside = tl.where(value > 0, 1.0, root_u)
        return outside * root, outside / (2 * above * root)


@triton.jit
def _score(value, real, SCORE: tl.constexpr, TINY: tl.constexpr):
    """(score, its derivative, probability, log-sum-exp, its slope): scores as chosen by, probabilities that sum to 1
    per token. A softmax has no derivative of one expert on its own: 1 stands in.

    Of a row whose largest logit is infinite the softmax is NaN and the log-sum-exp that infinity, as torch has them; a
    sigmoid is 1 or 0 there, as anywhere, and the log-sum-exp's slope NaN at the infinite logit alone."""
    low = tl.where(real[None, :], value, float("-inf"))
    top = tl.max(low, 1)
    infinite = tl.abs(top) == float("inf")
    power = tl.exp(low - top[:, None])
    total = tl.sum(power, 1)
    softmax = power / total[:, None]
    lse = tl.where(infinite, top, top + tl.log(total))
    slope = softmax
    if SCORE == "softmax":
        return softmax, 1.0, softmax, lse, slope
    else:
        slope = tl.where(infinite[:, None], power, softmax)
        score, derivative = _alone(value, SCORE)
        score = tl.where(real[None, :], score, 0.0)
        prob = score / tl.maximum(tl.sum(score, 1), TINY)[:, None]
        return score, derivative, prob, lse, slope


@triton.jit
def _key(value, free):
    """Integers in the order of the floats, the smallest integer where not free. No two zeros; one NaN, the largest (the
    one of all ones would be the smallest integer)."""
    value = tl.where(value == 0, 0.0, tl.where(value == value, value, float("nan")))
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
        return tl.where(free, key, -0x7FFFFFFFFFFFFFFF - 1)
    else:
        bits = value.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        return tl.where(free, key, -0x7FFFFFFF - 1)


@triton.jit
def _within_best_groups(
    choice, real, K_GROUPS: tl.constexpr, GROUP_TOP: tl.constexpr, WIDE: tl.constexpr, MEMBERS: tl.constexpr
):
    """Which columns lie in a token's K_GROUPS best groups, a group scored by the sum of its GROUP_TOP best experts."""
    ROWS: tl.constexpr = choice.shape[0]
    left = tl.where(real[None, :], choice, float("-inf")).reshape(ROWS, WIDE, MEMBERS)
    expert = tl.arange(0, MEMBERS)[None, None, :]
    value = tl.zeros((ROWS, WIDE), dtype=choice.dtype)
    for _ in range(GROUP_TOP):
        best, index = tl.max(left, 2, return_indices=True)
        value += best
        left = tl.where(expert == index[:, :, None], float("-inf"), left)
    exists = tl.max(real.to(tl.int32).reshape(WIDE, MEMBERS), 1) > 0
    group = tl.arange(0, WIDE)[None, :]
    kept = tl.zeros((ROWS, WIDE), dtype=tl.int32)
    for _ in range(K_GROUPS):
        index = tl.argmax(_key(value, exists[None, :] & (kept == 0)), 1)
        kept = tl.where(group == index[:, None], 1, kept)
    return tl.broadcast_to(kept[:, :, None], ROWS, WIDE, MEMBERS).reshape(ROWS, WIDE * MEMBERS) > 0


@triton.jit
def _gate(
    logits, bias, expert, weight, lse_out, prob_out, n_tokens,
    E: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, SCALE: tl.constexpr,
    GROUPS: tl.constexpr, K_GROUPS: tl.constexpr, GROUP_TOP: tl.constexpr, WIDE: tl.constexpr, MEMBERS: tl.constexpr,
    ROWS: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """Forward for ROWS tokens. SCALE is a constant because a float argument is a float32, whatever the logits."""
    # Load and score, and store what the balancing losses read; the host adds up the blocks' column sums.
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = t < n_tokens
    value, e, real = _load(logits, t, n_tokens, E, GROUPS, WIDE, MEMBERS)
    score, _, prob, lse, _ = _score(value, real, SCORE, TINY)
    tl.store(lse_out + t, lse, mask=live)
    column_sum = tl.sum(tl.where(live[:, None], prob, 0.0), 0)
    tl.store(prob_out + tl.program_id(0) * E + e, column_sum, mask=real)

    # What the choice goes by: integers, of which the largest that is free wins, and of equals the first.
    choice = value if bias is None else score + tl.load(bias + e, mask=real, other=0.0)[None, :]
    free = tl.broadcast_to(real[None, :], ROWS, WIDE * MEMBERS)
    if GROUPS > 1:
        ranked = score if bias is None else choice  # groups compare sums of scores
        free = free & _within_best_groups(ranked, real, K_GROUPS, GROUP_TOP, WIDE, MEMBERS)
    key = _key(choice, free)

    # K rounds of argmax: the expert that is taken gets a key below all that are free, in which its round stands.
    LOWEST: tl.constexpr = -(2 ** (key.dtype.primitive_bitwidth - 1))
    column, first = tl.arange(0, WIDE * MEMBERS)[None, :], tl.full((1, 1), LOWEST + 1, key.dtype)
    for j in range(K):
        key = tl.where(column == tl.argmax(key, 1)[:, None], first + j, key)
    taken = (key > LOWEST) & (key <= LOWEST + K)

    # The experts and their weights, each where its round says. Adding up pointers in this order spills nothing.
    place = (key & 0x7FFFFFFF) - 1
    row = t.to(tl.int64)[:, None] * K
    tl.store(expert + row + place, e[None, :].to(tl.int64), mask=live[:, None] & taken)
    total = tl.sum(tl.where(taken, score, 0.0), 1)[:, None]
    factor = SCALE / tl.maximum(total, TINY) if RENORMALIZE else SCALE + total * 0
    tl.store(weight + row + place, score * factor, mask=live[:, None] & taken)


@triton.jit
def _gate_backward(
    logits, expert, dweight, dlse, dprob, out, n_tokens,
    E: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, SCALE: tl.constexpr,
    MEMBERS: tl.constexpr, ROWS: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """d(logits) of ROWS tokens from the gradients of weights, log-sum-exp and column sums of probabilities."""
    # Load and score again: forward kept nothing but its choice.
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = t < n_tokens
    value, e, real = _load(logits, t, n_tokens, E, 1, 1, MEMBERS)
    score, derivative, prob, _, slope = _score(value, real, SCORE, TINY)

    # The weights' gradients to the columns that were chosen, and through their scale or their sum to the scores.
    dchosen = tl.zeros((ROWS, MEMBERS), dtype=score.dtype)
    chosen = tl.zeros((ROWS, MEMBERS), dtype=tl.int32)
    STEP: tl.constexpr = tl.cdiv(K, tl.cdiv(K, AT_ONCE))
    for start in range(0, K, STEP):
        for j in tl.static_range(STEP):
            at, there = t.to(tl.int64) * K + start + j, live & (start + j < K)
            winner = e[None, :] == tl.load(expert + at, mask=there, other=-1)[:, None]
            dchosen += tl.where(winner, tl.load(dweight + at, mask=there, other=0.0)[:, None], 0.0)
            chosen += winner.to(tl.int32)
    dscore = dchosen * SCALE
    if RENORMALIZE:
        total = tl.sum(tl.where(chosen > 0, score, 0.0), 1)[:, None]
        inner = tl.sum(dscore * score, 1)[:, None] / tl.maximum(total, TINY)
        inner = tl.where(total > TINY, inner, 0.0)  # below, the divisor is a constant
        dscore = tl.where(chosen > 0, dscore - inner, 0.0) / tl.maximum(total, TINY)

    # The probabilities' gradients join them; then through the score, and the log-sum-exp's, to the logits.
    dp = tl.load(dprob + e, mask=real, other=0.0)[None, :]
    if SCORE == "softmax":
        dscore += dp
        dlogits = score * (dscore - tl.sum(dscore * score, 1)[:, None])
    else:
        sum_score = tl.sum(score, 1)[:, None]
        inner = tl.where(sum_score > TINY, tl.sum(dp * prob, 1)[:, None], 0.0)
        dscore += (dp - inner) / tl.maximum(sum_score, TINY)
        dlogits = dscore * derivative
    dlse_T1 = tl.load(dlse + t, mask=live, other=0.0)[:, None]
    if SCORE != "softmax":  # a slope of NaN has no say where nobody reads the log-sum-exp
        slope = tl.where(dlse_T1 == 0, 0.0, slope)
    dlogits += dlse_T1 * slope
    tl.store(out + t.to(tl.int64)[:, None] * E + e[None, :], dlogits, mask=live[:, None] & real[None, :])


def _shape(n_experts: int, groups: int) -> tuple[int, int, int]:
    """Groups, experts of a group, and tokens of a program, in powers of two."""
    wide, members = triton.next_power_of_2(groups), triton.next_power_of_2(n_experts // groups)
    return wide, members, max(1, min(32, CELLS // (wide * members)))


@torch.library.custom_op("switchyard::gate", mutates_args=())
def _forward(
    logits_TE: Tensor, k: int, score: str, bias_E: Tensor | None, renormalize: bool, scale: float, groups: int,
    k_groups: int, group_top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n_experts = logits_TE.shape[1]
    wide, members, rows = _shape(n_experts, groups)
    blocks = triton.cdiv(len(logits_TE), rows)
    expert, weight, lse, prob = _empty(logits_TE, k, (blocks, n_experts))
    if not blocks:
        return expert, weight, lse, prob.sum(0)
    with torch.cuda.device_of(logits_TE):  # Triton launches on the current device
        _gate[(blocks,)](
            logits_TE, bias_E, expert, weight, lse, prob, len(logits_TE), E=n_experts, K=k, SCORE=score,
            RENORMALIZE=renormalize, SCALE=scale, GROUPS=groups, K_GROUPS=k_groups,
            GROUP_TOP=min(group_top, n_experts // groups), WIDE=wide, MEMBERS=members, ROWS=rows,
            TINY=torch.finfo(prob.dtype).tiny, num_warps=WARPS,
        )  # fmt: skip
    return expert, weight, lse, prob.sum(0)


@_forward.register_fake
def _(logits_TE, k, score, bias_E, renormalize, scale, groups, k_groups, group_top):  # type: ignore[no-untyped-def]
    return _empty(logits_TE, k, logits_TE.shape[1:])


def _empty(logits_TE: Tensor, k: int, prob: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what forward gives, probabilities in the shape `prob`: float32, or float64 for float64 logits."""
    expert = torch.empty(len(logits_TE), k, dtype=torch.int64, device=logits_TE.device)
    new = partial(logits_TE.new_empty, dtype=reference.wide(logits_TE.dtype))
    return expert, new(expert.shape), new(len(logits_TE)), new(prob)


@torch.library.custom_op("switchyard::gate_backward", mutates_args=())
def _backward(
    logits_TE: Tensor, expert_TK: Tensor, dweight_TK: Tensor, dlse_T: Tensor, dprob_E: Tensor, score: str,
    renormalize: bool, scale: float,
) -> Tensor:  # fmt: skip
    n_tokens, n_experts = logits_TE.shape
    _, members, rows = _shape(n_experts, 1)
    out = torch.empty_like(logits_TE)
    if not n_tokens:
        return out
    with torch.cuda.device_of(logits_TE):
        _gate_backward[(triton.cdiv(n_tokens, rows),)](
            logits_TE, expert_TK, dweight_TK, dlse_T, dprob_E, out, n_tokens, E=n_experts,
            K=expert_TK.shape[1], SCORE=score, RENORMALIZE=renormalize, SCALE=scale, MEMBERS=members, ROWS=rows,
            TINY=torch.finfo(dlse_T.dtype).tiny, num_warps=WARPS,
        )  # fmt: skip
    return out


@_backward.register_fake
def _(logits_TE, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits_TE)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, _, ctx.score, _, ctx.renormalize, ctx.scale, *_ = inputs
    ctx.save_for_backward(logits, output[0])
    ctx.mark_non_differentiable(output[0])


def _autograd_backward(ctx, _, dweight_TK, dlse_T, dprob_E):  # type: ignore[no-untyped-def]
    logits_TE, expert_TK = ctx.saved_tensors
    dtype = reference.wide(logits_TE.dtype)
    shapes = (expert_TK.shape, logits_TE.shape[:1], logits_TE.shape[1:])
    gradients = [
        torch.zeros(shape, dtype=dtype, device=logits_TE.device) if gradient is None else gradient.contiguous()
        for gradient, shape in zip((dweight_TK, dlse_T, dprob_E), shapes, strict=True)
    ]
    dlogits = _backward(logits_TE, expert_TK, *gradients, ctx.score, ctx.renormalize, ctx.scale)
    return dlogits, *[None] * 8


def refuse_second_derivative(ctx, *gradients):  # type: ignore[no-untyped-def]
    """The backward of a backward."""
    raise NotImplementedError("dispatch=triton has no second derivative; dispatch=reference does.")


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward.register_autograd(refuse_second_derivative)


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
    """`reference.gate` on a GPU: (T, E) -> expert (T, K) int64, weight (T, K), log-sum-exp (T,) and the probabilities'
    sum over tokens (E,). Raises `ValueError` as it does, and `NotImplementedError` for forward-mode derivatives."""
    operands.choice(NAME, logits_TE, k, score, bias_E, groups, k_groups)
    operands.refuse_tangents(NAME, logits_TE)
    bias = None if bias_E is None else bias_E.detach().to(reference.wide(logits_TE.dtype)).contiguous()
    arguments = (k, score, bias, renormalize, scale, groups, k_groups, group_top)
    return _forward(logits_TE.contiguous(), *arguments)
