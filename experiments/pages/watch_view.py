"""A run as it trains, for a terminal: loss, the MoE layers, where their rows go, alarms.

Letters beyond the glossary: L the MoE layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.text import Text

from experiments.study.states import seconds_left
from moe.analysis import heat_map
from moe.config.run import Config
from moe.run.summary import LayerMetrics, MetricsLine, StepCounts, Validation
from moe.run.terminal import printable
from moe.train.progress import STRIP

CURVE = 60  # columns of the loss curve
CELL = 5  # columns of an expert, at most
ALARMS = 5  # shown at once, the last ones
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue light (WCAG 2.2)


@dataclass
class Seen:
    """What a run's lines have said so far."""

    losses: list[float] = field(default_factory=list)  # of the text, by step; NaN where it was not finite
    last: MetricsLine | None = None  # the last step's
    val: Validation | None = None
    val_step: int = 0
    counts: StepCounts | None = None
    alarms: list[Any] = field(default_factory=list)

    def add(self, line: MetricsLine) -> None:
        """One more line."""
        if line.step:
            self.losses.append(math.nan if line.lm_loss is None else line.lm_loss)
            self.last = line
        if line.val:
            self.val, self.val_step = line.val, line.step
        self.alarms += alarms_of(line)


def alarms_of(line: MetricsLine) -> list[Any]:
    """The alarms that a step raised."""
    return getattr(line, "alarms", None) or []


def state_sentence(seen: Seen, word: str, name: str, steps: int) -> str:
    """How far a run is. `word`: training | finished | interrupted | waiting."""
    step = seen.last.step if seen.last else 0
    match word:
        case "finished":
            return f"{name}: finished, {steps} steps"
        case "training" if step:
            return f"{name}: step {step} of {steps}"
        case "training" | "waiting":
            return f"{name}: no step is recorded yet" + ("" if word == "training" else ", and nobody trains it")
    return f"{name}: interrupted, step {step} of {steps} is recorded, and nobody trains it"


