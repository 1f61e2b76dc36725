"""Two runs compared: by hand, against the intervals' own functions, on planted differences; and what is refused."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from rollout.intervals import bootstrap_differences, bootstrap_means, holm, permutation_test, sign_flip_test
from rollout.results.comparison import compare_cohorts
from rollout.results.layout import MANIFEST
from tests.support.evaluated import evaluate_toy
from tests.support.written_run import Record, Run, edit, write_run

FIRST = [
    Record(
        "p0", {"drugs": [("a", 0.5), ("b", 0.3), ("a", 0.2)], "visits": [(["x", "y"], 0.75), (["x"], 0.25)]}, (0.9,)
    ),
    Record("p1", {"drugs": [("b", 0.6), ("a", 0.4)]}, (0.2,)),
    Record("p0", {"drugs": [("a", 1.0)]}, (0.4,)),
    Record("p2", {"drugs": [("a", 0.5), ("b", 0.5)], "visits": [(["y"], 1.0)]}, (0.5,)),
]
SECOND = [
    Record("p0", {"drugs": [("a", 0.2), ("b", 0.3), ("a", 0.5)], "visits": [(["x", "y"], 0.5), (["x"], 0.5)]}, (0.7,)),
    Record("p1", {"drugs": [("b", 0.25), ("a", 0.75)]}, (0.6,)),
    Record("p0", {"drugs": [("a", 1.0)]}, (0.3,)),
    Record("p2", {"drugs": [("a", 0.75), ("b", 0.25)], "visits": [(["y"], 1.0)]}, (0.1,)),
]
ALL = {"minimum_records": 0, "read_position": None}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, records: Sequence[Record], run: Run | None = None, part_samples: int = 3) -> Path:
        (tmp_path / name).mkdir()
        return write_run(tmp_path / name, records, run, part_samples)

    return write


def row(table: pl.DataFrame, measure: str, code: str | None = None, feature: str | None = None) -> dict:
    same = pl.col("measure") == measure
    for name, value in (("code", code), ("feature", feature)):
        same = same & (pl.lit(True) if value is None else pl.col(name) == value)
    (found,) = table.filter(same).rows(named=True)
    return found


def numbers(found: dict, *names: str) -> list[object]:
    return [found[name] for name in names]


def test_a_pair_by_hand(written: Callable[..., Path]) -> None:
    found = compare_cohorts(written("a", FIRST), written("b", SECOND, part_samples=2), **ALL)
    assert (found.paired, found.samples, found.patients, found.notes) == (True, (4, 4), 3, [])
    a = row(found.table, "lift", "a")
    # a: lifts 1.5 .6 | .8 | 1 | 1 and .6 1.5 | 1.5 | 1 | 1.5
    assert numbers(a, "a", "b", "estimate") == pytest.approx([4.9 / 5, 6.1 / 5, 1.2 / 5], abs=1e-6)
    assert numbers(a, "records_a", "records_b", "patients") == [4, 4, 3]
    totals, sizes = np.array([[0.0], [0.7], [0.5]]), np.array([[3.0], [1.0], [1.0]])
    assert numbers(a, "estimate", "low", "high") == pytest.approx(
        [float(part[0]) for part in bootstrap_means(totals, sizes)], abs=1e-6
    )
    assert a["p"] == sign_flip_test(totals)[0] == 0.5
    probability = row(found.table, "probability")
    assert numbers(probability, "a", "b", "estimate") == pytest.approx([0.5, 1.7 / 4, -0.3 / 4], abs=1e-6)
    assert row(found.table, "same class")["estimate"] == 0.5  # .9 .7 and .4 .3
    assert numbers(row(found.table, "same class"), "a", "b", "p", "p_holm") == [None] * 4
    # Spearman: -1 of p0, -1 of p1; one place, and equal ones, have none
    drugs = row(found.table, "rank correlation", feature="drugs")
    assert numbers(drugs, "estimate", "records_a", "patients") == [-1.0, 2, 2]
    assert found.table.filter(pl.col("feature") == "visits", pl.col("measure") == "rank correlation").is_empty()
    tested = found.table.drop_nulls("p")
    assert tested["p_holm"].to_list() == holm(tested["p"].to_numpy()).tolist()
    visits = row(found.table, "lift", "x")
    assert numbers(visits, "a", "b", "low", "patients") == [1.0, 1.0, None, 1]


def test_relevance_is_of_records(written: Callable[..., Path]) -> None:
    found = compare_cohorts(written("a", FIRST), written("b", SECOND), by="relevance", **ALL)
    a = row(found.table, "relevance", "a")
    assert numbers(a, "a", "b", "records_a") == pytest.approx(
        [(0.7 + 0.4 + 1 + 0.5) / 4, (0.7 + 0.75 + 1 + 0.75) / 4, 4]
    )


def test_a_place_that_either_model_reads_is_left_out_of_both(written: Callable[..., Path]) -> None:
    found = compare_cohorts(
        written("a", FIRST), written("b", SECOND, Run(model="m.StageAttentionNet")), minimum_records=0
    )
    assert found.table.filter(pl.col("measure") == "lift").select("feature", "code", "records_a").rows() == [
        ("drugs", "b", 1)]  # fmt: skip
    # without place 0: .3 of .3 .2; without the last: .3 of .2 .3
    assert numbers(row(found.table, "lift", "b"), "a", "b") == pytest.approx([1.2, 1.2], abs=1e-6)


def test_other_parts_and_blocks_give_the_same(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = cohorts(50, 1), cohorts(50, 2)
    a, b = written("a", one, part_samples=7), written("b", other, part_samples=50)
    wanted = compare_cohorts(a, b).table
    c, d = written("c", one, part_samples=50), written("d", other, part_samples=1)
    monkeypatch.setattr("rollout.results.by_patient.CELLS", 1)
    found = compare_cohorts(c, d).table
    for name in wanted.columns:
        if wanted[name].dtype == pl.Float64:
            assert found[name].to_list() == pytest.approx(wanted[name].to_list(), abs=1e-9), name
        else:
            assert found[name].equals(wanted[name], null_equal=True), name


def cohorts(count: int, seed: int, patients: int | None = None, favoured: str = "", by: float = 1.0) -> list[Record]:
    """Records of the same codes whatever the seed; `favoured` draws `by` times the relevance."""
    codes, scores = random.Random(0), random.Random(seed)
    records = []
    for number in range(count):
        drawn = [codes.choice("abcdefgh") for _ in range(codes.randint(2, 8))]
        weights = [scores.uniform(0.5, 1.5) * (by if code == favoured else 1) for code in drawn]
        entries = [(code, weight / sum(weights)) for code, weight in zip(drawn, weights, strict=True)]
        patient = f"p{number if patients is None else number % patients}"
        records.append(Record(patient, {"drugs": entries}, (scores.random(),), (float(number % 2),)))
    return records


def test_a_run_and_its_copy_do_not_differ(written: Callable[..., Path], tmp_path: Path) -> None:
    a = written("a", cohorts(40, 1))
    shutil.copytree(a, tmp_path / "copy")
    table = compare_cohorts(a, tmp_path / "copy").table
    differences = table.drop_nulls("p")
    assert differences["estimate"].to_list() == [0.0] * 9
    assert differences["p_holm"].to_list() == [1.0] * 9
    assert row(table, "same class")["estimate"] == 1.0
    assert row(table, "rank correlation")["estimate"] == pytest.approx(1.0)


def test_a_planted_difference_is_found_and_no_other(written: Callable[..., Path]) -> None:
    paired = compare_cohorts(written("a", cohorts(150, 1, 60)), written("b", cohorts(150, 2, 60, "c", 2.0)))
    other = written("c", cohorts(140, 3, 60, "c", 2.0))
    unpaired = compare_cohorts(paired.a, other)
    assert (paired.paired, unpaired.paired, unpaired.samples) == (True, False, (150, 140))
    for found in (paired, unpaired):
        codes = found.codes()
        assert codes["code"][0] == "c"
        assert codes["estimate"][0] > 0.3
        assert codes["low"][0] > 0
        shown = codes.filter(pl.col("p_holm") <= 0.05)
        assert shown.filter(pl.col("estimate") > 0)["code"].to_list() == ["c"]  # what the others lose is spread thin


def test_two_cohorts_by_hand(written: Callable[..., Path]) -> None:
    def of(patients: str, scores: Sequence[float]) -> list[Record]:
        return [
            Record(f"p{patient}", {"drugs": [("a", score), ("b", 1 - score)]}, (score,))
            for patient, score in zip(patients, scores, strict=True)
        ]

    a, b = of("00123", [0.25, 0.5, 0.75, 0.125, 0.5]), of("0144", [0.5, 1.0, 0.375, 0.875])
    found = compare_cohorts(written("a", a), written("b", b), **ALL)
    assert (found.paired, found.samples, found.patients) == (False, (5, 4), 5)
    # lifts are twice the scores; of p0 … p4
    first, of_first = np.array([[1.5], [1.5], [0.25], [1.0], [0.0]]), np.array([[2.0], [1], [1], [1], [0]])
    second, of_second = np.array([[1.0], [2.0], [0.0], [0.0], [2.5]]), np.array([[1.0], [1], [0], [0], [2]])
    wanted = [float(part[0]) for part in bootstrap_differences(second, of_second, first, of_first)]
    sides = [True, True, False, False, True], [True, True, True, True, False]
    p = permutation_test(second, of_second, first, of_first, *sides)[0]
    found_a, probability = row(found.table, "lift", "a"), row(found.table, "probability")
    assert numbers(found_a, "a", "b", "estimate", "low", "high", "p") == [4.25 / 5, 5.5 / 4, *wanted, p]
    assert numbers(probability, "estimate", "low", "high", "p") == [*(value / 2 for value in wanted), p]
    assert numbers(found_a, "records_a", "records_b", "patients") == [5, 4, 5]
    assert set(found.table["measure"]) == {"lift", "probability"}


def test_the_same_numbers_of_other_patients_are_no_pairs(written: Callable[..., Path]) -> None:
    other = [Record(f"q{number}", one.features, one.prob) for number, one in enumerate(SECOND)]
    assert not compare_cohorts(written("a", FIRST), written("b", other), **ALL).paired
    nameless = [Record(None, one.features, one.prob) for one in FIRST]  # type: ignore[arg-type]
    again = [Record(None, one.features, one.prob) for one in SECOND]  # type: ignore[arg-type]
    found = compare_cohorts(written("c", nameless), written("d", again), **ALL)
    assert (found.paired, found.patients) == (True, 4)


def test_datasets_of_other_contents_are_no_pairs(written: Callable[..., Path]) -> None:
    a, b = written("a", FIRST), written("b", SECOND)
    for other, paired in (({"0": "00000002"}, False), ({"0": "00000001", "3": None}, True)):
        for folder, content in ((a, {"0": "00000001", "3": "00000003"}), (b, other)):
            identity = json.loads((folder / MANIFEST).read_bytes())["identity"]
            edit(folder / MANIFEST, identity={**identity, "dataset": {**identity["dataset"], "content": content}})
        assert compare_cohorts(a, b, **ALL).paired is paired


def test_samples_of_one_run_alone_are_left_out(written: Callable[..., Path]) -> None:
    a = written("a", FIRST, Run(status="complete with failures", failures={3: "died"}))
    found = compare_cohorts(a, written("b", SECOND), **ALL)
    assert (found.samples, found.patients, found.notes) == (
        (3, 3),
        2,
        ["1 samples that only one of the runs attributed"],
    )
    failures = ({1: "x", 2: "x", 3: "x"}, {0: "x", 2: "x", 3: "x"})
    apart = [
        written(name, FIRST, Run(status="complete with failures", failures=failed))
        for name, failed in zip("cd", failures, strict=True)
    ]
    with pytest.raises(ValueError, match="a and b must have samples in common, got 1 and 1 of one dataset"):
        compare_cohorts(*apart)


def test_classes(written: Callable[..., Path]) -> None:
    def compare(name: str, probs: Sequence[tuple], others: Sequence[tuple], true: object = (0.0,)) -> pl.DataFrame:
        runs = [
            written(f"{name}{i}", [Record(f"p{n}", {"d": [("a", 1.0)]}, prob, true) for n, prob in enumerate(given)])
            for i, given in enumerate((probs, others))
        ]
        return compare_cohorts(*runs, **ALL).table

    table = compare("classes", [(0.1, 0.2, 0.7), (0.5, 0.3, 0.2)], [(0.3, 0.3, 0.4), (0.2, 0.6, 0.2)], (2.0,))
    assert row(table, "same class")["estimate"] == 0.5
    assert row(table, "probability of class 2")["estimate"] == pytest.approx(-0.15)
    table = compare("labels", [(0.6, 0.7), (0.5, 0.3)], [(0.9, 0.1), (0.6, 0.1)], (1.0, 0.0))
    assert row(table, "same class")["estimate"] == 0.5
    table = compare("measured", [(7.5,), (1.0,)], [(8.5,), (1.0,)], (2.5,))
    assert set(table["measure"]) == {"prediction", "lift"}
    assert row(table, "prediction")["estimate"] == 0.5
    table = compare("unlabelled", [(7.5,), (0.25,)], [(8.5,), (0.75,)], None)
    assert row(table, "prediction")["estimate"] == 0.75
    assert "same class" not in table["measure"].to_list()
    table = compare("several", [(7.5, 1.0), (0.5, 1.0)], [(8.5, 1.0), (0.5, 2.0)], (0.5, 0.25))
    assert [row(table, f"prediction {output}")["estimate"] for output in (0, 1)] == [0.5, 0.5]
    table = compare("odd", [(float("nan"),), (0.25,), (0.75,)], [(0.5,), (0.5,), (0.5,)])
    assert numbers(row(table, "probability"), "a", "b", "records_a") == [0.5, 0.5, 2]
    assert row(table, "same class")["estimate"] == 0.5
    assert "probability" not in compare("other", [(0.5,), (0.5,)], [(0.5, 0.5), (0.5, 0.5)])["measure"].to_list()


def test_the_commonest_codes_are_chosen_and_named(written: Callable[..., Path]) -> None:
    a = written("a", cohorts(60, 1), Run(names={"drugs": {"a": "Aspirin"}}))
    b = written("b", cohorts(60, 2), Run(names={"drugs": {"a": "other", "b": "Biotin"}}))
    table = compare_cohorts(a, b, k=3, read_position=None).table
    codes = table.drop_nulls("code")
    assert codes.height == 3
    common = compare_cohorts(a, b, read_position=None).table.drop_nulls("code").sort("records_a", descending=True)
    assert set(codes["code"]) == set(common["code"][:3])
    names = dict(common.select("code", "name").rows())
    assert (names["a"], names["b"], names["c"]) == ("Aspirin", "Biotin", None)
    least = common["records_a"][4]
    few = compare_cohorts(a, b, minimum_records=least, read_position=None).table.drop_nulls("code")
    assert few["records_a"].min() == least


def test_a_code_is_as_common_as_where_it_is_rarer(written: Callable[..., Path]) -> None:
    def of(records: Sequence[str]) -> list[Record]:
        return [Record(f"p{n}", {"d": [(code, 1.0) for code in codes]}) for n, codes in enumerate(records)]

    a, b = written("a", of(["xy", "xy", "xy", "x"])), written("b", of(["xy", "y", "y"]))
    assert compare_cohorts(a, b, k=1, **ALL).table.drop_nulls("code")["code"].to_list() == ["y"]


def test_features_that_only_one_has_are_told(written: Callable[..., Path]) -> None:
    flat = [Record(one.patient, {"drugs": one.features["drugs"]}, one.prob) for one in SECOND]
    found = compare_cohorts(written("a", FIRST), written("b", flat), **ALL)
    assert found.notes == ["features of one run alone, or scored otherwise: visits"]
    with pytest.raises(ValueError, match=r"that both runs have and score alike, \['drugs'\], got 'visits'"):
        compare_cohorts(found.a, found.b, feature="visits")
    other = [Record(one.patient, {"labs": [(None, 1.0, 2.0)]}, one.prob) for one in SECOND]
    with pytest.raises(ValueError, match=r"feature must be one that both runs have and score alike, \[\]"):
        compare_cohorts(found.a, written("c", other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "prevalence"}, r"by must be one of \('lift', 'relevance'\), got 'prevalence'"),
        ({"k": 0}, "k must be an int of at least 1, got 0"),
        ({"minimum_records": -1}, "minimum_records must be an int of at least 0"),
        ({"level": 95}, "level must lie between 0 and 1, got 95"),
        ({"read_position": "last"}, "read_position must be an int, None or 'auto'"),
        ({"flips": 20, "minimum_records": 0}, "flips must be at least 80 for 4 comparisons, got 20"),
    ],
)
def test_arguments_out_of_range_are_refused(
    options: dict[str, object], message: str, written: Callable[..., Path]
) -> None:
    a, b = written("a", FIRST), written("b", SECOND)
    with pytest.raises(ValueError, match=message):
        compare_cohorts(a, b, **options)  # type: ignore[arg-type]


def test_folders_that_cannot_be_compared_are_refused(written: Callable[..., Path], tmp_path: Path) -> None:
    a = written("a", FIRST)
    with pytest.raises(ValueError, match="a and b must be two runs, got"):
        compare_cohorts(a, tmp_path / "." / "a")
    alone = [Record("p0", one.features, one.prob) for one in SECOND]
    with pytest.raises(ValueError, match="must have at least 2 patients each, for intervals, got 3 and 1"):
        compare_cohorts(a, written("b", alone))
    with pytest.raises(ValueError, match="no such folder"):
        compare_cohorts(a, tmp_path / "nowhere")
    evaluate_toy(tmp_path / "evaluated", 4)
    with pytest.raises(ValueError, match="path must be the folder of a run that attributes, got"):
        compare_cohorts(a, tmp_path / "evaluated")


def test_an_unfinished_run_is_warned_of(written: Callable[..., Path]) -> None:
    a, b = written("a", FIRST), written("b", SECOND, Run(status="running"))
    with pytest.warns(UserWarning, match="is not complete"):
        compare_cohorts(a, b, **ALL)
