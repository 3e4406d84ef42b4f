"""How far a page may believe what its experts take: intervals, chance, and names, of an `Inspection`'s tokens."""

from typing import NamedTuple

import numpy as np
import torch

from moe.analysis.inspection import Inspection
from moe.analysis.significance import LEVEL, Name, Specialisation, intervals, names, of_tokens
from moe.analysis.specialisation import permuted_information

DEALS = 200  # of documents' labels, for the bits that chance gives


class Evidence(NamedTuple):
    """Of every MoE layer."""

    documents: int
    of: Specialisation  # shares, lifts and bits with their intervals over documents
    chance_L: np.ndarray  # bits of domain that 95% of the deals of documents' labels stay under
    names: list[Name]  # experts that take a domain's documents more than chance, over all cells at once

    def earned(self) -> list[Name]:
        """Those of the names that hold beyond what the tokens' ids explain: the ones that may be written down."""
        return [name for name in self.names if name.p_of_tokens <= LEVEL]


def weigh(inspection: Inspection) -> Evidence | None:
    """The evidence, or None where there is nothing to compare: fewer than two domains with two documents each."""
    tokens, about = inspection.tokens, inspection.about
    domain_D = tokens.domain[np.unique(tokens.doc, return_index=True)[1]]
    if (np.bincount(domain_D) >= 2).sum() < 2:
        return None
    widest, n_domains = max(about.n_experts), len(about.domains)
    expert_TLK = inspection.routes.expert_TLK.astype(np.int64)
    docs = of_tokens(tokens.doc, tokens.domain, expert_TLK, widest, tokens.token)
    key_D = torch.from_numpy(docs.domain_D)
    deals = [
        permuted_information(torch.from_numpy(rows_DE), key_D, n_domains, DEALS)
        for rows_DE in docs.rows_DLE.transpose(1, 0, 2)
    ]
    chance_L = np.quantile(np.stack(deals), 0.95, axis=1)
    return Evidence(len(domain_D), intervals(docs, about.k, n_domains), chance_L, names(docs, about.k, n_domains))
