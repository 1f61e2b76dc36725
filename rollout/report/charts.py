"""Small charts as inline SVG: text is escaped, colours and type come from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 40
TINY = 1e-12
"""The least that an axis spans."""


@dataclass(frozen=True)
class Bars:
    """One series of a bar chart: a height per bar, the class of its colour, and its name."""

    heights: Sequence[float]
    style: str
    name: str


@dataclass(frozen=True)
class Line:
    """A line of a line chart, with its band where both ends are known, the class of its colour, and its name."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]
    style: str
    name: str


@dataclass(frozen=True)
class Axes:
    """Axes of a chart: what they measure, x from `start` to `stop`, and a dashed line across, if any; y includes 0
    where there is `zero`."""

    x: str
    y: str
    start: float
    stop: float
    line: float | None = None
    whole: bool = False
    zero: bool = True


def bar_chart(title: str, series: Sequence[Bars], axes: Axes) -> Markup:
    """Bars side by side from `axes.start` to `axes.stop`, the series stacked on each other.

    Args:
        title: What it shows, for those who cannot see it.
        series: From 0 up, or down where a height is negative; as many heights in each.
        axes: `whole`: each bar stands on a whole number, the first on `start`.
    """
    count = len(series[0].heights)
    frame = _Frame(axes, [sum(part.heights[i] for part in series) for i in range(count)])
    width = (WIDTH - LEFT - RIGHT) / max(count, 1)
    gap = min(1.0, width / 8)
    pieces = []
    for i in range(count):
        base = 0.0
        for part in series:
            height = part.heights[i]
            if height:
                top, bottom = sorted((frame.y(base), frame.y(base + height)))
                pieces.append(
                    f'<rect class="{escape(part.style)}" x="{LEFT + i * width + gap / 2:.2f}" y="{top:.2f}" '
                    f'width="{width - gap:.2f}" height="{max(bottom - top, 0.5):.2f}"/>'
                )
            base += height
    return frame.drawn(title, pieces)


def stem_chart(
    title: str, places: Sequence[float], heights: Sequence[float], styles: Sequence[str], axes: Axes
) -> Markup:
    """A stem with a dot for each of `heights` at its place on the x axis."""
    frame = _Frame(axes, heights)
    pieces = []
    for place, height, style in zip(places, heights, styles, strict=True):
        x, top = frame.x(place), frame.y(height)
        pieces.append(f'<path class="stem" d="M{x:.2f} {frame.y(0):.2f}V{top:.2f}"/>')
        pieces.append(f'<circle class="{escape(style)}" cx="{x:.2f}" cy="{top:.2f}" r="3.5"/>')
    return frame.drawn(title, pieces)


def line_chart(title: str, lines: Sequence[Line], axes: Axes) -> Markup:
    """Lines with a dot at each value, on their bands."""
    ends = [end for line in lines for part in (line.y, line.low, line.high) for end in part if end is not None]
    frame = _Frame(axes, ends)
    pieces = []
    for line in lines:
        band = [
            (x, a, b) for x, a, b in zip(line.x, line.low, line.high, strict=True) if a is not None and b is not None
        ]
        if len(band) > 1:
            round_it = [(x, b) for x, _, b in band] + [(x, a) for x, a, _ in reversed(band)]
            pieces.append(f'<path class="band {escape(line.style)}" d="{frame.path(round_it)}Z"/>')
    for line in lines:
        points = list(zip(line.x, line.y, strict=True))
        pieces.append(f'<path class="line {escape(line.style)}" d="{frame.path(points)}"/>')
        pieces += [
            f'<circle class="dot {escape(line.style)}" cx="{frame.x(x):.2f}" cy="{frame.y(y):.2f}" r="2.4"/>'
            for x, y in points
        ]
    return frame.drawn(title, pieces)


class _Frame:
    """The axes of a chart and the way from values to places in it."""

    def __init__(self, axes: Axes, heights: Sequence[float]) -> None:
        self.axes = axes
        base = [0.0, axes.line or 0.0] if axes.zero or not heights else []
        lowest, highest = min([*heights, *base[:1]]), max([*heights, *base])
        if highest - lowest < TINY:
            highest = lowest + max(TINY, 1e-9 * abs(lowest))
        self.ticks_y = ticks(lowest, highest, 4)
        self.floor, self.top = min(self.ticks_y[0], lowest * 1.04), max(self.ticks_y[-1], highest * 1.04)
        if not axes.zero:
            self.floor, self.top = self.ticks_y[0], self.ticks_y[-1]
        half = 0.5 if axes.whole else 0.0
        self.low, self.high = axes.start - half, axes.stop + half
        least = max(TINY, 1e-9 * max(abs(self.low), abs(self.high)))
        if self.high - self.low < least:
            around = max(0.5, abs(self.low) / 2)
            self.low, self.high = self.low - around, self.high + around

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((value - self.low) / (self.high - self.low))

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * ((value - self.floor) / (self.top - self.floor))

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(x):.2f} {self.y(y):.2f}" for x, y in points)

    def drawn(self, title: str, pieces: Sequence[str]) -> Markup:
        axes, floor, zero = self.axes, HEIGHT - BOTTOM, self.y(max(0.0, self.floor))
        parts = [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
        ]
        for tick in self.ticks_y:
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.2f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 4:.2f}" text-anchor="end">{label(tick)}</text>')
        parts += pieces
        parts.append(f'<path class="axis" d="M{LEFT} {zero:.2f}H{WIDTH - RIGHT}"/>')
        if axes.line is not None:
            parts.append(f'<path class="even" d="M{LEFT} {self.y(axes.line):.2f}H{WIDTH - RIGHT}"/>')
        for tick in self._ticks_x():
            parts.append(
                f'<text class="tick" x="{self.x(tick):.2f}" y="{floor + 15}" text-anchor="middle">{label(tick)}</text>'
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 7}" text-anchor="middle">{escape(axes.x)}</text>'
        )
        turned = f"translate(11 {(TOP + floor) / 2:.0f}) rotate(-90)"
        parts.append(f'<text class="name" transform="{turned}" text-anchor="middle">{escape(axes.y)}</text></svg>')
        return Markup("".join(parts))

    def _ticks_x(self) -> list[float]:
        inside = [t for t in ticks(self.low, self.high, 5) if self.low <= t <= self.high]
        return [t for t in inside if t == int(t)] if self.axes.whole else inside


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from the last at or below `low` to the first at or beyond `high`."""
    raw = (high - low) / count
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def label(value: float) -> str:
    """A tick: 0.25, 12, 3,000, 1.5M, 2e+30."""
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