def frame(seen: Seen, word: str, name: str, cfg: Config, width: int, height: int | None = None) -> RenderableType:
    """The whole view, `width` columns wide; no higher than `height` lines, if it is given."""
    parts = [one_line(state_sentence(seen, word, name, cfg.train.steps), "bold")]

    # Loss and pace.
    if seen.last:
        parts.append(one_line(pace(seen.last, cfg.train.steps if word == "training" else 0)))
        parts.append(one_line(loss_line(seen, width)))

    # Alarms, which stand below but have their room first, and the layers, which get what is left.
    alarms = alarm_lines(seen.alarms, width, None if height is None else height // 2)
    room = None if height is None else height - len(parts) - len(alarms) - 3
    if not cfg.model.moe:
        parts.append(Text("a dense model: there is no router to watch"))
    elif seen.last and seen.last.layers:
        parts += layer_lines(seen.last.step, seen.last.layers, seen.counts, width, room)
    return Group(*parts, *alarms)


def one_line(text: str, style: str = "") -> Text:
    """A line that is cut rather than wrapped."""
    return Text(printable(text), style, no_wrap=True, overflow="ellipsis")


def alarm_lines(alarms: Sequence[Any], width: int, room: int | None) -> list[Text]:
    """The last alarms, wrapped, and how many there were before them; no more than fit into `room` lines, but one."""
    wrapped: list[list[Text]] = []
    for alarm in reversed(alarms[-ALARMS:]):
        text = Text(printable(f"alarm: {alarm.sentence()}"), "bold red")
        lines = list(text.wrap(Console(width=width), width))
        for line in lines:
            line.rstrip()
        if wrapped and room is not None and sum(map(len, wrapped)) + len(lines) > room - 1:
            break
        wrapped.insert(0, lines)
    earlier = len(alarms) - len(wrapped)
    return [Text(f"{earlier} earlier alarms")] * (earlier > 0) + [line for lines in wrapped for line in lines]


def pace(line: MetricsLine, steps: int) -> str:
    """How fast a run trains and, where it has `steps` to come, how long it will take."""
    parts = [] if line.tokens_per_s is None else [f"{line.tokens_per_s:,.0f} tokens/s"]
    parts += [] if line.lr is None else [f"lr {line.lr:.2e}"]
    parts += [] if line.grad_norm is None else [f"gradient norm {line.grad_norm:.2f}"]
    left = seconds_left(line, steps) if steps else None
    parts += [] if left is None else [f"{timedelta(seconds=round(left))} of training left"]
    return "  ".join(parts)


def loss_line(seen: Seen, width: int) -> str:
    """The loss from the first step to the last as a curve, and the last validation's."""
    known = [loss for loss in seen.losses if math.isfinite(loss)]
    if not known:
        return "loss: not finite in any step"
    val = f"  val {seen.val.loss:.4f} at step {seen.val_step}" if seen.val else ""
    curve = sparkline(seen.losses, max(8, min(CURVE, width - 24 - len(val))))
    return f"loss {known[0]:.4f} {curve} {known[-1]:.4f}{val}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as at most `width` bars, each the mean of as many, from the lowest of these to the highest; a blank where
    none is finite."""
    value = np.array(values, dtype=float)
    value[~np.isfinite(value)] = np.nan
    means = [part[~np.isnan(part)] for part in np.array_split(value, min(width, len(value)))]
    mean = np.array([part.mean() if part.size else np.nan for part in means])
    low, high = np.nanmin(mean), np.nanmax(mean)
    level = (mean - low) / (high - low) * (len(STRIP) - 1) if high > low else mean * 0
    return "".join(" " if math.isnan(height) else STRIP[round(height)] for height in level)


def layer_lines(
    step: int, layers: list[LayerMetrics], counts: StepCounts | None, width: int, room: int | None
) -> list[Text]:
    """A row per MoE layer: its metrics of `step`, and its experts' load in colour. Where there is `room` for fewer,
    those that are least even."""
    most = len(layers) if room is None else max(1, room)
    shown = sorted(sorted(range(len(layers)), key=lambda i: -layers[i].max_vio)[:most])

    # The numbers, of the last step.
    decided = any(getattr(layer, "entropy", None) is not None for layer in layers)
    heading = f"{'layer':>5} {'MaxVio':>7} {'load H':>7} " + (f"{'token H':>7} " if decided else "")
    heading += f"{'dead':>5} {'dropped':>7}  "
    rows = []
    for layer in (layers[i] for i in shown):
        entropy = f"{number(getattr(layer, 'entropy', None), '.3f'):>7} " if decided else ""
        numbers = f"{layer.layer:>5} {layer.max_vio:>7.2f} {layer.load_entropy:>7.3f} {entropy}"
        rows.append(one_line(numbers + f"{layer.dead:>5} {layer.dropped:>7.1%}  "))

    # The load, of the last step that has one.
    note = "no load yet: it is recorded every log.every steps"
    if counts and len(counts.counts) == len(layers):
        ratio_LE = heat_map.ratios(counts.counts)
        columns = max(1, width - len(heading))
        for row, i in zip(rows, shown, strict=True):
            row.append_text(load_cells(ratio_LE[i, : len(counts.counts[i])], columns))
        together = -(-ratio_LE.shape[1] // columns)
        note = f"load over a fair share at step {counts.step}" + (f", {together} to a column" if together > 1 else "")
    below = f"of step {step}; H: entropy / ln E; blue below a fair share, orange above, × dead"
    if len(rows) < len(layers):
        below = f"the {len(rows)} of {len(layers)} MoE layers with the highest MaxVio; {below}"
    return [one_line(heading + note, "bold"), *rows, one_line(below, "dim")]


def number(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def load_cells(ratio_E: np.ndarray, columns: int) -> Text:
    """Experts' loads over a fair one, (E,), in at most so many columns: colour by `heat_map.colours`, and in it the
    number where there is room, else a bar, of which the middle is fair. Neighbours share a column where there are too
    many; one that is dead is red."""
    together = -(-len(ratio_E) // columns)
    means = [ratio_E[i : i + together].mean() for i in range(0, len(ratio_E), together)]
    width = max(1, min(CELL, columns // max(1, len(means))))
    text = Text()
    for ratio, colour in zip(means, heat_map.colours(np.array(means)), strict=True):
        digits = f"{ratio:.1f}" if ratio < 99.5 else f"{ratio:.0f}"
        if ratio == 0:
            text.append(("dead" if width >= CELL else "×").center(width), "bold white on red")
        else:
            label = digits.center(width) if width >= 4 else STRIP[min(7, int(ratio * 4))] * width
            red, green, blue = colour.tolist()
            text.append(label, f"{ink(colour)} on rgb({red},{green},{blue})")
    return text


def ink(colour: np.ndarray) -> str:
    """Black or white, whichever is read more easily on red, green and blue, (3,) uint8."""
    return "#000000" if (colour / 255) ** 2.2 @ LUMINANCE > 0.179 else "#ffffff"
