"""Claims about the page of scaling laws."""

import re
from pathlib import Path

import pytest

from experiments import scaling as command
from experiments.pages import scaling_page
from experiments.stats.scaling import Estimate, fit
from tests.experiments.stats.test_scaling import _records

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_has_every_form_its_parameters_and_what_it_predicts():
    page = scaling_page.page(_records("joint"), "abcdef", "a machine", ROOT / "experiments" / "results" / "x.png")
    for name, parameters in (("chinchilla", ("alpha", "beta")), ("joint", ("delta", "omega"))):
        for parameter in parameters:
            assert f"| {name} " in page
            assert f" {parameter} |" in page
    assert "![Loss over training FLOPs by size, and the Chinchilla fit](../experiments/results/x.png)" in page
    assert "120 runs of 60 sizes and lengths; a machine, commit abcdef" in page


def test_a_form_that_the_runs_cannot_have_says_why():
    page = scaling_page.page(_records("chinchilla", sizes=(1e5,)), None, "a machine", ROOT / "x.png")
    assert "- chinchilla: the form chinchilla has 5 parameters, and needs runs of 6 sizes; here are 4." in page
    assert "commit unknown" in page


@pytest.mark.parametrize("name", ["chinchilla", "joint"])
def test_every_table_starts_after_an_empty_line(name):
    """After a list's last line it would be more of that line's text, and not a table."""
    page = scaling_page.page(_records(name), None, "a machine", ROOT / "x.png")
    assert "Not fitted" in page
    lines = page.splitlines()
    tops = [i - 1 for i, line in enumerate(lines) if re.match(r"\| -", line)]
    assert len(tops) == 2
    assert [lines[top - 1] for top in tops] == ["", ""]


def test_the_page_says_how_many_draws_its_intervals_are_of():
    page = scaling_page.page(_records("chinchilla"), None, "a machine", ROOT / "x.png")
    assert "Draws out of 200 that had enough sizes, which the intervals are of: chinchilla 200." in page


def test_an_estimate_that_the_runs_do_not_tell_is_called_so():
    assert scaling_page.estimate_cells(Estimate(0.4, 0.3, 0.5, True)) == ("0.4", "0.3 to 0.5", "")
    assert scaling_page.estimate_cells(Estimate(0.4, 0.0, 5.0, False))[2] == "not identified"


def test_the_picture_is_drawn(tmp_path):
    assert scaling_page.picture(_records("chinchilla"), tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
    assert not scaling_page.picture(_records("chinchilla")[:2], tmp_path / "c.png")


def test_the_tracked_page_is_of_the_recorded_runs():
    records = [row.record() for row in command.read_rows(ROOT / "experiments" / "results" / "scaling.jsonl")]
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert f"{len(records)} runs of" in page
    rows = command.read_rows(ROOT / "experiments" / "results" / "scaling.jsonl")
    assert all(row.commit[:10] in page for row in rows)  # whatever commit a run is of is named
    (line,) = [line for line in page.splitlines() if re.match(r"\| chinchilla [^|]*\| +\d+ \|", line)]
    cells = scaling_page.fit_cells(records, fit(scaling_page.of_form(records, "chinchilla"), "chinchilla"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == list(cells)
