"""MIMIC-IV tables as MEDS: each row an event at its time, names and parents of codes, the schema of the package."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from rollout.data.meds import MedsDataset, convert
from rollout.data.meds.convert import convert_mimic
from rollout.data.synthetic import write_synthetic_cohort

TABLES: dict[str, tuple[str, list[str]]] = {
    "hosp/patients": ("subject_id,gender,anchor_age,anchor_year", ["1,F,50,2180", "2,,17,2180"]),
    "hosp/admissions": (
        "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admission_location,discharge_location,"
        "hospital_expire_flag",
        ["1,11,2181-01-02 10:00:00,2181-01-05 12:00:00,,URGENT,ER,HOME,0",
         "1,12,2181-03-02 10:00:00,2181-03-05 12:00:00,2181-03-05 11:00:00,URGENT,,DIED,1",
         "2,21,2181-03-02 10:00:00,2181-03-05 12:00:00,,URGENT,ER,HOME,0",
         "2,22,2181-04-02 10:00:00,2181-04-05 12:00:00,,URGENT,ER,HOME,0"],
    ),
    "icu/icustays": ("subject_id,hadm_id,stay_id,intime,outtime", []),
    "hosp/diagnoses_icd": (
        "subject_id,hadm_id,icd_code,icd_version",
        ["1,11,I509,10", "1,11,4280,9", "1,11,E8881,9", "2,21,I509,10"],
    ),
    "hosp/d_icd_diagnoses": ("icd_code,icd_version,long_title", ["I509,10,Heart failure"]),
    "hosp/procedures_icd": (
        "subject_id,hadm_id,chartdate,icd_code,icd_version",
        ["1,11,2181-01-03,0JDP0ZZ,10", "1,11,2181-01-05,5491,9", "2,21,2181-03-03,5491,9"],
    ),
    "hosp/prescriptions": (
        "subject_id,hadm_id,starttime,drug,ndc",
        ["1,11,2181-01-02 11:00:00,Aspirin,00904", "1,11,2181-01-02 12:00:00,Saline,0", "2,21,2181-03-03 10:00:00,A,7"],
    ),
}  # fmt: skip


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    for name, (header, rows) in TABLES.items():
        path = tmp_path / "mimic" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([header, *rows]) + "\n")
    return tmp_path / "mimic"


def test_every_row_is_an_event_at_its_time(tables: Path, tmp_path: Path) -> None:
    counts = convert_mimic(tables, tmp_path / "meds")
    events = pl.read_parquet(tmp_path / "meds/data/0.parquet")
    assert counts == {"subjects": 2, "events": len(events), "codes": events["code"].n_unique(), "labels": 1}
    mine = events.filter(subject_id=1).select("time", "code", "hadm_id").rows()
    assert mine == [
        (None, "GENDER//F", None),
        (datetime(2130, 1, 1), "MEDS_BIRTH", None),
        (datetime(2181, 1, 2, 10), "HOSPITAL_ADMISSION//URGENT//ER", 11),
        (datetime(2181, 1, 2, 11), "MEDICATION//NDC//00904", 11),
        (datetime(2181, 1, 2, 12), "MEDICATION//DRUG//Saline", 11),
        (datetime(2181, 1, 3, 23, 59, 59), "PROCEDURE//ICD//10//0JDP0ZZ", 11),
        (datetime(2181, 1, 5, 12), "PROCEDURE//ICD//9//5491", 11),
        (datetime(2181, 1, 5, 12), "DIAGNOSIS//ICD//10//I509", 11),
        (datetime(2181, 1, 5, 12), "DIAGNOSIS//ICD//9//4280", 11),
        (datetime(2181, 1, 5, 12), "DIAGNOSIS//ICD//9//E8881", 11),
        (datetime(2181, 1, 5, 12), "HOSPITAL_DISCHARGE//HOME", 11),
        (datetime(2181, 3, 2, 10), "HOSPITAL_ADMISSION//URGENT//UNK", 12),
        (datetime(2181, 3, 5, 11), "MEDS_DEATH", None),
        (datetime(2181, 3, 5, 12), "HOSPITAL_DISCHARGE//DIED", 12),
    ]
    labels = pl.read_parquet(tmp_path / "meds/labels/mortality.parquet").rows()
    assert labels == [(1, datetime(2181, 1, 5, 12), True)]  # the other patient is 17
    codes = {
        code: (name, parents)
        for code, name, parents in pl.read_parquet(tmp_path / "meds/metadata/codes.parquet").rows()
    }
    assert codes["DIAGNOSIS//ICD//10//I509"] == ("Heart failure", ["ICD10CM/I50.9"])
    assert codes["DIAGNOSIS//ICD//9//4280"] == (None, ["ICD9CM/428.0"])
    assert codes["DIAGNOSIS//ICD//9//E8881"] == (None, ["ICD9CM/E888.1"])
    assert codes["PROCEDURE//ICD//9//5491"] == (None, ["ICD9Proc/54.91"])
    assert codes["PROCEDURE//ICD//10//0JDP0ZZ"] == (None, ["ICD10PCS/0JDP0ZZ"])
    assert codes["MEDICATION//NDC//00904"] == ("Aspirin", ["NDC/00904"])
    assert codes["GENDER//F"] == (None, None)
    assert json.loads((tmp_path / "meds/metadata/dataset.json").read_text())["meds_version"] == "0.4"
    assert MedsDataset(tmp_path / "meds", tmp_path / "meds/labels/mortality.parquet")[0]["visit_id"] == "11"


def test_the_synthetic_cohort_is_sharded_and_of_the_packages_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "SHARD_SUBJECTS", 8)
    write_synthetic_cohort(tmp_path / "cohort", 30, 0)
    out = tmp_path / "meds"
    assert convert_mimic(tmp_path / "cohort", out)["subjects"] == 30
    assert sorted(path.name for path in (out / "data").iterdir()) == [
        "0.parquet",
        "1.parquet",
        "2.parquet",
        "3.parquet",
    ]
    codes = pl.read_parquet(out / "metadata/codes.parquet")
    events = pl.read_parquet(out / "data/*.parquet")
    assert set(events["code"]) == set(codes["code"])
    coded = codes.filter(pl.col("code").str.contains("//ICD//|//NDC//"))
    assert coded["description"].null_count() == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        convert_mimic(tmp_path / "cohort", out)
    assert_schema(out)


def assert_schema(out: Path) -> None:
    """The files of a folder are those of the package `meds`, and sorted as it wants."""
    meds = pytest.importorskip("meds", reason="meds is not installed: pip install 'attention-rollout[dev]'")
    for file in sorted((out / "data").rglob("*.parquet")):
        table = pq.ParquetFile(file).read()
        meds.DataSchema.validate(table)
        frame: Any = pl.from_arrow(table)
        assert frame.equals(frame.sort("subject_id", "time", nulls_last=False, maintain_order=True))
    meds.CodeMetadataSchema.validate(pq.ParquetFile(out / "metadata/codes.parquet").read())
    for file in (out / "labels").rglob("*.parquet"):
        meds.LabelSchema.validate(pq.ParquetFile(file).read())
    meds.DatasetMetadataSchema.validate(json.loads((out / "metadata/dataset.json").read_text()))


def test_nothing_is_left_of_a_folder_that_could_not_be_written(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(convert, "write_metadata", full)
    with pytest.raises(OSError, match="no space left"):
        convert_mimic(tables, tmp_path / "meds")
    assert list((tmp_path / "meds").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meds", "mimic"]


def test_tables_that_are_none(tables: Path, tmp_path: Path) -> None:
    (tables / "hosp/prescriptions.csv").unlink()
    with pytest.raises(ValueError, match=r"missing hosp/prescriptions.csv\[.gz\]"):
        convert_mimic(tables, tmp_path / "meds")
    assert not (tmp_path / "meds").exists()
