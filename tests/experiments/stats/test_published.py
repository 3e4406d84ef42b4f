"""Claims about published numbers beside predictions: what is fitted fits, and what is not is told as it is."""

import pytest

from experiments import simulate as command
from experiments.stats import published
from experiments.stats.published import Row


@pytest.fixture(scope="module")
def rows():
    return published.rows(command.machines(), command.models())


def _row(low, predicted, high=None, fitted=""):
    return Row("w", "m", "s", low, high or low, predicted, fitted, "source")


def test_an_error_is_relative_to_the_nearer_end_of_what_is_published():
    assert _row(100, 110).error == pytest.approx(0.1)
    assert _row(100, 90).error == pytest.approx(-0.1)
    assert _row(1.5, 2.0, 3.0).error == 0
    assert _row(1.5, 1.2, 3.0).error == pytest.approx(-0.2)
    assert _row(1.5, 3.3, 3.0).error == pytest.approx(0.1)


def test_a_verdict_is_fitted_near_or_missed():
    assert _row(100, 114).verdict == "within 15%"
    assert _row(100, 116).verdict == _row(100, 84).verdict == "missed"
    assert _row(100, 100, fitted="launch").verdict == "fitted: launch"


def test_every_constant_that_was_fitted_fits_its_row(rows):
    fitted = [row for row in rows if row.fitted]
    assert len(fitted) == 9
    assert len({(row.machine, row.fitted) for row in fitted}) == len(fitted), "one constant, one row"
    assert [(row.what, row.error) for row in fitted if abs(row.error) > 0.01] == []


def test_all_published_numbers_of_the_page_are_there(rows):
    """Of DeepEP's first version, as its page has them: 12 latencies and 8 bandwidths, and 6 of the second."""
    latencies = [row.low for row in rows if row.what.startswith("low-latency")]
    assert latencies == [77, 118, 155, 173, 192, 194, 114, 195, 273, 314, 369, 360]
    assert [row.low for row in rows if row.unit == "GB/s" and row.source == published.V1] == [
        153, 158, 43, 43, 58, 57, 51, 50,
    ]  # fmt: skip
    assert [row.low for row in rows if row.source == published.V2] == [90, 81, 61, 61, 726, 740]
    deepseek = next(row for row in rows if row.machine == "h800" and row.unit == "tokens/s")
    assert deepseek.low * 6 * 37e9 / 1e12 == pytest.approx(343, abs=1)


def test_all_to_alls_that_nothing_was_fitted_to_are_predicted(rows):
    free = [row for row in rows if row.source in (published.V1, published.V2) and not row.fitted]
    assert len(free) == 22
    assert [(row.what, row.error) for row in free if row.verdict != "within 15%"] == []


def test_misses_stay_in_the_table(rows):
    missed = {(row.machine, row.what) for row in rows if row.verdict == "missed"}
    assert ("h100", "dispatch, 2 GPUs, eager") in missed
    assert ("h100", "qwen3-30b-a3b, 16 GPUs, fp8") in missed
