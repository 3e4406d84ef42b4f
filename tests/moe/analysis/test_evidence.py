"""Claims about what a page may believe of a trace."""

import numpy as np
import pytest

from moe.analysis.evidence import weigh
from moe.analysis.inspection import inspect
from moe.analysis.significance import LEVEL
from tests.planted_traces import WINDOW, random_routes, write_trace

DOCS, SIZE = 60, 4 * WINDOW
T = DOCS * SIZE


def _weigh(folder, expert_TLK, domain_D, **columns):
    columns = {"doc": np.repeat(np.arange(DOCS), SIZE), "domain": np.repeat(domain_D, SIZE)} | columns
    return weigh(inspect(write_trace(folder, expert_TLK, domains=["a", "b", "c"], **columns)))


@pytest.fixture
def domain_D():
    return np.random.default_rng(0).integers(0, 3, DOCS)


def test_an_expert_of_a_domain_is_named_after_it_and_random_ones_are_not(tmp_path, domain_D):
    expert_TLK = random_routes(T, 2, 8, 2)
    domain_T = np.repeat(domain_D, SIZE)
    # In layer 1 expert 6 takes half of domain b's tokens, and else nothing.
    expert_TLK[:, 1] = np.where(expert_TLK[:, 1] == 6, 7, expert_TLK[:, 1])
    chosen_T = (domain_T == 1) & (np.random.default_rng(1).random(T) < 0.5)
    expert_TLK[chosen_T, 1, 0] = 6
    expert_TLK[chosen_T & (expert_TLK[:, 1, 1] == 6), 1, 1] = 0
    token_T = np.random.default_rng(2).integers(0, 40, T)
    evidence = _weigh(tmp_path / "t", expert_TLK, domain_D, token=token_T)
    assert [(name.layer, name.expert, name.domain) for name in evidence.earned()] == [(1, 6, 1)]
    (name,) = evidence.earned()
    rows = (expert_TLK[:, 1] == 6).sum() / (2 * T)
    lift = (expert_TLK[domain_T == 1, 1] == 6).sum() / (2 * (domain_T == 1).sum()) / rows
    assert name.lift == pytest.approx(lift, rel=1e-5)
    assert name.lift_low < lift < name.lift_high
    assert evidence.documents == DOCS
    bits = evidence.of.information
    assert bits.value[0] < evidence.chance_L[0], "the other layer tells no more than dealt labels do"
    assert bits.low[1] > evidence.chance_L[1]


def test_an_expert_that_goes_by_tokens_is_not_written_down_after_the_domain_that_has_them(tmp_path, domain_D):
    rng = np.random.default_rng(3)
    domain_T = np.repeat(domain_D, SIZE)
    token_T = np.where(rng.random(T) < 0.5, 100 + domain_T, rng.integers(0, 40, T))
    expert_TLK = random_routes(T, 1, 8, 1)
    expert_TLK[:, 0, 0] = np.where(token_T == 101, 6, np.where(expert_TLK[:, 0, 0] == 6, 5, expert_TLK[:, 0, 0]))
    evidence = _weigh(tmp_path / "t", expert_TLK, domain_D, token=token_T)
    assert (6, 1) in [(name.expert, name.domain) for name in evidence.names]
    assert all(name.p_of_tokens > LEVEL for name in evidence.names if name.expert == 6)
    assert evidence.earned() == []


def test_without_two_domains_of_two_documents_there_is_nothing_to_compare(tmp_path):
    routes = random_routes(T, 1, 8, 2)
    assert _weigh(tmp_path / "one", routes, np.zeros(DOCS, int)) is None
    assert _weigh(tmp_path / "single", routes, np.array([1, *[0] * (DOCS - 1)])) is None
    assert _weigh(tmp_path / "two", routes, np.array([1, 1, *[0] * (DOCS - 2)])) is not None
