"""Charts as SVG, drawn here: lines with a band over seeds, and points with their names.

Each is whole by itself: it has its own style, which follows the reader's light or dark, so that the file and the page
show the same. Colour-blind people tell the colours apart; names are in the colour of text, and further rounds of the
colours are dashed and hollow.
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Of each curve in turn, by light and in the dark; found by a search from Okabe and Ito's for the largest distance
# of the nearest two, as full and as colour-blind eyes see them. The last is that of text.
COLOURS = ("#005080", "#a12509", "#00a45f", "#b389a7", "#8f8fe9", "#e88806", "#1b1f24")
IN_THE_DARK = ("#0069df", "#db5010", "#3baa60", "#c095a8", "#35d7ff", "#f4ae00", "#e6e9ee")
DASHES = ("", "7 3", "2 3", "8 3 2 3", "1 4")  # of each round of the colours
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 320, 58, 178, 14, 46
NAME = 15.0  # px from a name to the next


def _style() -> str:
    """What every picture brings with it."""
    light, dark = (
        "".join(f".c{i}{{color:{tone}}}" for i, tone in enumerate(tones)) for tones in (COLOURS, IN_THE_DARK)
    )
    return (
        "<style>.t{font:13px system-ui,sans-serif;fill:#1b1f24}.s{fill:#59636e}.g{stroke:#dde1e6}.b{stroke:#59636e}"
        f"{light}@media(prefers-color-scheme:dark){{.t{{fill:#e6e9ee}}.s{{fill:#9aa4b1}}.g{{stroke:#2b313a}}"
        f".b{{stroke:#9aa4b1}}{dark}}}</style>"
    )


STYLE = _style()


class Series(NamedTuple):
    """A curve: where, its mean, and the ends of a band (the same as the mean for none)."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


class Point(NamedTuple):
    """A point with a name, whether it is on the front (no other is as good in both), and the ends of its interval."""

    name: str
    x: float
    y: float
    front: bool
    low: float | None = None
    high: float | None = None


def tone(index: int) -> str:
    """The class that colours the curve or point of this number."""
    return f"c{index % len(COLOURS)}"


def dashes(index: int) -> str:
    """How its line is broken, for those that begin the colours anew."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def filling(index: int) -> float:
    """How full its points are: every second round of the colours has hollow ones."""
    return 0.0 if index // len(COLOURS) % 2 else 1.0


def line_chart(series: Sequence[Series], x_title: str, y_title: str, whole: bool = False) -> str:
    """Curves over x, as high as the last two thirds of the way are: before, every loss falls from the same height. Or
    as high as the `whole` way is."""
    begin = 0.0 if whole else 1 / 3
    late = [
        (x, y) for s in series for x, *ys in zip(s.x, s.low, s.high, strict=True) if x >= s.x[-1] * begin for y in ys
    ]
    end = max((s.x[-1] for s in series), default=1.0) or 1.0
    heights = [y for _, y in late] or [0.0, 1.0]
    frame = Frame((0.0, end), (min(heights), max(heights)), x_title, y_title, height_for(series))

    # Bands first, that no curve is under another's, and fainter where there are many.
    bands, lines = [], []
    faint = min(1.0, 4 / max(1, len(series)))
    for i, curve in enumerate(series):
        band = [*zip(curve.x, curve.high, strict=True), *reversed([*zip(curve.x, curve.low, strict=True)])]
        if curve.low != curve.high:
            bands.append(
                f'<polygon class="{tone(i)}" points="{frame.path(band)}" fill="currentColor" '
                f'fill-opacity="{0.13 * faint:.2g}" stroke="currentColor" stroke-opacity="{0.35 * faint:.2g}"/>'
            )
        points = frame.path([*zip(curve.x, curve.y, strict=True)])
        lines.append(
            f'<polyline class="{tone(i)}" points="{points}" fill="none" stroke="currentColor" stroke-width="2" '
            f'stroke-dasharray="{dashes(i)}"/>'
        )
        for x, y in zip(curve.x, curve.y, strict=True):
            lines.append(dot(frame.across(x), frame.down(y), 3, i, f"{curve.name}, {x_title} {x:,.4g}: {y:.4f}"))
    key = lambda i, x, y: (
        f'<line class="{tone(i)}" x1="{x}" x2="{x + 14}" y1="{y}" y2="{y}" stroke="currentColor" '
        f'stroke-width="3" stroke-dasharray="{dashes(i)}"/>'
    )
    names = legend([(s.name, s.y[-1]) for s in series], frame, key)
    label = ", ".join(f"{s.name} ends at {s.y[-1]:.3f}" for s in series)
    return frame.svg(
        f"{y_title} over {x_title}: {label}", [f'<g clip-path="url(#{frame.id})">', *bands, *lines, "</g>", *names]
    )


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Named points with their intervals; those on the front are joined."""
    xs = [p.x for p in points]
    ys = [y for p in points for y in (p.low, p.y, p.high) if y is not None]
    # What costs nearly the same is not to look otherwise.
    pad = max(0.08 * (max(xs) - min(xs)), 0.03 * max(map(abs, xs))) or 1.0
    frame = Frame((min(xs) - pad, max(xs) + pad), (min(ys), max(ys)), x_title, y_title, height_for(points))
    front = sorted((p.x, p.y) for p in points if p.front)
    drawn = [f'<polyline points="{frame.path(front)}" fill="none" class="b" stroke-dasharray="3 3"/>']
    for i, p in enumerate(points):
        x = frame.across(p.x)
        if p.low is not None and p.high is not None:
            drawn.append(
                f'<line class="{tone(i)}" x1="{x}" x2="{x}" y1="{frame.down(p.low)}" y2="{frame.down(p.high)}" '
                'stroke="currentColor" stroke-width="1.5" opacity=".6"/>'
            )
        drawn.append(dot(x, frame.down(p.y), 5, i, f"{p.name}: {p.y:.4f} at {p.x:,.4g}"))
    key = lambda i, x, y: (
        f'<rect class="{tone(i)}" x="{x + 4}" y="{y - 4.5:.1f}" width="9" height="9" rx="4.5" '
        f'fill="currentColor" fill-opacity="{filling(i)}" stroke="currentColor"/>'
    )
    names = legend([(p.name, p.y) for p in points], frame, key)
    label = ", ".join(f"{p.name} {p.y:.3f}" for p in points)
    return frame.svg(f"{y_title} against {x_title}: {label}", [*drawn, *names])


