"""The folder of a run: locked by one process, its parts committed one by one, its manifest.

A part is three Parquet files at most (attributions, predictions, failures) and a commit record in `parts/`, written
last and by renaming. What has no record does not count: it is removed when the folder is opened again. So at whatever
moment a run is killed, the parts with a record are whole, and the others are done again.

Nothing of the folder may be a link to somewhere else: what is written and removed here is in the folder.
"""

import errno
import hashlib
import io
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from rollout.cohort.content import changed, differing, spot_checks
from rollout.cohort.identity import adopt_code, differences
from rollout.errors import CohortError
from rollout.files import PARTIAL, PROBE, as_json, empty_folder, plain, read_json, usable_path, write_whole
from rollout.results.layout import (
    ATTRIBUTER,
    CACHE,
    EVALUATOR,
    KINDS,
    LOCK,
    MANIFEST,
    NAMES,
    RECORDS,
    RUNNING,
    SCRATCH,
    part_name,
)
from rollout.results.manifest import (
    CONTENT,
    Identity,
    Manifest,
    OtherVersionError,
    PartRecord,
    check_names,
    read_manifest,
)
from rollout.results.parts import check_bytes

_PART = re.compile(r"part-\d{5,}\.(parquet|json)")
_OURS = re.compile(rf"part-\d{{5,}}\..*|\..*{re.escape(PARTIAL)}")


