"""Claims about the tables of a study: every number is the runs', with every digit in CSV, and leads to its run."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from scipy import stats

from experiments.pages.study_tables import Part, Table, tables
from experiments.stats.outcome import outcome
from experiments.study.manifest import run_of
from experiments.study.states import states_of
from tests.experiments.stats.test_outcome import DIFFERENCES, done  # noqa: F401 — the study


@pytest.fixture(scope="module")
def made(done):  # noqa: F811
    folder, study = done
    twins = dataclasses.replace(study, twins={"sigmoid": "switch"})
    result = outcome(folder, twins, states_of(folder, twins))
    return folder, result, tables(result, folder)


@pytest.fixture(scope="module")
def summaries(made):
    """{arm: [summary.json of every seed]}"""
    folder, result, _ = made
    by_arm = {}
    for job in result.study.jobs:
        by_arm.setdefault(job.arm, []).append(json.loads((run_of(folder, job) / "summary.json").read_text()))
    return by_arm


def _lines(table):
    return {row["arm"]: row for row in csv.DictReader(io.StringIO(table.csv()))}


def test_the_table_of_arms_has_losses_differences_words_and_ranks(made, summaries):
    _, _, by_name = made
    table = by_name["arms"]
    texts = {row[0][0].text: [", ".join(part.text for part in cell) for cell in row] for row in table.rows}
    lines = _lines(table)
    for arm, ends in summaries.items():
        losses = [end["val"]["loss"] for end in ends]
        half = stats.t.ppf(0.975, 2) * stats.sem(losses)
        assert texts[arm][table.headings.index("loss (nats per token)")] == f"{np.mean(losses):.3f} ± {half:.3f}"
        assert float(lines[arm]["loss"]) == pytest.approx(np.mean(losses), abs=1e-12)
        assert float(lines[arm]["bits_per_byte"]) == pytest.approx(np.mean([end["val"]["bpb"] for end in ends]))
    assert texts["softmax"][4:6] == ["the base", ""]
    assert texts["sigmoid"][4].startswith("−0.300 (−0.3")
    assert texts["sigmoid"][5] == "better"
    assert texts["switch"][5].startswith("inconclusive; ")
    deviation = np.std(DIFFERENCES["switch"], ddof=1)
    assert float(lines["switch"]["difference_deviation"]) == pytest.approx(deviation)
    apart = np.subtract(DIFFERENCES["sigmoid"], DIFFERENCES["switch"])
    assert float(lines["sigmoid"]["twin_difference_mean"]) == pytest.approx(apart.mean())
    assert lines["softmax"]["difference_mean"] == ""
    assert (lines["sigmoid"]["rank_from"], texts["sigmoid"][table.headings.index("rank")][0]) == ("1", "1")


def test_the_table_of_costs_has_means_over_seeds(made, summaries):
    _, _, by_name = made
    lines = _lines(by_name["costs"])
    for arm, ends in summaries.items():
        expected = {
            "active": [end["params"]["active"] for end in ends],
            "total": [end["params"]["total"] for end in ends],
            "flops": [end["tokens"] * end["flops"]["training"] for end in ends],
            "tokens_per_s": [end["tokens_per_s"] for end in ends],
            "seconds": [end["seconds"] for end in ends],
            "max_vio": [np.mean([layer["max_vio"] for layer in end["load"]["routing"]]) for end in ends],
            "dead": [sum(layer["dead"] for layer in end["load"]["routing"]) for end in ends],
        }
        for name, values in expected.items():
            assert float(lines[arm][name]) == pytest.approx(np.mean(values)), name


def test_a_speedup_stands_beside_every_arm_but_the_base(made):
    _, result, by_name = made
    lines = _lines(by_name["speedups"])
    assert list(lines) == ["sigmoid", "switch"]
    interval = result.arms[1].speedups["flops"]
    assert float(lines["sigmoid"]["flops"]) == pytest.approx(interval.mean)


def test_every_number_leads_to_the_run_or_the_runs_that_it_is_of(made):
    folder, result, by_name = made
    runs = by_name["runs"]
    ids = [name for name in runs.ids if name]
    for table in (by_name["arms"], by_name["costs"], by_name["speedups"]):
        for row in table.rows:
            for cell, heading in zip(row[1:], table.headings[1:], strict=True):
                for part in cell:
                    if any(c.isdigit() for c in part.text) and heading not in ("verdict", "rank", "could have shown"):
                        assert part.link[1:] in ids if part.link[0] == "#" else (folder / part.link).is_dir(), heading
    flat = [run for arm in result.arms for run in arm.runs]
    for row, run in zip(runs.rows, flat, strict=True):
        ((_, to),) = row[-1]
        assert (folder / to).samefile(run.folder)
        for cell in row[1:-1]:
            assert (folder / cell[0].link).parent.samefile(run.folder)
    first = [runs.rows[runs.ids.index(f"runs-{i}")][0][0].text for i in range(len(result.arms))]
    assert first == [arm.name for arm in result.arms]


def test_the_csv_of_curves_has_every_evaluation_of_every_run(made):
    folder, result, by_name = made
    rows = list(csv.DictReader(io.StringIO(by_name["curves"].csv())))
    assert len(rows) == 3 * len(result.study.jobs)
    for row in rows:
        job = next(job for job in result.study.jobs if (job.arm, str(job.seed)) == (row["arm"], row["seed"]))
        end = json.loads((run_of(folder, job) / "summary.json").read_text())
        if float(row["step"]) == end["steps"]:
            assert float(row["loss"]) == end["val"]["loss"]
        else:
            lines = (run_of(folder, job) / "metrics.jsonl").read_text().splitlines()
            (line,) = [line for line in map(json.loads, lines) if line["step"] == float(row["step"])]
            assert float(row["loss"]) == line["val"]["loss"]


def test_settings_are_what_differs_from_the_base(made):
    _, _, by_name = made
    rows = [[cell[0].text for cell in row] for row in by_name["settings"].rows]
    assert ["sigmoid", "router.name", "softmax", "sigmoid"] in rows
    assert {row[1] for row in rows} == {"router.name", "optim.lr"}


def test_places_on_the_page_are_plain_in_markdown_and_files_are_links():
    table = Table("t", ["arm", "n"], [[[Part("a|b")], [Part("1", "#runs-0"), Part("2", "../x")]]], [])
    assert table.markdown().splitlines()[2].split(" | ")[1].strip(" |") == "1, [2](../x)"
    assert table.csv() == "arm\n"
