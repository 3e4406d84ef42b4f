"""Claims about what metrics make of planted routers: ranks, names and sizes, on lines made by hand and a few draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.stats import recovery
from experiments.stats.recovery import DECISIVE, SETTINGS, Line, Setting, by_size
from moe.analysis import planted
from moe.analysis.caveats import CAVEATS
from moe.analysis.planted import ROUTERS, Recipe
from moe.analysis.significance import Name

SMALL = Setting(Recipe(documents=24))


def line(metric="lift of a domain", setting=DECISIVE, above=None, right=None, wrong=None):
    """A line in which all is well, but for what is given."""
    recipe = setting.recipe
    ranks = {router: 1.0 for router in ROUTERS if router != "domain"} | (above or {})
    return Line(
        metric, recipe.documents, 60.0 * recipe.documents, recipe.separable, recipe.follows, recipe.even, setting.noise,
        20, dict.fromkeys(ROUTERS, 0.0), ranks, right, wrong,
    )  # fmt: skip


@pytest.fixture(scope="module")
def lines():
    return {line.metric: line for line in recovery.simulate(2, 0, (SMALL,))}


def test_a_line_per_metric_and_setting_the_same_every_time(lines):
    assert list(lines) == list(CAVEATS)
    assert list(lines.values()) == list(recovery.simulate(2, 0, (SMALL,)))
    assert len(set(SETTINGS)) == len(SETTINGS)
    assert {line.documents for line in lines.values()} == {24}


def test_lift_and_information_rank_domains_above_all_and_a_share_is_fooled_by_a_skewed_load(lines):
    assert set(lines["lift of a domain"].above.values()) == {1.0}
    assert set(lines["bits of domain"].above.values()) == {1.0}
    assert lines["share of a domain"].above["popular"] == 0
    assert lines["share of a domain"].above["random"] == 1


def test_who_does_what_is_asked_is_not_ranked_against_itself(lines):
    for metric, caveat in CAVEATS.items():
        truth = recovery.TRUTH[caveat.asks or "domain"]
        assert set(lines[metric].above) == set(ROUTERS) - set(truth)
        assert set(lines[metric].score) == set(ROUTERS)


def test_above_is_the_share_of_the_draws_in_which_the_lowest_that_does_it_is_above():
    score_RPS = np.zeros((4, len(ROUTERS), len(recovery.SCORES)))
    read = list(recovery.SCORES).index("lift of a token read")
    for router, values in {"words": (3, 3, 3, 1), "token": (3, 2, 3, 3), "frequency": (3, 3, 3, 3)}.items():
        score_RPS[:, ROUTERS.index(router), read] = values
    score_RPS[:, ROUTERS.index("next"), read] = (1, 2, 1, 2)  # above in the first and third: a tie is not above
    judged = np.zeros((4, len(ROUTERS), len(recovery.NAMES), 2))
    made = {line.metric: line for line in recovery.lines(SMALL, 100.0, score_RPS, judged)}
    assert made["lift of a token read"].above["next"] == 0.5
    assert made["lift of a token read"].above["random"] == 1
    assert made["lift of a token read"].score["next"] == 1.5


def test_a_name_is_right_where_the_router_goes_by_domain_and_the_expert_is_of_that_one():
    name = lambda expert, domain: Name(0, expert, domain, *[0.0] * 8)
    named = [name(1, 1), name(6, 2), name(7, 0)]
    assert recovery.judged(named, "domain") == (2 / 16, 1)
    assert recovery.judged(named, "words") == (0, 3)


def test_shares_and_lifts_are_over_chance_and_of_common_tokens_only():
    key_T = torch.tensor([0] * 40 + [1] * 40 + [2])  # the last is too rare
    expert_TK = torch.tensor([[0, 1]] * 40 + [[2, 3]] * 40 + [[4, 5]])
    assert recovery.vocabulary(key_T, expert_TK, recovery.share) == 1
    assert recovery.vocabulary(key_T[:30] * 0, expert_TK[:30], recovery.share) == 1
    assert recovery.vocabulary(key_T[80:], expert_TK[80:], recovery.share) == 0


def test_random_choices_go_together_by_chance():
    recipe = Recipe(documents=1000)
    text = planted.corpus(recipe, 0)
    seen = recovery.look(text, "random", Setting(recipe), 0)
    assert recovery.together(seen) < 0.05
    assert recovery.largest_share(seen) == pytest.approx(1, abs=0.1)
    assert recovery.largest_lift(seen) == pytest.approx(1, abs=0.1)


def test_a_metric_is_fooled_by_routers_that_it_ranks_too_high_too_often():
    assert recovery.fooled(line(above={"words": 0.94, "next": 0.95})) == {"words": 0.94}
    assert not recovery.is_right(line(above={"words": 0.94}))
    assert recovery.is_right(line())


def test_names_are_right_if_nearly_all_experts_have_theirs_and_few_have_false_ones():
    made = lambda right, **wrong: line("names", right=right, wrong=dict.fromkeys(ROUTERS, 0.0) | wrong)
    assert recovery.is_right(made(0.95, words=0.8))
    assert not recovery.is_right(made(0.95, words=0.9))
    assert recovery.fooled(made(0.95, words=0.9)) == {"words": 0.9}
    assert not recovery.is_right(made(0.94))


def test_what_is_needed_is_the_size_from_which_on_it_is_right():
    sizes = (12, 25, 50, 100)
    bad = {"words": 0.0}
    sweep = lambda *right: [
        line(setting=by_size(n, 0.5), above={} if ok else bad) for n, ok in zip(sizes, right, strict=True)
    ]
    harder = line(setting=Setting(Recipe(documents=200, follows=1.0)), above=bad)  # no part of the sweep
    needed = lambda *right: recovery.needed([*sweep(*right), harder], "lift of a domain", 0.5)
    assert needed(True, True, True, True).documents == 12
    assert needed(True, False, True, True).documents == 50
    assert needed(True, True, True, False) is None
    assert recovery.needed(sweep(True, True, True, True), "lift of a domain", 0.8) is None


def test_answers_are_of_the_decisive_setting_and_of_what_is_asked():
    lines = [line(), line("names", right=0.5, wrong={}), line("MaxVio", above={"random": 0.0})]
    lines.append(replace(line("bits of domain"), documents=100))
    assert recovery.answers(lines) == {"lift of a domain": True, "names": False}
