"""Claims about the table of simulated studies."""

from experiments.pages import coverage_table
from experiments.stats.simulation import CHECKED, Line


def test_a_line_is_of_one_kind_of_study_and_ranks_have_a_table_of_their_own():
    names = [name for name in CHECKED if name != "all ranks covered"]
    lines = [Line("normal", "none", 3, name, 0.1 * i, 10) for i, name in enumerate(names)]
    lines.append(Line("normal", "a few better", 3, "all ranks covered", 0.96, 10))
    assert list(coverage_table.rows(lines)) == [("normal", "none", "3", "0.0%", "10.0%", "20.0%", "30.0%")]
    assert list(coverage_table.rank_rows(lines)) == [("normal", "3", "96.0%")]
    assert len(coverage_table.HEADINGS) == 7
