"""The files of a part held against its commit record: their bytes, then what they say of themselves."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.files import first_line
from rollout.results.manifest import PartFile

SHOWN = 8
"""Columns that an error lists."""


def check_size(path: Path, wanted: PartFile) -> None:
    """Refuse a file that is not there or has another size.

    Raises:
        ValueError: naming it.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{file_name(path)} cannot be read: {error.strerror}") from None
    if size != wanted.bytes:
        raise ValueError(f"{file_name(path)} must have {wanted.bytes:,} bytes, as its commit record says, got {size:,}")


def check_bytes(path: Path, wanted: PartFile) -> None:
    """Refuse a file whose bytes are not those that were written.

    Raises:
        ValueError: naming it.
    """
    check_size(path, wanted)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{file_name(path)} cannot be read: {error.strerror}") from None
    if found != wanted.sha256:
        raise ValueError(
            f"{file_name(path)} does not hold the bytes that were written: its SHA-256 is {found[:12]}…, its commit "
            f"record says {wanted.sha256[:12]}…"
        )


def check_table(path: Path, schema: pa.Schema, rows: int) -> None:
    """Refuse a Parquet file of other columns or another number of rows.

    Raises:
        ValueError: naming it, and the columns.
    """
    try:
        with pq.ParquetFile(path) as file:
            found, count = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file_name(path)} cannot be read as Parquet: {first_line(error)}") from None
    if not found.equals(schema, check_metadata=False):
        types = dict(zip(found.names, found.types, strict=True))
        differ = [
            f"{name} {types.get(name, 'missing')}"
            for name, kind in zip(schema.names, schema.types, strict=True)
            if types.get(name) != kind
        ]
        differ += [f"{name[:40]!r} unknown" for name in found.names if name not in schema.names]
        differ += [f"{name[:40]!r} {found.names.count(name)} times" for name in types if found.names.count(name) > 1]
        raise ValueError(
            f"{file_name(path)} must have the columns {', '.join(schema.names)} as a cohort run writes them; wrong: "
            f"{', '.join(differ[:SHOWN]) or 'their order'}"
        )
    if count != rows:
        raise ValueError(f"{file_name(path)} must have {rows:,} rows, as its commit record says, got {count:,}")


def file_name(path: Path) -> str:
    """What to call a part's file in an error."""
    return f"{path.parent.name}/{path.name} in {path.parent.parent}"
