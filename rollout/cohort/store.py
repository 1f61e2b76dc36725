"""The folder of a run: locked by one process, its parts committed one by one, its manifest.

A part is three Parquet files at most (attributions, predictions, failures) and a commit record in ``parts/``, written
last and by renaming. What has no record does not count: it is removed when the folder is opened again. So at whatever
moment a run is killed, the parts with a record are whole, and the others are done again.
"""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rollout.cohort.identity import CONTENT, differences, run_digest
from rollout.cohort.shares import add_up_shares
from rollout.errors import CohortError
from rollout.files import PARTIAL, PROBE, empty_folder, write_whole
from rollout.results.layout import (
    CACHE,
    KINDS,
    LOCK,
    MANIFEST,
    NAMES,
    RECORDS,
    SCHEMA_VERSION,
    SCRATCH,
    WRITER,
    part_name,
)

_PART = re.compile(r"part-\d{5,}\.(parquet|json)")

Record = dict[str, Any]


class Store:
    """The folder of one run, while this process has it.

    Args:
        out: Folder; made when missing.
        identity: What is run on what; a folder of another run is refused.
        parts: Number of parts of the run.
        resume: Whether to go on with what the folder holds; else it must be new or empty.
        retry_failures: Whether parts with failures are done again.

    Attributes:
        manifest: What stands in ``manifest.json``.
        records: Part number → commit record, of the parts that are done.

    Raises:
        ValueError: If the folder holds another run, other files, or cannot be written.
        CohortError: If another process has it.
    """

    def __init__(
        self, out: str | Path, identity: Mapping[str, Any], parts: int, *, resume: bool, retry_failures: bool
    ) -> None:
        self.path = run_folder(out)
        self._lock = FileLock(self.path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise CohortError(
                f"attribute_cohort: another process is writing to {self.path}; wait for it, or give another folder"
            ) from None
        try:
            self._open(json.loads(json.dumps(identity)), parts, resume, retry_failures)
        except BaseException:
            self.close()
            raise

    def _open(self, identity: dict[str, Any], parts: int, resume: bool, retry_failures: bool) -> None:
        self.run = run_digest(identity)
        self._features = identity["dataset"].get("features", [])
        found = self._read_manifest(identity, resume)
        _keep_content(identity, found.pop("identity", {}))
        for kind in (*KINDS[:2], RECORDS):
            (self.path / kind).mkdir(exist_ok=True)
        self.records: dict[int, Record] = {}
        for number in range(parts):
            record = self._whole(number)
            if record is not None and not (retry_failures and record["failed"]):
                self.records[number] = record
        self.manifest: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "written_by": WRITER,
            "status": found.get("status", "running"),
            "identity": identity,
            "sessions": found.get("sessions", []),
            "notes": found.get("notes", []),
        }
        if len(self.records) < parts and found:
            self.manifest["status"] = "running"
            self.write_manifest()
        self._sweep()

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def _read_manifest(self, identity: dict[str, Any], resume: bool) -> dict[str, Any]:
        """The manifest of an earlier run of the same; empty for a new folder or a manifest that cannot be read."""
        path = self.path / MANIFEST
        if not path.exists() and not (self.path / RECORDS).exists():
            return {}
        if not resume:
            raise ValueError(
                f"attribute_cohort: out holds a run already ({self.path}); resume=True goes on with it, another folder "
                "starts anew"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            there = manifest["identity"]
            version = manifest["schema_version"]
            kept: dict[str, Any] = {"status": str(manifest["status"]), "sessions": list(manifest["sessions"])}
            kept["notes"] = list(manifest["notes"])
            kept["identity"] = there
        except (OSError, ValueError, KeyError, TypeError) as error:
            return self._without_manifest(error)
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"attribute_cohort: {path} has schema_version {version}, this version of rollout writes "
                f"{SCHEMA_VERSION}; give another folder"
            )
        differ = differences(there, identity)
        if differ:
            raise ValueError(
                f"attribute_cohort: out holds another run ({self.path}). What differs: {'; '.join(differ)}. Give "
                "another folder, or run again what was run there"
            )
        return kept

    def _without_manifest(self, error: Exception) -> dict[str, Any]:
        """A damaged manifest is made anew if every part is of this run: each record says which run it is of."""
        for path in sorted((self.path / RECORDS).glob("part-*.json")):
            record = _read_json(path)
            if record is not None and record.get("run") != self.run:
                raise ValueError(
                    f"attribute_cohort: {self.path / MANIFEST} is damaged ({error}), and {path.name} was written by a "
                    "run of another model, method, dataset or plan; give another folder"
                ) from error
        return {"notes": ["the manifest was damaged and was made anew from the parts"]}

    def _whole(self, number: int) -> Record | None:
        """The record of a part whose files are all there as they were written, else None."""
        record = _read_json(self.path / RECORDS / f"{part_name(number)}.json")
        if record is None or record.get("run") != self.run:
            return None
        try:
            totals([record])
            add_up_shares([record], self._features)
            for kind, file in record["files"].items():
                path = self.path / kind / f"{part_name(number)}.parquet"
                if path.stat().st_size != file["bytes"] or _sha256(path) != file["sha256"]:
                    return None
        except (OSError, KeyError, TypeError, AttributeError):
            return None
        return record

    def _sweep(self) -> None:
        """Remove what no record stands for: our own names only."""
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        for folder in (self.path, *(self.path / kind for kind in (*KINDS, RECORDS))):
            for path in folder.glob(f".*{PARTIAL}"):
                path.unlink(missing_ok=True)
        for kind in (*KINDS, RECORDS):
            kept = {part_name(n) for n, r in self.records.items() if kind == RECORDS or kind in r["files"]}
            for path in (self.path / kind).glob("part-*"):
                if _PART.fullmatch(path.name) and path.stem not in kept:
                    path.unlink()

    def commit(self, number: int, files: Mapping[str, bytes], record: Record) -> None:
        """Write a part: its files, then its record.

        Raises:
            CohortError: If the disk is full or fails; the part then counts as not done.
        """
        described = {
            kind: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for kind, content in files.items()
        }
        record = {"run": self.run, "part": number, **record, "files": described}
        with _disk_trouble(self.path):
            for kind, content in files.items():
                (self.path / kind).mkdir(exist_ok=True)
                write_whole(self.path / kind / f"{part_name(number)}.parquet", content)
            write_whole(self.path / RECORDS / f"{part_name(number)}.json", _json(record))
        self.records[number] = record

    def write_manifest(self) -> None:
        """Write ``manifest.json``.

        Raises:
            CohortError: If the disk is full or fails.
        """
        with _disk_trouble(self.path):
            write_whole(self.path / MANIFEST, _json(self.manifest))

    def write_names(self, names: Mapping[str, Mapping[str, str]]) -> None:
        """Write ``code_names.json``: feature → code → name."""
        with _disk_trouble(self.path):
            write_whole(self.path / NAMES, _json({feature: dict(codes) for feature, codes in names.items()}))


class _disk_trouble:
    """Say what a failed write means for the run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, OSError):
            return
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise CohortError(
            f"attribute_cohort: cannot write to {self.path}: {reason}. The parts written so far are good; the same "
            "call goes on from there"
        ) from error


def run_folder(out: str | Path) -> Path:
    """The folder, if it is new, empty or of an earlier run."""
    folder = Path(out).expanduser()
    if (folder / LOCK).is_file() or (_read_json(folder / MANIFEST) or {}).get("written_by") == WRITER:
        return folder
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {CACHE, SCRATCH, PROBE}:
        return folder
    return empty_folder(folder, "attribute_cohort: out")


def _keep_content(identity: dict[str, Any], there: Mapping[str, Any]) -> None:
    """What a sample held is remembered when it cannot be read this time."""
    known = there.get("dataset", {}).get(CONTENT, {})
    content = identity["dataset"].get(CONTENT, {})
    content |= {number: known.get(number) for number, digest in content.items() if digest is None}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def totals(records: Iterable[Record]) -> dict[str, int]:
    """Sums over parts: what the manifest counts."""
    kept = list(records)
    return {key: sum(record[key] for record in kept) for key in ("samples", "attributed", "failed", "rows", "tokens")}
