"""Everything a run's folder says, held against everything in it: what `rollout verify` prints."""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from rollout.files import usable_path
from rollout.results.folder import disagreements, own_names, read_record, record_files
from rollout.results.layout import KINDS, MANIFEST, RECORDS, RUNNING
from rollout.results.manifest import Manifest, PartFile, PartRecord, read_manifest
from rollout.results.parts import check_bytes, check_table
from rollout.results.values import check_rows

_PART = re.compile(r"(part-\d{5,})\.(parquet|json)")


def verify_folder(path: str | Path) -> list[str]:
    """Check a run's folder; every file of it is read in full.

    Checked are the manifest and the commit records, field by field and against each other; that the parts are of one
    run and, where it is complete, hold every sample once; every file of a part: its bytes against the SHA-256 of its
    commit record, columns, number of rows, that they are of the part's samples and hold what a run writes; the names of
    codes; and that there is no part without a commit record.

    Args:
        path: The folder.

    Returns:
        One line per finding; none of a sound folder.

    Raises:
        ValueError: If there is no such folder.
    """
    folder = usable_path(path, "path")
    if not folder.is_dir():
        raise ValueError(f"path must be the folder of a cohort run, got {folder}: no such folder")
    return list(dict.fromkeys(_findings(folder)))


def _findings(folder: Path) -> Iterator[str]:
    manifest = yield from _tried(read_manifest, folder / MANIFEST)
    records = []
    for path in record_files(folder):
        record = yield from _tried(read_record, path)
        if record is not None:
            records.append(record)
    if manifest is not None:
        yield from disagreements(folder, manifest, records)
        yield from _gaps(folder, manifest, records)
        yield from _tried(own_names, folder, manifest)
    for record in records:
        for kind, file in record.files.items():
            yield from _tried(_check_file, folder, kind, file, record, manifest)
    yield from _without_record(folder, records)


def _tried(check: Callable[..., Any], *arguments: Any) -> Generator[str, None, Any]:
    """What a check returns; a finding, and None, if it does not hold."""
    try:
        return check(*arguments)
    except OSError as error:
        yield f"{error.filename} cannot be read: {error.strerror}"
    except ValueError as error:
        yield str(error)


def _check_file(folder: Path, kind: str, file: PartFile, record: PartRecord, manifest: Manifest | None) -> None:
    path = folder / kind / f"{record.name}.parquet"
    check_bytes(path, file)
    if manifest is not None:
        check_table(path, manifest.schemas[kind], file.rows)
        check_rows(path, kind, record)


def _gaps(folder: Path, manifest: Manifest, records: Sequence[PartRecord]) -> Iterator[str]:
    """The samples of a complete run that no part holds."""
    samples = manifest.identity["dataset"]["samples"]
    ends = [0, *(end for record in records for end in (record.start, record.stop)), samples]
    if manifest.status != RUNNING:
        for stop, start in zip(ends[::2], ends[1::2], strict=True):
            if stop < start:
                yield f"{folder} is complete by its manifest, but no part holds the samples {stop} … {start - 1}"
    if ends[-2] > samples:
        yield f"{folder} must have {samples:,} samples, as its manifest says, got a part with sample {ends[-2] - 1}"


def _without_record(folder: Path, records: Sequence[PartRecord]) -> Iterator[str]:
    known = {(kind, record.name) for record in records for kind in record.files}
    for kind in KINDS:
        for path in sorted((folder / kind).glob("part-*")):
            found = _PART.fullmatch(path.name)
            if found and (kind, found[1]) not in known:
                yield f"{path} has no sound commit record in {RECORDS}/: it does not count"
