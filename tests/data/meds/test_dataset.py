"""`MedsDataset`: which events a record has, in which order, with which times; what is refused."""

import pickle
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from rollout.data.meds import MedsDataset, MedsFolder, fit_vocabulary
from rollout.data.meds import dataset as module
from rollout.data.meds.tables import collected
from tests.support.meds_folder import CODES, EVENTS, LABELS, change, write_meds, write_table


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_meds(tmp_path / "meds")


def opened(root: Path, **options: Any) -> MedsDataset:
    return MedsDataset(root, options.pop("labels", root / "labels" / "dies.parquet"), **options)


def expected(root: Path, subject: int, until: datetime) -> list[dict[str, Any]]:
    """The events of a record, by the definition: a plain loop over every row of every file."""
    rows = [row for file in sorted((root / "data").rglob("*.parquet")) for row in pl.read_parquet(file).to_dicts()]
    mine = [row for row in rows if row["subject_id"] == subject and (row["time"] is None or row["time"] <= until)]
    return sorted(mine, key=lambda row: (row["time"] is not None, row["time"] or datetime.min))


def test_a_record_is_the_events_up_to_its_prediction_time(root: Path) -> None:
    data = opened(root)
    assert len(data) == 48
    words = {number: code for code, number in data.vocabulary.items()}
    for number in range(0, len(data), 5):
        subject, time, value = data.labels.row(number)[:3]
        rows, sample = expected(root, subject, time), data[number]
        hours, ids = sample["codes"]
        assert [words[one] for one in ids.tolist()] == [row["code"] for row in rows]
        assert torch.isnan(hours).tolist() == [row["time"] is None for row in rows]
        for hour, row in zip(hours.tolist(), rows, strict=True):
            if row["time"] is not None:
                assert hour == pytest.approx((time - row["time"]) / timedelta(hours=1), rel=1e-6)
        assert hours.dtype == torch.float32
        assert ids.dtype == torch.int64
        assert sample["patient_id"] == str(subject)
        assert sample["visit_id"] == str(next(r["hadm_id"] for r in reversed(rows) if r["hadm_id"] is not None))
        assert sample["label"].tolist() == [float(value)]
        assert data.events(number)["numeric_value"].to_list() == [row["numeric_value"] for row in rows]
    assert data.labels["shard"].is_sorted()


def test_an_event_at_the_prediction_time_counts_and_one_after_it_does_not(tmp_path: Path) -> None:
    then = datetime(2150, 1, 1)
    late = then + timedelta(microseconds=1)
    rows = [(5, late, "after", None, None, None), (5, then, "at", None, None, None), (5, None, "so", None, None, None)]
    write_table(tmp_path / "data" / "0.parquet", rows, EVENTS)
    labels = write_table(tmp_path / "labels.parquet", [(5, then, True)], LABELS)
    data = MedsDataset(tmp_path, labels, {"<pad>": 0, "so": 1, "at": 2, "after": 3})
    assert data[0]["codes"][1].tolist() == [1, 2]
    assert data[0]["visit_id"] is None


def test_names_parents_and_vocabulary(root: Path) -> None:
    data = opened(root)
    assert list(data.vocabulary)[:2] == ["<pad>", "<unk>"]
    assert list(data.vocabulary)[2:] == sorted(CODES)
    assert data.code_names["codes"]["LAB//HR"] == "The name of LAB//HR"
    assert data.folder.parents()["LAB//HR"] == ["LAB"]
    assert "MEDS_BIRTH" not in data.folder.parents()
    assert data.vocabulary == fit_vocabulary(root)


def test_an_unknown_code_is_unk_or_refused_by_name(root: Path) -> None:
    few = {"[PAD]": 9, "[UNK]": 4, "GENDER//F": 0}
    assert opened(root, vocabulary=few)[0]["codes"][1].tolist()[:2] == [0, 4]
    del few["[UNK]"]
    with pytest.raises(ValueError, match=r"subject 100 has the code 'MEDS_BIRTH', which the vocabulary lacks"):
        opened(root, vocabulary=few)[0]


def test_a_long_record_keeps_its_last_events(root: Path) -> None:
    whole, short = opened(root), opened(root, max_events=3)
    for number in range(len(whole)):
        assert torch.equal(short[number]["codes"][1], whole[number]["codes"][1][-3:])


def test_a_split_and_labels_in_a_folder(root: Path) -> None:
    held = opened(root, split="held_out", labels=root / "labels")
    assert set(held.labels["subject_id"]) == set(range(100, 124, 3))
    with pytest.raises(ValueError, match=r"split must be one of \['held_out', 'train'\], got 'test'"):
        opened(root, split="test")


