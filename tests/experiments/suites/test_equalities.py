"""Claims about the table of equalities: what it calls equal is, and a mistake shows."""

import pytest
import torch

from experiments.suites import equalities
from experiments.suites.cases import Wrong
from moe.config.parallel import Layout


def test_all_layouts_of_2_and_4_ranks_are_in_it():
    fitting = {
        Layout(n // shard, shard, ep)
        for n in (2, 4)
        for shard in (1, 2, 4)
        for ep in (1, 2, 4)
        if n % shard == 0 and shard % ep == 0 and n >= shard
    }
    assert set(equalities.LAYOUTS) == fitting
    asked = equalities.settings(torch.device("cpu"), True, 1)
    assert len(list(equalities.cases(asked))) == len(asked.routers) * (len(fitting) + 1)
    assert equalities.LAYOUTS[-2] == Layout(2, 2, 2)


def test_a_row_holds_ranks_to_one_process_and_what_differs_is_wrong(monkeypatch):
    asked = equalities.settings(torch.device("cpu"), False, 1)
    case = next(iter(equalities.cases(asked)))
    row = case.key | case.measure() | {"status": "measured"}
    assert row["gradients"] < 1e-12
    assert row["counts"]
    assert row["steps"] == 2
    assert equalities.cells(row)[-1] == "equal"
    one = equalities.alone("softmax", "torch", 2)
    wrong = equalities.Trace(
        one.losses, one.norms, {name: 2 * value for name, value in one.gradients.items()}, one.parameters, one.counts
    )
    monkeypatch.setattr(equalities, "alone", lambda *asked: wrong)
    with pytest.raises(Wrong, match=r"'gradients': 0\.5"):
        case.measure()
    equalities.local_ranks(2).end()
    equalities.local_ranks.cache_clear()


def test_a_router_has_its_largest_errors_in_one_line():
    row = {"router": "a", "backend": "torch", "status": "measured", "loss": 1e-16, "gradients": 2e-15, "norm": 0.0}
    row |= {"parameters": 1e-15, "counts": True}
    worse = row | {"gradients": 3e-13, "backend": "reference", "counts": False}
    assert equalities.summary([row, worse]) == [("a", "1", "1", "1e-16", "3e-13", "0e+00", "1e-15", "differ")]
    failed = {"router": "b", "status": "wrong"}
    assert equalities.summary([row | {"router": "b"}, failed])[0][:3] == ("b", "1 of 2", "")
