"""Places by hand, and the lift of a place is the same number in every view of it."""

import re
from pathlib import Path

import polars as pl
import pytest

from rollout import CohortAttributions, plot_record
from rollout.report.page import render
from rollout.report.sections.patients import patients
from rollout.results.attributions import READ_POSITION
from rollout.results.places import code_sums, find_places, place_sums
from rollout.results.ranking import rank_codes
from tests.support.pages import text_of
from tests.support.written_run import Record, Run, edit, write_run

SCHEMA = {
    "sample": pl.Int64, "feature": pl.String, "visit": pl.Int32, "position": pl.Int32, "code": pl.String,
    "attribution": pl.Float32,
}  # fmt: skip
FLAT = [("a", 0.5), ("b", 0.3), ("c", 0.0), ("d", 0.2)]
NESTED = [(["v", "w"], 0.5), (["x"], 0.125), (["y", "z"], 0.375)]
SIGNED = [("k", 0.5), ("l", -0.3), ("m", 0.1)]
LAST = 2**31 - 1


def rows(entries: list[tuple]) -> pl.DataFrame:
    return pl.DataFrame(entries, schema=SCHEMA, orient="row")


def by_place(found: pl.DataFrame, value: str) -> list[float | None]:
    return found.sort("place")[value].to_list()


def test_places_by_hand() -> None:
    flat = rows([(3, "f", None, p, code, score) for p, (code, score) in enumerate(FLAT)])
    found = find_places(flat, None).collect()
    assert by_place(found, "lift") == pytest.approx([2.0, 1.2, 0.0, 0.8])
    assert by_place(found, "even") == pytest.approx([0.25] * 4)
    found = find_places(flat, 0).collect()
    assert by_place(found, "lift")[0] is None
    assert by_place(found, "lift")[1:] == pytest.approx([1.8, 0.0, 1.2])
    assert by_place(found, "read") == [True, False, False, False]
    assert by_place(find_places(flat, -1).collect(), "lift")[:3] == pytest.approx([1.875, 1.125, 0.0])


def test_a_visit_counts_once_however_many_codes_stand_in_it() -> None:
    nested = rows([(0, "v", 0, 0, "a", 0.6), (0, "v", 0, 1, "b", 0.6), (0, "v", 1, 0, "c", 0.4)])
    found = find_places(nested, None).collect()
    assert by_place(found, "relevance") == pytest.approx([0.6, 0.4])
    assert by_place(found, "lift") == pytest.approx([1.2, 0.8])


def test_a_feature_of_one_score_is_one_place_which_the_model_reads(tmp_path: Path) -> None:
    """A multi-hot feature: before, each code was a place, and the first one the place that is read."""
    hot = rows([(n, "flags", None, at, code, 1.0) for n in range(6) for at, code in ((0, "a"), (2, "c"))])
    assert (
        find_places(hot, 0, ["flags"]).sort("sample").collect().select("place", "relevance", "read", "lift").rows()
        == [(0, 1.0, True, None)] * 6
    )
    assert code_sums(hot, None, None, ["flags"]).sort("code").select("code", "relevance", "lift", "records").rows() == [
        ("a", 6.0, 6.0, 6), ("c", 6.0, 6.0, 6)]  # fmt: skip
    assert rank_codes(hot, 0.0)["code"].to_list() == ["c"]
    assert rank_codes(hot, 0.0, 0, ["flags"]).is_empty()
    assert rank_codes(hot, 0.0, None, ["flags"])["records"].to_list() == [6, 6]
    each = hot.with_columns(attribution=pl.when(pl.col("code") == "a").then(0.75).otherwise(0.25))
    assert by_place(find_places(each, None, ["flags"]).filter(sample=0).collect(), "relevance") == [0.75, 0.25]
    records = [Record(f"p{n}", {"flags": [("a", 1.0), ("c", 1.0)], "f": FLAT}) for n in range(6)]
    edit(write_run(tmp_path, records) / "manifest.json", granularity={"flags": "feature", "f": "code"})
    cohort = CohortAttributions(tmp_path)
    assert cohort.by_position("flags").rows() == [("flags", 0, 1.0, 1.0, 6)]
    assert cohort.top_codes("flags", read_position=None)["relevance"].to_list() == [1.0, 1.0]
    assert cohort.top_codes("flags").is_empty()
    shown = patients(cohort, "p1")["samples"][0]["features"][0]
    assert [(one["code"], one["level"]) for one in shown["chips"]] == [("a", "read"), ("c", "read")]
    assert "All codes of a sample share one score, so that none stands above another: flags." in text_of(render(cohort))


def test_signed_relevance_has_signed_lift_against_its_size() -> None:
    signed = rows([(0, "s", None, p, code, score) for p, (code, score) in enumerate(SIGNED)])
    assert by_place(find_places(signed, None).collect(), "lift") == pytest.approx([5 / 3, -1.0, 1 / 3])
    assert by_place(find_places(signed, 0).collect(), "lift")[1:] == pytest.approx([-1.5, 0.5])


