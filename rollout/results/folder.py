"""The folder of a cohort run as a reader finds it: its manifest, its parts, the names of its codes, each checked."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from rollout.files import read_json, usable_path
from rollout.results.layout import (
    ATTRIBUTION_SCHEMA,
    MANIFEST,
    NAMES,
    RECORDS,
    RUNNING,
)
from rollout.results.manifest import Manifest, OtherVersionError, PartRecord, check_names, read_manifest, totals
from rollout.results.parts import check_bytes, check_size, check_table
from rollout.results.values import check_rows

ATTRIBUTIONS = pl.DataFrame(pl.from_arrow(ATTRIBUTION_SCHEMA.empty_table()))
_RECORD = re.compile(r"part-\d{5,}\.json")
_AGAIN = "run the same attribution again on the folder: it redoes what is damaged"

Names = dict[str, dict[str, str]]


class RunFolder:
    """A folder of `rollout attribute` or `rollout evaluate`, opened for reading; its rows stay on disk.

    Manifest and commit records are read and checked on opening. A file of rows is checked when it is first read: its
    bytes against the SHA-256 of its commit record, its columns, its number of rows, the values in them. It is not
    checked again until its size or its times change.

    Attributes:
        path: The folder.
        manifest: Of the run.
        records: The commit records of its parts, in order.
        names: Feature → code → name; empty when the folder has none.
        rows: Kind, such as `predictions` → how many rows the parts have.

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
        self.records = [_or_again(read_record, path) for path in record_files(self.path)]
        for what in disagreements(self.path, self.manifest, self.records):
            raise ValueError(f"{what}; {_AGAIN}")
        self.names = own_names(self.path, self.manifest)
        for feature, codes in _given_names(names).items():
            self.names[feature] = {**self.names.get(feature, {}), **codes}
        self.rows = {kind: sum(r.files[kind].rows for r in self.of(kind)) for kind in self.kinds}
        self._sound: dict[Path, tuple[int, ...]] = {}
        for kind in self.kinds:
            for record in self.of(kind):
                _or_again(check_size, self.file(kind, record), record.files[kind])

    @property
    def kinds(self) -> list[str]:
        """The kinds of rows it may have."""
        return list(self.manifest.schemas)

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
        """The rows of a kind, lazily, every file of them checked.

        Args:
            kind: One of `kinds`.
            records: Of these parts only; None: of all.

        Raises:
            ValueError: If a file does not hold what was written; it names the file.
        """
        chosen = [record for record in (self.records if records is None else records) if kind in record.files]
        for record in chosen:
            self._check(kind, record)
        if not chosen:
            empty = self.manifest.schemas[kind].empty_table()
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
            check_table(path, self.manifest.schemas[kind], recorded.rows)
            check_rows(path, kind, record)
            self._sound[path] = seen


def _or_again(check: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return check(*arguments)
    except ValueError as error:
        raise ValueError(f"{error}; {_AGAIN}") from None


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"path must be the folder of a cohort run (out of attribute_cohort), got {folder}: it has no {MANIFEST}"
        )
    try:
        return read_manifest(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except OtherVersionError:
        raise
    except ValueError as error:
        raise ValueError(f"{error}; {_AGAIN}") from None


def record_files(folder: Path) -> list[Path]:
    """The files of commit records, in order."""
    found = [path for path in (folder / RECORDS).glob("part-*.json") if _RECORD.fullmatch(path.name)]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def read_record(path: Path) -> PartRecord:
    """Read a commit record.

    Raises:
        ValueError: If it cannot be read, is damaged, or is of another part than its name says.
    """
    try:
        record = PartRecord.read(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if path.stem != record.name:
        raise ValueError(f"{path}: part must be that of the file's name, got {record.part}")
    return record


def disagreements(folder: Path, manifest: Manifest, records: Sequence[PartRecord]) -> Iterator[str]:
    """Where manifest and commit records do not say the same."""
    for record in records:
        if record.run != manifest.run:
            path = folder / RECORDS / f"{record.name}.json"
            yield f"{path}: run must be {manifest.run[:12]}…, got {record.run[:12]}…: it is of another run"
    for before, after in pairwise(records):
        if before.stop > after.start:
            yield f"{folder / RECORDS} has parts of the same samples: {before.name} and {after.name}"
    if manifest.status == RUNNING:
        return
    counts, found = dict(manifest.counts), {**totals(records), "parts": len(records)}
    for key in ("parts", "attributed", "failed", "rows"):
        if counts[key] != found[key]:
            yield (
                f"{folder} must have {counts[key]:,} {key}, as its manifest says, got {found[key]:,}: parts were "
                "removed or added"
            )
    planned = [{"part": r.part, "start": r.start, "stop": r.stop, "batches": r.batches} for r in records]
    if planned != manifest.parts:
        yield f"{folder / MANIFEST}: parts must be those of the commit records, got others"


def own_names(folder: Path, manifest: Manifest) -> Names:
    """The names in a run's folder; none if it has none.

    Raises:
        ValueError: If there are none where the manifest says so, or the file does not hold what was written.
    """
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
