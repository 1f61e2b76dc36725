"""MIMIC-IV tables: checked, read by PyHealth as mortality samples, and the names of their codes."""

import gzip
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

REQUIRED = {
    "hosp/patients": ("subject_id", "anchor_age"),
    "hosp/admissions": ("subject_id", "hadm_id", "admittime", "dischtime", "hospital_expire_flag"),
    "hosp/diagnoses_icd": ("subject_id", "hadm_id", "icd_code", "icd_version"),
    "hosp/procedures_icd": ("subject_id", "hadm_id", "icd_code", "icd_version"),
    "hosp/prescriptions": ("subject_id", "hadm_id", "starttime", "drug", "ndc"),
    "icu/icustays": ("subject_id", "hadm_id", "stay_id", "intime", "outtime"),
}
"""The tables `MortalityPredictionMIMIC4` needs, and the columns of each."""

NO_NDC = "no NDC in the table"


def check_mimic_root(root: str | Path) -> Path:
    """Return ``root`` if it holds the MIMIC-IV tables of the mortality task, as ``.csv`` or ``.csv.gz``.

    Raises:
        ValueError: naming the missing folder, tables or columns.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"ehr_root must be a MIMIC-IV folder (with hosp/ and icu/ in it), got {folder}: no such folder"
        )
    absent = [name for name in REQUIRED if _table(folder, name) is None]
    if absent:
        raise ValueError(
            f"ehr_root must be a MIMIC-IV folder (with hosp/ and icu/ in it), got {folder}: missing "
            + ", ".join(f"{name}.csv[.gz]" for name in absent)
        )
    for name, columns in REQUIRED.items():
        lacking = sorted(set(columns) - set(_header(_found(folder, name))))
        if lacking:
            raise ValueError(
                f"ehr_root: {name} in {folder} has no column {', '.join(lacking)}; is it a MIMIC-IV table?"
            )
    return folder


def mortality_samples(root: str | Path, cache: str | Path, workers: int = 1) -> Any:
    """Read the tables with PyHealth's ``MIMIC4Dataset`` and make samples by ``MortalityPredictionMIMIC4``.

    A sample is one admission with at least one diagnosis, procedure and drug that has an admission after it; its label
    is death in that next admission.

    Args:
        root: MIMIC-IV folder.
        cache: Folder for PyHealth's event table and samples. Give a new one for each run: PyHealth keys the samples of
            a ``MIMIC4Dataset`` by the path of the tables, not by their content.
        workers: Processes PyHealth reads with.

    Returns:
        A PyHealth ``SampleDataset`` with the features ``conditions``, ``procedures`` and ``drugs``.

    Raises:
        ValueError: If ``root`` is no MIMIC-IV folder, or gives no sample or one class only.
    """
    root = check_mimic_root(root)
    with quiet_pyhealth():
        from pyhealth.datasets import MIMIC4Dataset
        from pyhealth.tasks import MortalityPredictionMIMIC4

        tables = ["diagnoses_icd", "procedures_icd", "prescriptions"]
        dataset = MIMIC4Dataset(ehr_root=str(root), ehr_tables=tables, cache_dir=str(cache), num_workers=workers)
        try:
            samples = dataset.set_task(MortalityPredictionMIMIC4())
        except ValueError as error:
            if "zero samples" in str(error) or "binary" in str(error).lower():
                raise ValueError(
                    f"ehr_root: the tables in {root} give no mortality task: it needs patients with two admissions or "
                    f"more, codes of all three kinds, and deaths in some of them ({error})"
                ) from error
            raise
    return samples


def code_names(root: str | Path) -> dict[str, dict[str, str]]:
    """Return feature → code → name: ICD titles from ``d_icd_*``, the commonest drug name of each NDC.

    A code string that both ICD versions use has the title of the version that the cohort uses it in more often.
    Codes without a title are left out, and so are all of a kind whose ``d_icd_*`` table is absent.
    """
    root = Path(root)
    names = {
        "conditions": _icd_names(root, "hosp/diagnoses_icd", "hosp/d_icd_diagnoses"),
        "procedures": _icd_names(root, "hosp/procedures_icd", "hosp/d_icd_procedures"),
        "drugs": _commonest(_scan(root, "hosp/prescriptions"), "ndc", "drug"),
    }
    if "0" in names["drugs"]:
        names["drugs"]["0"] = NO_NDC
    return names


def _icd_names(root: Path, events: str, titles: str) -> dict[str, str]:
    if _table(root, titles) is None:
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


@contextmanager
def quiet_pyhealth() -> Iterator[None]:
    """Leave PyHealth's warnings and progress bars, without its log of every step and of its memory."""
    logger = logging.getLogger("pyhealth")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A newer version of litdata")
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)