def test_places_without_relevance_have_lift_0_and_a_lone_place_that_is_read_has_none() -> None:
    assert by_place(find_places(rows([(0, "f", None, p, "a", 0.0) for p in (0, 1)]), None).collect(), "lift") == [
        0.0,
        0.0,
    ]
    assert by_place(find_places(rows([(0, "f", None, 0, "a", 1.0)]), -1).collect(), "lift") == [None]


def test_the_largest_position_there_is_counts_as_any_other() -> None:
    """Counting from the end must not run over the range of the column."""
    far = rows([(0, "f", None, p, "a", 0.5) for p in (0, LAST)])
    assert by_place(find_places(far, -1).collect(), "read") == [False, True]
    sums = place_sums(far, nested=False, from_end=True, read_position=None)
    assert sorted(sums["place"]) == [0, LAST]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((7, "f", None, 0, "a", float("nan")), "attribution nan of sample 7"),
        ((7, "f", None, 0, "a", float("inf")), "attribution inf of sample 7"),
        ((7, "f", None, 0, "a", None), "attribution None of sample 7"),
        ((7, None, None, 0, "a", 0.5), "feature None"),
        ((7, "f", None, None, "a", 0.5), "place None"),
        ((7, "f", -2, 0, "a", 0.5), "place -2"),
    ],
)
def test_rows_that_say_nothing_are_refused_by_name(row: tuple, words: str) -> None:
    good = [(0, "f", None, p, "a", 0.5) for p in (0, 1)]
    for call in (
        lambda: find_places(rows([*good, row]), None),
        lambda: code_sums(rows([*good, row]), 0, None),
        lambda: rank_codes(rows([*good, row])),
    ):
        with pytest.raises(ValueError, match=f"attributions must have a feature, .*{words}"):
            call()


@pytest.mark.parametrize("model", ["mine.Encoder", "Transformer", "StageAttentionNet"], ids=["none", "first", "last"])
def test_the_lift_is_the_same_number_in_every_view(tmp_path: Path, model: str) -> None:
    features = {"flat": FLAT, "nested": NESTED, "signed": SIGNED}
    folder = write_run(tmp_path, [Record(f"p{i}", features) for i in range(6)], Run(model=model))
    cohort, read = CohortAttributions(folder), READ_POSITION.get(model)
    first = cohort.attributions.filter(pl.col("sample") == 0).collect()
    places = {
        (feature, place): lift
        for feature, place, lift in find_places(first, read).select("feature", "place", "lift").collect().rows()
        if lift is not None
    }
    assert len(places) == 10 - 3 * (read is not None)
    place_of = {
        code: (feature, visit if visit is not None else position)
        for feature, visit, position, code in first.select("feature", "visit", "position", "code").rows()
    }

    for table in (
        cohort.top_codes(by="lift", minimum_records=1, k=None).drop_nulls("lift"),
        rank_codes(cohort.attributions.collect(), read_position=read),
    ):
        lifts = dict(table.select("code", "lift").rows())
        assert lifts == pytest.approx({code: places[place] for code, place in place_of.items() if place in places})

    drawn = {
        (feature, place): lift
        for unit, table in (
            ("position", cohort.by_position(read_position=read)), ("visit", cohort.by_visit(read_position=read))
        )
        for feature, place, lift in table.select("feature", unit, "lift").rows()
    }  # fmt: skip
    assert drawn == pytest.approx(places)

    shown = {
        (feature["name"], one["place"]): one["lift"]
        for feature in patients(cohort, "p0")["samples"][0]["features"]
        for one in (*feature["chips"], *feature["visits"], *feature["leaders"])
        if not one["read"]
    }
    assert shown == pytest.approx(places)
    for lift in places.values():
        assert f"{lift:.2f}×" in render(cohort, "p0")

    figure = plot_record(first, read_position=read)
    for axis, feature in zip(figure.axes[::2], features, strict=True):
        even = axis.lines[0].get_ydata()[0]
        heights = [patch.get_height() for patch in axis.patches]
        part = first.filter(pl.col("feature") == feature)
        where = part.select(pl.coalesce("visit", "position")).to_series().to_list()
        assert len(heights) == len(where)
        for height, place in zip(heights, where, strict=True):
            if (feature, place) in places:
                assert height / even == pytest.approx(places[feature, place])


def test_lift_1_is_where_the_page_and_the_picture_draw_their_line(tmp_path: Path) -> None:
    timed = [(None, 0.7, 1.0), (None, 0.1, 2.0), (None, 0.2, 3.0)]
    folder = write_run(tmp_path, [Record(f"p{i}", {"labs": timed}) for i in range(4)])
    page = render(CohortAttributions(folder), "p0")
    chart = re.search(r"<svg[^>]*relevance over time.*?</svg>", page, re.S)
    assert chart
    line = float(re.search(r'class="even" d="M46 ([\d.]+)', chart.group(0)).group(1))  # type: ignore[union-attr]
    dots = [float(y) for y in re.findall(r'cy="([\d.]+)"', chart.group(0))]
    assert [(170 - y) / (170 - line) for y in dots] == pytest.approx([2 / 3, 4 / 3], abs=0.01)
