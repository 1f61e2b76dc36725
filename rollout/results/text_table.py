"""Tables as lines of a terminal and as a CSV file; strings of the data do no harm in either."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from rollout.errors import one_line
from rollout.files import usable_path, write_whole

WIDEST = 60
"""Signs of a string of the data that a cell shows."""
FORMULA = r"^[=+\-@\t\r\n＝＋－＠]"
"""A text that begins so is run as a formula by spreadsheets (OWASP, CSV Injection)."""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def cell(value: Any) -> str:
    """A string of the data in one line of bounded length, without control characters."""
    text = "" if value is None else str(value)
    return one_line(text, WIDEST) if text else ""


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def interval(value: float | None, low: float | None, high: float | None, form: str = ".3f") -> str:
    """`0.123 [0.100, 0.150]`."""
    ends = "" if low is None or high is None else f" [{format(low, form)}, {format(high, form)}]"
    return number(value, form) + ends


def csv_target(path: str | Path) -> Path:
    """Where a CSV file may be written: before any work.

    Raises:
        ValueError: If there is something already, or no folder for it.
    """
    file = usable_path(path, "csv")
    if os.path.lexists(file):
        raise ValueError(f"csv must be a new file, got {file}, which is there already; give another name")
    if not file.parent.is_dir():
        raise ValueError(f"csv must be in a folder that exists, got {file}: no folder {file.parent}")
    return file


def write_csv(table: pl.DataFrame, path: str | Path) -> Path:
    """Write a table as a CSV file, as `as_csv` says it, whole or not at all.

    Raises:
        ValueError: As `csv_target`; also if the file cannot be written.
    """
    file = csv_target(path)
    try:
        return write_whole(file, as_csv(table))
    except OSError as error:
        raise ValueError(f"csv must be a file that can be written, got {file}: {error.strerror}") from error


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
