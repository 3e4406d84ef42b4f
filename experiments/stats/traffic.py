"""Which rows an all-to-all moves: from recorded routes, or from routes that are drawn.

Expert e of E lives on rank e // (E / R) of an expert group of R ranks. A two-level all-to-all sends a token's row once
to every other node that has an expert of it, to the rank there that stands where the token's own stands in its node;
that one hands it to every rank of its node that has one. A direct all-to-all sends a row for every expert.

Letters beyond the glossary: R ranks of the expert group, M its nodes, G ranks of a node.
"""

import math
from typing import NamedTuple

import numpy as np

from experiments.stats.cluster import MachineConfig, transfer

TINY = np.finfo(np.float32).tiny


class Traffic(NamedTuple):
    """Rows of one all-to-all, of every rank in the group's order."""

    sent_R: np.ndarray  # rows over the network
    received_R: np.ndarray
    given_R: np.ndarray  # rows over NVLink
    taken_R: np.ndarray
    load_R: np.ndarray  # rows that its experts compute
    logical: float  # rows that a rank sends to nodes, its own included, on average

    def times(self, factor: float) -> "Traffic":
        """The same of so many times as many tokens."""
        return Traffic(*(rows_R * factor for rows_R in self[:5]), self.logical * factor)  # type: ignore[call-arg,arg-type]

    def evened(self) -> "Traffic":
        """The same rows in all, as many of every rank."""
        return Traffic(*(np.full(len(rows_R), rows_R.mean()) for rows_R in self[:5]), self.logical)  # type: ignore[call-arg,arg-type]


def home_of(n_tokens: int, ranks: int) -> np.ndarray:
    """(T,): the rank that a token lives on; tokens are dealt in order, as many to each."""
    return np.arange(n_tokens) * ranks // n_tokens


def traffic(expert_TK: np.ndarray, n_experts: int, ranks: int, inside: int, two_level: bool = True) -> Traffic:
    """What routes (T, K), negative where there is none, move among so many ranks, `inside` of them in a node."""
    home_T, nodes = home_of(len(expert_TK), ranks), ranks // inside
    t_N, k_N = np.nonzero(expert_TK >= 0)
    rank_N = expert_TK[t_N, k_N] // (n_experts // ranks)
    rows_RR = np.zeros((ranks, ranks))
    np.add.at(rows_RR, (home_T[t_N], rank_N), 1)

    # Once per rank, and once per node, of those that have an expert of the token.
    hit_TR = np.zeros((len(expert_TK), ranks), bool)
    hit_TR[t_N, rank_N] = True
    hit_TM = hit_TR.reshape(len(hit_TR), nodes, inside).any(-1)
    starts_R = np.searchsorted(home_T, np.arange(ranks))
    once_RR, once_RM = (np.add.reduceat(hit.astype(float), starts_R) for hit in (hit_TR, hit_TM))

    home_M, place_R = np.arange(ranks) // inside, np.arange(ranks) % inside
    elsewhere_RM = home_M[:, None] != np.arange(nodes)
    if two_level:
        sent_R = (once_RM * elsewhere_RM).sum(1)
        # What comes into a node comes to the rank at the sender's place, which hands it on to all places but its own.
        arrived_GM = (once_RM * elsewhere_RM).reshape(nodes, inside, nodes).sum(0)
        handed_GR = once_RR.reshape(nodes, inside, ranks).sum(0) * (np.arange(inside)[:, None] != place_R)
        received_R, taken_R = arrived_GM.T.reshape(-1), handed_GR.sum(0)
        given_R = handed_GR.reshape(inside, nodes, inside).sum(2).T.reshape(-1)
    else:
        far_RR = home_M[:, None] != home_M
        near_RR = ~far_RR & ~np.eye(ranks, dtype=bool)
        sent_R, received_R = (rows_RR * far_RR).sum(1), (rows_RR * far_RR).sum(0)
        given_R, taken_R = (rows_RR * near_RR).sum(1), (rows_RR * near_RR).sum(0)
    return Traffic(sent_R, received_R, given_R, taken_R, rows_RR.sum(0), float(once_RM.sum()) / ranks)


