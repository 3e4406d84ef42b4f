"""What keeps experts evenly loaded: losses on the router's scores, and a bias on its choice.

Probabilities are a token's scores divided by their sum. `prob_E` is their sum over the tokens and m_i = prob_i / T
their mean (P_i in the papers); f_i is expert i's share of the routed rows. Negative experts are none, and count
nowhere. Every loss is 0 for a batch without tokens.

A step's loss is the mean over its micro-batches and ranks, and balance.scope says what each is of:

                                     sequence               batch                  global
aux                                  each sequence          the micro-batch        the step
importance, load, spread, bandpass   the micro-batch        the micro-batch        the step
l1 of the ReLU router: its f         of the micro-batch     of the micro-batch     of the step
z, entropy, default, depth           means over tokens, and so the same whatever they are of
predictor of expert choice           a mean over tokens, of a choice that every micro-batch makes for itself

With global every one but the last has the value and the gradient that one big batch would give it.
"""

import torch
from torch import Tensor


def load_balancing_loss(prob_E: Tensor, count_E: Tensor, n_tokens: int) -> Tensor:
    """E · sum_i f_i m_i; 1 when uniform (Switch, 2101.03961, eq. 4, generalised to K choices).

    prob_E: probabilities (1 per token) summed over the tokens; m_i is their mean. count_E: routed rows per expert;
    f_i = c_i / sum c, no gradient. A batch with no routed row gives 0.

    The mean over micro-batches of this loss is not the loss of the whole batch, but asks for balance in each of them.
    With the whole step's counts in every micro-batch it is (global-batch balance, 2501.11873)."""
    share_E = count_E.to(prob_E.dtype) / count_E.sum().clamp_min(1)
    return count_E.numel() * (share_E * prob_E / max(1, n_tokens)).sum()


def sequence_balancing_loss(prob_TE: Tensor, expert: Tensor, token_N: Tensor | None, n_sequences: int) -> Tensor:
    """The mean over sequences of E · sum_i f_i m_i within each (DeepSeek-V3, 2412.19437, eq. 17-20).

    f counts the choice that was made, selection bias included (the paper's counts that of the scores alone).
    prob_TE: (T, E), T = n_sequences · S, sequence after sequence. expert: (T, K), or (N,) with the token of each row in
    token_N (N,). A sequence without a routed row adds 0."""
    n_tokens, n_experts = prob_TE.shape
    n_sequences = max(1, n_sequences)
    assert n_tokens % n_sequences == 0, f"{n_tokens} tokens are not {n_sequences} sequences of one length"
    length = n_tokens // n_sequences
    if token_N is None:
        token_N = torch.arange(n_tokens, device=expert.device).repeat_interleave(expert.shape[1])
    expert_N = expert.flatten()
    place_N = token_N // max(1, length) * n_experts + expert_N.clamp_min(0)
    count_BE = torch.zeros(n_sequences * n_experts, dtype=torch.int64, device=expert.device)
    count_BE = count_BE.scatter_add(0, place_N, (expert_N >= 0).long()).view(n_sequences, n_experts)
    share_BE = count_BE.to(prob_TE.dtype) / count_BE.sum(1, keepdim=True).clamp_min(1)
    prob_BE = prob_TE.reshape(n_sequences, length, n_experts).sum(1) / max(1, length)
    return n_experts * (share_BE * prob_BE).sum(1).mean()


def z_loss(lse_T: Tensor) -> Tensor:
    """mean_t (logsumexp_e z_te)²: keeps router logits small (ST-MoE, 2202.08906, eq. 5)."""
    return lse_T.square().sum() / max(1, len(lse_T))


def cv_squared(value_E: Tensor) -> Tensor:
    """The squared coefficient of variation, Var/mean² with the population's variance: (E,) -> (). Whole numbers are
    taken as float64. 0 for one expert, and where the mean is 0."""
    value_E = value_E if value_E.is_floating_point() else value_E.to(torch.float64)
    mean = value_E.mean()
    nonzero = mean != 0
    return torch.where(nonzero, (value_E / torch.where(nonzero, mean, 1.0) - 1).square().mean(), 0.0)


