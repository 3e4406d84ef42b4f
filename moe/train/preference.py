"""Learning from preferences: the losses of a reward model and of DPO, on plain tensors.

A preference is a prompt with two answers, of which the first was preferred. P pairs, so 2·P sequences of S places; a
place whose target is `NO_TARGET` (prompt, padding) is no part of an answer.

Traps. DPO sums log-probabilities over an answer: of two answers that are as likely by token the longer one moves
further, so training makes answers longer (2403.19159); `sigmoid_norm` and `ipo` divide by the length. DPO's loss says
nothing of how likely an answer is, only of the difference, and the preferred one often gets less likely too: look at
`Margins`. In a Mixture of Experts the policy and the reference choose experts each by itself, so that a part of their
ratio may be routing; it is reported as flips (`moe.train.objective`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.data.loader import NO_TARGET

DPO_LOSSES = ("sigmoid", "sigmoid_norm", "ipo")


class Answers(NamedTuple):
    """What a model says of answers: their log-probabilities in nats, summed over the tokens, and how many those are."""

    log_prob_B: Tensor
    length_B: Tensor  # int64, at least 1 where there is an answer

    def per_token(self) -> Tensor:
        """(B,) mean nats of a token."""
        return self.log_prob_B / self.length_B.clamp_min(1)


class Margins(NamedTuple):
    """DPO's loss of every pair, and the rewards that it is implicitly about: beta · log(policy / reference)."""

    loss_P: Tensor
    chosen_P: Tensor  # no gradient
    rejected_P: Tensor  # no gradient


def token_log_probs(logits_BSV: Tensor, targets_BS: Tensor, temperature: float = 1.0) -> Tensor:
    """ln softmax(logits / temperature) of every target, in float32 at least: (B, S, V), (B, S) -> (B, S); 0 where the
    target is `NO_TARGET`."""
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
    log_prob_TV = F.log_softmax(logits_BSV.to(dtype).flatten(0, 1) / temperature, dim=-1)
    loss_T = F.nll_loss(log_prob_TV, targets_BS.flatten(), reduction="none", ignore_index=NO_TARGET)
    return -loss_T.view(targets_BS.shape)


def answer_log_probs(logits_BSV: Tensor, targets_BS: Tensor) -> Answers:
    """The answers' log-probabilities, summed: (B, S, V), (B, S) -> (B,) and their lengths (B,)."""
    return Answers(token_log_probs(logits_BSV, targets_BS).sum(-1), (targets_BS != NO_TARGET).sum(-1))


def reward_loss(chosen_P: Tensor, rejected_P: Tensor, margin: float = 0.0) -> Tensor:
    """−ln σ(r_c − r_r − margin) of every pair, (P,), in nats: a Bradley-Terry model of who is preferred
    (InstructGPT, 2203.02155, eq. 1; the margin: Llama 2, 2307.09288, eq. 2). Only differences are known."""
    return -F.logsigmoid(chosen_P - rejected_P - margin)


def dpo_loss(policy: Answers, reference: Answers, beta: float, loss: str = "sigmoid") -> Margins:
    """Direct preference optimisation. Both of 2·P answers, each preferred one followed by its rejected one. With
    h = ln(π/ref) of the preferred answer less that of the rejected one:

    sigmoid        −ln σ(beta · h), log-probabilities summed over an answer (2305.18290, eq. 7)
    sigmoid_norm   the same with each log-ratio divided by its answer's length (Tülu 3, 2411.15124)
    ipo            (h − 1 / (2 beta))² (2310.12036, eq. 17), log-ratios divided by length as is usual since: it has a
                   minimum, so that pairs without noise do not drive the policy ever further

    The reference gets no gradient. Raises `ValueError` for another loss."""
    ratio_B = policy.log_prob_B - reference.log_prob_B.detach()
    scaled_B = ratio_B if loss == "sigmoid" else ratio_B / policy.length_B.clamp_min(1)
    chosen_P, rejected_P = scaled_B[0::2], scaled_B[1::2]
    match loss:
        case "sigmoid" | "sigmoid_norm":
            loss_P = -F.logsigmoid(beta * (chosen_P - rejected_P))
        case "ipo":
            loss_P = (chosen_P - rejected_P - 1 / (2 * beta)).square()
        case _:
            raise ValueError(f"loss={loss!r} is not one of {', '.join(DPO_LOSSES)}")
    return Margins(loss_P, beta * chosen_P.detach(), beta * rejected_P.detach())
