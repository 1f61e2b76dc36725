"""A tiny MEDS folder: 24 subjects in three shards, with what real ones have, and the labels of a task."""

import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

START = datetime(2150, 1, 1, 8, 30)
EVENTS = {
    "subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32,
    "text_value": pl.String, "hadm_id": pl.Int64,
}  # fmt: skip
LABELS = {"subject_id": pl.Int64, "prediction_time": pl.Datetime("us"), "boolean_value": pl.Boolean}
CODES = [f"DIAGNOSIS//ICD//10//U5{i}" for i in range(10)] + ["LAB//HR", "MEDS_BIRTH", "GENDER//F"]
SHARDS = ("held_out/0", "train/0", "train/1")


def write_meds(root: Path, subjects: int = 24, visits: int = 2) -> Path:
    """Write the folder, `labels/dies.parquet` and `vocabulary.json` in it; the same each time."""
    draw, labels = random.Random(7), []
    for number, shard in enumerate(SHARDS):
        events: list[tuple[Any, ...]] = []
        for subject in range(100 + number, 100 + subjects, len(SHARDS)):
            rows, found = subject_events(draw, subject, visits)
            events += rows
            labels += found
        write_table(root / "data" / f"{shard}.parquet", events, EVENTS)
    codes = [(code, f"The name of {code}", [code.rpartition("//")[0]] if "//" in code else None) for code in CODES]
    schema = {"code": pl.String, "description": pl.String, "parent_codes": pl.List(pl.String)}
    write_table(root / "metadata" / "codes.parquet", codes, schema)
    splits = [(subject, SHARDS[(subject - 100) % 3].partition("/")[0]) for subject in range(100, 100 + subjects)]
    write_table(root / "metadata" / "subject_splits.parquet", splits, {"subject_id": pl.Int64, "split": pl.String})
    write_table(root / "labels" / "dies.parquet", labels, LABELS)
    return root


def subject_events(
    draw: random.Random, subject: int, visits: int
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The events of a subject, and a label at the end of each visit."""
    events: list[tuple[Any, ...]] = [(subject, None, "GENDER//F", None, None, None)]
    events.append((subject, START - timedelta(days=365 * 50), "MEDS_BIRTH", None, None, None))
    labels, time = [], START + timedelta(days=subject)
    for visit in range(visits):
        for _ in range(draw.randint(1, 9)):
            code = draw.choice(CODES[:11])
            value = round(draw.random(), 3) if code.startswith("LAB") else None
            events.append((subject, time, code, value, None, 1000 * subject + visit))
            time += timedelta(minutes=draw.choice((0, 17, 600)))
        labels.append((subject, time, bool(draw.random() < 0.4)))
        time += timedelta(days=30)
    return events, labels


def write_table(path: Path, rows: list[tuple[Any, ...]], schema: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pl.DataFrame(rows, schema=schema, orient="row").to_arrow()
    small = [field.with_type(pa.string()) if field.type == pa.large_string() else field for field in table.schema]
    listed = [
        field.with_type(pa.list_(pa.string())) if pa.types.is_large_list(field.type) else field for field in small
    ]
    pq.write_table(table.cast(pa.schema(listed)), path)
    return path


def change(path: Path, **columns: Any) -> None:
    """Write a table again, with other columns; None: without."""
    table = pl.read_parquet(path)
    gone = [name for name, column in columns.items() if column is None]
    table.drop(gone).with_columns(**{n: c for n, c in columns.items() if c is not None}).write_parquet(path)
