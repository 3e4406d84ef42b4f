"""Metrics of routing on routers of which it is known what they go by: which recover it, and where they are fooled.

A metric is asked a question that some planted routers answer with yes: do experts go by domain, by the token that is
read, by the one that follows? It is right in a draw where it ranks those above a router that does not. The question of
every control is the first: a load, or how decided a router is, should not be read as an answer to it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from moe.analysis import decisions, metrics, significance, specialisation
from moe.analysis.caveats import CAVEATS
from moe.analysis.planted import ROUTERS, Corpus, Recipe, Routes, corpus, route
from moe.analysis.significance import Documents, Name

EXPERTS, K = 16, 2
DEALS = 99  # of labels, for the information's null
COMMON = 20  # times that a token occurs before its experts are looked at
ENOUGH = 0.95  # of the draws, to be right
TRUTH = {
    "domain": ("domain",),
    "read": ("words", "token", "frequency"),
    "predicted": ("next",),
}  # who does what is asked


@dataclass(frozen=True)
class Setting:
    """A corpus, and how noisy routers are on it."""

    recipe: Recipe = field(default_factory=Recipe)
    noise: float = 0.5  # share of the tokens that go anywhere


@dataclass(frozen=True)
class Line:
    """One metric in one setting, over all draws."""

    metric: str
    documents: int
    tokens: float  # mean
    separable: float
    follows: float
    even: bool
    noise: float
    draws: int
    score: dict[str, float]  # mean, by router
    above: dict[str, float]  # share of the draws in which all that do what is asked rank above a router that does not
    right: float | None  # of names: mean share of the experts of `domain` that are called what they are for
    wrong: dict[str, float] | None  # of names: mean number that are false, by router


class Seen(NamedTuple):
    """A router's choices on a corpus, as the metrics read them."""

    text: Corpus
    routes: Routes
    docs: Documents
    rows_YE: torch.Tensor
    named: list[Name]
    named_in_formats: list[Name]


def by_size(documents: int, noise: float) -> Setting:
    """A setting of so many documents, all else at its defaults."""
    return Setting(Recipe(documents=documents), noise)


SIZES, NOISES = (12, 25, 50, 100, 200), (0.5, 0.8)
PLAIN = Setting()
DECISIVE = by_size(200, 0.5)  # what a metric that is drawn has to pass
HARDER = {  # what may fool a metric: one thing at a time
    "domains without words of their own": Setting(Recipe(separable=0.0)),
    "words are nearly all the domain's": Setting(Recipe(separable=0.9)),
    "formats often the domain's": Setting(Recipe(follows=0.6)),
    "formats always the domain's": Setting(Recipe(follows=1.0)),
    "domains of unequal size": Setting(Recipe(even=False)),
}
SETTINGS = (*(by_size(n, noise) for noise in NOISES for n in SIZES), *HARDER.values())


def simulate(draws: int, seed: int, settings: tuple[Setting, ...] = SETTINGS) -> Iterator[Line]:
    """Every metric on every router in every setting, so many draws of each."""
    for setting in settings:
        tokens, scores, names = [], [], []
        for draw in range(draws):
            text = corpus(setting.recipe, seed + draw)
            looks = [look(text, router, setting, seed + draw) for router in ROUTERS]
            tokens.append(len(text.token_T))
            scores.append([[score(seen) for score in SCORES.values()] for seen in looks])
            names.append(
                [[judged(pick(looks[i]), router) for pick in NAMES.values()] for i, router in enumerate(ROUTERS)]
            )
        yield from lines(setting, float(np.mean(tokens)), np.array(scores), np.array(names))


def lines(setting: Setting, tokens: float, score_RPS: np.ndarray, judged_RPN2: np.ndarray) -> Iterator[Line]:
    """A line per metric, of R draws, P routers, S metrics and N kinds of names."""
    for i, metric in enumerate(SCORES):
        truth = TRUTH[CAVEATS[metric].asks or "domain"]
        least_R = score_RPS[:, [ROUTERS.index(router) for router in truth], i].min(1)
        above_P = (least_R[:, None] > score_RPS[:, :, i]).mean(0)
        by_router = lambda value_P: {name: round(float(v), 4) for name, v in zip(ROUTERS, value_P, strict=True)}
        above = {router: value for router, value in by_router(above_P).items() if router not in truth}
        right, wrong = None, None
        if metric in NAMES:
            right_P, wrong_P = judged_RPN2[:, :, list(NAMES).index(metric)].mean(0).T
            right, wrong = round(float(right_P[ROUTERS.index("domain")]), 4), by_router(wrong_P)
        recipe = setting.recipe
        yield Line(
            metric, recipe.documents, tokens, recipe.separable, recipe.follows, recipe.even, setting.noise,
            len(score_RPS), by_router(score_RPS[:, :, i].mean(0)), above, right, wrong,
        )  # fmt: skip


def look(text: Corpus, router: str, setting: Setting, seed: int) -> Seen:
    """Route a corpus, and count."""
    routes = route(text, router, setting.recipe, seed, setting.noise, EXPERTS, K)
    doc_T, domain_T, token_T = (column.numpy() for column in (text.doc_T, text.domain_T, text.token_T))
    docs = significance.of_tokens(doc_T, domain_T, routes.expert_TK[:, None].numpy(), EXPERTS, token_T)
    y = setting.recipe.domains
    format_D = text.format_T.numpy()[np.unique(doc_T, return_index=True)[1]]
    return Seen(
        text,
        routes,
        docs,
        specialisation.count_by(text.domain_T, routes.expert_TK, y, EXPERTS),
        significance.names(docs, K, y, seed=seed),
        significance.names(docs, K, y, seed=seed, stratum_D=format_D),
    )


