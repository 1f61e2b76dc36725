"""The plots: what is drawn where, from a cohort and from frames, and the files they write."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from rollout import CohortAttributions, plot_positions, plot_record, plot_top_codes
from rollout.results.plots import PLAIN, PLANTED, READ
from tests.support.written_run import NASTY, Record, Run, write_run

RECORDS = [
    Record("p0", {"drugs": [("a", 0.6), ("b", 0.3), ("$c$", 0.1)], "visits": [(["x", "y"], 0.7), (["z"], 0.3)]}),
    Record("p1", {"drugs": [("b", 0.4), ("a", 0.4), ("b", 0.2)], "labs": [(None, 0.25, 1.0), (None, 0.75, 2.0)]}),
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> CohortAttributions:
    names = {"drugs": {"a": "Aspirin"}}
    return CohortAttributions(write_run(tmp_path_factory.mktemp("run"), RECORDS, Run(names=names)))


def bars(axis: Any) -> list[Any]:
    return [patch for patch in axis.patches if patch.get_width() and patch.get_height()]


def labels(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_yticklabels()]


def colours(axis: Any) -> list[str]:
    from matplotlib.colors import to_hex

    return [to_hex(patch.get_facecolor()) for patch in bars(axis)]


def test_top_codes_of_a_cohort(cohort: CohortAttributions) -> None:
    figure = plot_top_codes(cohort, planted={"drugs": ["b"]}, top=2, minimum_records=1, read_position=None)
    drugs, visits = figure.axes
    table = cohort.top_codes("drugs", by="lift", k=2, minimum_records=1, read_position=None)
    assert [patch.get_width() for patch in bars(drugs)] == pytest.approx(table["lift"].to_list())
    assert labels(drugs) == ["a Aspirin", "★ b"]
    assert colours(drugs) == [PLAIN, PLANTED]
    assert labels(visits) == ["x", "y"]
    assert visits.get_xlabel().startswith("mean lift")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["planted risk code", "other entries"]


def test_top_codes_of_frames(cohort: CohortAttributions) -> None:
    ranking = pl.DataFrame({"feature": ["f"] * 2, "code": ["a", "b"], "effect": [2.0, 1.0], "error": [0.1, 0.2]})
    axis = plot_top_codes(ranking, {"f": {"a": "Alpha"}}).axes[0]
    assert [patch.get_width() for patch in bars(axis)] == [2.0, 1.0]
    assert labels(axis) == ["a Alpha", "b"]
    segments = axis.collections[0].get_segments()
    assert [float(np.ptp(segment[:, 0])) for segment in segments] == pytest.approx([0.4, 0.8])
    table = cohort.top_codes("drugs", by="prevalence", minimum_records=0)
    figure = plot_top_codes(table, by="prevalence")
    assert labels(figure.axes[0])[0] == "a Aspirin"
    assert figure.axes[0].get_xlabel() == "share of the samples that have the code"
    assert not figure.legends


def test_a_record_of_a_cohort(cohort: CohortAttributions) -> None:
    figure = plot_record(cohort, sample=0, planted={"drugs": ["b"]})
    drugs, leaders, visits, visit_leaders = figure.axes
    assert [patch.get_height() for patch in bars(drugs)] == pytest.approx([60, 30, 10], abs=1e-4)
    assert colours(drugs) == [READ, PLANTED, PLAIN]
    assert labels(leaders) == ["a Aspirin", "★ b", r"\$c\$"]
    assert [patch.get_height() for patch in bars(visits)] == pytest.approx([70, 70, 30], abs=1e-4)
    assert colours(visits) == [READ, READ, PLAIN]
    assert visits.get_title(loc="left") == "visits (3 codes in 2 visits)"
    assert labels(visit_leaders) == ["visit 0: x, y", "visit 1: z"]
    assert [patch.get_width() for patch in bars(visit_leaders)] == pytest.approx([70, 30], abs=1e-4)
    assert figure.get_suptitle() == "Patient p0 (sample 0): relevance of each entry"


def test_a_record_from_rows(cohort: CohortAttributions) -> None:
    rows = cohort.sample(1)
    figure = plot_record(rows, title="One $ record", read_position=-1)
    assert colours(figure.axes[0]) == [PLAIN, PLAIN, READ]
    assert labels(figure.axes[3]) == ["step 1", "step 0"]
    assert colours(figure.axes[3]) == [READ, PLAIN]
    assert figure.get_suptitle() == r"One \$ record"
    assert colours(plot_record(rows, read_position=None).axes[0]) == [PLAIN] * 3


def test_positions_and_visits(cohort: CohortAttributions) -> None:
    figure = plot_positions(cohort)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["drugs", "labs", "visits"]
    expected = cohort.by_position("drugs", read_position=0)
    drawn = bars(figure.axes[0])
    assert [patch.get_height() for patch in drawn] == pytest.approx(expected["lift"].to_list())
    assert [patch.get_x() + patch.get_width() / 2 for patch in drawn] == pytest.approx(expected["position"].to_list())
    assert figure.axes[0].get_title(loc="right") == "2 records reach position 1; 2 records reach position 2"
    visits = plot_positions(cohort.by_visit(), value="relevance").axes[0]
    assert [patch.get_height() for patch in bars(visits)] == pytest.approx([0.7, 0.3])
    assert visits.get_xlabel() == "visit (0: the first)"
    assert len(bars(plot_positions(cohort, feature="drugs", places=1, from_end=True).axes[0])) == 1


def test_files_are_pictures_and_no_figure_stays_open(cohort: CohortAttributions, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot_top_codes(cohort, path=tmp_path / "top.png", minimum_records=0)
    plot_record(cohort, sample=0, path=tmp_path / "record.png")
    plot_positions(cohort, tmp_path / "places.png")
    assert plt.get_fignums() == before
    for name in ("top.png", "record.png", "places.png"):
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        assert 0.01 < (pixels.min(axis=2) < 250).mean() < 0.7


@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_strings_are_drawn_as_text(tmp_path: Path) -> None:
    records = [Record(NASTY[0], {"f\n$": [(code, 0.1) for code in (*NASTY, "\x00\x1b[31m", "$\\bad{$")]})]
    cohort = CohortAttributions(write_run(tmp_path / "run", records))
    plot_record(cohort, sample=0, path=tmp_path / "a.png")
    plot_top_codes(cohort, minimum_records=0, top=20, path=tmp_path / "b.png")
    plot_positions(cohort, tmp_path / "c.png")
    assert "(empty string)" in labels(plot_record(cohort, sample=0).axes[1])
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("a.png", "b.png", "c.png"))


def test_what_cannot_be_drawn_is_refused(cohort: CohortAttributions) -> None:
    rows = cohort.attributions.collect()
    for call, match in (
        (lambda: plot_record(cohort), "sample must say which sample"),
        (lambda: plot_record(rows), "rows of one sample, got 2"),
        (lambda: plot_record(rows, sample=9), "rows of one sample, got 0"),
        (lambda: plot_record(cohort, sample=9), "no attributions of sample 9"),
        (lambda: plot_record(cohort, sample=0, listed=0), "listed must be an int of at least 1"),
        (lambda: plot_top_codes(cohort, minimum_records=50), "no code to draw; try a lower minimum_records"),
        (lambda: plot_top_codes(cohort, by="effect"), "by must be one of"),
        (lambda: plot_top_codes(rows), "source must have feature, code and 'lift'"),
        (lambda: plot_top_codes(cohort, top=0), "top must be an int of at least 1"),
        (lambda: plot_positions(rows.drop("position", "visit")), "must be from by_position or by_visit"),
        (lambda: plot_positions(cohort, value="effect"), "value must be 'lift' or 'relevance'"),
        (lambda: plot_positions(cohort.by_visit("drugs")), "no places to draw"),
        (lambda: plot_positions(cohort, feature="none"), "feature must be one of"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_a_sample_without_entries_is_said_to_have_none(tmp_path: Path) -> None:
    cohort = CohortAttributions(write_run(tmp_path, [Record("p", {"drugs": []})]))
    with pytest.raises(ValueError, match="plot_record: sample 0 has no entries to draw"):
        plot_record(cohort, sample=0)


def test_negative_relevance_and_a_far_position_are_drawn(tmp_path: Path) -> None:
    def moved(rows: list[tuple]) -> list[tuple]:
        return [(*row[:5], 2**31 - 1, *row[6:]) if row[5] == 2 else row for row in rows]

    record = Record("p", {"drugs": [("a", 0.5), ("b", -0.4), ("c", 0.2)]})
    signed = CohortAttributions(write_run(tmp_path, [record], Run(model="mine.Encoder", change=moved)))
    drawn = plot_record(signed, sample=0, path=tmp_path / "record.png").axes[0]
    assert [patch.get_height() for patch in bars(drawn)] == pytest.approx([50, -40, 20], abs=1e-4)
    low, high = drawn.get_ylim()
    assert low <= -40
    assert high >= 50
    assert drawn.lines[0].get_ydata()[0] == pytest.approx(100 * 1.1 / 3, abs=1e-4)
    places = plot_positions(signed, tmp_path / "places.png").axes[0]
    lifts = signed.by_position("drugs")["lift"].to_list()
    assert len(lifts) == 3
    assert [patch.get_height() for patch in bars(places)] == pytest.approx(lifts[:2])
