"""Claims about the tables of what metrics make of planted routers."""

from dataclasses import replace

from experiments.pages import trust_table
from experiments.stats.recovery import HARDER, NAMES, SETTINGS, SIZES, TRUTH
from moe.analysis.caveats import CAVEATS
from tests.experiments.stats.test_recovery import line


def _lines():
    """All is well in every setting."""
    names = {"right": 1.0, "wrong": {"domain": 0.0, "words": 0.0}}
    return [line(metric, setting, **(names if metric in NAMES else {})) for setting in SETTINGS for metric in CAVEATS]


def _row(lines, metric):
    return next(row for row in trust_table.rows(lines) if row[0] == metric)


def test_a_row_per_metric_says_how_few_documents_are_enough():
    rows = list(trust_table.rows(_lines()))
    assert [row[0] for row in rows] == list(CAVEATS)
    assert {len(row) for row in rows} == {len(trust_table.HEADINGS)}
    assert _row(_lines(), "lift of a domain") == (
        "lift of a domain", "domains", "", "", f"{SIZES[0]} (720 tokens)", f"{SIZES[0]} (720 tokens)", "yes",
    )  # fmt: skip
    assert set(trust_table.ASKED) == set(TRUTH)


def test_who_fools_a_metric_is_named_and_it_is_not_drawn():
    lines = [
        replace(one, above=one.above | {"popular": 0.1}) if one.metric == "share of a domain" else one
        for one in _lines()
    ]
    assert _row(lines, "share of a domain")[2:] == ("popular", "", "never", "never", "no")


def test_what_fools_it_only_where_it_is_harder_stands_apart():
    name, setting = next(iter(HARDER.items()))
    lines = [
        replace(one, above=one.above | {"format": 0.0})
        if one.metric == "bits of domain" and one.separable == setting.recipe.separable
        else one
        for one in _lines()
    ]
    assert _row(lines, "bits of domain")[2:4] == ("", f"{name}: format")
    assert _row(lines, "bits of domain")[-1] == "yes"


def test_a_metric_of_another_question_is_a_control():
    row = _row(_lines(), "MaxVio")
    assert row[1] == "domains, as a control"
    assert row[-1] == "for its own question"


def test_false_names_are_counted_by_router():
    lines = [replace(one, right=0.5, wrong={"words": 12.34, "token": 0.0}) if one.wrong else one for one in _lines()]
    rows = list(trust_table.name_rows(lines))
    assert len(rows) == (1 + len(HARDER)) * len(NAMES)
    assert rows[0] == ("plain", "names", "50%", "words 12.3")


def test_every_metric_has_what_it_cannot_tell():
    assert dict(trust_table.caveat_rows()) == {metric: caveat.cannot_tell for metric, caveat in CAVEATS.items()}
