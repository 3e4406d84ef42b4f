"""Claims about what a person sees: plain lines in a pipe, a bar and a strip of expert load on a terminal."""

import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.run.summary import LayerMetrics, MetricsLine, Validation
from moe.run.terminal import outlet, say
from moe.train.progress import STRIP, STRIP_WIDTH, Watch, load_strip, plain_line
from tests.small_runs import STEPS, settings, train

VAL = Validation(2.5, 1.25, {})
LINE = MetricsLine(
    step=10, seconds=1.0, loss=3.1, lm_loss=3.0, losses={"aux": 1.0, "z": 2.0}, grad_norm=0.5, lr=1e-3,
    tokens_per_s=12345.6, skipped=0, layers=[
        LayerMetrics(1, max_vio=0.5, load_entropy=0.9, effective_experts=3.0, dead=1, dropped=0.0, skipped=0.0),
        LayerMetrics(3, max_vio=1.5, load_entropy=0.8, effective_experts=2.0, dead=2, dropped=0.0, skipped=0.0),
    ],
)  # fmt: skip
COUNTS = [torch.tensor([0, 10, 10, 20]), torch.tensor([40, 0, 0, 0])]


class Terminal(io.StringIO):
    """Text that goes to a terminal, kept."""

    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Terminal]:
    """Meanwhile, standard output is a wide terminal. (A fixture could not: the capture begins anew with the test.)"""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"}.items():
            patch.setenv(name, value)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        patch.setattr(sys, "stdout", Terminal())
        yield sys.stdout


def plain(text: str) -> str:
    """Without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_in_a_pipe_lines_are_plain_and_as_often_as_asked(corpus, tmp_path, capsys):
    train(settings(corpus, tmp_path / "run", {"train.steps": 6, "train.eval_every": 4, "log.every": 3}))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert [line.split()[1] for line in lines] == ["0/6", "3/6", "4/6", "6/6"]
    number = r"[\d,.]+"
    assert re.fullmatch(rf"step 3/6  loss {number}  {number} tokens/s  lr \S+  max_vio {number}  dead \d+", lines[1]), (
        lines[1]
    )
    assert re.search(rf"val loss {number} bpb {number}$", lines[2])


def test_a_plain_line_sums_up_all_layers():
    assert plain_line(LINE, 20) == "step 10/20  loss 3.0000  12,346 tokens/s  lr 1.00e-03  max_vio 1.50  dead 3"
    assert plain_line(MetricsLine(0, 0.0, val=VAL), 20) == "step 0/20  val loss 2.5000 bpb 1.2500"
    validated = dataclasses.replace(LINE, layers=[], val=VAL)
    assert plain_line(validated, 20).endswith("lr 1.00e-03  val loss 2.5000 bpb 1.2500")


def test_on_a_terminal_there_is_a_bar_and_a_strip_of_load_for_each_layer():
    with terminal() as out, Watch("my-run", 20, 5, 1) as watch:
        watch.step(MetricsLine(5, 0.0, val=VAL), [])
        watch.step(LINE, COUNTS)
    shown = plain(out.getvalue())
    last, _, stays = shown[shown.rindex("my-run") :].partition("step 10/20")
    assert "10/20" in last
    assert "50%" in last
    assert "loss 3.000  val 2.500  max_vio 1.50  12,346 tokens/s" in last
    assert f"layer   1 ·{STRIP[4]}{STRIP[4]}{STRIP[7]}" in last
    assert f"layer   3 {STRIP[7]}···" in last
    # When the bar is gone one line of it is still there.
    assert shown.count("step 10/20") == 1
    assert stays.split("\n")[0].strip() == "loss 3.0000  12,346 tokens/s  lr 1.00e-03  max_vio 1.50  dead 3"


def test_a_line_whose_evaluation_is_made_up_for_is_shown_without_its_load():
    with terminal() as out, Watch("my-run", 20, 10, 1) as watch:
        watch.step(dataclasses.replace(LINE, val=VAL), [])
    assert "loss 3.000  val 2.500" in plain(out.getvalue())


def test_on_a_terminal_what_is_said_stays_above_the_bar():
    with terminal() as out, Watch("my-run", 20, 0, 1) as watch:
        watch.say("checkpoint: runs/[a]/step-1")
    shown = plain(out.getvalue())
    assert "checkpoint: runs/[a]/step-1\n" in shown.replace("\r", "")


def test_a_runs_name_is_neither_markup_nor_control_characters():
    with terminal() as out, Watch("\x1b[31m[red]run", 20, 0, 1) as watch:
        watch.say("run: \x1b[31mred\r\n")
    assert "␛[31m[red]run" in plain(out.getvalue())
    assert "run: ␛[31mred␍␊" in plain(out.getvalue())
    assert "\x1b[31m" not in out.getvalue()


def test_without_a_reader_training_goes_on_and_says_so_once_elsewhere(monkeypatch, corpus, tmp_path, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", outlet(writer))
    summary = train(settings(corpus, tmp_path / "run", {"log.every": 1}), say)
    os.close(writer)
    assert summary.steps == STEPS
    assert (tmp_path / "run" / "summary.json").exists()
    assert capfd.readouterr().err.count("Nobody reads standard output (Broken pipe): training goes on") == 1


def test_a_whole_run_can_be_watched_on_a_terminal(corpus, tmp_path):
    with terminal() as out:
        train(settings(corpus, tmp_path / "run"))
    shown = plain(out.getvalue())
    assert "7/7" in shown
    assert "layer   0 " in shown
    assert "layer   1 " in shown


def test_a_dead_expert_is_red_and_twice_the_fair_load_yellow():
    strip = load_strip(torch.tensor([0, 10, 19, 20, 1]))  # fair is 10
    assert [str(span.style) for span in strip.spans] == ["bold red", "green", "green", "yellow", "green"]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300))
def test_a_strip_has_a_column_for_each_expert_or_group_of_neighbours(count):
    strip = load_strip(torch.tensor(count)).plain
    assert 1 <= len(strip) <= STRIP_WIDTH
    if len(count) <= STRIP_WIDTH:
        assert len(strip) == len(count)
        assert [character == "·" for character in strip] == [c == 0 for c in count]
    mean = sum(count) / len(count)
    for character, c in zip(strip, count, strict=False) if len(count) <= STRIP_WIDTH else ():
        if c:
            assert character == STRIP[min(7, int(c / mean * 4 + 1e-9))] or (c / mean * 4) % 1 < 1e-6