def importance(weight_N: Tensor, expert_N: Tensor, n_experts: int) -> Tensor:
    """The weights summed per expert, (E,), of which the importance loss is the CV² (Shazeer 2017, 1701.06538, eq. 6-7);
    weight and expert (N,) or (T, K)."""
    expert_E = torch.arange(n_experts, device=expert_N.device)
    weight_NE = torch.where(expert_N.reshape(-1, 1) == expert_E, weight_N.reshape(-1, 1), 0.0)
    return weight_NE.sum(0)  # one sum per expert, without atomics: the same on a rerun


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, noise_TE: Tensor, k: int) -> Tensor:
    """Expected rows of every expert, were its noise drawn again: (T, E) three times -> (E,), differentiable. The load
    loss is its CV² (eq. 11).

    sum_t Phi((clean_ti − the K-th highest of the token's other noisy logits) / noise_ti), Phi the normal distribution
    function (Shazeer 2017, 1701.06538, eq. 8-10). noisy = clean + noise · normal draws, noise their standard deviation,
    not below the dtype's epsilon. With K = E every expert is taken for certain: T each."""
    if k >= clean_TE.shape[1]:
        return torch.ones_like(clean_TE).sum(0)
    best = noisy_TE.topk(k + 1, dim=-1).values
    last_in_T1, first_out_T1 = best[:, k - 1 : k], best[:, k:]
    # An expert of the best K stays among them while it is above the first that is out; another has to beat the last in.
    to_beat_TE = torch.where(noisy_TE >= last_in_T1, first_out_T1, last_in_T1)
    noise_TE = noise_TE.clamp_min(torch.finfo(noise_TE.dtype).eps)
    return torch.special.ndtr((clean_TE - to_beat_TE) / noise_TE).sum(0)


def token_entropy(prob_TE: Tensor) -> Tensor:
    """mean_t −sum_i p_ti ln p_ti, in nats: 0 when every token is sure of one expert, ln E when it favours none."""
    return -_p_log(prob_TE).sum() / max(1, len(prob_TE))


def spread_loss(prob_E: Tensor, n_tokens: int) -> Tensor:
    """ln E less the entropy of m: 0 when the batch as a whole favours no expert, ln E when it knows but one.

    Computed as sum_i m_i ln(E m_i), the same as m sums to 1. With `token_entropy` it is the (negative) information of
    the choice about the token."""
    mean_E = prob_E / max(1, n_tokens)
    return (mean_E * (mean_E * len(mean_E)).clamp_min(torch.finfo(mean_E.dtype).tiny).log()).sum()


def bandpass_loss(prob_E: Tensor, n_tokens: int, band: float) -> Tensor:
    """mean_i max(0, |E · m_i − 1| − band)²: no force on an expert while its probability is within the band."""
    if n_tokens == 0:
        return 0.0 * prob_E.sum()
    off_E = (prob_E / n_tokens * len(prob_E) - 1).abs() - band
    return off_E.clamp_min(0).square().mean()


def scheduled(value: float, factors: list[float] | None, progress: float) -> float:
    """value times the factor at `progress`, 0 to 1 over the run: factors stand at equal distances, straight lines
    between them. [1, 1, 0]: full for half of the run, then down to 0. One factor holds all along; none: value."""
    if not factors:
        return value
    place = min(max(progress, 0.0), 1.0) * (len(factors) - 1)
    left = int(place)
    right = min(left + 1, len(factors) - 1)
    return value * (factors[left] + (factors[right] - factors[left]) * (place - left))


@torch.no_grad()
def update_bias(bias_E: Tensor, count_E: Tensor, rate: float, step: str = "sign") -> None:
    """Loss-free balancing, in place (2408.15664). step "sign": b_i += rate · sign(mean c − c_i), algorithm 1;
    "proportional": b_i += rate · (mean c − c_i) / mean c, nothing when there are no rows.

    count_E: the routed rows of the whole optimiser step, summed over micro-batches."""
    count = count_E.to(torch.float64)
    short_E = count.mean() - count
    match step:
        case "sign":
            change_E = short_E.sign()
        case "proportional":
            change_E = torch.where(count.mean() > 0, short_E / count.mean().clamp_min(1e-300), 0.0)
        case _:
            raise ValueError(f"step={step!r} is not one of sign, proportional")
    bias_E += rate * change_E.to(bias_E.dtype)


def _p_log(prob: Tensor) -> Tensor:
    """p ln p, elementwise; 0 with a finite gradient where p has underflowed to 0."""
    return prob * prob.clamp_min(torch.finfo(prob.dtype).tiny).log()
