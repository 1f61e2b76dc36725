"""The rows of a part held against what a cohort run writes: whose they are, and the numbers that sums are made of."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from polars.exceptions import PanicException, PolarsError

from rollout.files import first_line
from rollout.results.manifest import PartRecord
from rollout.results.parts import file_name

ONE_PER_SAMPLE = ("predictions", "failures")


def check_rows(path: Path, kind: str, record: PartRecord) -> None:
    """Read every value of a part's file, and refuse rows that no cohort run writes.

    Args:
        path: The file; its columns are those of its kind.
        kind: Of its rows.
        record: The commit record of the part.

    Raises:
        ValueError: If values cannot be read, rows are of samples that are not of the part, a sample has two predictions
            or failures, or a row of attributions has no feature, no place from 0 on, or no finite attribution; it
            names the file.
    """
    try:
        said = _decode(path)
        rows = pl.read_parquet(path.absolute(), glob=False)
    except (pa.ArrowException, PolarsError, PanicException, OSError) as error:
        raise ValueError(f"{file_name(path)} cannot be read as Parquet: {first_line(error)}") from None
    if rows.schema != pl.DataFrame(pl.from_arrow(said.empty_table())).schema:
        raise ValueError(f"{file_name(path)} cannot be read as Parquet: it says of its columns one thing and another")
    _check_samples(path, rows["sample"], record)
    if kind == "attributions":
        _check_places(path, rows)
    elif kind in ONE_PER_SAMPLE and rows["sample"].is_duplicated().any():
        twice = rows["sample"].filter(rows["sample"].is_duplicated())[0]
        raise ValueError(f"{file_name(path)} must have one row for each sample, got several of sample {twice}")


def _decode(path: Path) -> pa.Schema:
    """Read it by Arrow, which refuses pages that polars panics on, or reads as other values; return its columns."""
    found = pq.read_schema(path)
    text = [name for name, kind in zip(found.names, found.types, strict=True) if pa.types.is_string(kind)]
    with pq.ParquetFile(path, read_dictionary=text) as file:  # as codes of a dictionary: quicker, and small
        file.read()
    return found


def _check_samples(path: Path, sample: pl.Series, record: PartRecord) -> None:
    ends = "a row without one" if sample.null_count() else f"{sample.min()!r} … {sample.max()!r}"
    if sample.null_count() or not sample.is_between(record.start, record.stop - 1).all():
        raise ValueError(
            f"{file_name(path)} must have rows of the samples {record.start} … {record.stop - 1} only, got {ends}"
        )


def _check_places(path: Path, rows: pl.DataFrame) -> None:
    visit = pl.col("visit").is_null() | (pl.col("visit") >= 0)
    good = pl.col("feature").is_not_null() & (pl.col("position") >= 0) & visit & pl.col("attribution").is_finite()
    bad = rows.filter(~good.fill_null(False)).select("feature", "visit", "position", "attribution", "sample")
    for feature, visit, position, attribution, sample in bad.head(1).rows():
        raise ValueError(
            f"{file_name(path)} must have a feature, a place from 0 on and a finite attribution in every row, got "
            f"feature {feature!r}, visit {visit}, position {position}, attribution {attribution} of sample {sample}"
        )