@pytest.mark.parametrize(
    ("column", "values", "classes", "wanted"),
    [
        ("integer_value", pl.Series([2, 0], dtype=pl.Int64), None, [2, 0]),
        ("categorical_value", ["home", "died"], None, [1, 0]),
        ("categorical_value", ["home", "died"], {"home": 5, "died": 3}, [5, 3]),
        ("float_value", pl.Series([0.5, 2.0], dtype=pl.Float32), None, [[0.5], [2.0]]),
    ],
)
def test_other_labels(root: Path, column: str, values: Any, classes: Any, wanted: list[Any]) -> None:
    path = root / "labels" / "dies.parquet"
    pl.read_parquet(path).head(2).with_columns(pl.Series(column, values)).drop("boolean_value").write_parquet(path)
    data = opened(root, classes=classes)
    assert [data[number]["label"].tolist() for number in range(2)] == wanted
    assert data.collate([data[0], data[1]])["label"].shape == ((2,) if column != "float_value" else (2, 1))


def test_a_cohort_without_labels(root: Path) -> None:
    change(root / "labels" / "dies.parquet", boolean_value=None)
    data = opened(root)
    assert "label" not in data[0]
    assert "label" not in data.collate([data[0]])


def test_batches_are_padded_on_the_right(root: Path) -> None:
    data = opened(root, vocabulary={"[UNK]": 0, "[PAD]": 1})
    hours, ids = data.collate([data[0], data[1]])["codes"]
    first = len(data[0]["codes"][1])
    assert ids.shape == hours.shape
    assert (ids[0, first:] == 1).all()
    assert torch.isnan(hours[0, first:]).all()


def test_two_shards_are_held_at_most_and_other_processes_get_none(root: Path) -> None:
    data = opened(root)
    for number in range(len(data)):
        assert data[number]
        assert len(data._held) <= module.HELD_SHARDS
    again = pickle.loads(pickle.dumps(data))
    assert not again._held
    assert torch.equal(again[3]["codes"][1], data[3]["codes"][1])


def test_only_labelled_subjects_stand_in_memory(root: Path) -> None:
    labels = root / "labels" / "dies.parquet"
    pl.read_parquet(labels).filter(pl.col("subject_id") == 103).write_parquet(labels)
    data = opened(root)
    assert data[0]
    (shard,) = data._held.values()
    assert shard.events["subject_id"].unique().to_list() == [103]


def test_a_subset_leaves_the_whole_as_it_was(root: Path) -> None:
    data = opened(root)
    few = data.subset([5, 3])
    assert few[1]["patient_id"] == data[5]["patient_id"]
    assert [torch.equal(few[i]["codes"][1], data[j]["codes"][1]) for i, j in ((0, 3), (1, 5))] == [True, True]
    assert len(data[0]["codes"][1])
    assert data.patient_to_index["103"] == [number for number in range(48) if data[number]["patient_id"] == "103"]


def test_a_subject_without_events_before_the_time_fails_alone(root: Path) -> None:
    path, early = root / "labels" / "dies.parquet", datetime(1900, 1, 1)
    first = pl.int_range(pl.len()) == 0
    change(path, prediction_time=pl.when(first).then(early).otherwise("prediction_time"))
    data = opened(root)
    message = r"subject 100 has no event with a time up to its prediction_time 1900-01-01 .*first is at 2100"
    with pytest.raises(ValueError, match=message):
        data[0]
    assert data[1]["patient_id"] == "100"


