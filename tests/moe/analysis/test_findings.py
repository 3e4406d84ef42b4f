"""Claims about what is said to be wrong with a routing."""

import numpy as np
import pytest

from moe.analysis.findings import findings, nothing_wrong, verdict
from moe.analysis.inspection import inspect
from tests.planted_traces import random_routes, write_trace

T = 1600


def _texts(tmp_path, expert_TLK, **columns):
    inspection = inspect(write_trace(tmp_path / "t", expert_TLK, **columns))
    return [(f.severity, f.text) for f in findings(inspection)], verdict(inspection)


def test_random_routing_has_nothing_that_stands_out(tmp_path):
    inspection = inspect(write_trace(tmp_path / "t", random_routes(T, 2, 8, 2)))
    assert findings(inspection) == []
    assert verdict(inspection) == nothing_wrong(inspection)
    assert "no expert is dead or starved" in verdict(inspection)


def test_a_collapse_is_said_with_its_layer_its_experts_and_what_to_try(tmp_path):
    expert_TLK = random_routes(T, 2, 8, 2)
    expert_TLK[:, 1] = np.where(expert_TLK[:, 1] > 1, 0, expert_TLK[:, 1])
    told, sentence = _texts(tmp_path, expert_TLK)
    assert told[0] == (3, "Layer 1: 6 of 8 experts take no token (2, 3, 4, 5, 6, 7).")
    assert any("expert 0 takes" in text and "fair share" in text for _, text in told)
    assert any("as if" in text and "of 8 experts shared it evenly" in text for _, text in told)
    assert all(text.startswith("Layer 1") for _, text in told)
    assert sentence == f"{told[0][1]} 2 more stand out."


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"entropy_TL": np.full((T, 1), np.log(8) * 0.995)}, "prefers hardly any expert"),
        ({"margin_TL": np.full((T, 1), 0.002)}, "100% of the choices are closer than 0.01"),
    ],
)
def test_what_bears_on_the_figures_alone_is_no_part_of_the_verdict(tmp_path, columns, words):
    told, sentence = _texts(tmp_path, random_routes(T, 1, 8, 2), **columns)
    assert [severity for severity, _ in told] == [1]
    assert words in told[0][1]
    assert sentence.startswith("Nothing stands out")


def test_starved_experts_and_lost_rows_are_said(tmp_path):
    expert_TLK = random_routes(T, 1, 8, 1)
    taken = np.flatnonzero(expert_TLK[:, 0, 0] == 5)
    expert_TLK[taken[:-3], 0, 0] = 4
    expert_TLK[:160, 0, 0] = -1
    told, _ = _texts(tmp_path, expert_TLK)
    assert [text for _, text in told if "less than a tenth" in text] == [
        "Layer 0: 1 of 8 experts take less than a tenth of a fair share."
    ]
    assert any(text == "Layer 0: 10.0% of the rows find no room." for _, text in told)


def test_what_is_so_in_many_layers_is_said_once_of_the_worst(tmp_path):
    expert_TLK = random_routes(T, 4, 8, 2)
    for layer, dead in ((1, 2), (2, 5), (3, 1)):
        expert_TLK[:, layer] = np.where(expert_TLK[:, layer] < dead, 7, expert_TLK[:, layer])
    told, sentence = _texts(tmp_path, expert_TLK)
    about_dead = [text for _, text in told if "take no token" in text]
    assert about_dead == ["Layer 2: 5 of 8 experts take no token (0, 1, 2, 3, 4). So it is in 2 other layers."]
    assert sentence.startswith(about_dead[0])
