"""MIMIC-IV tables: checked, and read by PyHealth as the samples of a task."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rollout.data.quiet import quiet_pyhealth
from rollout.data.samples import SampleSource, prepare_samples

__all__ = ["check_mimic_root", "find_table", "mimic_source", "mortality_samples", "quiet_pyhealth", "read_header"]

COLUMNS = {
    "hosp/patients": ("subject_id", "anchor_age"),
    "hosp/admissions": ("subject_id", "hadm_id", "admittime", "dischtime", "hospital_expire_flag"),
    "icu/icustays": ("subject_id", "hadm_id", "stay_id", "intime", "outtime"),
    "hosp/diagnoses_icd": ("subject_id", "hadm_id", "icd_code", "icd_version"),
    "hosp/procedures_icd": ("subject_id", "hadm_id", "icd_code", "icd_version"),
    "hosp/prescriptions": ("subject_id", "hadm_id", "starttime", "drug", "ndc"),
    "hosp/labevents": ("subject_id", "hadm_id", "itemid", "charttime", "storetime", "valuenum"),
}
"""Tables, and the columns that PyHealth's tasks read of each."""
ALWAYS = ("hosp/patients", "hosp/admissions", "icu/icustays")
"""What PyHealth reads whatever the task."""
CODE_TABLES = ("diagnoses_icd", "procedures_icd", "prescriptions")
"""The tables of `MortalityPredictionMIMIC4` and `LengthOfStayPredictionMIMIC4`."""

REQUIRED = {name: COLUMNS[name] for name in (*ALWAYS, *(f"hosp/{table}" for table in CODE_TABLES))}
"""Tables and columns of these tasks."""


def check_mimic_root(root: str | Path, tables: Sequence[str] = CODE_TABLES) -> Path:
    """Return `root` if it holds the MIMIC-IV tables of a task, as `.csv` or `.csv.gz`.

    Args:
        root: Folder with `hosp/` and `icu/`.
        tables: Beside patients, admissions and ICU stays, as PyHealth names them.

    Raises:
        ValueError: naming the missing folder, tables or columns.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"ehr_root must be a MIMIC-IV folder (with hosp/ and icu/ in it), got {folder}: no such folder"
        )
    needed = [*ALWAYS, *(f"hosp/{table}" for table in tables)]
    absent = [name for name in needed if find_table(folder, name) is None]
    if absent:
        raise ValueError(
            f"ehr_root must be a MIMIC-IV folder (with hosp/ and icu/ in it), got {folder}: missing "
            + ", ".join(f"{name}.csv[.gz]" for name in absent)
        )
    for name in needed:
        lacking = sorted(set(COLUMNS.get(name, ())) - set(read_header(_found(folder, name))))
        if lacking:
            raise ValueError(
                f"ehr_root: {name} in {folder} has no column {', '.join(lacking)}; is it a MIMIC-IV table?"
            )
    return folder


def mimic_source(
    root: str | Path, task: str = "MortalityPredictionMIMIC4", tables: Sequence[str] = CODE_TABLES, workers: int = 1
) -> SampleSource:
    """Return where the samples of a task on MIMIC-IV tables come from: PyHealth's `MIMIC4Dataset` over `root`.

    Args:
        root: MIMIC-IV folder.
        task: Name of a task in `pyhealth.tasks`.
        tables: It needs, beside patients, admissions and ICU stays.
        workers: Processes PyHealth reads with.

    Raises:
        ValueError: If `root` lacks a table or column.
    """
    folder = check_mimic_root(root, tables)
    return SampleSource("MIMIC4Dataset", folder, task, {"ehr_tables": list(tables)}, workers=workers)


def mortality_samples(root: str | Path, cache: str | Path, workers: int = 1) -> Any:
    """Read the tables with PyHealth's `MIMIC4Dataset` and make samples by `MortalityPredictionMIMIC4`.

    A sample is one admission with at least one diagnosis, procedure and drug that has an admission after it; its label
    is death in that next admission.

    Args:
        root: MIMIC-IV folder.
        cache: Folder for PyHealth's event table and samples, as in `rollout.runfile.prepare_samples`.
        workers: Processes PyHealth reads with.

    Returns:
        A PyHealth `SampleDataset` with the features `conditions`, `procedures` and `drugs`.

    Raises:
        ValueError: If `root` is no MIMIC-IV folder, or gives no sample or one class only.
    """
    return prepare_samples(mimic_source(root, workers=workers), cache)


def find_table(root: Path, name: str) -> Path | None:
    """Return the file of a table such as `hosp/patients`, packed or not; None when there is none."""
    return next((path for path in (root / f"{name}.csv.gz", root / f"{name}.csv") if path.is_file()), None)


def _found(root: Path, name: str) -> Path:
    path = find_table(root, name)
    if path is None:
        raise ValueError(f"ehr_root: {root} has no {name}.csv[.gz]")
    return path


def read_header(path: Path) -> list[str]:
    """Return the names of a CSV table's columns, in lower case.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return file.readline().strip().lower().replace('"', "").split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"ehr_root: {path} cannot be read as a CSV table: {error}") from error
