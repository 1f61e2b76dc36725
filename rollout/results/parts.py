"""The files of a part held against its commit record: their bytes, then what they say of themselves."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollout.files import first_line
from rollout.results.manifest import PartFile, PartRecord


def check_size(path: Path, wanted: PartFile) -> None:
    """Refuse a file that is not there or has another size.

    Raises:
        ValueError: naming it.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{_name(path)} cannot be read: {error.strerror}") from None
    if size != wanted.bytes:
        raise ValueError(f"{_name(path)} must have {wanted.bytes:,} bytes, as its commit record says, got {size:,}")


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
        raise ValueError(f"{_name(path)} cannot be read: {error.strerror}") from None
    if found != wanted.sha256:
        raise ValueError(
            f"{_name(path)} does not hold the bytes that were written: its SHA-256 is {found[:12]}…, its commit record "
            f"says {wanted.sha256[:12]}…"
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
        raise ValueError(f"{_name(path)} cannot be read as Parquet: {first_line(error)}") from None
    if not found.equals(schema, check_metadata=False):
        differ = [
            f"{name} {found.field(name).type if name in found.names else 'missing'}"
            for name, kind in zip(schema.names, schema.types, strict=True)
            if name not in found.names or found.field(name).type != kind
        ]
        differ += [f"{name} unknown" for name in found.names if name not in schema.names]
        raise ValueError(
            f"{_name(path)} must have the columns {', '.join(schema.names)} as a cohort run writes them; wrong: "
            f"{', '.join(differ) or 'their order'}"
        )
    if count != rows:
        raise ValueError(f"{_name(path)} must have {rows:,} rows, as its commit record says, got {count:,}")


def check_samples(path: Path, record: PartRecord) -> None:
    """Refuse a Parquet file with rows of samples that are not of its part.

    Raises:
        ValueError: naming it.
    """
    column = pq.read_table(path, columns=["sample"]).column("sample")
    ends = pc.min_max(column).as_py()
    if column.null_count or (len(column) and not record.start <= ends["min"] <= ends["max"] < record.stop):
        raise ValueError(
            f"{_name(path)} must have rows of the samples {record.start} … {record.stop - 1} only, got "
            f"{ends['min']} … {ends['max']}"
        )


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name} in {path.parent.parent}"
