"""What is taken away: tables as CSV in which no cell can act as a formula, and a record as PNG."""

from threading import Lock

import polars as pl

from rollout.report.explore.record import with_places
from rollout.results.attributions import CohortAttributions, named
from rollout.results.drawing import png_bytes
from rollout.results.plots import plot_record
from rollout.results.text_table import as_csv

__all__ = ["as_csv", "record_png", "record_table"]

_DRAWING = Lock()
"""One picture at a time: matplotlib's fonts are not made for threads."""


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