class Store:
    """The folder of one run, while this process has it.

    Args:
        out: Folder; made when missing.
        begun: The manifest of the run if it began now; a folder of another run is refused.
        parts: Number of parts of the run.
        samples: Gives sample i by `samples[i]`; held against what the parts that are done say it was.
        resume: Whether to go on with what the folder holds; else it must be new or empty.
        retry_failures: Whether parts with failures are done again.

    Attributes:
        manifest: What stands in `manifest.json`.
        records: Part number → commit record, of the parts that are done.

    Raises:
        ValueError: If the folder holds another run, other files, links, or cannot be written.
        CohortError: If another process has it.
    """

    def __init__(
        self, out: str | Path, begun: Manifest, parts: int, samples: Any, *, resume: bool, retry_failures: bool
    ) -> None:
        self.path = run_folder(out)
        self.parts = parts
        self._lock = FileLock(self.path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise CohortError(
                f"attribute_cohort: another process is writing to {self.path}; wait for it, or give another folder"
            ) from None
        try:
            self._open(begun, samples, resume, retry_failures)
        except BaseException:
            self.close()
            raise

    def _open(self, begun: Manifest, samples: Any, resume: bool, retry_failures: bool) -> None:
        found = self._read_manifest(begun, resume)
        self.manifest = begun if found is None else found
        self.run = self.manifest.run
        if found is None and self._holds_records():
            self._take_parts_of_this_run_only()
        held = {number: self._read_record(number) for number in range(self.parts)}
        self._before = {number: record for number, record in held.items() if record is not None}
        self.records = {
            number: record
            for number, record in self._before.items()
            if self._is_whole(record) and not (retry_failures and record.failed)
        }
        self._check_content(samples)
        self._settle_names()
        for kind in (*self.manifest.schemas, RECORDS):
            if kind != "failures":
                (self.path / kind).mkdir(exist_ok=True)
        if len(self.records) < self.parts and found is not None:
            self.manifest.status = RUNNING
            self.write_manifest()
        self._sweep()

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def _holds_records(self) -> bool:
        return (self.path / RECORDS).is_dir()

    def _read_manifest(self, begun: Manifest, resume: bool) -> Manifest | None:
        """The manifest of an earlier session of the same run; None for a new folder or one that cannot be read."""
        path = self.path / MANIFEST
        if not path.exists() and not self._holds_records():
            return None
        if not resume:
            raise ValueError(
                f"attribute_cohort: out holds a run already ({self.path}); resume=True goes on with it, another folder "
                "starts anew"
            )
        try:
            found = read_manifest(path)
        except OtherVersionError as error:
            raise ValueError(f"attribute_cohort: {error}, or give another folder") from None
        except (OSError, ValueError):
            return None
        if found.written_by != begun.written_by:
            raise ValueError(
                f"attribute_cohort: out holds what {found.written_by} wrote ({self.path}); give another folder"
            )
        there = plain(found.as_dict()["identity"])
        now = plain(begun.as_dict()["identity"])
        if adopt_code(now, there):
            begun.notes.append(
                f"code was compiled by {there['python']}; that of a later session could not be compared with it"
            )
        differ = differences(there, now) + _changed_state(found, begun)
        if differ:
            raise ValueError(
                f"attribute_cohort: out holds another run ({self.path}). What differs: {'; '.join(differ)}. Give "
                "another folder, or run again what was run there"
            )
        _keep_content(now, there)
        found.identity = cast(Identity, now)
        found.notes += [note for note in begun.notes if note not in found.notes]
        return found

    def _take_parts_of_this_run_only(self) -> None:
        """A damaged manifest is made anew if every part is of this run: each record says which run it is of."""
        path = self.path / MANIFEST
        for name in sorted(file.name for file in (self.path / RECORDS).glob("part-*.json")):
            try:
                record = PartRecord.read(self.path / RECORDS / name)
            except (OSError, ValueError):
                continue
            if record.run != self.run:
                raise ValueError(
                    f"attribute_cohort: {path} is damaged, and {name} was written by a run of another model, method, "
                    "dataset or plan; give another folder"
                )
        self.manifest.notes.append("the manifest was damaged and was made anew from the parts")

    def _read_record(self, number: int) -> PartRecord | None:
        """The record of a part of this run, if it is there and sound."""
        try:
            record = PartRecord.read(self.path / RECORDS / f"{part_name(number)}.json")
        except (OSError, ValueError):
            return None
        return record if record.run == self.run and record.part == number else None

    def _is_whole(self, record: PartRecord) -> bool:
        """Whether the files of a part are all there as they were written."""
        try:
            for kind, file in record.files.items():
                check_bytes(self.path / kind / f"{record.name}.parquet", file)
        except ValueError:
            return False
        return True

    def _check_content(self, samples: Any) -> None:
        """Look at samples of the parts that are done; see `spot_checks` for how many."""
        done = list(self.records.values())
        differ = list(changed(samples, done, spot_checks(done)))
        if differ:
            raise ValueError(
                f"attribute_cohort: out holds another run ({self.path}). What differs: dataset.{_named(differ)} hold "
                "other values than when they were attributed. Give another folder, or the dataset that was run there"
            )

    def _settle_names(self) -> None:
        """A file of names that was written before a kill is taken; one that does not hold what was written is removed,
        to be written again."""
        try:
            found = hashlib.sha256((self.path / NAMES).read_bytes()).hexdigest()
        except OSError:
            found = None
        if found is not None and self.manifest.names not in (None, found):
            (self.path / NAMES).unlink()
            found = None
        self.manifest.names = found

    def _sweep(self) -> None:
        """Remove what no record stands for: our own names only."""
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        for folder in (self.path, *(self.path / kind for kind in (*KINDS, RECORDS))):
            for path in folder.glob(f".*{PARTIAL}"):
                path.unlink(missing_ok=True)
        for kind in (*KINDS, RECORDS):
            kept = {record.name for record in self.records.values() if kind == RECORDS or kind in record.files}
            for path in (self.path / kind).glob("part-*"):
                if _PART.fullmatch(path.name) and path.stem not in kept:
                    path.unlink()

    def commit(self, number: int, files: Mapping[str, bytes], record: Mapping[str, Any]) -> PartRecord:
        """Write a part: its files, then its record.

        Raises:
            CohortError: If the disk is full or fails; the part then counts as not done. If the part was done before,
                of other samples.
        """
        described = {
            kind: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "rows": _rows_in(content)}
            for kind, content in files.items()
        }
        made = PartRecord.checked({**record, "run": self.run, "part": number, "files": described}, part_name(number))
        differ = differing(self._before[number], made) if number in self._before else []
        if differ:
            raise CohortError(
                f"attribute_cohort: {_named(differ)} hold other values than when part {number} was done first: this is "
                "another dataset than that of the parts that are done; give another folder"
            )
        with self._disk():
            for kind, content in files.items():
                (self.path / kind).mkdir(exist_ok=True)
                write_whole(self.path / kind / f"{part_name(number)}.parquet", content)
            write_whole(self.path / RECORDS / f"{part_name(number)}.json", made.as_bytes())
        self.records[number] = made
        return made

    def write_manifest(self) -> None:
        """Write `manifest.json`.

        Raises:
            CohortError: If the disk is full or fails.
        """
        with self._disk():
            write_whole(self.path / MANIFEST, self.manifest.as_bytes())

    def write_names(self, names: Mapping[str, Mapping[str, str]]) -> None:
        """Write `code_names.json`: feature → code → name.

        Raises:
            ValueError: If they are not names.
            CohortError: If the disk is full or fails.
        """
        content = as_json(check_names(names, "attribute_cohort: code_names"))
        digest = hashlib.sha256(content).hexdigest()
        if digest == self.manifest.names:
            return
        self.manifest.names = digest
        with self._disk():
            write_whole(self.path / NAMES, content)
        self.write_manifest()

    def set_volatile(self, names: list[str]) -> None:
        """Note that these settings change as the run is at work: they do not tell it from another."""
        self.manifest.volatile = sorted({*self.manifest.volatile, *names})
        self.write_manifest()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Say what a failed write means for the run."""
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
            raise CohortError(
                f"attribute_cohort: cannot write to {self.path}: {reason}. The parts written so far are good; the same "
                "call goes on from there"
            ) from error


def _rows_in(content: bytes) -> int:
    return int(pq.read_metadata(io.BytesIO(content)).num_rows)


def run_folder(out: str | Path) -> Path:
    """The folder, if it is new, empty or of an earlier run, and nothing in it leads out of it.

    Raises:
        ValueError: If it is none of these, or cannot be written.
    """
    folder = usable_path(out, "attribute_cohort: out")
    refuse_links(folder)
    if (folder / LOCK).is_file() or _is_ours(folder / MANIFEST):
        return folder
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {CACHE, SCRATCH, PROBE}:
        return folder
    return empty_folder(folder, "attribute_cohort: out")


def refuse_links(folder: Path) -> None:
    """Refuse a folder where something of ours is a link: a run would write or remove what it leads to.

    Raises:
        ValueError: naming the first.
    """
    top = (LOCK, MANIFEST, NAMES, SCRATCH, CACHE, RECORDS, *KINDS)
    links = [folder / name for name in top if (folder / name).is_symlink()]
    for inside in (folder, *(folder / kind for kind in (*KINDS, RECORDS))):
        if not inside.is_symlink() and inside.is_dir():
            links += [path for path in inside.iterdir() if _OURS.fullmatch(path.name) and path.is_symlink()]
    if links:
        raise ValueError(
            f"attribute_cohort: {links[0]} must not be a link ({links[0]} → {links[0].readlink()}): a run writes and "
            "removes within out only. Make out itself a link, or give another folder"
        )


def _is_ours(manifest: Path) -> bool:
    try:
        value = read_json(manifest)
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("written_by") in (ATTRIBUTER, EVALUATOR)


def _changed_state(there: Manifest, now: Manifest) -> list[str]:
    """What model and functions hold otherwise than there, what changes as they run left out, in words."""
    names = [*there.state, *(name for name in now.state if name not in there.state)]
    return differences(
        {name: there.state.get(name) for name in names if name not in there.volatile},
        {name: now.state.get(name) for name in names if name not in there.volatile},
    )


def _named(numbers: list[int]) -> str:
    return f"samples {', '.join(map(str, numbers[:5]))}{', …' * (len(numbers) > 5)}"


def _keep_content(identity: dict[str, Any], there: Mapping[str, Any]) -> None:
    """What a sample held is remembered when it cannot be read this time."""
    known = there["dataset"].get(CONTENT, {})
    content = identity["dataset"].get(CONTENT, {})
    content |= {number: known.get(number) for number, digest in content.items() if digest is None}
