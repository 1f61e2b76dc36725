"""What is taken away: tables as CSV in which no cell can act as a formula, and a record as PNG."""

import io
from threading import Lock

import polars as pl

from rollout.report.explore.record import with_places
from rollout.results.attributions import CohortAttributions, named
from rollout.results.drawing import png_bytes
from rollout.results.plots import plot_record

FORMULA = r"^[=+\-@\t\r\n＝＋－＠]"
"""A text that begins so is run as a formula by spreadsheets."""
_DRAWING = Lock()
"""One picture at a time: matplotlib's fonts are not made for threads."""


def as_csv(table: pl.DataFrame) -> bytes:
    """A table as CSV in UTF-8: text that a spreadsheet would run gets an apostrophe before it; numbers are numbers.

    A list of numbers is one text, with semicolons between.
    """
    lists = [name for name, kind in table.schema.items() if isinstance(kind, pl.List)]
    flat = table.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(";") for name in lists)
    texts = [name for name, kind in flat.schema.items() if kind == pl.String]
    safe = flat.with_columns(
        pl.when(pl.col(name).str.contains(FORMULA)).then("'" + pl.col(name)).otherwise(pl.col(name)).alias(name)
        for name in texts
    )
    sink = io.BytesIO()
    safe.write_csv(sink)
    return sink.getvalue()


def record_table(cohort: CohortAttributions, rows: pl.DataFrame) -> pl.DataFrame:
    """Every entry of a record with its name, relevance and lift."""
    return with_places(cohort, rows).select(
        "sample", "patient_id", "visit_id", "feature", "visit", "position", "code", named(cohort.names), "time",
        "attribution", "lift", model_reads="read",
    )  # fmt: skip


def record_png(cohort: CohortAttributions, sample: int) -> bytes:
    """The record as `rollout.plot_record` draws it.

    Raises:
        ValueError: If there is no such sample.
    """
    with _DRAWING:
        return png_bytes(plot_record(cohort, sample=sample))