def dot(x: float, y: float, radius: int, index: int, title: str) -> str:
    """A point of the curve of this number, with what it says when it is pointed at."""
    return (
        f'<circle class="{tone(index)}" cx="{x}" cy="{y}" r="{radius}" fill="currentColor" '
        f'fill-opacity="{filling(index)}" stroke="currentColor"><title>{html.escape(title)}</title></circle>'
    )


def legend(ends: Sequence[tuple[str, float]], frame: "Frame", key: Callable[[int, float, float], str]) -> list[str]:
    """Names and values beside the plot, as near to the height of their value as none covers another; before each what
    `key` draws for its number at (x, y)."""
    heights = spread([frame.down(y) for _, y in ends], NAME, frame.height - BOTTOM)
    left = WIDTH - RIGHT + 10
    return [
        f'{key(i, left, round(height, 1))}<text class="t" x="{left + 19}" y="{height + 4:.1f}">'
        f"{html.escape(short(name))} {y:.3f}</text>"
        for i, ((name, y), height) in enumerate(zip(ends, heights, strict=True))
    ]


class Frame:
    """Axes, and where a value goes on them."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], x_title: str, y_title: str, height: int = HEIGHT
    ) -> None:
        margin = 0.06 * (y[1] - y[0]) or 0.5
        self.x, self.y, self.x_title, self.y_title = x, (y[0] - margin, y[1] + margin), x_title, y_title
        self.height = height
        self.id = "c" + "".join(c for c in x_title if c.isalnum())

    def across(self, value: float) -> float:
        """px from the left."""
        return round(LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT), 1)

    def down(self, value: float) -> float:
        """px from the top."""
        return round(TOP + (self.y[1] - value) / (self.y[1] - self.y[0]) * (self.height - TOP - BOTTOM), 1)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """Points of a line."""
        return " ".join(f"{self.across(x)},{self.down(y)}" for x, y in points)

    def svg(self, label: str, marks: list[str]) -> str:
        """The picture."""
        right, foot = WIDTH - RIGHT, self.height - BOTTOM
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img" '
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
        below = f'x="{middle}" y="{self.height - 6}"'
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
    """A name that fits beside the plot: with its beginning and its end, in which names differ."""
    return name if len(name) <= 12 else f"{name[:5]}…{name[-6:]}"


def height_for(drawn: Sequence[Series] | Sequence[Point]) -> int:
    """Enough for a name of each."""
    return max(HEIGHT, TOP + BOTTOM + math.ceil(NAME) * len(drawn))


def spread(heights: Sequence[float], distance: float, foot: float = HEIGHT - BOTTOM) -> list[float]:
    """Heights moved apart until neighbours are `distance` apart, in their order, none below `foot`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved, last = list(heights), -math.inf
    for i in order:
        moved[i] = last = max(heights[i], last + distance)
    # What went below the foot pushes up those above it, as far as it must.
    last = foot + distance
    for i in reversed(order):
        moved[i] = last = min(moved[i], last - distance)
    return moved


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two bounds."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
