"""Parquet tables of MEDS: read by polars, and refused where a column lacks or is of another type."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

DATA, CODES, SPLITS, DATASET = (
    "data",
    "metadata/codes.parquet",
    "metadata/subject_splits.parquet",
    "metadata/dataset.json",
)
"""Where they stand in a folder."""

SUBJECT = {"subject_id": pl.Int64()}
EVENTS = {**SUBJECT, "time": pl.Datetime("us"), "code": pl.String()}
VALUES = {"numeric_value": pl.Float32()}
"""Of events, where they are there."""
LABELS = {**SUBJECT, "prediction_time": pl.Datetime("us")}
LABEL_VALUES = {
    "boolean_value": pl.Boolean(),
    "integer_value": pl.Int64(),
    "float_value": pl.Float32(),
    "categorical_value": pl.String(),
}
"""Of labels, those that are there."""
CODE_NAMES = {"code": pl.String()}
CODE_DETAILS = {"description": pl.String(), "parent_codes": pl.List(pl.String())}
"""Of codes, where they are there."""

UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
"""What polars raises on a damaged file."""

Columns = Mapping[str, pl.DataType]


def parquet_files(path: Path) -> list[Path]:
    """A file, or every `.parquet` file below a folder, in the order of their names; hidden ones are left out."""
    if path.is_file():
        return [path]
    found = (file for file in path.rglob("*.parquet") if file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))


def scan_table(path: Path, required: Columns, optional: Columns, what: str) -> pl.LazyFrame:
    """The named columns of a Parquet file, lazily; only its footer is read now.

    Args:
        path: The file.
        required: Name → type of columns it must have.
        optional: Of columns it may have; those it lacks are null in the frame.
        what: What to call it in an error.

    Raises:
        ValueError: If it cannot be read as Parquet, lacks a column, or has one of another type.
    """
    schema = read_columns(path, what)
    for name, wanted in {**required, **optional}.items():
        if name not in schema:
            if name in required:
                raise ValueError(
                    f"{what} must have the column {name} ({_type(wanted)}): {path} has {', '.join(schema)}"
                )
        elif schema[name] != wanted and not (wanted == pl.String and schema[name] == pl.Categorical):
            raise ValueError(f"{what}: {name} must be {_type(wanted)}, got {_type(schema[name])} in {path}")
    columns = [
        (pl.col(name) if name in schema else pl.lit(None)).cast(wanted).alias(name)
        for name, wanted in {**required, **optional}.items()
    ]
    return pl.scan_parquet(path, glob=False).with_columns(columns)


def read_columns(path: Path, what: str) -> Mapping[str, pl.DataType]:
    """Name → type of the columns of a Parquet file.

    Raises:
        ValueError: If it cannot be read as one.
    """
    try:
        return pl.read_parquet_schema(path)
    except UNREADABLE as error:
        raise ValueError(f"{what} must be a Parquet file, got {path}: {_first_line(error)}") from error


def collected(frame: pl.LazyFrame, path: Path, what: str) -> pl.DataFrame:
    """The rows of a lazy frame.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        return frame.collect()
    except UNREADABLE as error:
        raise ValueError(f"{what} {path} cannot be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _type(kind: pl.DataType) -> str:
    """A type as MEDS writes it."""
    if isinstance(kind, pl.Datetime):
        zone = f", {kind.time_zone}" if kind.time_zone else ""
        return f"timestamp[{kind.time_unit}{zone}]"
    return str(kind).lower()
