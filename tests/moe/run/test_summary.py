"""Claims about what a run says of itself: written, read, and refused where it cannot be read."""

import dataclasses
import json
import math

import pytest

from moe.errors import BadInput
from moe.run.jsonl import read_lines, to_text
from moe.run.summary import (
    SCHEMA,
    Alarm,
    LayerMetrics,
    MetricsLine,
    Validation,
    line_from_json,
    line_to_json,
    read_metrics,
    read_summary,
    write_summary,
)
from tests.fake_runs import fake_run, write_run

LAYER = LayerMetrics(1, 0.5, 0.75, 3.0, 1, 0.0, 0.125)
VAL = Validation(2.0, 1.0, {})
LINE = MetricsLine(3, 9.0, loss=1.5, lm_loss=1.25, losses={"aux": 1.25, "z": 0.5}, lr=1e-3, layers=[LAYER], val=VAL)


@pytest.mark.parametrize("layers", [(1, 3), ()])
def test_what_was_written_is_read_back(layers, tmp_path):
    run = fake_run(layers=layers)
    write_run(run, tmp_path / "run")
    assert read_summary(tmp_path / "run") == run.summary
    assert read_metrics(tmp_path / "run") == run.metrics


def test_a_summary_without_a_schema_is_of_the_first(tmp_path):
    write_run(fake_run(), tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    tree = json.loads(path.read_text())
    del tree["schema"]
    path.write_text(json.dumps(tree | {"a_later_field": 1}))
    assert read_summary(tmp_path / "run").schema == SCHEMA


def test_losses_stand_in_a_line_by_their_names_and_what_is_not_known_is_left_out():
    tree = line_to_json(LINE)
    assert (tree["aux"], tree["z"]) == (1.25, 0.5)
    assert not {"losses", "grad_norm", "tokens_per_s"} & tree.keys()
    assert line_from_json(json.loads(to_text(tree))) == LINE
    assert line_to_json(MetricsLine(0, 0.0)) == {"step": 0, "seconds": 0.0}


def test_a_number_that_is_not_finite_is_null_at_any_depth_and_not_a_number_when_read(tmp_path):
    """JSON has no NaN: a strict reader refuses a file that has one."""
    run = fake_run()
    bad = dataclasses.replace(run.summary.val, loss=math.nan, bpb=math.inf)
    (tmp_path / "run").mkdir()
    write_summary(tmp_path / "run", dataclasses.replace(run.summary, val=bad, val_windows=[1.0, -math.inf]))
    text = (tmp_path / "run" / "summary.json").read_text()
    tree = json.loads(text, parse_constant=pytest.fail)
    assert (tree["val"]["loss"], tree["val"]["bpb"], tree["val_windows"]) == (None, None, [1.0, None])
    read = read_summary(tmp_path / "run")
    assert math.isnan(read.val.loss)
    assert math.isnan(read.val_windows[1])


def without(tree, *path):
    """`tree` without the entry at `path`."""
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return tree


REFUSED = {
    "no JSON": (lambda tree: "{", "is damaged: "),
    "a list": (lambda tree: "[]", "is damaged: '[]' is not Summary; restore it, or delete it and"),
    "a field missing": (
        lambda tree: json.dumps(without(tree, "steps")),
        "is damaged: it has no steps; restore it, or delete it and",
    ),
    "one missing within": (
        lambda tree: json.dumps(without(tree, "val", "domains", "code", "tokens")),
        ": val: domains: code is damaged: it has no tokens; restore it, or delete it and",
    ),
    "a word for a number": (
        lambda tree: json.dumps(tree | {"seconds": "9"}),
        ": seconds is damaged: '9' is not float; restore it, or delete it and",
    ),
    "a truth for a number": (
        lambda tree: json.dumps(tree | {"steps": True}),
        ": steps is damaged: 'True' is not int; restore it, or delete it and",
    ),
    "a schema that is no number": (lambda tree: json.dumps(tree | {"schema": "2"}), "is damaged: '2' is not int"),
    "too deep": (lambda tree: "[" * 100_000, "is damaged: "),
    "a later schema": (
        lambda tree: json.dumps(tree | {"schema": SCHEMA + 1}),
        f"was written by a newer version (schema {SCHEMA + 1}; this one reads {SCHEMA}): update it.",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_summary_that_cannot_be_read_is_refused_in_one_sentence(what, tmp_path):
    change, sentence = REFUSED[what]
    write_run(fake_run(), tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(BadInput) as caught:
        read_summary(tmp_path / "run")
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_summary_is_not_finished(tmp_path):
    with pytest.raises(BadInput, match=f"run={tmp_path} is not finished: it has no summary.json"):
        read_summary(tmp_path)


def test_a_damaged_line_is_refused_with_its_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "seconds": 0.0}\n{"step": 1}\n')
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2
    with pytest.raises(BadInput, match=r"metrics\.jsonl is damaged: it has no seconds"):
        read_metrics(tmp_path)


def test_what_a_line_leaves_out_because_it_is_none_is_none_at_any_depth_and_all_else_is_missing():
    """As an alarm of the whole model has no layer."""
    alarm = Alarm("loss spike", 318, None, "5.15 nats", "a bad batch", "a lower optim.lr")
    tree = json.loads(to_text(line_to_json(MetricsLine(318, 9.0, alarms=[alarm]))))
    assert "layer" not in tree["alarms"][0]
    assert line_from_json(tree).alarms == [alarm]
    del tree["alarms"][0]["cause"]
    with pytest.raises(BadInput, match=r"alarms\[0\] is damaged: it has no cause\."):
        line_from_json(tree)
