"""Claims about the sentences, tables and charts of the inspector's page."""

import math

import numpy as np
import pytest

from experiments.pages.charts import Series
from experiments.pages.inspector_tables import (
    Look,
    chart,
    coverage_chart,
    distinct_chart,
    known,
    layer_table,
    serving_table,
    side_by_side,
    words,
)
from moe.analysis import placement
from moe.analysis.inspection import inspect
from tests.planted_traces import random_routes, write_trace


@pytest.fixture
def inspection(tmp_path):
    expert_TLK = random_routes(1600, 2, 8, 2)
    expert_TLK[:, 1] = np.where(expert_TLK[:, 1] == 3, 2, expert_TLK[:, 1])
    return inspect(write_trace(tmp_path / "t", expert_TLK, n_experts=[8, 8]))


def test_a_row_per_layer_has_its_numbers(inspection):
    table = layer_table(inspection)
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [row["dead"] for row in rows] == ["0", "1"]
    count_E = inspection.layers[1].rows_YE.sum(0)
    assert rows[1]["MaxVio"] == f"{count_E.max() / count_E.mean() - 1:.2f}"
    assert known(math.nan, ".2f") == "–"


def test_the_points_of_a_chart_are_in_its_csv():
    made = chart([Series("a", [0.0, 1.0], [2.0, 3.5], [2.0, 3.5], [2.0, 3.5])], "step", "loss")
    assert made.csv.splitlines() == ["curve,step,loss", "a,0,2", "a,1,3.5"]
    assert made.svg.startswith("<svg")


def test_coverage_is_of_the_most_even_and_the_most_skewed_layer_against_an_even_load(inspection):
    lines = coverage_chart(inspection.layers).csv.splitlines()
    names = dict.fromkeys(line.partition(",")[0] for line in lines[1:])
    assert list(names) == ["even", "layer 0", "layer 1"]
    assert lines[-1] == "layer 1,1,1"


def test_the_serving_table_has_the_mean_and_the_worst_layer(inspection):
    rows = {row[0]: row[1:] for row in serving_table(inspection.layers).rows}
    import torch

    loads = [
        placement.imbalance(placement.device_load(torch.from_numpy(v.rows_YE.sum(0)), 4)) for v in inspection.layers
    ]
    assert rows["4"][:2] == (f"{np.mean(loads):.2f}", f"{max(loads):.2f}")
    assert list(rows) == ["2", "4", "8"]


def test_random_experts_of_a_batch_follow_the_formula(inspection):
    rows = [line.split(",") for line in distinct_chart(inspection).csv.splitlines()[1:]]
    random = {float(x): float(y) for name, x, y in rows if name == "random"}
    measured = {float(x): float(y) for name, x, y in rows if name == "layer 0"}
    assert random[0.0] == 0.25
    assert random[2.0] == pytest.approx(1 - 0.75**4, rel=1e-5)
    assert all(abs(measured[x] - random[x]) < 0.03 for x in random)


def test_runs_side_by_side_have_a_row_each(inspection):
    look = Look("one", inspection, None)
    table = side_by_side([look, look._replace(name="other")])
    assert [row[0] for row in table.rows] == ["one", "other"]
    assert table.rows[0][1:] == table.rows[1][1:]
    assert table.rows[0][3] == "1", "dead experts of all layers"


def test_what_is_not_known_is_left_out(inspection):
    said = words(Look("one", inspection, None, unasked="Not asked: for a reason."))
    assert said["loss"] is said["names"] is said["kept"] is said["information"] is said["saturation"] is None
    assert said["unasked"] == "Not asked: for a reason."
    assert said["alarms"] == []
    assert dict(said["provenance"])["Tokenizer"] == "none: ids are shown"
