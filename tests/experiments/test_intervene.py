"""Claims about the command that routes otherwise and measures what it costs."""

import json
import math
import sys

import pytest

from experiments import intervene, trace
from moe.analysis.effects import Difference, Effect
from moe.run.jsonl import read_records
from moe.run.summary import read_summary
from tests.small_runs import settings, train


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(settings(corpus, str(folder), {"train.eval_tokens": 10**9}))
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments) -> (exit status, stdout, stderr) of `experiments.intervene`."""

    def call(*words, of=intervene):
        monkeypatch.setattr(sys, "argv", [of.__name__, *map(str, words)])
        code = 0
        try:
            of.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def _cells(line):
    return [cell.strip() for cell in line.strip("| \n").split(" | ")]


def test_a_mask_is_measured_on_the_runs_own_validation_and_said_by_domain(run, command, tmp_path):
    out = tmp_path / "lines.jsonl"
    code, printed, err = command(f"run={run}", "mask=1:3,0:1,0:2", "tokens=0", "which=last", f"out={out}")
    assert code == 0, err
    (effect,) = read_records(Effect, out)
    assert [(change.layer, change.experts) for change in effect.changes] == [(1, [3]), (0, [1, 2])]
    val = read_summary(run).val
    assert effect.total.before == pytest.approx(val.loss, rel=1e-5)
    assert {name: d.before for name, d in effect.domains.items()} == pytest.approx(
        {name: score.loss for name, score in val.domains.items()}, rel=1e-5
    )
    table = [_cells(line) for line in printed.splitlines() if line.startswith("| ")]
    assert table[0][:4] == ["mask 1:3,0:1,0:2", "before", "after", "difference"]
    assert [row[0] for row in table[2:6]] == ["all", *val.domains]
    assert table[2][1:4] == [
        f"{effect.total.before:.4f}",
        f"{effect.total.after:.4f}",
        f"{effect.total.difference:+.4f}",
    ]
    line = json.loads(out.read_text())
    assert (line["run"], line["checkpoint"], line["unit"]) == (str(run), "step-00000007", effect.unit)


def test_every_expert_has_its_line_and_the_table_the_worst_first(run, command, tmp_path):
    code, printed, err = command(f"run={run}", "importance=true", "tokens=300", f"out={tmp_path / 'x'}")
    assert code == 0, err
    told = read_records(Effect, tmp_path / "x")
    assert [effect.what for effect in told] == [f"mask {layer}:{e}" for layer in (0, 1) for e in range(4)]
    rows = [_cells(line) for line in printed.splitlines() if line.startswith("| mask")]
    assert [row[0] for row in rows] == [e.what for e in sorted(told, key=lambda e: -e.total.difference)]


def test_its_own_trace_replayed_changes_nothing_and_other_routes_do(run, command, tmp_path):
    assert command(f"run={run}", f"out={tmp_path / 't'}", "tokens=300", of=trace)[0] == 0
    code, printed, err = command(f"run={run}", f"replay={tmp_path / 't'}", "tokens=300")
    assert code == 0, err
    assert "| all " in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("| all ")]
    assert _cells(line)[3] == "+0.0000"
    code, _, err = command(f"run={run}", f"replay={tmp_path / 't'}", "tokens=200")
    assert code == 2
    assert "is a trace of another text" in err


def test_a_share_is_kept_and_compared_with_random_experts(run, command):
    code, printed, err = command(f"run={run}", "keep=0.5", "tokens=300")
    assert code == 0, err
    rows = [_cells(line)[0] for line in printed.splitlines() if line.startswith(("| by", "| at"))]
    assert rows == ["by use", "by each domain's use", *(f"at random, draw {i}" for i in range(3))]


@pytest.mark.parametrize("word", ["drop=1:0", "swap=0:0-1,0:2-3", "force=1:0,1:2"])
def test_the_other_changes_are_said_by_domain_too(run, command, word):
    code, printed, err = command(f"run={run}", word, "tokens=300")
    assert code == 0, err
    assert f"| {word.replace('=', ' ')} " in printed


def test_a_single_text_has_no_interval():
    one = Difference(3.0, 3.5, 0.5, -math.inf, math.inf, 1000, 1)
    assert intervene.cells("x", one) == ("x", "3.0000", "3.5000", "+0.5000", "unknown: all of one text", "1,000")


def test_what_a_token_says_cannot_move_the_cursor(run, command, tmp_path):
    text = tmp_path / "hostile.txt"
    text.write_text("\x1b[2J\u202e<script>|\r\x07 " * 60)
    code, printed, err = command(f"run={run}", "mask=1:0,1:1", f"text={text}", "which=last")
    assert code == 0, err
    assert "most hurt" in printed
    assert not set("\x1b\u202e\r\x07") & set(printed)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("mask=1:3",), "run=... is needed"),
        (("run={run}",), "one of mask, drop, swap, force, replay, keep, importance is needed, and given are none."),
        (("run={run}", "mask=1:0", "keep=0.25"), "given are mask, keep."),
        (("run={run}", "mask=1:0:2"), "mask=1:0:2 has 1:0:2 in it: accepted is LAYER:EXPERT"),
        (("run={run}", "mask=,"), "has nothing in it"),
        (("run={run}", "mask=-1:0"), "has -1:0 in it"),
        (("run={run}", "swap=1:0"), "swap=1:0 has 1:0 in it: accepted is LAYER:EXPERT-EXPERT"),
        (("run={run}", "mask=1:9"), "layer 1 has no expert 9: accepted is 0 to 3"),
        (("run={run}", "mask=7:0"), "layer 7 has no experts; MoE layers are 0, 1"),
        (("run={run}", "mask=1:0,1:1,1:2,1:3"), "no expert left"),
        (("run={run}", "mask=1:0,1:0"), "different experts"),
        (("run={run}", "keep=1.5"), "keep=1.5 is out of range"),
        (("run={run}", "keep=nan"), "keep=nan is out of range"),
        (("run={run}", "mask=1:0", "tokens=-1"), "tokens=-1 is out of range"),
        (("run={run}", "mask=1:0", "out={tmp}"), "exists: choose another"),
        (("run={run}", "mask=1:0", "out={run}/config.yaml/x"), "config.yaml/x cannot be written"),
        (("run={run}", "replay={tmp}"), "is no trace"),
        (("run={tmp}/norun", "mask=1:0"), "norun is not a run's folder"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(run, tmp_path, command, words, sentence):
    code, _, err = command(*(word.format(run=run, tmp=tmp_path) for word in words))
    assert code == 2
    (line,) = err.strip().splitlines()
    assert sentence in line


def test_runs_without_choices_and_traces_of_other_models_are_refused(run, corpus, tmp_path, command):
    short = {"train.steps": 1, "optim.warmup": 0, "train.eval_every": 0}
    for name, changes, sentence in (
        ("dense", {"model.moe": None}, "is dense: it has no experts"),
        ("soft", {"router.name": "soft", "balance.aux": 0.0, "balance.z": 0.0}, "router is soft"),
        ("six", {"model.moe.n_experts": 6}, "a trace of another model: it has MoE layers [0, 1] of [4, 4] experts"),
    ):
        train(settings(corpus, str(tmp_path / name), short | changes))
        word = f"replay={tmp_path / 't'}" if name == "six" else "importance=true"
        if name == "six":
            assert command(f"run={run}", f"out={tmp_path / 't'}", "tokens=300", of=trace)[0] == 0
        code, _, err = command(f"run={tmp_path / name}", word, "tokens=300")
        assert code == 2
        assert sentence in err


def test_a_router_without_scores_is_told_to_drop(corpus, tmp_path, command):
    changes = {"router.name": "hash", "balance.aux": 0.0, "balance.z": 0.0}
    train(settings(corpus, str(tmp_path / "run"), changes))
    code, _, err = command(f"run={tmp_path / 'run'}", "mask=1:0", "tokens=300")
    assert code == 2
    assert "use drop instead" in err
    assert command(f"run={tmp_path / 'run'}", "importance=true", "tokens=300")[0] == 0
    code, _, err = command(f"run={tmp_path / 'run'}", "keep=0.25", "tokens=300")
    assert code == 2
    assert "use drop instead" in err
