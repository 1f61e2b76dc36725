"""MIMIC-IV tables: checked, read by PyHealth as the samples of a task, and the names of their codes."""

import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from rollout.data.quiet import quiet_pyhealth
from rollout.data.samples import SampleSource, prepare_samples

__all__ = ["check_mimic_root", "code_names", "mimic_source", "mortality_samples", "names_for", "quiet_pyhealth"]

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

NO_NDC = "no NDC in the table"


def check_mimic_root(root: str | Path, tables: Sequence[str] = CODE_TABLES) -> Path:
    """Return ``root`` if it holds the MIMIC-IV tables of a task, as ``.csv`` or ``.csv.gz``.

    Args:
        root: Folder with ``hosp/`` and ``icu/``.
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
    absent = [name for name in needed if _table(folder, name) is None]
    if absent:
        raise ValueError(
            f"ehr_root must be a MIMIC-IV folder (with hosp/ and icu/ in it), got {folder}: missing "
            + ", ".join(f"{name}.csv[.gz]" for name in absent)
        )
    for name in needed:
        lacking = sorted(set(COLUMNS.get(name, ())) - set(_header(_found(folder, name))))
        if lacking:
            raise ValueError(
                f"ehr_root: {name} in {folder} has no column {', '.join(lacking)}; is it a MIMIC-IV table?"
            )
    return folder


def mimic_source(
    root: str | Path, task: str = "MortalityPredictionMIMIC4", tables: Sequence[str] = CODE_TABLES, workers: int = 1
) -> SampleSource:
    """Return where the samples of a task on MIMIC-IV tables come from: PyHealth's ``MIMIC4Dataset`` over ``root``.

    Args:
        root: MIMIC-IV folder.
        task: Name of a task in ``pyhealth.tasks``.
        tables: It needs, beside patients, admissions and ICU stays.
        workers: Processes PyHealth reads with.

    Raises:
        ValueError: If ``root`` lacks a table or column.
    """
    folder = check_mimic_root(root, tables)
    return SampleSource("MIMIC4Dataset", folder, task, {"ehr_tables": list(tables)}, workers=workers)


def mortality_samples(root: str | Path, cache: str | Path, workers: int = 1) -> Any:
    """Read the tables with PyHealth's ``MIMIC4Dataset`` and make samples by ``MortalityPredictionMIMIC4``.

    A sample is one admission with at least one diagnosis, procedure and drug that has an admission after it; its label
    is death in that next admission.

    Args:
        root: MIMIC-IV folder.
        cache: Folder for PyHealth's event table and samples, as in ``rollout.runfile.prepare_samples``.
        workers: Processes PyHealth reads with.

    Returns:
        A PyHealth ``SampleDataset`` with the features ``conditions``, ``procedures`` and ``drugs``.

    Raises:
        ValueError: If ``root`` is no MIMIC-IV folder, or gives no sample or one class only.
    """
    return prepare_samples(mimic_source(root, workers=workers), cache)


def names_for(root: str | Path, features: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return feature → code → name for those features of a MIMIC-IV task whose codes are known; others are left out."""
    names = code_names(root)
    names["icd_codes"] = {**names["procedures"], **names["conditions"]}
    return {feature: names[feature] for feature in features if names.get(feature)}


def code_names(root: str | Path) -> dict[str, dict[str, str]]:
    """Return feature → code → name: ICD titles from ``d_icd_*``, the commonest drug name of each NDC.

    A code string that both ICD versions use has the title of the version that the cohort uses it in more often.
    Codes without a title are left out, and so are all of a kind whose tables are absent.
    """
    root = Path(root)
    drugs = _table(root, "hosp/prescriptions") is not None
    names = {
        "conditions": _icd_names(root, "hosp/diagnoses_icd", "hosp/d_icd_diagnoses"),
        "procedures": _icd_names(root, "hosp/procedures_icd", "hosp/d_icd_procedures"),
        "drugs": _commonest(_scan(root, "hosp/prescriptions"), "ndc", "drug") if drugs else {},
    }
    if "0" in names["drugs"]:
        names["drugs"]["0"] = NO_NDC
    return names


def _icd_names(root: Path, events: str, titles: str) -> dict[str, str]:
    if _table(root, titles) is None or _table(root, events) is None:
        return {}
    key = ["icd_code", "icd_version"]
    named = (
        _scan(root, events)
        .select(pl.col(key).str.strip_chars())
        .join(_scan(root, titles).select(pl.col(*key, "long_title").str.strip_chars()), on=key)
    )
    return _commonest(named, "icd_code", "long_title")


def _commonest(rows: pl.LazyFrame, code: str, name: str) -> dict[str, str]:
    counted = rows.drop_nulls([code, name]).group_by(code, name).len().sort("len", name, descending=[True, False])
    first = counted.group_by(code, maintain_order=True).first().collect()
    return dict(zip(first[code].str.strip_chars(), first[name].str.strip_chars(), strict=True))


def _scan(root: Path, name: str) -> pl.LazyFrame:
    return pl.read_csv(_found(root, name), infer_schema=False, columns=_wanted(root, name)).lazy()


def _wanted(root: Path, name: str) -> list[str]:
    useful = {"icd_code", "icd_version", "long_title", "ndc", "drug"}
    return [column for column in _header(_found(root, name)) if column in useful]


def _table(root: Path, name: str) -> Path | None:
    return next((path for path in (root / f"{name}.csv.gz", root / f"{name}.csv") if path.is_file()), None)


def _found(root: Path, name: str) -> Path:
    path = _table(root, name)
    if path is None:
        raise ValueError(f"ehr_root: {root} has no {name}.csv[.gz]")
    return path


def _header(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return file.readline().strip().lower().replace('"', "").split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"ehr_root: {path} cannot be read as a CSV table: {error}") from error
