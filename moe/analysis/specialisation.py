"""What experts are for: which domains and tokens their rows come from, and which experts go together.

Everything is of counts: of routed rows by (key, expert), where a key is a domain, an input token or a predicted token.
The window is what was counted. High numbers alone prove nothing: each docstring has what chance gives, and
`permuted_information` what keys that mean nothing would.

Letters beyond the glossary: M keys.
"""

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**16  # tokens at a time


def count_by(key_T: Tensor, expert_TK: Tensor, n_keys: int, n_experts: int) -> Tensor:
    """Routed rows by (key, expert), (M, E) int64, of tokens with these keys; a negative expert is none."""
    key_TK = key_T[:, None].expand_as(expert_TK)
    taken_TK = expert_TK >= 0
    cell = key_TK[taken_TK].long() * n_experts + expert_TK[taken_TK].long()
    return torch.bincount(cell, minlength=n_keys * n_experts).view(n_keys, n_experts)


def key_specialisation(count_ME: Tensor, k: int) -> Tensor:
    """K · c_mi / sum_i c_mi, (M, E) float64: the share of a key's tokens that expert i takes. Of domains it is OLMoE's
    domain specialisation, of tokens its vocabulary specialisation (2409.02060; FLAME-MoE, 2505.20225). Without any
    preference it is K / E; NaN for a key without rows."""
    count_ME = count_ME.double()
    return k * count_ME / count_ME.sum(1, keepdim=True)


def lift(count_ME: Tensor) -> Tensor:
    """(c_mi / c_m) / (c_i / c), (M, E) float64: how much more often expert i takes key m than it takes anything. 1
    where keys and experts have nothing to do with each other; NaN for a key or an expert without rows."""
    count_ME = count_ME.double()
    return count_ME * count_ME.sum() / (count_ME.sum(1, keepdim=True) * count_ME.sum(0, keepdim=True))


def information(count_ME: Tensor) -> float:
    """I(key; expert) of a routed row, in bits: sum p_mi log2(p_mi / (p_m p_i)). 0 where the expert tells nothing of the
    key; at most the entropy of either. Of few rows it is above 0 by chance: about (M − 1)(E − 1) / (2 N ln 2) bits
    (Miller 1955)."""
    joint_ME = count_ME.double().numpy() / max(1, int(count_ME.sum()))
    independent_ME = joint_ME.sum(1, keepdims=True) * joint_ME.sum(0, keepdims=True)
    seen = joint_ME > 0
    return float((joint_ME[seen] * np.log2(joint_ME[seen] / independent_ME[seen])).sum())


def permuted_information(
    document_DE: Tensor, key_D: Tensor, n_keys: int, resamples: int = 200, seed: int = 0
) -> np.ndarray:
    """`information` under keys that mean nothing, (resamples,): the documents' own keys, dealt out anew. Whole
    documents are dealt, since a document's tokens are alike whatever its key; `document_DE` are their rows by
    expert."""
    generator = np.random.default_rng(seed)
    rows_DE, label_DM = document_DE.double().numpy(), np.eye(n_keys)[key_D.numpy()]
    counts = (generator.permutation(label_DM).T @ rows_DE for _ in range(resamples))
    return np.array([information(torch.from_numpy(count_ME)) for count_ME in counts])


def co_activation(expert_TK: Tensor, n_experts: int) -> Tensor:
    """N_ij / N_i, (E, E) float64: of the tokens that take expert i, the share that take j too (OLMoE, 2409.02060).
    Without any preference it is (K − 1) / (E − 1) off the diagonal; NaN for an expert without tokens."""
    pair_EE = pairs(expert_TK, expert_TK, n_experts, n_experts).double()
    return pair_EE / pair_EE.diagonal()[:, None]


def flow(expert_TK: Tensor, next_TK: Tensor, n_experts: int, n_next: int) -> Tensor:
    """N_ij / N_i, (E, E') float64: of the tokens that take expert i in one layer, the share that take j in another.
    Without any preference it is K' / E'; NaN for an expert without tokens."""
    token_E = torch.bincount(expert_TK[expert_TK >= 0].flatten(), minlength=n_experts)
    return pairs(expert_TK, next_TK, n_experts, n_next).double() / token_E.double()[:, None]


def pairs(expert_TK: Tensor, other_TK: Tensor, n_experts: int, n_others: int) -> Tensor:
    """How many tokens have expert i in one choice and j in another, (E, E') int64; a negative expert is none."""
    pair_EE = torch.zeros(n_experts, n_others, dtype=torch.int64)
    for rows in range(0, len(expert_TK), CHUNK):  # float32 counts to 2^24 without a rounding
        taken_TE, other_TE = (
            _one_hot(choice_TK[rows : rows + CHUNK], n)
            for choice_TK, n in ((expert_TK, n_experts), (other_TK, n_others))
        )
        pair_EE += (taken_TE.T @ other_TE).long()
    return pair_EE


def _one_hot(expert_TK: Tensor, n_experts: int) -> Tensor:
    """How often a token takes each expert, (T, E) float32."""
    column_TK = torch.where(expert_TK < 0, n_experts, expert_TK.long())
    count_TE = torch.zeros(len(expert_TK), n_experts + 1)
    return count_TE.scatter_add_(1, column_TK, torch.ones(()).expand(column_TK.shape))[:, :n_experts]
