"""Claims about the page of a study: what its figures show are the runs' numbers, its links lead somewhere, and it loads
nothing."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from scipy import stats

from experiments.pages import study_page
from experiments.pages.study_tables import tables
from experiments.stats.outcome import outcome, sentences
from experiments.study.manifest import run_of
from experiments.study.states import states_of
from tests.experiments.stats.test_outcome import done  # noqa: F401 — the study

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def written(done):  # noqa: F811
    folder, study = done
    result = outcome(folder, study, states_of(folder, study))
    return folder, result, study_page.write(folder, result)


def _evaluations(folder, study):
    """{arm: {step: [(FLOPs, seconds, loss) of every seed]}}, read as plain JSON."""
    by_arm = {}
    for job in study.jobs:
        run = run_of(folder, job)
        end = json.loads((run / "summary.json").read_text())
        per_step = end["tokens"] / end["steps"] * end["flops"]["training"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = {line["step"]: (line["seconds"], line["val"]["loss"]) for line in lines if line.get("val")}
        found[end["steps"]] = (end["seconds"], end["val"]["loss"])
        for step, (seconds, loss) in found.items():
            by_arm.setdefault(job.arm, {}).setdefault(step, []).append((step * per_step, seconds, loss))
    return by_arm


def _values(picture):
    """px -> value across and down, told from the numbers beside the axes alone."""
    across, down = {}, {}
    for text in picture.iter(f"{SVG}text"):
        if text.get("class") == "t s" and text.get("x") and re.fullmatch(r"-?[\d.,e]+", text.text):
            value = float(text.text.replace(",", ""))
            if text.get("text-anchor") == "end":
                down[float(text.get("y")) - 4] = value
            else:
                across[float(text.get("x"))] = value
    line = lambda at: np.polyfit(list(at), list(at.values()), 1)
    return line(across), line(down)


def _picture(folder, name):
    return ET.fromstring((folder / "figures" / f"{name}.svg").read_text())


@pytest.mark.parametrize(("axis", "column"), [("steps", None), ("flops", 0), ("seconds", 1)])
def test_every_point_and_band_of_a_curve_stands_where_the_runs_numbers_are(written, axis, column):
    folder, result, _ = written
    picture = _picture(folder, f"loss-{axis}")
    across, down = _values(picture)
    circles = iter(picture.iter(f"{SVG}circle"))
    bands = iter(picture.iter(f"{SVG}polygon"))
    evaluations = _evaluations(folder, result.study)
    for arm in result.arms:
        expected = []
        for step, seeds in sorted(evaluations[arm.name].items()):
            loss = [values[2] for values in seeds]
            half = stats.t.ppf(0.975, len(loss) - 1) * stats.sem(loss)
            x = step if column is None else np.mean([values[column] for values in seeds])
            expected.append((x, np.mean(loss), half))
        assert len(expected) == 3  # at the start, in the middle and at the end
        tolerance = [abs(across[0]) * 0.11, abs(down[0]) * 0.11]  # px are rounded to a tenth
        for x, y, _ in expected:
            circle = next(circles)
            at = np.polyval(across, float(circle.get("cx"))), np.polyval(down, float(circle.get("cy")))
            assert at[0] == pytest.approx(x, abs=tolerance[0] + 1e-4 * abs(x))
            assert at[1] == pytest.approx(y, abs=tolerance[1])
            assert circle.find(f"{SVG}title").text.startswith(f"{arm.name}, ")
        corners = [corner.split(",") for corner in next(bands).get("points").split()]
        edges = [np.polyval(down, float(y)) for _, y in corners]
        wanted = [y + half for _, y, half in expected] + [y - half for _, y, half in reversed(expected)]
        assert edges == pytest.approx(wanted, abs=tolerance[1])
    assert next(circles, None) is None


def test_the_points_of_loss_against_cost_are_the_arms_final_losses(written):
    folder, result, _ = written
    picture = _picture(folder, "pareto")
    across, down = _values(picture)
    evaluations = _evaluations(folder, result.study)
    circles = list(picture.iter(f"{SVG}circle"))
    assert len(circles) == len(result.arms)
    for arm, circle in zip(result.arms, circles, strict=True):
        seeds = evaluations[arm.name][max(evaluations[arm.name])]
        flops, loss = np.mean([values[0] for values in seeds]), np.mean([values[2] for values in seeds])
        assert np.polyval(across, float(circle.get("cx"))) == pytest.approx(flops, rel=1e-3)
        assert np.polyval(down, float(circle.get("cy"))) == pytest.approx(loss, abs=0.11 * abs(down[0]))
    front = [point.name for point in study_page.points(result.arms) if point.front]
    assert front == ["sigmoid"]  # the lowest loss at the same FLOPs


def test_axes_have_units_and_every_arm_its_name(written):
    folder, result, _ = written
    for name, unit in (("loss-steps", "steps"), ("loss-flops", "FLOPs of training"), ("loss-seconds", "(s)")):
        words = ["".join(text.itertext()) for text in _picture(folder, name).iter(f"{SVG}text")]
        assert any(unit in word for word in words)
        assert "validation loss (nats per token)" in words
        assert all(any(word.startswith(f"{arm.name} ") for word in words) for arm in result.arms)


def test_the_page_begins_with_the_verdict_and_has_every_cell_of_its_tables(written):
    folder, result, _ = written
    page = (folder / "index.html").read_text()
    assert re.search(r"<h1>(.*?)</h1>", page)[1] == sentences(result)[0]
    text = re.sub(r"<[^>]+>", "", page)
    for name, table in tables(result, folder).items():
        for row in table.rows:
            for cell in row:
                assert ", ".join(part.text for part in cell) in text, name


def test_every_link_leads_to_a_run_a_file_or_a_row_and_nothing_is_loaded(written):
    folder, result, paths = written
    page = (folder / "index.html").read_text()
    links = re.findall(r'href="([^"]+)"', page)
    for link in links:
        assert f'id="{link[1:]}"' in page if link[0] == "#" else (folder / link).exists(), link
    for arm in result.arms:
        for run in arm.runs:
            assert any((folder / link).samefile(run.folder) for link in links if link[0] != "#")
    assert re.findall(r"<script|<link|<img|src=|https?://(?!www\.w3\.org)", page) == []
    assert all(path.is_file() for path in paths)


def test_figures_and_tables_stand_beside_the_page(written):
    folder, result, _ = written
    names = lambda place: sorted(path.name for path in (folder / place).iterdir())
    assert names("figures") == ["loss-flops.svg", "loss-seconds.svg", "loss-steps.svg", "pareto.svg"]
    assert names("tables") == ["arms.csv", "costs.csv", "curves.csv", "runs.csv", "settings.csv", "speedups.csv"]
    table = (folder / "table.md").read_text()
    assert table.startswith(sentences(result)[0])
    for run in re.findall(r"\]\(([^)]+)\)", table):
        assert (folder / run).exists()


def test_evaluations_that_only_some_seeds_have_are_not_averaged(written):
    _, result, _ = written
    arm = result.arms[1]
    shorter = arm.curves[0]._replace(**{name: values[::2] for name, values in arm.curves[0]._asdict().items()})
    drawn = study_page.series(dataclasses.replace(arm, curves=[shorter, *arm.curves[1:]]), "steps")
    assert drawn.x == shorter.steps
    assert drawn.y[-1] == pytest.approx(np.mean([curve.loss[-1] for curve in arm.curves]))


def test_names_are_text_and_no_markup(written):
    folder, result, _ = written
    hostile = dataclasses.replace(result.arms[1], name="<script>alert(1)</script>")
    changed = dataclasses.replace(result, arms=[result.arms[0], hostile], missing=["<script> is waiting"])
    page = study_page.render(changed, study_page.figures(changed.arms), tables(changed, folder))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