def judged(named: list[Name], router: str) -> tuple[float, float]:
    """(share of the experts that have the right name, number of false names)."""
    right = sum(router == "domain" and name.domain == name.expert % Recipe.domains for name in named)
    return right / EXPERTS, len(named) - right


def largest_share(seen: Seen) -> float:
    """The largest domain specialisation, over the chance line K / E."""
    return specialisation.key_specialisation(seen.rows_YE, K).nan_to_num().max().item() * EXPERTS / K


def largest_lift(seen: Seen) -> float:
    """The largest lift of any domain and expert."""
    return specialisation.lift(seen.rows_YE).nan_to_num().max().item()


def information(seen: Seen) -> float:
    """Bits that an expert tells of the domain."""
    return specialisation.information(seen.rows_YE)


def over_chance(seen: Seen) -> float:
    """The same in deviations of the null of labels dealt anew, above its mean."""
    rows_DE, domain_D = torch.from_numpy(seen.docs.rows_DLE[:, 0]), torch.from_numpy(seen.docs.domain_D)
    null_R = specialisation.permuted_information(rows_DE, domain_D, Recipe.domains, DEALS)
    return (information(seen) - null_R.mean()) / null_R.std()


def vocabulary(key_T: torch.Tensor, expert_TK: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The mean, over the common tokens, of the largest of their experts' shares or lifts."""
    rows_ME = specialisation.count_by(key_T, expert_TK, int(key_T.max()) + 1, EXPERTS)
    common_M = key_T.bincount() >= COMMON
    return of(rows_ME)[common_M].max(1).values.mean().item() if common_M.any() else 0.0


def share(rows_ME: torch.Tensor) -> torch.Tensor:
    """Vocabulary specialisation."""
    return specialisation.key_specialisation(rows_ME, K)


def together(seen: Seen) -> float:
    """How far co-activation is from chance: the mean over pairs of |N_ij / N_i over (K - 1) / (E - 1), less 1|."""
    ratio_EE = specialisation.co_activation(seen.routes.expert_TK, EXPERTS) * (EXPERTS - 1) / (K - 1)
    return (ratio_EE - 1)[~torch.eye(EXPERTS, dtype=torch.bool)].abs().nanmean().item()


def how_many(pick: Callable[[Seen], list[Name]]) -> Callable[[Seen], float]:
    """The number of names as a score."""
    return lambda seen: float(len(pick(seen)))


def beyond(named: list[Name]) -> list[Name]:
    """Those that tokens' ids do not explain."""
    return [name for name in named if name.p_of_tokens <= significance.LEVEL]


NAMES: dict[str, Callable[[Seen], list[Name]]] = {
    "names": lambda seen: seen.named,
    "names beyond tokens": lambda seen: beyond(seen.named),
    "names beyond tokens and formats": lambda seen: beyond(seen.named_in_formats),
}
SCORES: dict[str, Callable[[Seen], float]] = {
    "share of a domain": largest_share,
    "lift of a domain": largest_lift,
    "bits of domain": information,
    "bits over dealt labels": over_chance,
    **{name: how_many(pick) for name, pick in NAMES.items()},
    "share of a token read": lambda seen: vocabulary(seen.text.token_T, seen.routes.expert_TK, share),
    "lift of a token read": lambda seen: vocabulary(seen.text.token_T, seen.routes.expert_TK, specialisation.lift),
    "share of a token predicted": lambda seen: vocabulary(seen.text.next_T, seen.routes.expert_TK, share),
    "lift of a token predicted": lambda seen: vocabulary(seen.text.next_T, seen.routes.expert_TK, specialisation.lift),
    "co-activation": together,
    "router information": lambda seen: decisions.router_information(seen.routes.prob_TE),
    "MaxVio": lambda seen: metrics.max_violation(seen.routes.expert_TK.flatten().bincount(minlength=EXPERTS)),
    "load entropy": lambda seen: metrics.load_entropy(seen.routes.expert_TK.flatten().bincount(minlength=EXPERTS)),
}


def fooled(line: Line) -> dict[str, float]:
    """The routers that a metric does not tell from those that do what is asked, with how often it does; of names those
    with false ones, with how many."""
    if line.wrong is not None:
        return {router: value for router, value in line.wrong.items() if value > (1 - ENOUGH) * EXPERTS}
    return {router: value for router, value in line.above.items() if value < ENOUGH}


def is_right(line: Line) -> bool:
    """Whether a metric answers what it is asked in 95% of the draws; whether 95% of the experts have the right name,
    and not more than 5% a false one."""
    return not fooled(line) and (line.right is None or line.right >= ENOUGH)


def matches(line: Line, setting: Setting) -> bool:
    """Whether a line is of this setting."""
    recipe = setting.recipe
    theirs = (line.documents, line.separable, line.follows, line.even, line.noise)
    return theirs == (recipe.documents, recipe.separable, recipe.follows, recipe.even, setting.noise)


def answers(lines: Sequence[Line]) -> dict[str, bool]:
    """Whether each metric answers what it is asked, on `DECISIVE`; those of another question do not count."""
    return {line.metric: is_right(line) for line in lines if matches(line, DECISIVE) and CAVEATS[line.metric].asks}


def needed(lines: Sequence[Line], metric: str, noise: float) -> Line | None:
    """The fewest documents from which on a metric is right, as long as they get more; None where it never is."""
    sweep = [line for line in lines if line.metric == metric and matches(line, by_size(line.documents, noise))]
    enough = None
    for line in sorted(sweep, key=lambda line: -line.documents):
        if not is_right(line):
            break
        enough = line
    return enough
