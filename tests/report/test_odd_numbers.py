"""Numbers that are missing, not finite, far or negative: shown as what they are, or refused."""

import re
from pathlib import Path

import pytest

from rollout.report import write_report
from rollout.report.page import render
from rollout.report.sections.summary import summary
from rollout.results.attributions import CohortAttributions
from tests.support.pages import figure_of, text_of
from tests.support.written_run import Record, Run, write_run


def test_labels_that_are_not_known_are_drawn_as_such(tmp_path: Path) -> None:
    truths = [(1.0,), (0.0,), (0.0,), None, (None,), (float("nan"),), (0.0,), (1.0,)]
    found = [Record(f"p{i}", {"f": [("a", 0.5), ("b", 0.5)]}, (0.3,), true) for i, true in enumerate(truths)]  # type: ignore[arg-type]
    cohort = CohortAttributions(write_run(tmp_path, found))
    page = render(cohort)
    bars = re.findall(r'<rect class="(series\d)".*?height="([\d.]+)"', figure_of(page, "Histogram"))
    heights = {name: float(height) for name, height in bars}
    assert heights["series0"] == pytest.approx(heights["series2"], rel=1e-3)
    assert heights["series1"] / heights["series0"] == pytest.approx(2 / 3, rel=1e-3)
    assert "label not known" in page
    assert {row["label"]: row["samples"] for row in summary(cohort)["labels"]} == {0: 3, 1: 2}
    for i in (3, 4, 5):
        assert re.search(r"truth ?not known", text_of(render(cohort, f"p{i}")))


def test_predictions_that_are_not_known_are_counted_and_not_drawn(tmp_path: Path) -> None:
    probs = [(0.2,), (None,), (float("nan"),), (float("inf"),), (), (0.7,)]
    found = [Record(f"p{i}", {"f": [("a", 0.5), ("b", 0.5)]}, prob) for i, prob in enumerate(probs)]  # type: ignore[arg-type]
    cohort = CohortAttributions(write_run(tmp_path, found))
    page = figure_of(render(cohort), "Histogram of the predicted probability, 2 samples")
    assert "Not drawn: 3 samples without a finite prediction." in page
    shown = [text_of(render(cohort, f"p{i}")) for i in range(6)]
    assert [re.findall(r"predicted ?(no prediction kept|no finite prediction|\d+\.\d %)", one)[0] for one in shown] == [
        "20.0 %", *["no finite prediction"] * 3, "no prediction kept", "70.0 %"
    ]  # fmt: skip


def test_classes_with_a_part_of_their_probabilities(tmp_path: Path) -> None:
    probs = [(0.1, 0.9, 0.0), (None, 0.3, 0.6), (0.2, float("nan"), 0.1), (0.5, 0.3, 0.2)]
    found = [Record(f"p{i}", {"f": [("a", 1.0)]}, prob, (float(i % 3),)) for i, prob in enumerate(probs)]  # type: ignore[arg-type]
    page = render(CohortAttributions(write_run(tmp_path, found, Run(model="m.M"))), "p1")
    assert "class 2 with 60.0 %" in page
    assert "class not known" in figure_of(page, "Histogram of the probability of the predicted class, 4 samples")


@pytest.mark.parametrize("true", [(0.0,), (1.0,)])
def test_predictions_beyond_1_are_no_probabilities(tmp_path: Path, true: tuple[float, ...]) -> None:
    found = [
        Record(f"p{i}", {"f": [("a", 0.5), ("b", 0.5)]}, (value,), true) for i, value in enumerate((-3.0, 0.5, 7.0))
    ]
    page = render(CohortAttributions(write_run(tmp_path, found)), "p2")
    figure_of(page, "Histogram of the predicted value, 3 samples")
    assert re.search(r"predicted ?7", text_of(page))


