"""A picture of measured rows under the roofs measured beside them: FLOP per byte against TF/s."""

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
    roofs = [row["ceilings"] for row in layers + combines]
    copy, matmul = (max(each[name] for each in roofs) / 1e12 for name in ("copy", "matmul"))
    knee = matmul / copy
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    left, right, labelled = knee / 8, knee * 8, set[str]()

    def point(x: float, y: float | None, label: str, **style: Any) -> None:
        if y is not None:
            axes.plot(x, y, label=None if label in labelled else label, linestyle="none", **style)
            labelled.add(label)

    colours = {name: f"C{i}" for i, name in enumerate(peers.PEERS)}
    for row in layers:
        shape = Shape(*(row[letter] for letter in Shape._fields))
        x = shapes.forward_flops(shape) / shapes.layer_bytes(shape)
        left, right = min(left, x / 2), max(right, 2 * x)
        colour, marker = colours[row["contestant"]], "o" if row["load"] == "uniform" else "^"
        point(x, row["forward_tf"], row["contestant"], marker=marker, color=colour)
        point(x, row["backward_tf"], row["contestant"], marker=marker, color=colour, markerfacecolor="none")
        if row["contestant"] == peers.OURS and row["load"] == "uniform":
            side, dx = ("left", 7) if len(axes.texts) % 2 else ("right", -7)  # shapes lie close to each other
            axes.annotate(
                row["shape"],
                (x, row["forward_tf"]),
                (dx, 0),
                textcoords="offset points",
                fontsize=7,
                ha=side,
                va="center",
            )
    for row in combines:
        flops = (2 if row["op"] == "combine" else 1) * row["T"] * row["K"] * row["D"]
        x, microseconds = flops / row["bytes"], row["us"] or row["eager_us"]
        left = min(left, x / 2)
        point(x, flops / microseconds / 1e6, "combine", marker="s", color="0.6", markersize=3)
    span = [left, knee, right]
    axes.plot(span, [min(matmul, copy * each) for each in span], "k-", linewidth=1)
    axes.text(right, matmul, f"{matmul:,.3g} TF/s ", ha="right", va="bottom", fontsize=8)
    axes.text(left, copy * left, f" {copy:.3g} TB/s", ha="left", va="top", fontsize=8)
    first = (layers or combines)[0]
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (least bytes)", ylabel="TF/s")
    axes.set_title(f"{first['device']}, torch {first['versions']['torch']}", fontsize=10)
    title = "filled: forward, open: backward\ncircle: uniform, triangle: other loads"
    axes.legend(fontsize=8, title=title, title_fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
