"""Sums by patient, and what becomes of them: means with intervals, as many columns at a time as memory allows."""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from rollout.intervals import Floats

CELLS = 8_000_000
"""Patients × columns of a matrix that is held at once."""


def number_patients(*predictions: pl.LazyFrame) -> list[pl.DataFrame]:
    """`sample`, `patient`: the number of each sample's patient from 0 on, the same one in all of the frames.

    A sample without a patient id is a patient of its own.
    """
    keyed = []
    for run, frame in enumerate(predictions):
        own = pl.concat_str(pl.lit(f"\x00{run} "), pl.col("sample").cast(pl.String))
        key = pl.coalesce(pl.col("patient_id"), own).alias("key")
        keyed.append(frame.select("sample", key, run=pl.lit(run)))
    rows = pl.concat(keyed).collect(engine="streaming")
    rows = rows.with_columns(patient=pl.col("key").rank("dense").cast(pl.Int64) - 1)
    return [rows.filter(pl.col("run") == run).select("sample", "patient") for run in range(len(predictions))]


def spread(sums: pl.DataFrame, values: Sequence[str], patients: int, columns: range) -> Floats:
    """The values of some columns as a matrix [V, patients, columns], 0 where a patient has none.

    Args:
        sums: `patient`, `column`, and the values: one row per patient and column.
        values: Names of V of its columns.
        patients: How many there are.
        columns: Which.
    """
    rows = sums.filter(pl.col("column").is_between(columns.start, columns.stop - 1))
    at = rows["patient"].to_numpy(), rows["column"].to_numpy() - columns.start
    found = np.zeros((len(values), patients, len(columns)))
    for place, name in enumerate(values):
        found[(place, *at)] = rows[name].to_numpy()
    return found


def blocks(patients: int, columns: int) -> Iterator[range]:
    """The columns, so many at a time that a matrix of them has at most `CELLS` cells."""
    step = max(1, CELLS // max(patients, 1))
    for start in range(0, columns, step):
        yield range(start, min(start + step, columns))
