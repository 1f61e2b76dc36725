"""What a search finds, against answers worked out by hand and against plain loops over the rows of a cohort."""

from collections import defaultdict
from pathlib import Path

import polars as pl
import pytest

from rollout.report.explore.app import Explorer
from rollout.report.explore.index import build_index, put_beside
from rollout.report.explore.search import PAGE, BadQuestionError, OneCode, Search, Searcher, page_of
from rollout.results.attributions import CohortAttributions
from rollout.results.layout import MANIFEST
from rollout.results.places import find_cells
from tests.support.explored import RECORDS, explorer_of, written
from tests.support.toy_cohort import attribute, rows
from tests.support.written_run import Record, edit


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    return explorer_of(written(tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "toy"
    attribute(folder)
    return folder


def numbers(searcher: Searcher, **asked: object) -> list[int]:
    given = [(name, str(value)) for name, value in asked.items()]
    return searcher.find(Search.of(given))["sample"].to_list()


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"patient": "p1"}, [1, 2]),  # so called: not p10, of which it is a piece
        ({"patient": "p"}, [0, 1, 2, 3]),
        ({"patient": "P1"}, []),
        ({"patient": "."}, []),  # no pattern
        ({"label": 1}, [0, 2]),
        ({"label": 0}, [1, 3]),  # sample 4 has no label
        ({"label": 7}, []),
        ({"prediction_min": 0.5}, [0, 2, 3]),
        ({"prediction_min": 0.15, "prediction_max": 0.6}, [1, 2]),
        ({"length_min": 3}, [0, 1, 2]),
        ({"length_max": 1}, [3]),
        ({"length_min": 7, "length_max": 7}, [1]),
        ({"code": "d1"}, [0, 1, 2]),
        ({"code": "metf"}, [0, 1, 2]),  # of its name
        ({"code": "D"}, [0, 1, 2, 4]),  # d1, d2, d3, read and the names
        ({"code": "1"}, [0, 1, 2, 3, 4]),  # d1, I10, E11 and the formula's A1
        ({"code": "1", "feature": "visits"}, [1, 3]),
        ({"code": "I10"}, [1, 3]),
        ({"code": "nothing of the kind"}, []),
        ({"code": "d1", "label": 1, "sort": "prediction"}, [2, 0]),
        ({"sort": "prediction", "order": "desc"}, [0, 3, 2, 1, 4]),
        ({"sort": "length"}, [3, 4, 0, 2, 1]),
        ({"sort": "length", "order": "desc"}, [1, 0, 2, 4, 3]),
        ({"sort": "patient"}, [4, 0, 1, 2, 3]),
        ({"order": "desc"}, [4, 3, 2, 1, 0]),
    ],
    ids=str,
)
def test_searches_worked_out_by_hand(explorer: Explorer, asked: dict[str, object], found: list[int]) -> None:
    assert numbers(explorer.searcher, **asked) == found


def test_the_index_worked_out_by_hand(explorer: Explorer) -> None:
    index = explorer.index
    assert (index.kind, index.several) == ("binary", False)
    assert index.samples["entries"].to_list() == [3, 7, 3, 1, 2]
    assert index.samples["label"].to_list() == [1.0, 0.0, 1.0, 0.0, None]
    assert index.samples["prediction"].round(3).to_list() == pytest.approx([0.95, 0.2, 0.5, 0.7, 0.1])
    known = {(f, c): (n, s) for f, c, n, s in index.codes.select("feature", "code", "name", "samples").rows()}
    assert known["drugs", "d1"] == ("Metformin", 3)
    assert known["visits", "I10"] == ("Hypertension", 2)
    assert known["drugs", "d3"] == (None, 1)
    assert index.codes["samples"].is_sorted(descending=True)


def test_a_codes_samples_worked_out_by_hand(explorer: Explorer) -> None:
    """The place read, 0, has no share in relevance and lift; a code twice in a visit is there once."""
    found = explorer.searcher.samples_of(OneCode(feature="drugs", code="d1"))
    assert found.select("sample", "places", "time").rows() == [(0, 1, 1.0), (1, 1, 6.5), (2, 1, 0.0)]
    assert found["relevance"].to_list() == pytest.approx([0.4, 0.6, 0.3])
    assert found["lift"].to_list() == pytest.approx([4 / 3, 1, 2 / 3])
    visits = explorer.searcher.samples_of(OneCode(feature="visits", code="I10", sort="sample", order="asc"))
    assert visits.select("sample", "places").rows() == [(1, 1), (3, 0)]
    assert visits["relevance"].to_list() == [pytest.approx(0.3), None]
    assert visits["lift"].to_list() == [pytest.approx(0.3 / 0.25), None]


