"""The timeline of lanes: where marks stand, what is left out and said, whatever the numbers."""

import re

import pytest

from rollout.report.lanes import LEFT, RIGHT, STACK, STEP, Lane, Mark, lane_chart

WIDTH = 400


def marks(chart: str) -> list[tuple[str, float, float]]:
    """(style, x, y) of each mark."""
    found = re.findall(r'<rect class="(\w+)" x="([\d.-]+)" y="([\d.-]+)"', chart)
    return [(style, float(x), float(y)) for style, x, y in found]


def test_marks_stand_at_their_places_and_on_each_other() -> None:
    """0 at the left, 10 at the right, 5 between; of two at one place the heavier is below."""
    lane = Lane("drugs", [Mark(0, "a", 1, "a"), Mark(10, "b", 1, "b"), Mark(5, "c", 1, "c"), Mark(5, "d", 2, "d")])
    found = {style: (x, y) for style, x, y in marks(lane_chart("t", [lane], "time", WIDTH))}
    assert found["a"][0] == LEFT
    assert found["b"][0] == pytest.approx(WIDTH - RIGHT - STEP, abs=STEP)
    assert found["c"][0] == found["d"][0] == pytest.approx((found["a"][0] + found["b"][0]) / 2, abs=STEP)
    assert found["d"][1] == found["a"][1]
    assert found["c"][1] == found["d"][1] - STEP


def test_what_does_not_fit_is_counted() -> None:
    lane = Lane("x", [Mark(1, f"w{n}", n, "") for n in range(STACK + 5)])
    chart = lane_chart("t", [lane], "time", WIDTH)
    assert [style for style, _, _ in marks(chart)] == [f"w{n}" for n in range(STACK + 4, 4, -1)]
    assert ">+5</text>" in chart


def test_lanes_share_an_axis_and_do_not_overlap() -> None:
    lanes = [Lane(str(n), [Mark(at, f"n{n}", 1, "") for at in (0, 4)] * 20) for n in range(3)]
    chart = lane_chart("t", lanes, "time", WIDTH)
    heights = [[y for style, _, y in marks(chart) if style == f"n{n}"] for n in range(3)]
    assert max(heights[0]) < min(heights[1]) <= max(heights[1]) < min(heights[2])
    assert len({x for _, x, _ in marks(chart)}) == 2
    assert re.findall(r'class="tick"[^>]*>([^<]*)<', chart) == ["0", "2", "4"]


@pytest.mark.parametrize("places", [(3,), (3, 3), (1e30,), (-1e30, 1e30), (0, 1e-300), (-5, -5), (7, 7.5)])
def test_any_numbers_give_marks_within_the_picture(places: tuple[float, ...]) -> None:
    chart = lane_chart("t", [Lane("x", [Mark(at, "m", 1, "") for at in places])], "time", WIDTH, whole=True)
    assert len(marks(chart)) == len(places)
    assert all(0 <= x <= WIDTH - STEP for _, x, _ in marks(chart))
    assert not re.search(r'="[^"]*(?:nan|inf)', chart)
    assert chart.count("<text") < 20


def test_words_are_escaped() -> None:
    chart = lane_chart("<t>", [Lane("<l>", [Mark(1, '"><x', 1, "<w>")])], "<a>", WIDTH)
    assert "&lt;t&gt;" in chart
    assert not re.search(r"<[tlwax]>", chart)
