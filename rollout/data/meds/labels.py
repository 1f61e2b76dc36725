"""The labels of a task in MEDS: when which subject is predicted, and what is true of it."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from rollout.data.meds.tables import LABEL_VALUES, LABELS, collected, parquet_files, scan_table
from rollout.files import usable_path

SHOWN = 3


@dataclass(frozen=True)
class Labels:
    """The labels of a task.

    Attributes:
        name: Of the task, as its file or folder is called.
        rows: `subject_id`, `prediction_time`, `value` (null column when there is none).
        kind: The column the values come from, such as `boolean_value`; None for a task without labels.
    """

    name: str
    rows: pl.DataFrame
    kind: str | None


def read_labels(path: str | Path, value: str | None = None) -> Labels:
    """Read the labels of a task.

    Args:
        path: A Parquet file, or a folder of them, in the schema of MEDS's labels.
        value: The column to take, when there are several.

    Raises:
        ValueError: If there is none, a column lacks or is of another type, a subject or time is null, a label is there
            twice, some rows have a value and others none, or which column is meant cannot be told.
    """
    path = usable_path(path, "labels")
    files = parquet_files(path)
    if not files:
        raise ValueError(f"labels must be a Parquet file or a folder of them, got {path}: there is none")
    columns = [*LABELS, *LABEL_VALUES]
    scanned = [(scan_table(file, LABELS, LABEL_VALUES, "labels").select(columns), file) for file in files]
    rows = pl.concat([collected(frame, file, "labels") for frame, file in scanned])
    for name in LABELS:
        if rows[name].has_nulls():
            raise ValueError(f"labels must each have a {name}: {path} has {rows[name].null_count()} without")
    years = rows["prediction_time"].dt.year().unique().sort().to_list()
    if years and not 1 <= years[0] <= years[-1] <= 9999:
        raise ValueError(
            f"labels must have prediction times of the years 1 to 9999, got {years[0]} to {years[-1]} in {path}"
        )
    if rows.is_empty():
        raise ValueError(f"labels must have at least one row, got none in {path}")
    twice = rows.filter(pl.struct("subject_id", "prediction_time").is_duplicated())
    if len(twice):
        subject, time = twice.select("subject_id", "prediction_time").row(0)
        raise ValueError(
            f"labels must have one row for a subject and prediction_time, {path} has several of {subject} at {time}"
        )
    kind = _kind(rows, path, value)
    chosen = rows.select("subject_id", "prediction_time", value=pl.lit(None) if kind is None else pl.col(kind))
    return Labels(path.stem, chosen, kind)


def _kind(rows: pl.DataFrame, path: Path, value: str | None) -> str | None:
    if value is not None and value not in LABEL_VALUES:
        raise ValueError(f"value must be one of {', '.join(LABEL_VALUES)}, got {value!r}")
    filled = [name for name in LABEL_VALUES if rows[name].null_count() < len(rows)]
    if value is None and len(filled) > 1:
        raise ValueError(f"labels in {path} have {', '.join(filled)}: name one with [task] value")
    kind = filled[0] if value is None and filled else value
    if kind is not None and kind not in filled:
        raise ValueError(f"labels in {path} have no {kind}, but {', '.join(filled) or 'no value at all'}")
    if kind is not None and rows[kind].has_nulls():
        raise ValueError(f"labels in {path} must each have a {kind}, {rows[kind].null_count()} have none")
    return kind


def check_known(rows: pl.DataFrame, subjects: pl.DataFrame, root: Path) -> None:
    """Refuse labels of subjects that have no event.

    Raises:
        ValueError: naming some.
    """
    unknown = rows.join(subjects, on="subject_id", how="anti")["subject_id"].unique().sort()
    if len(unknown):
        named = ", ".join(map(str, unknown[:SHOWN])) + ", …" * (len(unknown) > SHOWN)
        raise ValueError(f"labels must be of subjects in {root}: {len(unknown):,} have no event there, {named}")
