"""Text whose domains are known, and routers of which it is known what they go by: to try metrics on.

A document is of one domain. So many of its tokens (`separable`) come from the domain's own words, the others from words
that all domains share; every fourth is a mark of the document's format, which is its domain's (`follows` says how
often) or any; and documents repeat themselves, so that the tokens of one are more alike than those of two. Words are
Zipf-distributed.

A planted router splits its experts into as many groups as there are domains, and a token goes to K of a group. Which
group is what the router goes by. Nothing is trained: what each expert is for is known.

Letters beyond the glossary: Dc documents, G groups, W words of a part of the vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHARED, OWN, MARKS = 200, 50, 4  # words that all domains share, of each domain, and of each format
EVERY = 4  # a mark of the format is every so many tokens
REPEATED = 0.3  # of the words, share that is one of the document's first
FIRST = 8  # words that it repeats
SPAN = 16  # positions that are alike to a router that goes by position
SURE = 10.0  # logits by which a router prefers a group
ROUTERS = ("domain", "words", "token", "frequency", "next", "format", "document", "position", "popular", "random")


@dataclass(frozen=True)
class Recipe:
    """How a corpus is made."""

    documents: int = 100
    separable: float = 0.5  # share of the words that are the domain's own
    follows: float = 0.25  # how often the format is the domain's; 1 / domains: as often as any
    even: bool = True  # domains of equal size; otherwise each has half the documents of the one before, 2 at least
    domains: int = 4
    shortest: int = 32  # tokens of a document, `FIRST` at least, up to
    longest: int = 96


class Corpus(NamedTuple):
    """Tokens, (T,) int64 each: document, position in it, domain and format of the document, the token and the next."""

    doc_T: Tensor
    pos_T: Tensor
    domain_T: Tensor
    format_T: Tensor
    token_T: Tensor
    next_T: Tensor


class Routes(NamedTuple):
    """What a planted router did: experts (T, K) int64, and the probabilities (T, E) that it drew them from."""

    expert_TK: Tensor
    prob_TE: Tensor


def corpus(recipe: Recipe, seed: int) -> Corpus:
    """Draw a corpus. Token ids are the shared words, then each domain's own, then each format's marks."""
    generator = np.random.default_rng(seed)
    n, y = recipe.documents, recipe.domains
    # Documents: domain, format and length.
    domain_D = generator.permutation(sizes(recipe))
    format_D = np.where(
        generator.random(n) < (recipe.follows - 1 / y) / (1 - 1 / y), domain_D, generator.integers(y, size=n)
    )
    length_D = generator.integers(recipe.shortest, recipe.longest + 1, n)
    doc_T = np.repeat(np.arange(n), length_D)
    start_T = np.repeat(np.cumsum(length_D) - length_D, length_D)
    pos_T = np.arange(len(doc_T)) - start_T
    domain_T, format_T = domain_D[doc_T], format_D[doc_T]
    # Words: shared or the domain's own; some are again one of the document's first.
    own_T = SHARED + OWN * domain_T + zipf(generator, OWN, len(doc_T))
    word_T = np.where(generator.random(len(doc_T)) < recipe.separable, own_T, zipf(generator, SHARED, len(doc_T)))
    again_T = start_T + generator.integers(FIRST, size=len(doc_T))
    word_T = np.where((generator.random(len(doc_T)) < REPEATED) & (pos_T >= FIRST), word_T[again_T], word_T)
    # Marks of the format.
    mark_T = SHARED + OWN * y + MARKS * format_T + generator.integers(MARKS, size=len(doc_T))
    token_T = np.where(pos_T % EVERY == 0, mark_T, word_T)
    columns = (doc_T, pos_T, domain_T, format_T, token_T, np.roll(token_T, -1))
    return Corpus(*(torch.from_numpy(column.astype(np.int64)) for column in columns))


def sizes(recipe: Recipe) -> np.ndarray:
    """The domain of every document, (Dc,), in order."""
    if recipe.even:
        return np.arange(recipe.documents) % recipe.domains
    counts = [max(2, recipe.documents >> (y + 1)) for y in range(1, recipe.domains)]
    return np.repeat(np.arange(recipe.domains), [recipe.documents - sum(counts), *counts])


def zipf(generator: np.random.Generator, words: int, count: int) -> np.ndarray:
    """Words, (count,), drawn with probabilities that go as 1 / rank."""
    share_W = 1 / np.arange(1, words + 1)
    return generator.choice(words, count, p=share_W / share_W.sum())


def route(
    text: Corpus, router: str, recipe: Recipe, seed: int, noise: float = 0.5, n_experts: int = 16, k: int = 2
) -> Routes:
    """What a router of `ROUTERS` does with a corpus: a token goes to K experts of its group (expert i is in group
    i mod G), drawn without replacement (Gumbel-top-K, 1903.06059). So many tokens (`noise`) go to any expert, whatever
    they are.

    domain: the document's domain · words: the token, and the words of a domain go together · token: the token, and each
    id has a group of its own, drawn for it · frequency: how common the token is · next: the token that follows, as
    `token` · format: the document's format · document: the document, as `token` · position: where in the document ·
    popular: nothing, and experts are chosen as 1 / rank · random: nothing."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens, n_groups = len(text.token_T), recipe.domains
    expert_E = torch.arange(n_experts)
    if router in ("popular", "random"):
        logits_E = -(expert_E + 1.0).log() if router == "popular" else torch.zeros(n_experts)
        logits_TE = logits_E.expand(n_tokens, n_experts)
    else:
        sure_T = torch.rand(n_tokens, generator=generator) >= noise
        group_T = groups(text, router, n_groups, generator)
        logits_TE = SURE * ((expert_E % n_groups == group_T[:, None]) & sure_T[:, None])
    gumbel_TE = -torch.empty(n_tokens, n_experts).exponential_(generator=generator).log()
    return Routes((logits_TE + gumbel_TE).topk(k).indices, logits_TE.softmax(-1))


def groups(text: Corpus, router: str, n_groups: int, generator: torch.Generator) -> Tensor:
    """The group of experts that a router prefers for each token, (T,)."""
    any_group = lambda key_T: torch.randint(n_groups, (int(key_T.max()) + 1,), generator=generator)[key_T]
    whose_T = (text.token_T - SHARED).div(OWN, rounding_mode="floor")  # the domain of a domain's own word
    match router:
        case "domain":
            return text.domain_T
        case "format":
            return text.format_T
        case "document":
            return any_group(text.doc_T)
        case "words":
            return torch.where((whose_T >= 0) & (whose_T < n_groups), whose_T, any_group(text.token_T))
        case "token":
            return any_group(text.token_T)
        case "next":
            return any_group(text.next_T)
        case "position":
            return text.pos_T // SPAN % n_groups
        case "frequency":  # as many tokens in each group, the most common words in the first
            count_V = text.token_T.bincount()
            common_V = count_V.argsort(descending=True, stable=True)
            before_V = torch.empty_like(count_V).index_copy(
                0, common_V, count_V[common_V].cumsum(0) - count_V[common_V]
            )
            return (before_V * n_groups // len(text.token_T))[text.token_T]
    raise AssertionError(f"{router} is not one of {ROUTERS}")
