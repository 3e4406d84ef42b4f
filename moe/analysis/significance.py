"""Which specialisation is more than chance: intervals over documents, a null of documents' labels dealt anew, and names
for the experts that have earned one.

Tokens of a document are alike whatever its domain, so a document is one draw, and not its tokens: intervals that
resample tokens are too narrow, and a router that gives every document experts of its own looks like one that knows the
domains. Here documents are resampled, and documents are dealt other labels.

Letters beyond the glossary: Dc documents (D in suffixes), Y domains, L the MoE layers, N = L · E cells, R resamples,
G strata, M different tokens.
"""

from typing import NamedTuple

import numpy as np
import scipy

from moe.analysis.trace import Trace

CHUNK = 2**24  # cells of several resamples at a time
ROUNDING = 1e-3  # rows; a null that deviates by less does not deviate
LEVEL = 0.05  # how often one name or more of a page may be false
LEAST = 1.5  # lift from which an expert may be called after a domain


class Documents(NamedTuple):
    """Routed rows by document, layer and expert; layers with fewer experts than the widest have zeros."""

    rows_DLE: np.ndarray  # float32, whole numbers
    domain_D: np.ndarray
    expected_DLE: np.ndarray | None = None  # rows that the tokens' ids alone would have it, `expected`; None: unknown


class Estimate(NamedTuple):
    """Numbers with their 95% intervals."""

    value: np.ndarray
    low: np.ndarray  # NaN where there are fewer than two documents
    high: np.ndarray


class Specialisation(NamedTuple):
    """`moe.analysis.specialisation` of every layer, with intervals over documents."""

    share: Estimate  # (L, Y, E), `key_specialisation`
    lift: Estimate  # (L, Y, E)
    information: Estimate  # (L,), bits; the interval is without what few documents inform by chance, the value with it


class Tested(NamedTuple):
    """Every domain and expert against labels that mean nothing, (L, Y, E)."""

    z: np.ndarray  # deviations of the null that the domain's rows are above its mean
    p: np.ndarray  # how often the largest z of any cell is as large: corrected for all cells at once


class Name(NamedTuple):
    """An expert that may be called after a domain."""

    layer: int  # index among the MoE layers
    expert: int
    domain: int
    share: float  # of the domain's tokens that the expert takes; by chance K / E
    share_low: float
    share_high: float
    lift: float  # times as often as it takes anything
    lift_low: float
    lift_high: float
    p: float  # corrected for layers x experts x domains
    p_of_tokens: float  # the same beyond what the tokens' ids explain; NaN where that is unknown


def of_tokens(
    doc_T: np.ndarray, domain_T: np.ndarray, expert_TLK: np.ndarray, n_experts: int, token_T: np.ndarray | None = None
) -> Documents:
    """Rows by document of tokens that are in memory; with their ids also what those alone would have it."""
    number_D, first_D, index_T = np.unique(doc_T, return_index=True, return_inverse=True)
    rows_DLE = np.zeros((len(number_D), expert_TLK.shape[1], n_experts), np.float32)
    count(rows_DLE, index_T, expert_TLK)
    expected_DLE = None if token_T is None else expected(index_T, token_T, expert_TLK, n_experts)
    return Documents(rows_DLE, domain_T[first_D].astype(np.int64), expected_DLE)


