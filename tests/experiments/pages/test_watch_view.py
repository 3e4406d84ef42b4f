"""Claims about the view of a run that trains: what it says, in how much room, and that text stays text."""

import io
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.pages.watch_view import ALARMS, Seen, frame, ink, layer_lines, load_cells, sparkline, state_sentence
from moe.analysis.heat_map import colours
from moe.config.run import build
from moe.run.summary import LayerMetrics, MetricsLine, StepCounts, Validation
from moe.train.progress import STRIP
from tests.small_runs import settings

SCORE = Validation(4.5, 2.0, {})


@dataclass(frozen=True)
class Alarm:
    """Something that went wrong."""

    text: str

    def sentence(self) -> str:
        return self.text


@dataclass(frozen=True)
class Alarmed(MetricsLine):
    alarms: list[Alarm] = field(default_factory=list)


def layer(number, vio, dead=0):
    return LayerMetrics(number, vio, 0.9, 3.0, dead, 0.25, 0.0)


def line(step, loss, layers=(), **more):
    kind = Alarmed if "alarms" in more else MetricsLine
    return kind(step, 0.5 * step, loss, loss, tokens_per_s=1000.0, lr=1e-3, grad_norm=0.5, layers=list(layers), **more)


def shown(view, width=100, colour=False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(view)
    return out.getvalue()


def seen_of(*lines, counts=None):
    seen = Seen(counts=counts)
    for entry in lines:
        seen.add(entry)
    return seen


@pytest.fixture
def cfg(corpus):
    return settings(corpus, "run", {"train.steps": 40})


def test_a_run_is_told_in_its_loss_its_layers_and_its_load(cfg):
    layers = [layer(1, 0.5), layer(3, 2.0, dead=1)]
    counts = StepCounts(10, [[5, 5, 5, 5], [0, 4, 4, 12]])
    lines = (MetricsLine(0, 0.0, val=SCORE), line(1, 6.0), line(10, 5.0, layers))
    text = shown(frame(seen_of(*lines, counts=counts), "training", "mine", cfg, 100))
    name, pace, loss, heading, first, second, below = text.splitlines()
    assert name == "mine: step 10 of 40"
    assert pace == "1,000 tokens/s  lr 1.00e-03  gradient norm 0.50  0:00:15 of training left"
    assert loss == f"loss 6.0000 {STRIP[7]}{STRIP[0]} 5.0000  val 4.5000 at step 0"
    assert " ".join(heading.split()) == "layer MaxVio load H dead dropped load over a fair share at step 10"
    assert first.split() == ["1", "0.50", "0.900", "0", "25.0%", "1.0", "1.0", "1.0", "1.0"]
    assert second.split() == ["3", "2.00", "0.900", "1", "25.0%", "dead", "0.8", "0.8", "2.4"]
    assert below.startswith("of step 10;")


def test_what_is_not_there_yet_is_a_sentence(cfg):
    assert shown(frame(Seen(), "training", "mine", cfg, 80)) == "mine: no step is recorded yet\n"
    waiting = shown(frame(Seen(), "waiting", "mine", cfg, 80))
    assert waiting == "mine: no step is recorded yet, and nobody trains it\n"
    early = shown(frame(seen_of(line(1, 6.0, [layer(0, 0.5)])), "training", "mine", cfg, 100))
    assert "no load yet: it is recorded every log.every steps" in early
    lost = seen_of(line(1, None), line(2, math.nan))
    assert "loss: not finite in any step" in shown(frame(lost, "training", "mine", cfg, 100))
    dense = build({"model": {"moe": None}})
    text = shown(frame(seen_of(line(1, 6.0)), "training", "mine", dense, 80))
    assert text.endswith("a dense model: there is no router to watch\n")


def test_the_first_line_says_whether_it_goes_on():
    seen = seen_of(line(7, 3.0))
    assert state_sentence(seen, "finished", "mine", 40) == "mine: finished, 40 steps"
    words = "mine: interrupted, step 7 of 40 is recorded, and nobody trains it"
    assert state_sentence(seen, "interrupted", "mine", 40) == words


def test_alarms_stand_below_the_last_ones_whole(cfg):
    alarms = [Alarm(f"number {i}") for i in range(7)]
    seen = seen_of(line(1, 6.0, alarms=alarms[:4]), line(2, 6.0, alarms=alarms[4:]), line(3, 6.0))
    lines = shown(frame(seen, "training", "mine", cfg, 80)).splitlines()
    assert lines[-ALARMS - 1 :] == ["2 earlier alarms", *(f"alarm: number {i}" for i in range(2, 7))]


def test_neither_names_nor_alarms_move_the_cursor_or_are_markup(cfg):
    seen = seen_of(line(1, 6.0, alarms=[Alarm("\x1b[2J[bold]domain\u202e")]))
    text = shown(frame(seen, "training", "\x1b]0;x\x07[red]run", cfg, 80))
    assert "␛]0;x␇[red]run: step 1 of 40" in text
    assert "alarm: ␛[2J[bold]domain\ufffd" in text
    assert not set("\x1b\x07\u202e") & set(text)


def test_in_little_room_the_least_even_layers_are_shown_in_their_order(cfg):
    layers = [layer(i, vio) for i, vio in enumerate([0.1, 3.0, 0.2, 2.0, 0.3])]
    rows = layer_lines(9, layers, None, 100, 2)
    assert [row.plain.split()[0] for row in rows[1:-1]] == ["1", "3"]
    assert rows[-1].plain.startswith("the 2 of 5 MoE layers with the highest MaxVio; of step 9;")
    seen = seen_of(line(1, 6.0, [layer(i, 0.0) for i in range(60)], alarms=[Alarm("word " * 40)] * 9))
    for height in (20, 24, 50):
        lines = shown(frame(seen, "training", "mine", cfg, 80, height), 80).splitlines()
        assert height - 4 <= len(lines) <= height - 1  # the cursor has a line of its own
        assert lines[-1].startswith("word")


def test_a_curve_goes_from_the_lowest_bar_to_the_highest_and_leaves_out_what_is_not_finite():
    assert sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 60) == STRIP
    assert sparkline([8.0, 8.0, 1.0, 1.0], 2) == STRIP[7] + STRIP[0]
    assert sparkline([3.0, 3.0], 9) == STRIP[0] * 2
    assert sparkline([math.nan, 1.0, math.inf, 2.0], 4) == f" {STRIP[0]} {STRIP[7]}"
    assert sparkline([1.0, math.nan, 3.0, 3.0], 2) == STRIP[0] + STRIP[7]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300), st.integers(1, 120))