def busiest(moved: Traffic) -> tuple[float, float]:
    """Rows of the busiest rank over the network, and over NVLink: a link sends and receives at once."""
    return max(moved.sent_R.max(), moved.received_R.max()), max(moved.given_R.max(), moved.taken_R.max())


def exchange(machine: MachineConfig, moved: Traffic, row: float) -> float:
    """Seconds of an all-to-all of rows of so many bytes: what passes through the network and what NVLink hands on flow
    at once, and the busiest rank's link paces all."""
    if len(moved.sent_R) == 1:
        return 0.0
    far, near = busiest(moved)
    return machine.launch + max(transfer(machine.network, far * row), transfer(machine.nvlink, near * row))


def row_bytes(d_model: int, kind: str) -> float:
    """Bytes of a token's row: bf16 has 2 for each channel; fp8 has 1, and a float32 scale for every 128."""
    return d_model + 4 * d_model / 128 if kind == "fp8" else 2.0 * d_model


def nodes_touched(n_experts: int, k: int, nodes: int) -> float:
    """How many of so many nodes a token's K experts are on, on average, where all sets are equally likely and nodes
    have as many experts each: every node is missed with the hypergeometric probability C(E − E/M, K) / C(E, K)."""
    inside = n_experts // nodes
    return nodes * (1 - math.comb(n_experts - inside, k) / math.comb(n_experts, k))


def draw(
    n_tokens: int, n_experts: int, k: int, zipf: float = 0.0, groups: int = 1, k_groups: int = 1, best: int = 0,
    seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """(T, K): the K highest of scores log p_e + Gumbel noise, so that experts are drawn one after another without
    putting back, with probability p_e ∝ 1 / (place of e)^zipf; which expert has which place is drawn too. zipf=0: all
    sets are equally likely.

    groups, k_groups: experts only of the `k_groups` groups with the highest sum of their `best` best scores (0: K /
    k_groups of them, as in DeepSeek-V3, 2412.19437)."""
    generator = np.random.default_rng(seed)
    logit_E = (-zipf * np.log1p(generator.permutation(n_experts))).astype(np.float32)
    expert_TK = np.empty((n_tokens, k), np.int64)
    for lo in range(0, n_tokens, 8192):
        shape = (min(8192, n_tokens - lo), n_experts)
        score_TE = logit_E - np.log(generator.standard_exponential(shape, np.float32).clip(TINY))
        if groups > 1 and k_groups < groups:
            score_TE = np.where(kept_groups(score_TE, groups, k_groups, best or k // k_groups), score_TE, -np.inf)
        expert_TK[lo : lo + len(score_TE)] = np.argpartition(-score_TE, k - 1, 1)[:, :k]
    return expert_TK


def kept_groups(score_TE: np.ndarray, groups: int, k_groups: int, best: int) -> np.ndarray:
    """(T, E): whether an expert is in one of a token's `k_groups` groups with the highest sums of `best` scores."""
    parts = score_TE.reshape(len(score_TE), groups, -1)
    sums_TG = np.partition(parts, -best, -1)[..., -best:].sum(-1)
    lowest_T1 = np.partition(sums_TG, -k_groups, -1)[:, -k_groups, None]
    return np.repeat(sums_TG >= lowest_T1, score_TE.shape[1] // groups, 1)


def dropped(expert_TK: np.ndarray, n_experts: int, capacity: float) -> np.ndarray:
    """The routes (T, K) with −1 for those beyond ceil(capacity · K · T / E) rows of an expert; the first ones stay."""
    rows = expert_TK.ravel()
    order = np.argsort(rows, kind="stable")
    first_E = np.searchsorted(rows[order], np.arange(n_experts))
    place = np.empty(len(rows), np.int64)
    place[order] = np.arange(len(rows)) - first_E[rows[order].clip(0)]
    room = math.ceil(capacity * rows.size / n_experts)
    return np.where((place < room) & (rows >= 0), rows, -1).reshape(expert_TK.shape)
