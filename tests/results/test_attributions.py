"""A cohort read back: every number against one worked out by hand, and memory that does not follow the cohort."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from rollout.results.attributions import CohortAttributions
from rollout.results.layout import ATTRIBUTION_SCHEMA, PREDICTION_SCHEMA
from rollout.results.manifest import Manifest
from tests.support.written_run import NASTY, Record, Run, write_part, write_run

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [
    Record("p0", {"drugs": [("a", 0.6), ("b", 0.3), ("a", 0.1)], "visits": [(["x", "y", "x"], 0.8), (["x"], 0.2)]},
           prob=(0.9,), true=(1.0,), visit="v0"),
    Record("p1", {"drugs": [("b", 0.5), ("a", 0.3), ("c", 0.2)]}, prob=(0.2,), true=(0.0,), visit="v1"),
    Record("p0", {"drugs": [("c", 1.0)], "visits": [(["y"], 1.0)], "labs": [(None, 0.25, 1.5), (None, 0.75, 6.0)]},
           prob=(0.7,), true=(0.0,), visit="v2"),
    Record("p2", {"drugs": [("a", 0.0), ("b", 0.0)]}, prob=(0.4,), true=(1.0,)),
]  # fmt: skip


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> CohortAttributions:
    folder = write_run(tmp_path_factory.mktemp("run"), RECORDS, Run(names={"drugs": {"a": "Aspirin"}}), part_samples=2)
    return CohortAttributions(folder)


def numbers(frame: pl.DataFrame, *columns: str) -> dict[str, tuple]:
    return {row[0]: row[1:] for row in frame.select("code", *columns).rows()}


def approx(values: dict[str, tuple]) -> dict[str, object]:
    return {code: pytest.approx(row, abs=1e-6) for code, row in values.items()}


def test_frames_hold_what_was_written(cohort: CohortAttributions) -> None:
    rows = cohort.attributions.collect()
    assert rows.height == 19 - 3
    labs = rows.filter(pl.col("feature") == "labs")
    assert labs.select("sample", "position", "code", "time", "attribution").rows() == [
        (2, 0, None, 1.5, 0.25), (2, 1, None, 6.0, 0.75)]  # fmt: skip
    assert cohort.predictions.select("sample", "patient_id", "visit_id").collect().rows() == [
        (0, "p0", "v0"), (1, "p1", "v1"), (2, "p0", "v2"), (3, "p2", None)]  # fmt: skip
    assert cohort.failures.collect().is_empty()
    assert cohort.failures.collect_schema().names() == ["sample", "error"]
    assert (cohort.samples, cohort.complete, cohort.features) == (4, True, ["drugs", "visits", "labs"])
    assert cohort.names == {"drugs": {"a": "Aspirin"}}
    assert repr(cohort).endswith("complete, 4 samples)")


def test_relevance_lift_and_prevalence_of_flat_codes(cohort: CohortAttributions) -> None:
    table = cohort.top_codes("drugs", minimum_records=0, read_position=None)
    found = numbers(table, "relevance", "lift", "prevalence", "records", "entries")
    # a: sums 0.7, 0.3, 0 over 3 records; lifts 1.8, 0.3, 0.9 and 0 over 4 entries
    assert found == approx({
        "a": (1.0 / 3, 3.0 / 4, 3 / 4, 3, 4),
        "b": (0.8 / 3, 2.4 / 3, 3 / 4, 3, 3),
        "c": (1.2 / 2, 1.6 / 2, 2 / 4, 2, 2),
    })  # fmt: skip
    assert table["code"].to_list() == ["c", "a", "b"]
    assert dict(table.select("code", "name").rows()) == {"a": "Aspirin", "b": None, "c": None}


def test_a_visit_counts_once_however_many_codes_stand_in_it(cohort: CohortAttributions) -> None:
    table = cohort.top_codes("visits", minimum_records=0, read_position=None)
    # x stands in both visits of sample 0, twice in the first: 0.8 + 0.2, lifts 1.6 and 0.4
    assert numbers(table, "relevance", "lift", "records", "entries") == approx({
        "x": (1.0, 1.0, 1, 2), "y": (0.9, 1.3, 2, 2)})  # fmt: skip


def test_the_read_position_is_left_out_but_not_of_prevalence(cohort: CohortAttributions) -> None:
    assert cohort.read_position == 0
    table = cohort.top_codes("drugs", minimum_records=0)
    found = numbers(table, "relevance", "lift", "prevalence", "records", "entries")
    # without position 0: sample 0 has b .3 a .1, sample 1 has a .3 c .2, sample 2 nothing, sample 3 b 0
    assert found == {
        "a": pytest.approx((0.2, (0.5 + 1.2) / 2, 3 / 4, 2, 2)),
        "b": pytest.approx((0.15, (1.5 + 0.0) / 2, 3 / 4, 2, 2)),
        "c": pytest.approx((0.2, 0.8, 2 / 4, 1, 1)),
    }
    last = cohort.top_codes("drugs", minimum_records=0, read_position=-1)
    assert numbers(last, "relevance", "entries") == approx({"a": (0.3, 3), "b": (0.4, 2), "c": (None, 0)})


def test_orders_minimum_and_k(cohort: CohortAttributions) -> None:
    def codes(**options: object) -> list[str]:
        return cohort.top_codes("drugs", read_position=None, **{"minimum_records": 0, **options})["code"].to_list()  # type: ignore[arg-type]

    assert codes(by="lift")[-1] == "a"  # the others have 0.8 both
    assert set(codes(by="lift", k=2)) == {"b", "c"}
    assert codes(by="prevalence") == ["a", "b", "c"]
    assert codes(minimum_records=3) == ["a", "b"]
    assert codes(k=1) == ["c"]
    both = cohort.top_codes(minimum_records=0, k=1, read_position=None)
    assert both.select("feature", "code").rows() == [("drugs", "c"), ("visits", "x")]


def test_by_label_and_split_by_label(cohort: CohortAttributions) -> None:
    assert cohort.label_kind == "binary"
    assert cohort.labels().sort("label").rows() == [(0, 2, None), (1, 2, None)]
    dead = cohort.top_codes("drugs", label=1, minimum_records=0, read_position=None)
    assert numbers(dead, "relevance", "prevalence", "records") == approx({"a": (0.35, 1.0, 2), "b": (0.15, 1.0, 2)})
    split = cohort.top_codes("drugs", per_label=True, minimum_records=0, read_position=None)
    assert split.select("label", "code").rows() == [(0, "c"), (0, "b"), (0, "a"), (1, "a"), (1, "b")]
    assert split.filter((pl.col("label") == 1) & (pl.col("code") == "a"))["relevance"].item() == pytest.approx(0.35)
    assert split.filter(pl.col("label") == 0)["prevalence"].to_list() == pytest.approx([1.0, 0.5, 0.5])


def test_positions_and_visits(cohort: CohortAttributions) -> None:
    drugs = cohort.by_position("drugs")
    assert drugs["position"].to_list() == [0, 1, 2]
    assert drugs["records"].to_list() == [4, 3, 2]
    assert drugs["relevance"].to_list() == pytest.approx([2.1 / 4, 0.6 / 3, 0.3 / 2])
    assert drugs["lift"].to_list() == pytest.approx([(1.8 + 1.5 + 1) / 4, (0.9 + 0.9) / 3, (0.3 + 0.6) / 2])
    from_end = cohort.by_position("drugs", from_end=True)
    assert from_end["relevance"].to_list() == pytest.approx([(0.1 + 0.2 + 1 + 0) / 4, 0.6 / 3, 1.1 / 2])
    assert set(cohort.by_position()["feature"]) == {"drugs", "labs"}
    visits = cohort.by_visit()
    assert visits.select("feature", "visit", "records").rows() == [("visits", 0, 2), ("visits", 1, 1)]
    assert visits["relevance"].to_list() == pytest.approx([0.9, 0.2])
    assert cohort.by_visit(from_end=True)["lift"].to_list() == pytest.approx([(0.4 + 1.0) / 2, 1.6])


def test_lengths(cohort: CohortAttributions) -> None:
    assert cohort.lengths("drugs").select("unit", "length", "records").sort("length").rows() == [
        ("entries", 1, 1), ("entries", 2, 1), ("entries", 3, 2)]  # fmt: skip
    nested = cohort.lengths("visits").sort("unit", "length").select("unit", "length", "records").rows()
    assert nested == [("entries", 1, 1), ("entries", 4, 1), ("visits", 1, 1), ("visits", 2, 1)]


def test_one_patient_and_one_sample_in_record_order(cohort: CohortAttributions) -> None:
    rows = cohort.patient("p0")
    assert rows.select("sample", "feature", "visit", "position", "code").rows() == [
        (0, "drugs", None, 0, "a"), (0, "drugs", None, 1, "b"), (0, "drugs", None, 2, "a"),
        (0, "visits", 0, 0, "x"), (0, "visits", 0, 1, "y"), (0, "visits", 0, 2, "x"), (0, "visits", 1, 0, "x"),
        (2, "drugs", None, 0, "c"), (2, "visits", 0, 0, "y"), (2, "labs", None, 0, None), (2, "labs", None, 1, None),
    ]  # fmt: skip
    assert rows["y_prob"].list.first().to_list() == pytest.approx([0.9] * 7 + [0.7] * 4)
    assert cohort.sample(2).equals(rows.filter(pl.col("sample") == 2))
    joined = cohort.with_predictions().filter(pl.col("sample") == 1).collect()
    assert joined["y_true"].to_list() == [[0.0]] * 3
    assert joined["attribution"].to_list() == pytest.approx([0.5, 0.3, 0.2])


def test_unknown_ids_and_arguments_are_refused(cohort: CohortAttributions) -> None:
    with pytest.raises(ValueError, match=r"sample is of patient 'p9'; ids here are as \['p0', 'p1', 'p0'\]"):
        cohort.patient("p9")
    with pytest.raises(ValueError, match="no attributions of sample 7; the dataset has 4 samples, from 0"):
        cohort.sample(7)
    for number in (True, "0", 1.5):
        with pytest.raises(ValueError, match="number must be an int"):
            cohort.sample(number)  # type: ignore[arg-type]
    for options, match in (
        ({"feature": "labs2"}, "feature must be one of"),
        ({"by": "effect"}, "by must be one of relevance, lift, prevalence"),
        ({"k": 0}, "k must be an int of at least 1"),
        ({"minimum_records": -1}, "minimum_records must be an int of at least 0"),
        ({"label": 5}, r"label must be among \[0, 1\], got 5"),
        ({"label": []}, "label must be among"),
        ({"read_position": "first"}, "read_position must be an int, None or 'auto'"),
        ({"read_position": 1.0}, "read_position must be an int, None or 'auto'"),
    ):
        with pytest.raises(ValueError, match=match):
            cohort.top_codes(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="feature must be one of"):
        cohort.by_position("x")


def test_kinds_of_labels(tmp_path: Path) -> None:
    def opened(name: str, labels: list[tuple[float, ...] | None], prob: tuple[float, ...]) -> CohortAttributions:
        records = [Record(f"p{i}", {"f": [("a", 1.0)]}, prob, label) for i, label in enumerate(labels)]
        return CohortAttributions(write_run(tmp_path / name, records))

    multiclass = opened("multiclass", [(2.0,), (0.0,), (2.0,), None], (0.1, 0.2, 0.7))
    assert multiclass.label_kind == "multiclass"
    assert multiclass.labels().rows() == [(2, 2, None), (0, 1, None)]
    split = multiclass.top_codes(per_label=True, minimum_records=0, read_position=None)
    assert split.select("label", "records", "prevalence").rows() == [(0, 1, 1.0), (2, 2, 1.0)]
    multilabel = opened("multilabel", [(1.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)], (0.1, 0.2, 0.7))
    assert multilabel.label_kind == "multilabel"
    assert multilabel.labels().rows() == [(2, 2, None), (0, 1, None)]
    either = multilabel.top_codes(label=[0, 2], minimum_records=0, read_position=None)
    assert either["records"].item() == 2
    assert either["prevalence"].item() == 1.0
    for name, labels in (("regression", [(1.5,), (2.0,)]), ("negative", [(-1.0,)]), ("counts", [(3.0,), (1.0,)])):
        measured = opened(name, labels, (0.5,))
        assert measured.label_kind == "regression"
        assert measured.labels().is_empty()
        with pytest.raises(ValueError, match="measured values, not classes"):
            measured.top_codes(per_label=True)
    with pytest.raises(ValueError, match="have no labels"):
        opened("none", [None, None], (0.5,)).top_codes(label=1)


def test_labels_have_the_names_of_the_dataset(tmp_path: Path) -> None:
    records = [Record(f"p{i}", {"f": [("a", 1.0)]}, (0.1, 0.2, 0.7), (float(i % 3),)) for i in range(4)]
    run = Run(labels={"stay": ["short", None, "long"]}, time={"f": "hours since admission", "g": None})
    cohort = CohortAttributions(write_run(tmp_path / "one", records, run))
    assert cohort.labels().rows() == [(0, 2, "short"), (1, 1, None), (2, 1, "long")]
    assert cohort.label_names == {"stay": ["short", None, "long"]}
    assert cohort.time_units == {"f": "hours since admission", "g": None}
    split = cohort.top_codes(per_label=True, minimum_records=0, read_position=None)
    assert split.select("label", "records", "prevalence").rows() == [(0, 2, 1.0), (1, 1, 1.0), (2, 1, 1.0)]
    two = Run(labels={"stay": ["short"], "death": ["no"]})  # which of them y_true is, is not known
    assert CohortAttributions(write_run(tmp_path / "two", records, two)).labels()["name"].to_list() == [None] * 3


def test_a_label_that_is_nan_is_none(tmp_path: Path) -> None:
    nan = float("nan")
    records = [Record(f"p{i}", {"f": [("a", 1.0)]}, (0.5,), (one,)) for i, one in enumerate((1.0, nan, 0.0, nan))]
    cohort = CohortAttributions(write_run(tmp_path, records))
    assert cohort.label_kind == "binary"
    assert cohort.labels().sort("label").rows() == [(0, 1, None), (1, 1, None)]
    assert cohort.top_codes(label=1, minimum_records=0, read_position=None)["records"].item() == 1
    none = write_run(tmp_path / "none", [Record("p", {"f": [("a", 1.0)]}, (0.5,), (nan,))])
    assert CohortAttributions(none).label_kind is None


@pytest.mark.parametrize("name", ["x[et]*", "~", "a=b", "50%", "sp ace", "q?", "новая\nпапка"])
def test_a_folder_of_any_name_is_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / name, RECORDS, part_samples=2)
    cohort = CohortAttributions(Path("./", name) if name != "~" else tmp_path / name)
    assert cohort.attributions.collect().height == 16
    assert cohort.attributions.collect().columns[0] == "sample"
    assert cohort.patient("p0").height == 11
    assert set(cohort.top_codes(minimum_records=0)["feature"]) == {"drugs", "visits"}


def test_hostile_strings_come_through(tmp_path: Path) -> None:
    records = [Record(text, {text: [(other, 0.5) for other in NASTY]}, visit=text) for text in NASTY if text]
    names = {text: {other: f"name of {other}" for other in NASTY} for text in NASTY}
    cohort = CohortAttributions(write_run(tmp_path, records, Run(names=names)))
    table = cohort.top_codes(k=None, minimum_records=0, read_position=None)
    assert sorted(table.select("feature", "code", "name").rows()) == sorted(
        (text, other, f"name of {other}") for text in NASTY if text for other in NASTY
    )
    for text in NASTY:
        if text:
            assert cohort.patient(text).select("patient_id", "visit_id").unique().rows() == [(text, text)]


def test_failed_samples_say_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path, RECORDS, Run(status="complete with failures", failures={1: "ValueError: bad tensor"}))
    cohort = CohortAttributions(folder)
    assert cohort.failures.collect().rows() == [(1, "ValueError: bad tensor")]
    assert cohort.samples == 3
    with pytest.raises(ValueError, match="no attributions of sample 1; it failed: ValueError: bad tensor"):
        cohort.sample(1)
    with pytest.raises(ValueError, match="no attributed sample is of patient 'p1'"):
        cohort.patient("p1")


def test_a_running_run_gives_its_committed_parts_and_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path, RECORDS, Run(status="running"), part_samples=2)
    (folder / "parts" / "part-00001.json").unlink()
    with pytest.warns(UserWarning, match="not complete: 2 of 4 samples can be read"):
        cohort = CohortAttributions(folder)
    assert cohort.granularity == {"drugs": "code", "visits": "visit", "labs": "step"}
    assert cohort.attributions.select("sample").unique().collect().height == 2
    assert not cohort.complete
    (folder / "parts" / "part-00000.json").unlink()
    with pytest.warns(UserWarning, match="0 of 4 samples"):
        cohort = CohortAttributions(folder)
    assert cohort.attributions.collect().is_empty()
    assert cohort.top_codes().columns == [
        "feature", "code", "name", "relevance", "lift", "prevalence", "records", "entries"]  # fmt: skip
    assert cohort.by_position().is_empty()
    assert cohort.by_visit().is_empty()
    assert cohort.lengths().is_empty()
    assert cohort.label_kind is None


def test_paths_and_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        CohortAttributions(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="that is a file"):
        CohortAttributions(tmp_path / "file")
    for path, match in (("x" * 300, "File name too long"), ("~nouser/x", "home directory"), ("a\0b", "null")):
        with pytest.raises(ValueError, match=rf"path must be a path, .*{match}"):
            CohortAttributions(path)
    folder = write_run(tmp_path / "run", RECORDS, Run(names={"drugs": {"a": "old", "b": "kept"}}))
    given = tmp_path / "names.json"
    given.write_text(json.dumps({"drugs": {"a": "new"}, "visits": {"x": "ex"}}))
    merged = {"drugs": {"a": "new", "b": "kept"}, "visits": {"x": "ex"}}
    assert CohortAttributions(folder, given).names == merged
    assert CohortAttributions(folder, json.loads(given.read_text())).names == merged
    for content in ("[1]", '{"drugs": {"a": 1}}', '{"drugs": "a"}', "{", b"\xff\xfe\x00"):
        given.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match="name"):
            CohortAttributions(folder, given)
    with pytest.raises(ValueError, match=r"none\.json: No such file"):
        CohortAttributions(folder, tmp_path / "none.json")


PEAK = """
import resource, sys
sys.path[:0] = {paths!r}
from rollout.results.attributions import CohortAttributions
for folder in sys.argv[1:]:
    cohort = CohortAttributions(folder)
    table = cohort.top_codes(per_label=True, k=3)
    cohort.by_position(); cohort.sample(5)
    print(table["entries"].sum(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def large_run(folder: Path, parts: int, samples: int = 2048, length: int = 60) -> Path:
    """Parts of 122,880 rows each; three samples a patient."""
    rng = np.random.default_rng(0)
    number = np.repeat(np.arange(samples), length)
    codes = pa.array([f"c{code}" for code in range(500)]).take(pa.array(rng.integers(0, 500, len(number))))
    score, position = pa.array(rng.random(len(number)), pa.float32()), pa.array(np.tile(np.arange(length), samples))

    def ids(numbers: np.ndarray) -> list[pa.Array]:
        patient = pa.array(numbers // 3).cast(pa.string())
        return [pa.array(numbers), patient, pa.array(numbers).cast(pa.string())]

    one = write_run(folder.with_name("one"), [Record("p", {"f": [("a", 1.0)]})])
    manifest = Manifest.read(one / "manifest.json")
    manifest.identity["dataset"]["samples"] = parts * samples
    records = []
    for part in range(parts):
        first, empty = part * samples, pa.nulls(len(number))
        columns = [
            *ids(number + first), pa.array(["f"]).take(pa.array(np.zeros(len(number), np.int64))),
            empty.cast(pa.int32()), position.cast(pa.int32()), codes, empty.cast(pa.float32()), score,
        ]  # fmt: skip
        true = pa.array([[float(n % 2)] for n in range(samples)], pa.list_(pa.float32()))
        half = pa.array([[0.5]] * samples, pa.list_(pa.float32()))
        predicted = [*ids(np.arange(first, first + samples)), half, true, pa.nulls(samples, half.type)]
        tables = {
            "attributions": pa.Table.from_arrays(columns, schema=ATTRIBUTION_SCHEMA),
            "predictions": pa.Table.from_arrays(predicted, schema=PREDICTION_SCHEMA),
        }
        records.append(write_part(folder, part, range(first, first + samples), tables, manifest.run))
    manifest.count(records, parts)
    (folder / "manifest.json").write_bytes(manifest.as_bytes())
    return folder


def test_memory_does_not_follow_the_cohort(tmp_path: Path) -> None:
    """Peak resident memory of a process that reads 0.5 million rows, then 2.9 million."""
    small, large = tmp_path / "small", tmp_path / "large"
    large_run(small, 4)
    large_run(large, 24)
    script = PEAK.format(paths=[str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", script, str(small), str(large)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (few, low), (many, high) = ((int(n) for n in line.split()) for line in done.stdout.splitlines())
    assert many > 5 * few
    assert high < low + 100, f"{low} MiB, then {high} MiB"  # 195 MiB more if all rows were held
