"""A record as a timeline, inline SVG: a lane per feature over one axis, a mark per entry in the colour of its lift."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from rollout.report.charts import label, ticks

LEFT, RIGHT, HEAD, AXIS, STEP, STACK = 6, 8, 20, 38, 8, 8
"""Margins, room for a lane's name and for the axis, a mark with its gap, and marks that may stand on each other."""


@dataclass(frozen=True)
class Mark:
    """An entry: where it stands on the axis, the class of its colour, what it weighs, and what it is in words."""

    at: float
    style: str
    weight: float
    words: str


@dataclass(frozen=True)
class Lane:
    """A feature and its entries."""

    name: str
    marks: Sequence[Mark]


def lane_chart(title: str, lanes: Sequence[Lane], axis: str, width: int, whole: bool = False) -> Markup:
    """Marks at their places; those that would cover each other stand on each other, the heaviest lowest.

    Of one place the `STACK` heaviest are drawn; a `+` and a number say how many more there are.

    Args:
        title: What it shows, for those who cannot see it.
        lanes: From the top down.
        axis: What the axis measures.
        width: In units of the drawing; as wide as it is shown, text has its size.
        whole: The axis has whole numbers only.
    """
    places = [mark.at for lane in lanes for mark in lane.marks]
    scale = _Scale(min(places), max(places), width)
    pieces, top = [], 0.0
    for lane in lanes:
        columns = scale.columns(lane.marks)
        tallest = max(map(len, columns.values()))
        floor = top + HEAD + STEP * min(tallest, STACK) + (12 if tallest > STACK else 0)
        name = lane.name if len(lane.name) <= width // 8 else lane.name[: width // 8 - 1] + "…"
        pieces.append(f'<text class="heading" x="{LEFT}" y="{top + 13:.0f}">{escape(name)}</text>')
        pieces.append(f'<path class="axis" d="M{LEFT} {floor:.1f}H{width - RIGHT}"/>')
        for place, marks in columns.items():
            pieces += _column(LEFT + place * STEP, floor, marks)
        top = floor + 10
    several = ticks(min(places), max(places), max(2, width // 110))  # of one place: itself
    for tick in several if len(several) > 1 else places[:1]:
        if min(places) <= tick <= max(places) and (not whole or tick == int(tick)):
            x = scale.x(tick)
            pieces.append(f'<path class="grid" d="M{x:.1f} {top - 10:.1f}V{top - 4:.1f}"/>')
            anchor = "start" if x < LEFT + 12 else "end" if x > width - RIGHT - 12 else "middle"
            pieces.append(
                f'<text class="tick" x="{x:.1f}" y="{top + 9:.0f}" text-anchor="{anchor}">{label(tick)}</text>'
            )
    pieces.append(
        f'<text class="name" x="{width / 2:.0f}" y="{top + 26:.0f}" text-anchor="middle">{escape(axis)}</text>'
    )
    head = f'<svg class="chart" viewBox="0 0 {width} {top + AXIS:.0f}" role="img" aria-label="{escape(title)}">'
    return Markup("".join([head, f"<title>{escape(title)}</title>", *pieces, "</svg>"]))


def _column(x: float, floor: float, marks: Sequence[Mark]) -> list[str]:
    heaviest = sorted(marks, key=lambda mark: -mark.weight)
    pieces = [
        f'<rect class="{escape(mark.style)}" x="{x:.0f}" y="{floor - STEP * (place + 1):.1f}" width="{STEP - 1}" '
        f'height="{STEP - 1}"><title>{escape(mark.words)}</title></rect>'
        for place, mark in enumerate(heaviest[:STACK])
    ]
    if len(marks) > STACK:
        y = floor - STEP * STACK - 3
        pieces.append(
            f'<text class="more" x="{x + STEP / 2:.0f}" y="{y:.1f}" text-anchor="middle">+{len(marks) - STACK}</text>'
        )
    return pieces


class _Scale:
    """The axis: from a value to its place, and to the column of marks it stands in."""

    def __init__(self, low: float, high: float, width: int) -> None:
        around = 0.0 if high > low else max(1.0, abs(low))
        self.low, self.high = low - around, high + around
        self.left, self.span = LEFT + STEP / 2, width - LEFT - RIGHT - STEP

    def x(self, value: float) -> float:
        return self.left + self.span * ((value - self.low) / (self.high - self.low))

    def columns(self, marks: Sequence[Mark]) -> dict[int, list[Mark]]:
        found: dict[int, list[Mark]] = {}
        for mark in marks:
            found.setdefault(int((self.x(mark.at) - LEFT) // STEP), []).append(mark)
        return found