def test_against_loops_over_the_toy_cohort(toy: Path) -> None:
    """Every code's samples, each label's, and lengths, from the rows as they stand on disk."""
    searcher = explorer_of(toy).searcher
    having, lengths = defaultdict(set), defaultdict(int)
    for row in rows(toy).rows(named=True):
        lengths[row["sample"]] += 1
        if row["code"] is not None:
            having[row["code"]].add(row["sample"])
    assert len(having) == 40
    for code, samples in having.items():
        assert searcher.samples_of(OneCode(feature="codes", code=code))["sample"].sort().to_list() == sorted(samples)
        if code:
            assert numbers(searcher, code=code) == sorted(samples)
    predictions = {row["sample"]: row for row in rows(toy, "predictions").rows(named=True)}
    for label in (0, 1):
        assert numbers(searcher, label=label) == [n for n, row in predictions.items() if row["y_true"] == [label]]
    for least in (1, 5, 12, 25):
        assert numbers(searcher, length_min=least) == sorted(n for n, size in lengths.items() if size >= least)
    cut = sorted(row["y_prob"][0] for row in predictions.values())[40]
    assert len(numbers(searcher, prediction_min=cut)) == 50


@pytest.mark.parametrize("whole", [False, True], ids=["codes", "whole"])
@pytest.mark.parametrize("read", ["Transformer", "StageAttentionNet", "Other"])
def test_lifts_of_a_code_are_those_of_the_places(tmp_path: Path, read: str, whole: bool) -> None:
    """Whichever place the model reads: the first, the last, or none that is known; also of one score for all codes."""
    records = [*RECORDS[:4], Record("p9", {"drugs": [("d1", 0.5), ("d2", 0.5), ("d1", 0.5)]})] if whole else RECORDS
    folder = written(tmp_path, records, model=f"a.{read}")
    if whole:
        edit(folder / MANIFEST, granularity={"drugs": "feature", "visits": "visit"})
    explorer = explorer_of(folder)
    cohort = explorer.cohort
    cells = find_cells(cohort.rows_of(range(5)), cohort.read_position, cohort.whole_features).collect()
    for (feature, code), mine in cells.partition_by("feature", "code", as_dict=True).items():
        found = explorer.searcher.samples_of(OneCode(feature=feature, code=code, sort="sample", order="asc"))
        whole = mine.drop_nulls("lift").group_by("sample").agg(pl.col("lift").mean(), pl.col("relevance").sum())
        joined = found.join(whole, on="sample", how="left", suffix="_true", maintain_order="left")
        for name in ("lift", "relevance"):
            assert joined[name].to_list() == pytest.approx(joined[f"{name}_true"].to_list())
    assert {"Transformer": 0, "StageAttentionNet": -1, "Other": None}[read] == cohort.read_position


