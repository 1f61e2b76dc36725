"""MEDS written: tables in the very types of its schema, and a folder that is there whole or not at all."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.data.meds.tables import CODES, DATASET
from rollout.files import PARTIAL, empty_folder, write_json

VERSION = "0.4"
"""Of MEDS."""
EVENT_FIELDS = {
    "subject_id": pa.int64(),
    "time": pa.timestamp("us"),
    "code": pa.string(),
    "numeric_value": pa.float32(),
}
LABEL_FIELDS = {"subject_id": pa.int64(), "prediction_time": pa.timestamp("us"), "boolean_value": pa.bool_()}
CODE_FIELDS = {"code": pa.string(), "description": pa.string(), "parent_codes": pa.list_(pa.string())}


@contextmanager
def whole_folder(path: str | Path, name: str) -> Iterator[Path]:
    """A new folder to write into, which takes its name when all is written; nothing is left of it if that fails.

    Args:
        path: What it is called in the end; new or empty.
        name: What to call it in an error.

    Raises:
        ValueError: If it holds anything, or cannot be written.
    """
    folder = empty_folder(path, name)
    partial = folder.absolute().with_name(f".{folder.name[:80]}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process of this number left
    partial.mkdir()
    try:
        yield partial
        folder.rmdir()  # fails where somebody has put something there since
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_table(frame: pl.DataFrame, fields: Mapping[str, pa.DataType], path: Path) -> Path:
    """Write columns of a frame as Parquet, in these types and this order, and see them on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = frame.select(list(fields)).to_arrow().cast(pa.schema(list(fields.items())))
    with path.open("xb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    return path


def write_metadata(root: Path, codes: pl.DataFrame, said: Mapping[str, Any]) -> None:
    """Write `metadata/codes.parquet` and `metadata/dataset.json`.

    Args:
        root: Of the folder.
        codes: `code`, `description`, `parent_codes`.
        said: Of the dataset, by the keys of MEDS's `DatasetMetadataSchema`.
    """
    write_table(codes.sort("code"), CODE_FIELDS, root / CODES)
    write_json({**said, "meds_version": VERSION, "etl_name": "attention-rollout"}, root / DATASET)
