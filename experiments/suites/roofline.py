"""A picture of measured rows under the roofs measured beside them: FLOP per byte against TF/s.

    python -m experiments.gpu_evidence --out DIR    # draws DIR/roofline.png of the rows in DIR

A point is a measured row of suite layer or a combine of suite kernels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.suites import peers, shapes
from experiments.suites.cases import Absent
from experiments.suites.shapes import Shape


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: a point per row of suite layer and direction, contestants by colour, filled for forward; and a grey
    square per combine of suite kernels. Bytes are the least that have to move: for a layer's forward x, weights and y
    once, for its backward twice that, as it has twice the FLOPs. Raises `Absent` without matplotlib, or with nothing to
    draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Absent("matplotlib not installed") from None
    measured = [row for row in rows if row["status"] == "measured"]
    layers = [row for row in measured if row["suite"] == "layer"]
    combines = [row for row in measured if row["suite"] == "kernels" and row["op"].startswith("combine")]
    if not layers and not combines:
        raise Absent("no measured rows of suites layer and kernels")

    # Points first: the roofs reach as far as they do, and at least three octaves to either side of their knee.
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    of_layers, of_combines = _draw_layers(axes, layers), _draw_combines(axes, combines)
    ceilings = [row["ceilings"] for row in layers + combines]
    copy, matmul = (max(roofs[name] for roofs in ceilings) / 1e12 for name in ("copy", "matmul"))
    knee = matmul / copy
    left = min([knee / 8, *(x / 2 for x in of_layers + of_combines)])
    right = max([knee * 8, *(2 * x for x in of_layers)])
    span = [left, knee, right]
    axes.plot(span, [min(matmul, copy * x) for x in span], "k-", linewidth=1)
    axes.text(right, matmul, f"{matmul:,.3g} TF/s ", ha="right", va="bottom", fontsize=8)
    axes.text(left, copy * left, f" {copy:.3g} TB/s", ha="left", va="top", fontsize=8)

    # What is drawn, and of which device.
    first = (layers or combines)[0]
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (least bytes)", ylabel="TF/s")
    axes.set_title(f"{first['device']}, torch {first['versions']['torch']}", fontsize=10)
    title = "filled: forward, open: backward\ncircle: uniform, triangle: other loads"
    axes.legend(fontsize=8, title=title, title_fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_layers(axes: Any, layers: Sequence[dict[str, Any]]) -> list[float]:
    """Two points per row, and the shape's name at ours under the uniform load; returns every row's FLOP per byte."""
    colours = {name: f"C{i}" for i, name in enumerate(peers.PEERS)}
    intensities = []
    for row in layers:
        shape = Shape(*(row[letter] for letter in Shape._fields))
        x = shapes.forward_flops(shape) / shapes.layer_bytes(shape)
        intensities.append(x)
        colour, marker = colours[row["contestant"]], "o" if row["load"] == "uniform" else "^"
        _point(axes, x, row["forward_tf"], row["contestant"], marker=marker, color=colour)
        _point(axes, x, row["backward_tf"], row["contestant"], marker=marker, color=colour, markerfacecolor="none")
        if row["contestant"] == peers.OURS and row["load"] == "uniform":
            side, dx = ("left", 7) if len(axes.texts) % 2 else ("right", -7)  # shapes lie close to each other
            axes.annotate(
                row["shape"], (x, row["forward_tf"]), (dx, 0), textcoords="offset points", fontsize=7, ha=side,
                va="center",
            )  # fmt: skip
    return intensities


def _draw_combines(axes: Any, combines: Sequence[dict[str, Any]]) -> list[float]:
    """A grey square per row; returns every row's FLOP per byte."""
    intensities = []
    for row in combines:
        flops = (2 if row["op"] == "combine" else 1) * row["T"] * row["K"] * row["D"]
        x, microseconds = flops / row["bytes"], row["us"] or row["eager_us"]
        intensities.append(x)
        _point(axes, x, flops / microseconds / 1e6, "combine", marker="s", color="0.6", markersize=3)
    return intensities


def _point(axes: Any, x: float, y: float | None, label: str, **style: Any) -> None:
    """One point, named in the legend if it is the first of its label; none for a value that was not to be had."""
    if y is not None:
        named = label in axes.get_legend_handles_labels()[1]
        axes.plot(x, y, label=None if named else label, linestyle="none", **style)
