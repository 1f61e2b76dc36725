"""Folders that are no MIMIC-IV are refused by name, and codes get the names of their tables."""

import gzip
import shutil
from pathlib import Path

import polars as pl
import pytest

from rollout.data.mimic import NO_NDC, check_mimic_root, code_names, mimic_source, names_for
from rollout.data.synthetic import write_synthetic_cohort


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_synthetic_cohort(tmp_path / "mimic", patients=40, seed=0)
    return tmp_path / "mimic"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ehr_root must be a MIMIC-IV folder .* no such folder"):
        check_mimic_root(tmp_path / "nowhere")


def test_a_folder_of_something_else_names_every_missing_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing") as caught:
        check_mimic_root(tmp_path)
    for name in ("patients", "admissions", "diagnoses_icd", "procedures_icd", "prescriptions"):
        assert f"hosp/{name}.csv[.gz]" in str(caught.value)
    assert "icu/icustays.csv[.gz]" in str(caught.value)


def test_one_missing_table_is_named_alone(root: Path) -> None:
    (root / "hosp" / "prescriptions.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"missing hosp/prescriptions\.csv\[\.gz\]$"):
        check_mimic_root(root)


def test_a_missing_column_is_named(root: Path) -> None:
    path = root / "hosp" / "prescriptions.csv.gz"
    frame = pl.read_csv(path).drop("ndc")
    path.write_bytes(gzip.compress(frame.write_csv().encode()))
    with pytest.raises(ValueError, match=r"hosp/prescriptions in .* has no column ndc"):
        check_mimic_root(root)


def test_the_tables_of_another_task_are_asked_for(root: Path) -> None:
    (root / "hosp" / "prescriptions.csv.gz").unlink()
    assert check_mimic_root(root, ("diagnoses_icd",)) == root
    with pytest.raises(ValueError, match=r"missing hosp/labevents\.csv\[\.gz\]$"):
        mimic_source(root, "InHospitalMortalityMIMIC4", ("labevents",))
    source = mimic_source(root, "SomeTask", ("diagnoses_icd",), workers=3)
    assert (source.dataset, source.root, source.task, source.workers) == ("MIMIC4Dataset", root, "SomeTask", 3)
    assert source.dataset_arguments == {"ehr_tables": ["diagnoses_icd"]}


def test_a_file_that_is_no_gzip_is_named(root: Path) -> None:
    (root / "hosp" / "patients.csv.gz").write_text("subject_id,anchor_age\n")
    with pytest.raises(ValueError, match=r"patients\.csv\.gz cannot be read as a CSV table"):
        check_mimic_root(root)


def test_plain_csv_serves_as_well(root: Path) -> None:
    before = code_names(root)
    for path in list(root.rglob("*.csv.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert check_mimic_root(root) == root
    assert code_names(root) == before


def write(root: Path, name: str, rows: list[tuple], columns: list[str]) -> None:
    path = root / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows, schema=columns, orient="row").write_csv(path)


def test_names_come_from_the_version_in_use_and_the_commonest_drug(tmp_path: Path) -> None:
    key = ["icd_code", "icd_version"]
    write(tmp_path, "hosp/diagnoses_icd", [("V100", 9), ("V100", 10), ("V100", 10), ("A1", 10)], key)
    titles = [("V100", 9, "old"), ("V100", 10, "new"), ("A1", 9, "of the other version")]
    write(tmp_path, "hosp/d_icd_diagnoses", titles, [*key, "long_title"])
    write(tmp_path, "hosp/procedures_icd", [("P1", 9)], key)
    drugs = [("00123", "Right"), ("00123", "Right"), ("00123", "Wrong"), ("0", "Saline"), (None, "Left out")]
    write(tmp_path, "hosp/prescriptions", drugs, ["ndc", "drug"])
    assert code_names(tmp_path) == {
        "conditions": {"V100": "new"},
        "procedures": {},
        "drugs": {"00123": "Right", "0": NO_NDC},
    }


def test_a_synthetic_cohort_without_its_truth_is_still_a_cohort(root: Path) -> None:
    (root / "truth.json").unlink()
    shutil.rmtree(root / "icu")
    with pytest.raises(ValueError, match=r"missing icu/icustays\.csv\[\.gz\]$"):
        check_mimic_root(root)


def test_names_are_those_of_the_features_and_of_the_tables_there_are(root: Path) -> None:
    names = code_names(root)
    assert names_for(root, ("drugs", "labs")) == {"drugs": names["drugs"]}
    assert names_for(root, ("icd_codes",)) == {"icd_codes": {**names["procedures"], **names["conditions"]}}
    (root / "hosp" / "prescriptions.csv.gz").unlink()
    (root / "hosp" / "procedures_icd.csv.gz").unlink()
    assert names_for(root, ("conditions", "procedures", "drugs")) == {"conditions": names["conditions"]}