def test_cells_have_equal_widths_and_fit_in_their_room(count, columns):
    ratio_E = np.array(count) / max(1.0, np.mean(count))
    text = load_cells(ratio_E, columns)
    n = -(-len(count) // -(-len(count) // columns))
    assert len(text.plain) <= columns
    assert len(text.plain) % n == 0
    assert len(text.spans) == n


def test_a_cell_has_its_number_or_a_bar_in_a_colour_and_a_dead_expert_is_red():
    assert load_cells(np.array([0.0, 1.04, 2.5, 120.0]), 40).plain == " dead 1.0  2.5  120 "
    assert load_cells(np.array([0.0, 2.0]), 8).plain == " ×  2.0 "
    narrow = load_cells(np.array([0.0, 0.1, 1.0, 2.5]), 4)
    assert narrow.plain == f"×{STRIP[0]}{STRIP[4]}{STRIP[7]}"
    styles = [str(span.style) for span in narrow.spans]
    assert styles[0] == "bold white on red"
    assert styles[1:3] == ["#ffffff on rgb(33,102,172)", "#000000 on rgb(241,242,244)"]
    assert styles[3].startswith("#000000 on rgb(2")
    # Of three experts that share a column one is dead: their mean is what is shown.
    assert load_cells(np.array([0.0, 1.5, 1.5, 1.0, 1.0, 1.0]), 2).plain == STRIP[4] * 2


def test_what_stands_on_a_colour_is_read_with_a_contrast_of_four_and_a_half():
    """WCAG 2.2's contrast, by its own definition of luminance."""

    def luminance(colour):
        share = np.asarray(colour) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return linear @ np.array([0.2126, 0.7152, 0.0722])

    for colour in colours(np.append(np.geomspace(0.2, 5, 200), np.nan)):
        light, dark = sorted((luminance(colour), 0.0 if ink(colour) == "#000000" else 1.0), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
