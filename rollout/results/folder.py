"""The folder of a cohort run as a reader finds it: its manifest, its parts, the names of its codes, each checked."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from rollout.files import read_json, usable_path
from rollout.results.layout import (
    ATTRIBUTION_SCHEMA,
    KINDS,
    MANIFEST,
    NAMES,
    RECORDS,
    RUNNING,
    part_name,
    schemas,
)
from rollout.results.manifest import Manifest, OtherVersionError, PartRecord, check_names, totals
from rollout.results.parts import check_bytes, check_size, check_table

ATTRIBUTIONS = pl.DataFrame(pl.from_arrow(ATTRIBUTION_SCHEMA.empty_table()))
_RECORD = re.compile(r"part-\d{5,}\.json")
_AGAIN = "run the same attribution again on the folder: it redoes what is damaged"

Names = dict[str, dict[str, str]]


class RunFolder:
    """A folder of ``rollout attribute``, opened for reading; its rows stay on disk.

    Manifest and commit records are read and checked on opening. A file of rows is checked when it is first read: its
    bytes against the SHA-256 of its commit record, its columns, its number of rows. It is not checked again until its
    size or its times change.

    Attributes:
        path: The folder.
        manifest: Of the run.
        records: The commit records of its parts, in order.
        names: Feature → code → name; empty when the folder has none.
        rows: ``attributions`` | ``predictions`` | ``failures`` → how many rows the parts have.

    Args:
        path: The folder.
        names: Further names, or the path of a JSON file of them; they go before the folder's own.

    Raises:
        ValueError: If there is no such folder, no manifest, or one that is damaged or of another schema version; if
            commit records are damaged, or fewer than a complete run has; if a file of a part is missing or of another
            size; if the names are not names.
    """

    def __init__(self, path: str | Path, names: str | Path | Mapping[str, Mapping[str, str]] | None = None) -> None:
        self.path = usable_path(path, "path")
        if not self.path.is_dir():
            what = "that is a file" if self.path.exists() else "no such folder"
            raise ValueError(f"path must be the folder of a cohort run, got {self.path}: {what}")
        self.manifest = _read_manifest(self.path)
        self.records = _read_records(self.path, self.manifest)
        self.names = _own_names(self.path, self.manifest)
        for feature, codes in _given_names(names).items():
            self.names[feature] = {**self.names.get(feature, {}), **codes}
        self.rows = {kind: sum(r.files[kind].rows for r in self.of(kind)) for kind in KINDS}
        self._sound: dict[Path, tuple[int, ...]] = {}
        for kind in KINDS:
            for record in self.of(kind):
                _or_again(check_size, self.file(kind, record), record.files[kind])

    @property
    def complete(self) -> bool:
        """Whether the run came to its end; failed samples may still lack."""
        return self.manifest.status != RUNNING

    def of(self, kind: str) -> list[PartRecord]:
        """The records of the parts that have a file of a kind, in order."""
        return [record for record in self.records if kind in record.files]

    def file(self, kind: str, record: PartRecord) -> Path:
        """The file of a part."""
        return self.path / kind / f"{record.name}.parquet"

    def scan(self, kind: str, records: Iterable[PartRecord] | None = None) -> pl.LazyFrame:
        """The rows of ``attributions``, ``predictions`` or ``failures``, lazily, every file of them checked.

        Args:
            kind: One of the three.
            records: Of these parts only; None: of all.

        Raises:
            ValueError: If a file does not hold what was written; it names the file.
        """
        chosen = [record for record in (self.records if records is None else records) if kind in record.files]
        for record in chosen:
            self._check(kind, record)
        if not chosen:
            empty = schemas(self.manifest.class_specific)[kind].empty_table()
            return pl.DataFrame(pl.from_arrow(empty)).lazy()
        # Absolute and no pattern: a folder may be called "~x" or "x[et]*".
        return pl.scan_parquet([self.file(kind, record).absolute() for record in chosen], glob=False)

    def holding(self, numbers: Iterable[int]) -> list[PartRecord]:
        """The parts that these samples lie in, in order."""
        wanted = sorted(numbers)
        found, place = [], 0
        for record in self.records:
            while place < len(wanted) and wanted[place] < record.start:
                place += 1
            if place < len(wanted) and wanted[place] < record.stop:
                found.append(record)
        return found

    def _check(self, kind: str, record: PartRecord) -> None:
        """Check a file, unless it is as it was when it was last checked."""
        path, recorded = self.file(kind, record), record.files[kind]
        _or_again(check_size, path, recorded)
        now = path.stat()
        seen = (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
        if self._sound.get(path) != seen:
            _or_again(check_bytes, path, recorded)
            check_table(path, schemas(self.manifest.class_specific)[kind], recorded.rows)
            self._sound[path] = seen


def _or_again(check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        raise ValueError(f"{error}; {_AGAIN}") from None


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"path must be the folder of a cohort run (out of attribute_cohort), got {folder}: it has no {MANIFEST}"
        )
    try:
        return Manifest.read(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except OtherVersionError:
        raise
    except ValueError as error:
        raise ValueError(f"{error}; {_AGAIN}") from None


def _read_records(folder: Path, manifest: Manifest) -> list[PartRecord]:
    """The commit records, in order, as many as the manifest says, none of them damaged."""
    found = sorted(path for path in (folder / RECORDS).glob("part-*.json") if _RECORD.fullmatch(path.name))
    records = []
    for path in found:
        try:
            record = PartRecord.read(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; {_AGAIN}") from None
        except ValueError as error:
            raise ValueError(f"{error}; {_AGAIN}") from None
        if path.stem != part_name(record.part):
            raise ValueError(f"{path}: part must be that of the file's name, got {record.part}; {_AGAIN}")
        records.append(record)
    records.sort(key=lambda record: record.part)
    if len({record.run for record in records}) > 1:
        raise ValueError(f"{folder / RECORDS} has parts of several runs; {_AGAIN}")
    if any(before.stop > after.start for before, after in pairwise(records)):
        raise ValueError(f"{folder / RECORDS} has parts that hold the same samples; {_AGAIN}")
    counts, found_counts = dict(manifest.counts), {**totals(records), "parts": len(records)}
    wrong = [key for key in ("attributed", "failed", "rows", "parts") if counts[key] != found_counts[key]]
    if manifest.status != RUNNING and wrong:
        key = wrong[-1]
        raise ValueError(
            f"{folder} must have {counts[key]:,} {key}, as its manifest says, got {found_counts[key]:,}: parts were "
            "removed or added; run the same attribution again on the folder"
        )
    return records


def _own_names(folder: Path, manifest: Manifest) -> Names:
    path = folder / NAMES
    if manifest.names is None and not path.is_file():
        return {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; {_AGAIN}") from None
    if hashlib.sha256(content).hexdigest() != manifest.names:
        raise ValueError(
            f"{path} does not hold what was written; remove it and run the same attribution again on the folder. Names "
            "of your own are given apart from it"
        )
    return check_names(read_json(path), str(path))


def _given_names(names: str | Path | Mapping[str, Mapping[str, str]] | None) -> Names:
    if names is None:
        return {}
    if not isinstance(names, str | Path):
        return check_names(names, "names")
    path = usable_path(names, "names")
    try:
        return check_names(read_json(path), str(path))
    except OSError as error:
        raise ValueError(f"names must be a JSON file, got {path}: {error.strerror}") from error
