"""Folders that are no MIMIC-IV are refused by name."""

import gzip
import shutil
from pathlib import Path

import polars as pl
import pytest

from rollout.data.mimic import check_mimic_root, mimic_source
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


def test_a_synthetic_cohort_without_its_truth_is_still_a_cohort(root: Path) -> None:
    (root / "truth.json").unlink()
    shutil.rmtree(root / "icu")
    with pytest.raises(ValueError, match=r"missing icu/icustays\.csv\[\.gz\]$"):
        check_mimic_root(root)
