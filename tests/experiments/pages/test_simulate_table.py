"""Claims about the tables of the simulator."""

from experiments.pages import simulate_table
from experiments.stats.published import UNCHECKED, Row
from experiments.stats.scale_out import Effect, Line


def _row(predicted, low=100.0, high=100.0, fitted=""):
    return Row("a step", "h800", "µs", low, high, predicted, fitted, "a page")


def test_a_line_has_a_cell_for_every_heading():
    line = Line(64, 1, 64, 64, "4 nodes", "even", 3.97, 1.03, 0.0, 0.31, 34.7, 0.0021, 944, 265, 187e9, False, -0.046)
    (cells,) = simulate_table.cells([line])
    assert len(cells) == len(simulate_table.HEADINGS)
    for text in ("1 × 64, 64", "3.97", "1.03×", "31%", "34.70 s", "-4.6%", "2.1 ms", "187.0 GB, too much"):
        assert text in cells


def test_a_check_says_its_error_and_its_verdict():
    rows = [_row(110), _row(250), _row(100, fitted="launch"), _row(2.0, 1.5, 3.0)]
    near, missed, fitted, inside = list(simulate_table.check_cells(rows))[:4]
    assert near[3:7] == ("100", "110", "+10.0%", "within 15%")
    assert missed[5:7] == ("+150.0%", "missed")
    assert fitted[6] == "fitted: launch"
    assert inside[3:6] == ("1.50 to 3.00", "2.00", "inside")


def test_what_nobody_published_is_named_unchecked():
    cells = list(simulate_table.check_cells([]))
    assert [cell[0] for cell in cells] == list(UNCHECKED)
    assert {cell[6] for cell in cells} == {"unchecked"}
    assert {len(cell) for cell in cells} == {len(simulate_table.CHECKS)}


def test_the_summary_leaves_fitted_rows_out():
    said = simulate_table.summary([_row(110), _row(250), _row(100, fitted="launch")])
    assert said == "Of 2 rows that nothing was fitted to, 1 are within 15%; 1 are fitted."


def test_effects_have_signs():
    assert list(simulate_table.effect_cells([Effect("x", 0.05, -0.03)])) == [("x", "+5.0%", "-3.0%")]