EVENTS_OF, TASK = "data/train/1.parquet", "labels/dies.parquet"
SPOILT: dict[str, tuple[str, dict[str, Any], str]] = {
    "no code": (EVENTS_OF, {"code": None}, r"must have the column code \(string\): .*has subject_id, time, num"),
    "text ids": (EVENTS_OF, {"subject_id": pl.lit("1")}, "subject_id must be int64, got string"),
    "time zone": (
        EVENTS_OF, {"time": pl.col("time").dt.replace_time_zone("UTC")},
        r"time must be timestamp\[us\], got timestamp\[us, UTC\]",
    ),
    "milliseconds": (EVENTS_OF, {"time": pl.col("time").dt.cast_time_unit("ms")}, r"got timestamp\[ms\]"),
    "null subject": (EVENTS_OF, {"subject_id": pl.lit(None, pl.Int64)}, "must each have a subject_id"),
    "in two files": (EVENTS_OF, {"subject_id": pl.lit(100, pl.Int64)}, r"must stand in one file, 100 is in"),
    "unknown subject": (
        TASK, {"subject_id": pl.col("subject_id") + 22},
        r"labels must be of subjects in .*: 22 have no event there, 124, 125, 126, …",
    ),
    "label twice": (
        TASK, {"prediction_time": pl.col("prediction_time").first()},
        "must have one row for a subject and prediction_time, .* has several of 1",
    ),
    "no time of prediction": (TASK, {"prediction_time": None}, "must have the column prediction_time"),
    "null time of prediction": (
        TASK, {"prediction_time": pl.lit(None, pl.Datetime("us"))}, "each have a prediction_time: .* has 48 without",
    ),
    "a year that is none": (
        TASK, {"prediction_time": pl.lit(-(2**62)).cast(pl.Datetime("us"))}, "of the years 1 to 9999, got -14",
    ),
    "some labels": (
        TASK, {"boolean_value": pl.when(pl.col("subject_id") < 110).then("boolean_value")},
        "must each have a boolean_value, 28 have none",
    ),
    "two values": (TASK, {"integer_value": pl.lit(1, pl.Int64)}, "name one with"),
    "labels of numbers": (TASK, {"boolean_value": pl.lit(1)}, "boolean_value must be boolean, got int32"),
    "codes of numbers": ("metadata/codes.parquet", {"code": pl.lit(1)}, "MEDS codes: code must be string, got int32"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_refused(root: Path, what: str) -> None:
    file, columns, message = SPOILT[what]
    change(root / file, **columns)
    with pytest.raises(ValueError, match=message) as raised:
        assert opened(root).code_names
    assert len(str(raised.value).splitlines()) == 1


def test_files_that_are_not_there_or_no_parquet(root: Path, tmp_path: Path) -> None:
    labels = root / TASK
    for given, message in (
        (tmp_path / "x", "no such folder"),
        (labels, "that is a file"),
        (root / "labels", "it has no such file"),
    ):
        with pytest.raises(ValueError, match=f"MEDS root must be a folder with .*: {message}"):
            MedsDataset(given, labels)
    with pytest.raises(ValueError, match=r"labels must be a Parquet file or a folder of them, got .*: there is none"):
        opened(root, labels=root / "nowhere")
    pl.read_parquet(labels).clear().write_parquet(labels)
    with pytest.raises(ValueError, match="labels must have at least one row, got none"):
        opened(root)
    (root / EVENTS_OF).write_text("PAR1 and then nothing")
    with pytest.raises(ValueError, match="MEDS events must be a Parquet file, got"):
        opened(root)


def test_an_event_without_a_code_is_refused_when_its_shard_is_read(root: Path) -> None:
    change(root / "data/held_out/0.parquet", code=pl.when(pl.col("code") != "LAB//HR").then("code"))
    data = opened(root)
    with pytest.raises(ValueError, match=r"MEDS events must each have a code: .*held_out.0.parquet has some without"):
        data[0]


def test_events_out_of_order_are_put_in_order(root: Path) -> None:
    wanted, path = opened(root)[0]["codes"], root / "data/held_out/0.parquet"
    pl.read_parquet(path).sample(fraction=1, shuffle=True, seed=1).write_parquet(path)
    found = opened(root)[0]["codes"]
    assert sorted(found[1].tolist()) == sorted(wanted[1].tolist())
    assert torch.equal(found[0].nan_to_num(1e9), wanted[0].nan_to_num(1e9))


def test_the_files_are_those_of_the_package(root: Path) -> None:
    meds = pytest.importorskip("meds", reason="meds is not installed: pip install 'attention-rollout[dev]'")
    for file in (root / "data").rglob("*.parquet"):
        read = pq.ParquetFile(file).read()
        meds.DataSchema.validate(read.set_column(4, "text_value", read["text_value"].cast("large_string")))
    meds.LabelSchema.validate(pq.read_table(root / "labels/dies.parquet"))
    meds.CodeMetadataSchema.validate(pq.read_table(root / "metadata/codes.parquet"))
    assert len(MedsFolder(root).shards) == 3


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_read_right_or_refused_in_one_line(root: Path, seed: int) -> None:
    draw, refused, read = random.Random(seed), 0, 0
    files = sorted(root.rglob("*.parquet"))
    for _ in range(20):
        file = draw.choice(files)
        content = file.read_bytes()
        at, length = draw.randrange(len(content)), draw.choice((1, 1, 20, len(content)))
        noise = bytes(draw.randrange(256) for _ in range(length % 21))
        file.write_bytes(content[:at] + noise + content[at + length :])
        try:
            data = opened(root)
            assert data.code_names
            for number in (0, 20, 40):
                data[number]
        except ValueError as error:
            refused += len(str(error).splitlines()) == 1
        else:
            read += 1
        file.write_bytes(content)
    assert refused + read == 20
    assert refused > 5
    assert len(opened(root)[0]["codes"][1])


def test_what_makes_polars_panic_is_refused(tmp_path: Path) -> None:
    class Panics:
        def collect(self) -> None:
            raise pl.exceptions.PanicException("entered unreachable code: invalid num_bits 187\nat …")

    with pytest.raises(ValueError, match=r"MEDS events .* cannot be read: entered unreachable code") as raised:
        collected(Panics(), tmp_path / "0.parquet", "MEDS events")  # type: ignore[arg-type]
    assert len(str(raised.value).splitlines()) == 1
