"""A forest plot as inline SVG: a dot and its interval per row, in blocks with a heading, about a line at 0."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from rollout.report.charts import label, ticks

WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 400, 146, 14, 4, 19, 44
LETTERS = 21
"""Of a row's name that fit beside the axis."""


@dataclass(frozen=True)
class Row:
    """A difference with its interval, or what has none; `stands`: it is told from 0. A heading has no style."""

    name: str
    style: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    stands: bool = False


def forest_chart(title: str, rows: Sequence[Row], name: str) -> Markup:
    """Rows from the top down; a filled dot stands, a hollow one does not.

    Args:
        title: What it shows, for those who cannot see it.
        rows: Headings and differences.
        name: Of the axis.
    """
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    marks = ticks(min([*ends, 0.0]), max([*ends, 0.0]) or 1e-12, 4)
    low, high, floor = marks[0], marks[-1], TOP + ROW * len(rows)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {floor + BOTTOM}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for tick in marks:
        parts.append(f'<path class="grid" d="M{x(tick):.2f} {TOP}V{floor}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.2f}" y="{floor + 15}" text-anchor="middle">{label(tick)}</text>')
    parts.append(f'<path class="axis" d="M{x(0):.2f} {TOP}V{floor}"/>')
    for place, row in enumerate(rows):
        y = TOP + ROW * (place + 0.5)
        text = row.name if len(row.name) <= LETTERS else row.name[: LETTERS - 1] + "…"
        kind = "heading" if row.style is None else "tick"
        parts.append(f'<text class="{kind}" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        if row.style is not None and row.value is not None:
            if row.low is not None and row.high is not None:
                parts.append(
                    f'<path class="line {escape(row.style)}" d="M{x(row.low):.2f} {y:.1f}H{x(row.high):.2f}"/>'
                )
            dot = "dot" if row.stands else "ring"
            parts.append(f'<circle class="{dot} {escape(row.style)}" cx="{x(row.value):.2f}" cy="{y:.1f}" r="4"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="name" x="{middle:.0f}" y="{floor + 35}" text-anchor="middle">{escape(name)}</text></svg>'
    )
    return Markup("".join(parts))
