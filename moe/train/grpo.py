"""Group-relative policy optimisation (GRPO; DeepSeekMath, 2402.03300): losses and advantages on plain tensors.

A step has B answers, G in a row for each prompt. An answer's advantage is its reward against its group's, and every
token of it has that advantage. `old` are the log-probabilities with which the answers were drawn.

Traps. An answer's loss divided by its own length (grpo) prefers short right answers and long wrong ones; dapo and
dr_grpo do not. The loss's value means nothing: at ratios of 1 it is the mean advantage, which is 0 by construction
(exactly under grpo, whatever was learnt); the gradient is not. The k3 estimate of KL is unbiased as a number, and its
gradient is that of the other KL, unless it is multiplied by π/old before differentiating. A group whose rewards are
equal teaches nothing, and its deviation, 0 but for rounding, must not be divided by.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe.errors import BadInput

NORMALISATIONS = ("grpo", "dapo", "dr_grpo")


class Advantages(NamedTuple):
    """What answers are better or worse than their group by, and how many groups had nothing to tell."""

    advantage_B: Tensor
    flat: int  # groups whose rewards are all the same; their advantages are 0


def advantages(reward_B: Tensor, group: int, normalisation: str = "grpo") -> Advantages:
    """A = (r − mean) / deviation of each group of `group` answers in a row (2402.03300, section 4.1.2; the deviation is
    the group's own, not an estimate of a population's); dr_grpo leaves the deviation out (2503.20783, section 3.2).

    (B,) -> (B,) in float64. Raises `BadInput` for a reward that is not finite."""
    reward_PG = reward_B.double().view(-1, group)
    if not reward_PG.isfinite().all():
        bad = reward_B[~reward_B.double().isfinite()][0].item()
        raise BadInput(f"the reward of an answer is {bad}: accepted is a finite number.")
    # Equal rewards, by comparison: their deviation may be a rounding error, and not 0.
    flat_P1 = (reward_PG == reward_PG[:, :1]).all(-1, keepdim=True)
    advantage_PG = reward_PG - reward_PG.mean(-1, keepdim=True)
    if normalisation != "dr_grpo":
        deviation_P1 = reward_PG.std(-1, correction=0, keepdim=True)
        advantage_PG = advantage_PG / torch.where(flat_P1, 1.0, deviation_P1)
    return Advantages(torch.where(flat_P1, 0.0, advantage_PG).flatten(), int(flat_P1.sum()))


def token_weights(answer_BS: Tensor, normalisation: str, longest: int) -> Tensor:
    """What each token's loss is multiplied with before all are summed: (B, S) bool, where the answers' tokens are ->
    (B, S) float32. B and all lengths are of the whole step, so that micro-batches may be summed.

    grpo      1 / (B · the answer's length): mean over answers of their mean over tokens (2402.03300, eq. 3)
    dapo      1 / the step's tokens (DAPO, 2503.14476)
    dr_grpo   1 / (B · `longest`), the longest answer that could be (2503.20783, section 3.2)

    Raises `ValueError` for another normalisation."""
    n_answers, token_BS = len(answer_BS), answer_BS.float()
    match normalisation:
        case "grpo":
            return token_BS / (n_answers * token_BS.sum(-1, keepdim=True).clamp_min(1))
        case "dapo":
            return token_BS / token_BS.sum().clamp_min(1)
        case "dr_grpo":
            return token_BS / (n_answers * longest)
        case _:
            raise ValueError(f"normalisation={normalisation!r} is not one of {', '.join(NORMALISATIONS)}")


def clipped_loss(log_prob_BS: Tensor, old_BS: Tensor, advantage_B: Tensor, low: float, high: float) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A) of every token, ρ = π / old (PPO, 1707.06347, eq. 7; low and high apart:
    DAPO, 2503.14476): (B, S), (B, S), (B,) -> (B, S)."""
    ratio_BS = (log_prob_BS - old_BS.detach()).exp()
    advantage_B1 = advantage_B.to(ratio_BS.dtype)[:, None]
    clipped_BS = ratio_BS.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio_BS * advantage_B1, clipped_BS * advantage_B1)


def kl_estimate(log_prob_BS: Tensor, old_BS: Tensor, reference_BS: Tensor) -> Tensor:
    """ρ · k3, ρ = π / old and k3 = ref/π − ln(ref/π) − 1 (Schulman, "Approximating KL divergence"), of every token:
    its mean over tokens drawn from `old` is KL(π || ref) in nats, and the gradient of that mean KL's own gradient.

    Without ρ the value is right at π = old, and the gradient is that of KL(ref || π). (B, S) three times -> (B, S)."""
    ratio_BS = (log_prob_BS - old_BS.detach()).exp()
    gap_BS = reference_BS.detach() - log_prob_BS
    return ratio_BS * (gap_BS.exp() - gap_BS - 1)