def documents(trace: Trace) -> Documents:
    """Rows by document of a trace, a part of its routes at a time: in memory are two numbers of every token and the
    result."""
    table = trace.table("tokens", ["doc", "domain"]).combine_chunks()
    doc_T, domain_T = table["doc"].to_numpy(), table["domain"].combine_chunks().indices.to_numpy()
    number_D, first_D, index_T = np.unique(doc_T, return_index=True, return_inverse=True)
    n_layers, k = len(trace.about.layers), trace.about.k
    rows_DLE = np.zeros((len(number_D), n_layers, max(trace.about.n_experts)), np.float32)
    for batch in trace.batches(65536 // n_layers * n_layers or n_layers):
        expert_TLK = batch["expert"].flatten().to_numpy(zero_copy_only=False).reshape(-1, n_layers, k)
        count(rows_DLE, index_T[batch["token_row"].to_numpy()[::n_layers]], expert_TLK)
    return Documents(rows_DLE, domain_T[first_D].astype(np.int64))


def count(rows_DLE: np.ndarray, index_T: np.ndarray, expert_TLK: np.ndarray) -> None:
    """Add tokens' rows to those of their documents; a negative expert is none."""
    _, n_layers, n_experts = rows_DLE.shape
    cell_TLK = (index_T[:, None, None] * n_layers + np.arange(n_layers)[:, None]) * n_experts + expert_TLK
    first = int(index_T.min()) * n_layers * n_experts if len(index_T) else 0
    count_N = np.bincount(cell_TLK[expert_TLK >= 0] - first)
    rows_DLE.reshape(-1)[first : first + len(count_N)] += count_N


def expected(index_T: np.ndarray, token_T: np.ndarray, expert_TLK: np.ndarray, n_experts: int) -> np.ndarray:
    """Rows by document if an expert took a token for its id alone, (Dc, L, E) float32: every token counts as that id's
    mean over all documents. Equal to the true ones where a router goes by token id."""
    key_M, number_T = np.unique(token_T, return_inverse=True)
    shape = (int(index_T.max()) + 1, len(key_M))
    times_DM = scipy.sparse.csr_matrix((np.ones(len(index_T), np.float32), (index_T, number_T)), shape)
    times_M = np.asarray(times_DM.sum(0)).ravel()
    layers = []
    for expert_TK in expert_TLK.transpose(1, 0, 2):
        taken_TK = expert_TK >= 0
        cell_N = (number_T[:, None] * n_experts + expert_TK)[taken_TK]
        rows_ME = np.bincount(cell_N, minlength=len(key_M) * n_experts).reshape(-1, n_experts)
        layers.append(times_DM @ (rows_ME / times_M[:, None]).astype(np.float32))
    return np.stack(layers, 1)


def intervals(docs: Documents, k: int, n_domains: int, resamples: int = 400, seed: int = 0) -> Specialisation:
    """Specialisation of every cell with 95% intervals from documents resampled within their domains. Shares and lifts
    have the percentile interval, widened as Student's is for few documents (Hesterberg 2015, 1411.5279); that of
    information has what documents and resamples inform by chance taken off, and may lie below the value."""
    drawn_RD = resampled(docs.domain_D, n_domains, resamples, seed)
    members = [np.flatnonzero(docs.domain_D == y) for y in range(n_domains)]
    shares: list[list[Estimate]] = []
    lifts: list[list[Estimate]] = []
    informed = []
    for rows_DE in docs.rows_DLE.transpose(1, 0, 2):
        count_RYE = np.stack([drawn_RD[:, of_D] @ rows_DE[of_D] for of_D in members], 1)
        domain_RY, expert_RE, all_R = count_RYE.sum(2), count_RYE.sum(1), count_RYE.sum((1, 2), dtype=np.float64)
        # How much the layer informs: the entropies of domain and expert less the joint one.
        bits_R = log_sum(count_RYE.reshape(len(all_R), -1)) - log_sum(domain_RY) - log_sum(expert_RE)
        bits_R = (bits_R + log_sum(all_R[:, None])) / np.maximum(all_R, 1)
        chance = 2 * (bits_R[1:].mean() - bits_R[0])  # a resample has its own and that of the documents
        ends = quantiles(bits_R[None, 1:], len(docs.domain_D) - n_domains)
        informed.append((bits_R[0].clip(0), *((end[0] - chance).clip(0) for end in ends)))
        # Shares and lifts, a domain at a time, since each has as many documents as it has.
        with np.errstate(invalid="ignore", divide="ignore"):
            share_RYE = count_RYE / domain_RY[..., None]
            lift_RYE = share_RYE / (expert_RE / all_R[:, None])[:, None]
        for kept, value_RYE in ((shares, k * share_RYE), (lifts, lift_RYE)):
            kept.append([estimate(value_RYE[:, y], len(of_D)) for y, of_D in enumerate(members)])
    share, lift = (Estimate(*np.array(kept).transpose(2, 0, 1, 3)) for kept in (shares, lifts))
    return Specialisation(share, lift, Estimate(*np.array(informed).T))


def resampled(domain_D: np.ndarray, n_domains: int, resamples: int, seed: int) -> np.ndarray:
    """How often each document is drawn, (1 + R, Dc) float32: once, and then in every resample with replacement from its
    domain's."""
    generator = np.random.default_rng(seed)
    drawn_RD = np.ones((1 + resamples, len(domain_D)), np.float32)
    for y in range(n_domains):
        of_D = np.flatnonzero(domain_D == y)
        if len(of_D):
            drawn_RD[1:, of_D] = generator.multinomial(len(of_D), np.full(len(of_D), 1 / len(of_D)), resamples)
    return drawn_RD


def estimate(value_RE: np.ndarray, n_docs: int) -> Estimate:
    """The first of R values, (E,), with the interval of the others."""
    return Estimate(value_RE[0].copy(), *quantiles(value_RE[1:].T, n_docs - 1))


def quantiles(value_NR: np.ndarray, freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the 95% percentile interval, (N,) each, with the quantiles moved outwards so that a normal mean of
    so many degrees of freedom would have Student's interval. NaN without any."""
    if freedom < 1:
        return (np.full(len(value_NR), np.nan),) * 2
    outer = scipy.stats.norm.cdf(np.sqrt((freedom + 1) / freedom) * scipy.stats.t.ppf(0.025, freedom))
    last = value_NR.shape[1] - 1
    ranks = int(np.floor(outer * last)), int(np.ceil((1 - outer) * last))
    ordered_NR = np.sort(np.ascontiguousarray(value_NR), axis=1)  # of float32 several times as fast as a partition
    return ordered_NR[:, ranks[0]].copy(), ordered_NR[:, ranks[1]].copy()


def log_sum(count: np.ndarray) -> np.ndarray:
    """sum c log2 c over the last axis, summed in float64."""
    return (count * np.log2(np.maximum(count, 1))).sum(-1, dtype=np.float64)


def deviation(docs: Documents, of_tokens: bool = False) -> np.ndarray:
    """What each document gives an expert above what is to be expected, (Dc, L, E) float32: of its rows the share that
    the expert has of all; or what its tokens' ids would have it."""
    if of_tokens:
        assert docs.expected_DLE is not None
        return docs.rows_DLE - docs.expected_DLE
    rows_LE = docs.rows_DLE.sum(0, dtype=np.float64)
    share_LE = (rows_LE / np.maximum(rows_LE.sum(-1, keepdims=True), 1)).astype(np.float32)
    return docs.rows_DLE - share_LE * docs.rows_DLE.sum(-1, keepdims=True)


def permuted(
    deviation_DLE: np.ndarray,
    domain_D: np.ndarray,
    n_domains: int,
    resamples: int = 500,
    seed: int = 0,
    stratum_D: np.ndarray | None = None,
) -> Tested:
    """Every domain's sum of deviations against what it is when documents are dealt each other's labels: z by the exact
    mean and deviation of that null (sampling without replacement), p by the largest z of any cell in each deal
    (Westfall & Young 1993, single step), so that all cells hold together, whatever hangs together. In strata, such as
    formats, labels are dealt within each alone: what domains have through them is no evidence then."""
    shape = deviation_DLE.shape[1:]
    dev_DN = deviation_DLE.reshape(len(domain_D), -1)
    stratum_D = np.zeros_like(domain_D) if stratum_D is None else np.unique(stratum_D, return_inverse=True)[1]
    # The null's mean and deviation by domain and cell.
    label_YD = (domain_D == np.arange(n_domains)[:, None]).astype(np.float32)
    in_GD = (stratum_D == np.arange(stratum_D.max() + 1)[:, None]).astype(np.float32)
    size_G = in_GD.sum(1)
    mean_GN = in_GD @ dev_DN / size_G[:, None]
    dev_DN = dev_DN - mean_GN[stratum_D]
    spread_GN = in_GD @ dev_DN**2 / np.maximum(size_G - 1, 1)[:, None]
    size_YG = label_YD @ in_GD.T
    scale_YN = np.sqrt((size_YG * (1 - size_YG / size_G)) @ spread_GN)
    inverse_YN = np.where(scale_YN > ROUNDING, 1 / np.maximum(scale_YN, ROUNDING), 0).astype(np.float32)
    z_YN = (label_YD @ dev_DN) * inverse_YN
    # The largest z of every deal.
    generator = np.random.default_rng(seed)
    largest_R = np.empty(resamples)
    at_once = max(1, CHUNK // z_YN.size)
    for start in range(0, resamples, at_once):
        dealt_RD = dealt(domain_D, stratum_D, min(at_once, resamples - start), generator)
        label_RYD = (dealt_RD[:, None] == np.arange(n_domains)[:, None]).astype(np.float32)
        z_RYN = (label_RYD.reshape(-1, len(domain_D)) @ dev_DN).reshape(-1, *z_YN.shape) * inverse_YN
        largest_R[start : start + at_once] = z_RYN.max((1, 2))
    at_least_YN = resamples - np.searchsorted(np.sort(largest_R), z_YN - 1e-5, side="left")
    by_layer = lambda value_YN: value_YN.reshape(n_domains, *shape).transpose(1, 0, 2)
    return Tested(by_layer(z_YN), by_layer((1 + at_least_YN) / (1 + resamples)))


def dealt(domain_D: np.ndarray, stratum_D: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """The labels dealt anew within every stratum, (R, Dc)."""
    order_RD = np.argsort(stratum_D + generator.random((resamples, len(domain_D))), axis=1)  # stratum by stratum
    dealt_RD = np.empty(order_RD.shape, domain_D.dtype)
    dealt_RD[:, np.argsort(stratum_D, kind="stable")] = domain_D[order_RD]
    return dealt_RD


def names(
    docs: Documents,
    k: int,
    n_domains: int,
    level: float = LEVEL,
    least: float = LEAST,
    seed: int = 0,
    stratum_D: np.ndarray | None = None,
) -> list[Name]:
    """The experts that may be called after a domain, the one of the highest lift where there are several: p at most
    `level` over all layers, experts and domains, lift at least `least`, and the interval of the lift above 1."""
    tested = permuted(deviation(docs), domain_D=docs.domain_D, n_domains=n_domains, seed=seed, stratum_D=stratum_D)
    earned_LYE = tested.p <= level
    if not earned_LYE.any():
        return []
    # Beyond what the tokens' ids explain.
    p_LYE = np.full_like(tested.p, np.nan)
    if docs.expected_DLE is not None:
        p_LYE = permuted(deviation(docs, of_tokens=True), docs.domain_D, n_domains, seed=seed, stratum_D=stratum_D).p
    of = intervals(docs, k, n_domains, seed=seed)
    lift_LYE = np.where(earned_LYE & (of.lift.value >= least) & (of.lift.low > 1), of.lift.value, 0)
    named = []
    for layer, expert in np.argwhere(lift_LYE.max(1) > 0):
        cell = layer, lift_LYE[layer, :, expert].argmax(), expert
        numbers = [float(array[cell]) for array in (*of.share, *of.lift, tested.p, p_LYE)]
        named.append(Name(int(layer), int(expert), int(cell[1]), *numbers))
    return named
