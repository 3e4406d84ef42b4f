"""Claims about the table of routers."""

import functools

import pytest

from experiments import readme
from experiments.pages import router_table
from tests.conftest import PRESETS


@functools.cache
def _rows():
    return {name: cells for name, *cells in router_table.rows()}


def test_every_file_has_a_row_of_its_own_that_says_what_it_does():
    found = _rows()
    assert found.keys() == PRESETS.keys()
    said = [cells[0] for cells in found.values()]
    assert len(set(said)) == len(said)
    assert all(len(each) > 25 for each in said)


def test_who_sees_later_tokens_is_what_the_table_says():
    found = _rows()
    assert {name for name, cells in found.items() if cells[3] == "seen"} == {"expert-choice", "soft"}
    assert {name for name, cells in found.items() if cells[2] == "seen"} == {
        "base", "expert-choice", "expert-choice-predictor", "expert-choice-threshold", "mod", "sinkhorn", "soft",
    }  # fmt: skip


def test_how_many_experts_a_token_takes_and_what_balances_them_come_from_the_composed_settings():
    found = {name: (cells[1], cells[4]) for name, cells in _rows().items()}
    assert found["softmax"] == ("K", "aux")
    assert found["switch"] == ("1", "aux, capacity")
    assert found["gshard"] == ("2", "aux, capacity")
    assert found["dense"] == ("all", "aux")
    assert found["moepp"] == ("K of E + 4", "aux")
    assert found["relu"] == ("as many as it wants", "none")
    assert found["sigmoid-bias"] == ("K", "bias_rate")
    assert found["soft"] == ("a mix of all", "none")


@pytest.mark.parametrize(
    ("text", "said"),
    [("name: softmax\n", ""), ("# @package _global_\n#\nrouter:\n  name: hash\n", ""), ("#What\nname: hash\n", "What")],
)
def test_a_file_without_a_comment_has_a_row_without_one(text, said, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    assert router_table.description(tmp_path / "mine.yaml") == said


def test_the_page_beside_the_files_is_the_table():
    assert readme.ROUTERS.read_text() == readme.all_routers()
