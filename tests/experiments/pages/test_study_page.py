"""Claims about the page of a study: its numbers are the runs', its links lead somewhere, and it loads nothing."""

import csv
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.pages import study_page
from experiments.stats.outcome import outcome, sentences
from experiments.stats.statistics import t_interval
from experiments.study.states import states_of
from tests.experiments.stats.test_outcome import done  # noqa: F401 — the study


@pytest.fixture(scope="module")
def written(done):  # noqa: F811
    folder, study = done
    result = outcome(folder, study, states_of(folder, study))
    return folder, result, study_page.write(folder, result)


def test_the_page_begins_with_the_verdict_and_has_every_number_of_the_table(written):
    folder, result, _ = written
    page = (folder / "index.html").read_text()
    assert re.search(r"<h1>(.*?)</h1>", page)[1] == sentences(result)[0]
    for arm in result.arms:
        interval = t_interval([run.summary.val.loss for run in arm.runs])
        assert f"<td>{interval.mean:.3f} ± {interval.high - interval.mean:.3f}</td>" in page
        assert f"<td>{arm.runs[0].summary.params.active:,}</td>" in page


def test_every_link_leads_to_a_file_and_nothing_is_loaded(written):
    folder, _, paths = written
    page = (folder / "index.html").read_text()
    links = re.findall(r'href="([^"#]+)"', page)
    assert len(links) >= 9 + 4 + 3
    for link in links:
        assert (folder / link).is_file(), link
    assert re.findall(r"<script|<link|<img|https?://(?!www\.w3\.org)", page) == []
    assert all(path.is_file() for path in paths)


def test_figures_and_tables_stand_beside_the_page(written):
    folder, result, _ = written
    assert sorted(path.name for path in (folder / "figures").iterdir()) == [
        "loss-flops.svg", "loss-seconds.svg", "loss-steps.svg", "pareto.svg",
    ]  # fmt: skip
    with open(folder / "tables" / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    first = result.arms[0].runs[0].summary
    assert float(rows[0]["loss"]) == pytest.approx(first.val.loss, abs=1e-4)
    assert (folder / rows[0]["run"] / "summary.json").is_file()
    with open(folder / "tables" / "settings.csv", newline="") as file:
        assert {row["setting"] for row in csv.DictReader(file)} == {"router.name", "optim.lr"}
    table = (folder / "table.md").read_text()
    assert table.startswith(sentences(result)[0])
    assert table.count("\n|") == 2 + len(result.arms)


def test_a_curves_points_are_means_over_seeds_with_their_intervals(written):
    _, result, _ = written
    arm = result.arms[1]
    drawn = study_page.series(arm, "steps")
    assert drawn.x == arm.curves[0].steps
    assert drawn.y[-1] == pytest.approx(np.mean([run.summary.val.loss for run in arm.runs]))
    interval = t_interval([run.summary.val.loss for run in arm.runs])
    assert (drawn.low[-1], drawn.high[-1]) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_names_are_text_and_no_markup(written):
    folder, result, _ = written
    hostile = dataclasses.replace(result.arms[1], name="<script>alert(1)</script>")
    changed = dataclasses.replace(result, arms=[result.arms[0], hostile])
    charts, rows = study_page.figures(changed.arms), [study_page.cells(arm, "softmax") for arm in changed.arms]
    page = study_page.render(changed, charts, rows, Path(folder))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
