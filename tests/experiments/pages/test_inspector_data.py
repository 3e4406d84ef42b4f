"""Claims about what the inspector's script is given."""

import numpy as np
import pytest

from experiments.pages.inspector_data import Strings, by_experts, packed, passages, shown, text_rows
from experiments.pages.inspector_tables import Look
from experiments.pages.packed import Pack
from moe.analysis.inspection import inspect
from tests.experiments.pages.test_inspector_page import tokenizer
from tests.planted_traces import WINDOW, random_routes, write_trace


@pytest.mark.parametrize(
    ("token", "text"), [(10, "↵"), (9, "⇥"), (32, " "), (65, "A"), (0xC3, r"\xc3"), (27, "␛"), (999, "⟨999⟩")]
)
def test_a_token_is_shown_so_that_a_person_sees_it(token, text):
    assert shown(tokenizer(), token) == text
    assert shown(None, token) == f"⟨{token}⟩"


@pytest.fixture
def inspection(tmp_path):
    return inspect(write_trace(tmp_path / "t", random_routes(320, 2, 4, 2)))


def test_a_passage_has_the_token_in_its_middle_and_ends_with_its_window(inspection):
    strings = Strings(None)
    token_ECW = passages(inspection, inspection.layers[0], strings)
    for e, row_C in enumerate(inspection.layers[0].contexts_EC):
        for c, row in enumerate(row_C):
            around = [row + w for w in range(-7, 8)]
            inside = [r // WINDOW == row // WINDOW and r >= 0 for r in around]
            expected = [f"⟨{inspection.tokens.token[r]}⟩" if ok else "" for r, ok in zip(around, inside, strict=True)]
            assert [strings.texts[n] if n >= 0 else "" for n in token_ECW[e, c]] == expected


def test_a_text_stands_once_however_often_it_is_shown():
    strings = Strings(None)
    numbers = strings.numbers(np.array([[5, -1], [9, 5]]))
    assert numbers.tolist() == [[0, -1], [1, 0]]
    assert strings.texts == ["⟨5⟩", "⟨9⟩"]


def test_whole_windows_are_shown_from_beginning_to_end(inspection, monkeypatch):
    monkeypatch.setattr("experiments.pages.inspector_data.TEXT_BYTES", 3 * WINDOW * 20)
    windows = inspection.tokens.window[text_rows(inspection)]
    assert (np.unique(windows, return_counts=True)[1] == WINDOW).all()
    assert (windows.min(), windows.max()) == (0, 19)
    assert len(windows) < 320


def test_layers_of_several_widths_become_one_array():
    made = by_experts([np.ones((2, 3)), np.ones((4, 3))], 4, -1)
    assert made.shape == (2, 4, 3)
    assert made[0].tolist() == [[1] * 3, [1] * 3, [-1] * 3, [-1] * 3]


def test_what_is_packed_is_what_was_traced(inspection):
    pack = Pack()
    data = packed(pack, 3, Look("a", inspection, None))
    assert data["layers"] == [0, 1]
    assert data["tokens"] == 320
    where = pack.directory["3/domain"]
    rows = np.frombuffer(b"".join(pack.parts), np.uint32, 8, where["at"]).reshape(2, 4)
    assert rows.tolist() == [view.rows_YE.sum(0).tolist() for view in inspection.layers]
    assert data["earned"] == []
    assert not {"3/importance", "3/history/load", "3/lift/low"} & set(pack.directory)