def test_one_far_position_costs_one_row(tmp_path: Path) -> None:
    """Before, a chart of 2³¹ places was made for it."""

    def moved(rows: list[tuple]) -> list[tuple]:
        return [(*row[:5], 2**31 - 1, *row[6:]) if row[5] == 2 else row for row in rows]

    found = [Record(f"p{i}", {"f": [("a", 0.5), ("b", 0.3), ("c", 0.2)]}) for i in range(6)]
    page = render(CohortAttributions(write_run(tmp_path, found, Run(change=moved))))
    assert "1 later places are not shown" in page
    assert len(re.findall(r"<rect", figure_of(page, "mean lift by position"))) == 1
    assert len(page) < 100_000


def test_any_finite_time_is_drawn_and_no_other(tmp_path: Path) -> None:
    for times, drawn in (
        ((1e38, 1e38, 1e38), 2),
        ((1.0, -1e38, 1e38), 2),
        ((1.0, float("nan"), 2.0), 1),
        ((0.0, 5.0, None), 1),
    ):
        labs = [(None, 0.5, times[0]), (None, 0.2, times[1]), (None, 0.3, times[2])]
        folder = write_run(tmp_path / str(times), [Record(f"p{i}", {"labs": labs}) for i in range(4)])
        chart = figure_of(render(CohortAttributions(folder), "p1"), f"relevance over time, {drawn} of 2 entries")
        places = [float(x) for x in re.findall(r' cx="([\d.]+)"', chart)]
        assert len(places) == drawn
        assert all(46 <= x <= 392 for x in places)


def test_one_or_two_measurements_are_shown_too(tmp_path: Path) -> None:
    """Of two, the model reads the first; before, the page then had a heading with nothing under it."""
    found = [Record(f"p{n}", {"age": [(None, 1.0)], "labs": [(None, 0.7, 1.0), (None, 0.3, 4.0)]}) for n in range(4)]
    page = render(CohortAttributions(write_run(tmp_path / "run", found)), "p1")
    assert "4 samples of 4 patients" in text_of(page)
    one = write_run(tmp_path / "one", [Record("p", {"drugs": [("a", 1.0)]})])
    assert "1 sample of 1 patient, read by" in text_of(render(CohortAttributions(one)))
    assert "age 1 entry The model reads at its only place, with 100.0 %." in " ".join(text_of(page).split())
    chart = figure_of(page, "relevance over time, 1 of 1 entries")
    assert len(re.findall(r"<circle", chart)) == 1
    assert "Not drawn: the place the model reads, with 70.0 %." in " ".join(text_of(chart).split())


def test_negative_relevance_goes_down_from_the_line_of_0(tmp_path: Path) -> None:
    flat, timed = [("a", 0.5), ("b", -0.6), ("c", 0.2)], [(None, 0.1, 1.0), (None, -0.2, 2.0), (None, 0.3, 3.0)]
    found = [Record(f"p{i}", {"f": flat, "labs": timed}) for i in range(6)]
    cohort = CohortAttributions(write_run(tmp_path, found, Run(model="m.M")))
    page = render(cohort)
    stems = figure_of(render(cohort, "p1"), "relevance over time, 3 of 3 entries")
    zero = float(re.search(r'class="axis" d="M46 ([\d.]+)', stems).group(1))  # type: ignore[union-attr]
    down = [float(y) - zero for y in re.findall(r' cy="([\d.]+)"', stems)]
    assert [y / down[0] for y in down] == pytest.approx([1, -2, 3], abs=0.01)
    bars = figure_of(page, "mean lift by position")
    zero = float(re.search(r'class="axis" d="M46 ([\d.]+)', bars).group(1))  # type: ignore[union-attr]
    rects = [(float(y), float(h)) for y, h in re.findall(r'<rect[^>]* y="([\d.]+)"[^>]* height="([\d.]+)"', bars)]
    assert rects[1][0] == pytest.approx(zero, abs=0.01)
    assert rects[0][0] + rects[0][1] == pytest.approx(zero, abs=0.01)
    assert rects[1][1] / rects[0][1] == pytest.approx(0.6 / 0.5, abs=0.01)
    assert "-1.38×" in page


def test_names_nested_past_reading_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [Record("p", {"f": [("a", 1.0)]})])
    names = tmp_path / "names.json"
    names.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"^[^\n]*nested too deep[^\n]*$"):
        write_report(folder, tmp_path / "out.html", names=names)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".html"] == []
