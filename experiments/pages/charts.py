"""Charts as SVG, drawn here: lines with a band over seeds, and points with their names.

Each is whole by itself: it has its own style, which follows the reader's light or dark, so that the file and the page
show the same. Colours are Okabe and Ito's, which colour-blind people tell apart, and every curve ends with its name.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments.pages.compare_page import ticks

# Light and dark: of each curve in turn.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6bb1", "#666666")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 580, 340, 64, 152, 14, 46
STYLE = (
    "<style>.t{font:12px system-ui,sans-serif;fill:#1b1f24}.s{fill:#59636e}.g{stroke:#dde1e6}.b{stroke:#59636e}"
    "@media(prefers-color-scheme:dark){.t{fill:#e6e9ee}.s{fill:#9aa4b1}.g{stroke:#2b313a}.b{stroke:#9aa4b1}}</style>"
)


class Series(NamedTuple):
    """A curve: where, its mean, and the ends of a band (the same as the mean for none)."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


class Point(NamedTuple):
    """A point with a name, and whether it is on the front: no other is as good in both."""

    name: str
    x: float
    y: float
    front: bool


def colour(index: int) -> str:
    """Of the curve or point of this number."""
    return COLOURS[index % len(COLOURS)]


def line_chart(series: Sequence[Series], x_title: str, y_title: str) -> str:
    """Curves over x, as high as the last two thirds of the way are: before, every loss falls from the same height."""
    late = [(x, y) for s in series for x, *ys in zip(s.x, s.low, s.high, strict=True) if x >= s.x[-1] / 3 for y in ys]
    end = max((s.x[-1] for s in series), default=1.0) or 1.0
    heights = [y for _, y in late] or [0.0, 1.0]
    frame = Frame((0.0, end), (min(heights), max(heights)), x_title, y_title)
    drawn = []
    for i, curve in enumerate(series):
        band = [*zip(curve.x, curve.high, strict=True), *reversed([*zip(curve.x, curve.low, strict=True)])]
        if curve.low != curve.high:
            drawn.append(f'<polygon points="{frame.path(band)}" fill="{colour(i)}" opacity=".16"/>')
        points = frame.path([*zip(curve.x, curve.y, strict=True)])
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour(i)}" stroke-width="2"/>')
        for x, y in zip(curve.x, curve.y, strict=True):
            title = html.escape(f"{curve.name}, {x_title} {x:,.4g}: {y:.4f}")
            drawn.append(dot(frame.across(x), frame.down(y), 3, i, title))
    ends = spread([frame.down(s.y[-1]) for s in series], 15.0)
    names = [
        f'<text class="t" x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}" style="fill:{colour(i)};font-weight:600">'
        f"{html.escape(short(s.name))} {s.y[-1]:.3f}</text>"
        for i, (s, y) in enumerate(zip(series, ends, strict=True))
    ]
    label = ", ".join(f"{s.name} ends at {s.y[-1]:.3f}" for s in series)
    return frame.svg(
        f"{y_title} over {x_title}: {label}", [f'<g clip-path="url(#{frame.id})">', *drawn, "</g>", *names]
    )


def dot(x: float, y: float, radius: int, index: int, title: str) -> str:
    """A point of the curve of this number, with what it says when it is pointed at."""
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour(index)}"><title>{title}</title></circle>'


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Named points; those on the front are joined."""
    xs, ys = [p.x for p in points], [p.y for p in points]
    pad = 0.06 * (max(xs) - min(xs)) or 0.05 * abs(max(xs)) or 1.0
    frame = Frame((min(xs) - pad, max(xs) + pad), (min(ys), max(ys)), x_title, y_title)
    front = sorted((p.x, p.y) for p in points if p.front)
    drawn = [f'<polyline points="{frame.path(front)}" fill="none" class="b" stroke-dasharray="3 3"/>']
    heights = spread([frame.down(p.y) for p in points], 13.0)
    for i, (p, y) in enumerate(zip(points, heights, strict=True)):
        title = html.escape(f"{p.name}: {p.y:.4f} at {p.x:,.4g}")
        x = frame.across(p.x)
        drawn.append(
            f'<circle cx="{x}" cy="{frame.down(p.y)}" r="5" fill="{colour(i)}"><title>{title}</title></circle>'
        )
        left = x > WIDTH - RIGHT - 70
        drawn.append(
            f'<text class="t" x="{x - 9 if left else x + 9}" y="{y + 4:.1f}" '
            f'text-anchor="{"end" if left else "start"}">'
            f"{html.escape(short(p.name))}</text>"
        )
    label = ", ".join(f"{p.name} {p.y:.3f}" for p in points)
    return frame.svg(f"{y_title} against {x_title}: {label}", drawn)


class Frame:
    """Axes, and where a value goes on them."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_title: str, y_title: str) -> None:
        margin = 0.06 * (y[1] - y[0]) or 0.5
        self.x, self.y, self.x_title, self.y_title = x, (y[0] - margin, y[1] + margin), x_title, y_title
        self.id = "c" + "".join(c for c in x_title if c.isalnum())

    def across(self, value: float) -> float:
        """px from the left."""
        return round(LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT), 1)

    def down(self, value: float) -> float:
        """px from the top."""
        return round(TOP + (self.y[1] - value) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """Points of a line."""
        return " ".join(f"{self.across(x)},{self.down(y)}" for x, y in points)

    def svg(self, label: str, marks: list[str]) -> str:
        """The picture."""
        right, foot = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{html.escape(label, quote=True)}">{STYLE}<clipPath id="{self.id}">'
            f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT + 5}" height="{foot - TOP}"/></clipPath>'
        ]
        for tick in ticks(*self.y):
            y = self.down(tick)
            parts.append(f'<line class="g" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="t s" x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<line class="b" x1="{LEFT}" x2="{right}" y1="{foot}" y2="{foot}"/>')
        for tick in ticks(*self.x):
            x = self.across(tick)
            parts.append(f'<line class="b" x1="{x}" x2="{x}" y1="{foot}" y2="{foot + 4}"/>')
            parts.append(f'<text class="t s" x="{x}" y="{foot + 18}" text-anchor="middle">{brief(tick)}</text>')
        middle, height = (LEFT + right) / 2, (TOP + foot) / 2
        parts += marks
        below = f'x="{middle}" y="{HEIGHT - 6}"'
        parts.append(f'<text class="t s" {below} text-anchor="middle">{html.escape(self.x_title)}</text>')
        parts.append(
            f'<text class="t s" transform="translate(13 {height}) rotate(-90)" text-anchor="middle">'
            f"{html.escape(self.y_title)}</text></svg>"
        )
        return "".join(parts)


def brief(value: float) -> str:
    """A number for an axis: with its power of ten where it is long."""
    return f"{value:,g}" if abs(value) < 1e6 else f"{value:.4g}".replace("e+", "e")


def short(name: str) -> str:
    """A name that fits beside the plot."""
    return name if len(name) <= 14 else name[:13] + "…"


def spread(heights: Sequence[float], distance: float) -> list[float]:
    """Heights moved apart until neighbours are `distance` apart, in their order."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved, last = list(heights), -math.inf
    for i in order:
        moved[i] = last = max(heights[i], last + distance)
    over = max(0.0, last - (HEIGHT - BOTTOM))
    return [height - over for height in moved]