def test_pages() -> None:
    found = pl.DataFrame({"sample": range(2 * PAGE + 1)})
    for number, first, last in ((1, 1, PAGE), (2, PAGE + 1, 2 * PAGE), (3, 2 * PAGE + 1, 2 * PAGE + 1), (99, 101, 101)):
        part, place = page_of(found, number)
        assert (place["first"], place["last"], place["total"], place["pages"]) == (first, last, 101, 3)
        assert part["sample"].to_list() == list(range(first - 1, last))
    assert page_of(found.head(0), 4)[1] == {"page": 1, "pages": 1, "first": 1, "last": 0, "total": 0}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([("label", "x")], "label: input should be a valid integer, unable to parse string as an integer, got 'x'"),
        ([("label", "-1")], "label: input should be greater than or equal to 0, got '-1'"),
        ([("page", "0")], "page: input should be greater than or equal to 1, got '0'"),
        ([("page", "9" * 40)], "page: input should be less than 2147483648, got"),
        ([("prediction_min", "nan")], "prediction_min: input should be a finite number, got 'nan'"),
        ([("sort", "drop table")], "sort: input should be 'sample', 'patient', 'prediction', 'length' or 'difference'"),
        ([("patient", "a"), ("patient", "b")], "patient must be given once, got it 2 times"),
        ([("frobnicate", "1")], "frobnicate is no parameter of this page"),
        ([("patient", "x" * 1001)], "patient: string should have at most 1000 characters, got 'xxx"),
        ([("feature", "labs")], "feature must be one of drugs, visits, got 'labs'"),
        ([("predicted", "1")], "predicted cannot be asked for: the model has one output"),
        ([("sort", "difference")], "sort by difference needs a second run"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_asked_is_said_in_one_line(explorer: Explorer, asked: list[tuple[str, str]], said: str) -> None:
    with pytest.raises(BadQuestionError) as refused:
        explorer.searcher.find(Search.of(asked))
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_empty_fields_of_a_form_ask_nothing() -> None:
    assert Search.of([("patient", ""), ("label", ""), ("page", "")]) == Search()


def test_several_outputs_and_several_labels(tmp_path: Path) -> None:
    record = {"drugs": [("a", 0.5), ("b", 0.5)]}
    classes = [((0.1, 0.7, 0.2), (2.0,)), ((0.6, 0.3, 0.1), (0.0,)), ((float("nan"), 0.2, 0.1), None)]
    three = [Record(f"p{n}", record, prob, true) for n, (prob, true) in enumerate(classes)]
    searcher = explorer_of(written(tmp_path / "classes", three)).searcher
    assert searcher.index.samples["predicted"].to_list() == [1, 0, 1]
    assert searcher.index.samples["prediction"].to_list() == pytest.approx([0.7, 0.6, 0.2])
    assert [numbers(searcher, label=k) for k in (0, 1, 2)] == [[1], [], [0]]
    assert numbers(searcher, predicted=1) == [0, 2]
    labels = [((0.9, 0.8), (1.0, 1.0)), ((0.1, 0.2), (0.0, 0.0)), ((0.1, 0.6), (0.0, 1.0))]
    several = [Record(f"p{n}", record, prob, true) for n, (prob, true) in enumerate(labels)]
    searcher = explorer_of(written(tmp_path / "labels", several)).searcher
    assert searcher.index.samples["label"].to_list() == [[0, 1], None, [1]]
    assert [numbers(searcher, label=k) for k in (0, 1)] == [[0], [0, 2]]


def test_measured_values_are_no_labels(tmp_path: Path) -> None:
    measured = [Record(f"p{n}", {"drugs": [("a", 1.0)]}, (2.5 * n,), (0.5 + n,)) for n in range(3)]
    searcher = explorer_of(written(tmp_path, measured)).searcher
    assert numbers(searcher, prediction_min=2) == [1, 2]
    with pytest.raises(BadQuestionError, match="label cannot be asked for: the samples have measured values"):
        numbers(searcher, label=1)


def test_two_runs_beside_each_other(tmp_path: Path) -> None:
    """By sample, with the difference of the predictions; a run of others is refused, by the first that differs."""
    changed = [Record(r.patient, r.features, (0.5,), r.true, r.visit) for r in RECORDS]
    here, there = written(tmp_path / "here"), written(tmp_path / "there", changed, failures={1: "it broke"})
    both = put_beside(build_index(CohortAttributions(here)), CohortAttributions(there))
    assert both["beside"].to_list() == [0.5, None, 0.5, 0.5, 0.5]
    assert both["difference"].to_list() == [pytest.approx(-0.45), None, 0.0, pytest.approx(-0.2), pytest.approx(0.4)]
    assert numbers(explorer_of(here, there).searcher, sort="difference") == [2, 3, 4, 0, 1]
    changed[2].patient = "somebody else"
    other = written(tmp_path / "other", changed)
    with pytest.raises(ValueError, match="got sample 2 of patient 'somebody else', visit '' there, of patient 'p1'"):
        explorer_of(here, other)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = written(tmp_path, [], status="running")
    with pytest.warns(UserWarning, match="is not complete"):
        explorer = explorer_of(folder)
    assert numbers(explorer.searcher) == []
    assert explorer.index.codes.is_empty()
