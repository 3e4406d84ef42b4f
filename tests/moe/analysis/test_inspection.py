"""Claims about what a page says of a trace, held against counting by hand."""

from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest

from moe.analysis import inspection
from moe.analysis.inspection import inspect
from moe.analysis.trace import Trace
from moe.errors import BadInput
from tests.planted_traces import WINDOW, random_routes, write_trace

T, L, E, K = 640, 3, 6, 2


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    rng = np.random.default_rng(1)
    expert_TLK = random_routes(T, L, E, K)
    expert_TLK[::7, 1, 1] = -1  # dropped
    expert_TLK[:, 2] = np.where(expert_TLK[:, 2] == 4, 3, expert_TLK[:, 2])  # a dead one, and some that take 3 twice
    domain_T = np.repeat(rng.integers(0, 3, T // WINDOW), WINDOW)
    token_T = np.minimum(rng.geometric(0.12, T), 40)
    folder = tmp_path_factory.mktemp("trace") / "t"
    return write_trace(folder, expert_TLK, domain=domain_T, token=token_T, domains=["a", "b", "c"], n_experts=[E] * L)


@pytest.fixture(scope="module")
def seen(trace):
    return inspect(trace)


def test_rows_by_domain_are_those_that_a_loop_counts(trace, seen):
    domains = [("a", "b", "c").index(name) for name in trace.table("tokens")["domain"].to_pylist()]
    for i, view in enumerate(seen.layers):
        by_hand = np.zeros((3, E), int)
        for t, row in enumerate(trace.experts()[:, i]):
            for e in row:
                if e >= 0:
                    by_hand[domains[t], e] += 1
        assert view.rows_YE.tolist() == by_hand.tolist()
        assert view.rows_YE.tolist() == trace.counts[i].tolist()
        assert view.metrics.max_vio == pytest.approx(by_hand.sum(0).max() / by_hand.sum(0).mean() - 1)
    assert seen.layers[2].metrics.dead == 1
    dropped = len(range(0, T, 7))
    assert seen.layers[1].metrics.dropped == pytest.approx(dropped / (K * T))


@pytest.mark.parametrize("name", ["taken", "predicted"])
def test_the_tokens_of_a_card_are_those_with_the_highest_lift(trace, seen, name):
    tokens = trace.table("tokens")["token" if name == "taken" else "next"].to_pylist()
    expert_TK = trace.experts()[:, 0]
    rows = Counter((token, int(e)) for token, row in zip(tokens, expert_TK, strict=True) for e in row)
    of_token, of_expert, total = Counter(), Counter(), sum(rows.values())
    for (token, e), n in rows.items():
        of_token[token] += n
        of_expert[e] += n
    occurs = Counter(tokens)
    for e in range(E):
        lifts = {
            token: rows[token, e] / of_token[token] / (of_expert[e] / total)
            for token in occurs
            if occurs[token] >= inspection.COMMON and rows[token, e] >= inspection.TAKEN
        }
        best = sorted((lift for lift in lifts.values() if lift > 1), reverse=True)[: inspection.TOP]
        top = getattr(seen.layers[0], name)
        taken = [(t, n, lift) for t, n, lift in zip(top.token[e], top.rows[e], top.lift[e], strict=True) if t >= 0]
        assert [lift for _, _, lift in taken] == pytest.approx(best)
        assert all(lifts[t] == pytest.approx(lift) and rows[t, e] == n for t, n, lift in taken)
        assert taken, "some token is preferred by chance"


def test_partners_of_random_routing_go_together_as_often_as_chance_has_it(tmp_path):
    view = inspect(write_trace(tmp_path / "t", random_routes(64_000, 2, 8, 3))).layers[0]
    assert view.together.expert.shape == (8, 8)
    assert (np.sort(view.together.expert, 1)[:, 0] == -1).all(), "an expert is not its own partner"
    assert np.abs(view.together.ratio[:, :7] - 1).max() < 0.05
    assert np.abs(view.onward.ratio - 1).max() < 0.05
    assert view.onward.expert.shape == (8, 8)


def test_experts_that_always_go_together_are_partners_and_the_next_layers_follow(tmp_path):
    first_T = np.random.default_rng(0).integers(0, 4, 3200)
    expert_TLK = np.stack([np.stack([first_T, first_T + 4], -1), np.stack([7 - first_T, 3 - first_T], -1)], 1)
    seen = inspect(write_trace(tmp_path / "t", expert_TLK))
    layer = seen.layers[0]
    assert layer.together.expert[:, 0].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    # One of 7 others by chance, always here.
    assert layer.together.ratio[:, 0] == pytest.approx(7.0, rel=0.1)
    assert [set(pair) for pair in layer.onward.expert[:4, :2].tolist()] == [{7, 3}, {6, 2}, {5, 1}, {4, 0}]
    assert layer.onward.ratio[:, 0] == pytest.approx(4.0, rel=0.1)
    assert seen.layers[1].onward is None
    single = inspect(write_trace(tmp_path / "one", expert_TLK[..., :1], n_experts=[8, 8]))
    assert single.layers[0].together is None


def test_above_64_experts_the_strongest_partners_are_kept(tmp_path):
    layer = inspect(write_trace(tmp_path / "t", random_routes(6400, 1, 80, 4))).layers[0]
    assert layer.together.expert.shape == (80, inspection.PARTNERS)
    assert (np.diff(layer.together.ratio, axis=1) <= 0).all()


def test_a_passage_is_of_a_token_that_the_expert_takes_and_no_two_are_the_same(trace, seen):
    for i, view in enumerate(seen.layers):
        for e, rows in enumerate(view.contexts_EC):
            rows = rows[rows >= 0]
            assert all(e in trace.experts()[row, i] for row in rows)
            assert len(rows) == min(inspection.CONTEXTS, (trace.experts()[:, i] == e).sum())
    assert (seen.layers[2].contexts_EC[4] == -1).all(), "a dead expert has none"


def test_a_long_trace_is_inspected_in_part_by_whole_windows_from_beginning_to_end(trace):
    part = inspect(trace, most=100)
    assert len(part.tokens.token) == 96
    windows = np.unique(part.tokens.window)
    assert (windows[0], windows[-1], len(windows)) == (0, T // WINDOW - 1, 6)
    rows = np.flatnonzero(np.isin(trace.table("tokens")["window"].to_numpy(), windows))
    assert part.routes.expert_TLK.tolist() == trace.experts()[rows].tolist()
    assert part.sampling == "96 of the 640 tokens of planted windows"
    assert sum(part.layers[0].rows_YE.sum(0)) == 96 * K


def test_a_router_without_scores_has_no_entropy_and_no_margin(tmp_path):
    nan = np.full((160, 1), np.nan)
    (view,) = inspect(write_trace(tmp_path / "t", random_routes(160, 1, 4, 2), margin_TL=nan, entropy_TL=nan)).layers
    assert np.isnan([view.entropy, view.margin, view.close]).all()


def test_entropy_is_a_share_of_what_no_preference_has(tmp_path):
    routes = random_routes(160, 1, 4, 2)
    (view,) = inspect(write_trace(tmp_path / "t", routes, entropy_TL=np.full((160, 1), np.log(4)))).layers
    assert view.entropy == pytest.approx(1, abs=1e-3)
    assert view.close == 0
    (view,) = inspect(write_trace(tmp_path / "u", routes, margin_TL=np.linspace(0, 0.02, 160)[:, None])).layers
    assert view.close == pytest.approx(0.5, abs=0.02)


def test_routes_that_cannot_be_are_refused(tmp_path):
    trace = write_trace(tmp_path / "t", random_routes(32, 2, 6, 2))
    table, schema = trace.table("routes").to_pydict(), trace.files["routes"].schema_arrow
    for row, sentence in (([1, 9], "names expert 9 in layer 1, which has 6"), ([1, None], "a token has no experts")):
        table["expert"][7] = row
        pyarrow.parquet.write_table(pyarrow.table(table, schema), tmp_path / "t" / "routes.parquet")
        with pytest.raises(BadInput, match=sentence):
            inspect(Trace(tmp_path / "t"))


def test_a_trace_without_tokens_is_refused(tmp_path):
    trace = write_trace(tmp_path / "t", random_routes(16, 1, 4, 2))
    trace.n_tokens = 0
    with pytest.raises(BadInput, match="has no tokens"):
        inspect(trace)
