"""The folder in which PyHealth's samples are prepared: what proves that it is ours, and unchanged.

    prepared.json        the record: samples of what, from which tables, the digest of every file; sealed
    pyhealth-<random>/   PyHealth's own cache, in a folder made new for it

PyHealth unpickles from its cache: `schema.pkl`, and the chunks of samples (`*.bin`), so whoever wrote those files says
what is run. They are opened only when the record bears this user's seal and every file is as the record has it; and
only what a sealed record names is ever removed.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rollout.data.seal import SEAL, seal_problem, seal_record
from rollout.files import PARTIAL, parse_json, write_json

SCHEMA_VERSION = 2
RECORD, LOCK = "prepared.json", ".lock"
_MADE = re.compile(r"pyhealth-[0-9a-f]{16}")
_KEYS = {"made": str, "pending": bool, "tables": dict, "files": dict, "samples": dict}
_ELSE = "give another cache (or output)"

Record = dict[str, Any]


class SampleCache:
    """The folder of a cache.

    Args:
        folder: It, made on the first write.
        identity: What it is to hold samples of.
        trusted: Whether a record without this user's seal is believed.

    Attributes:
        record: What stands in `prepared.json`; of a new cache, one without samples.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], trusted: bool) -> None:
        self.folder, self.identity, self.trusted = folder, dict(identity), trusted
        self.read()

    def read(self) -> None:
        """Read the record.

        Raises:
            ValueError: If the folder holds other things than a cache, one of another run, or one not known to be ours.
            OSError: If it cannot be read.
        """
        self._refuse_other_things()
        path = self.folder / RECORD
        self.own = True
        if not path.exists():
            empty: Record = {name: kind() for name, kind in _KEYS.items()}
            self.record = {"schema_version": SCHEMA_VERSION, **self.identity, **empty}
            return
        try:
            record = parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged or no record of rollout's: {error}; {_ELSE}") from error
        self._check(record, path)
        self.record = record

    def _refuse_other_things(self) -> None:
        """What is there without a record of ours belongs to somebody else, and so does what a link leads to."""
        if not self.folder.is_dir():
            return
        names = {entry.name for entry in os.scandir(self.folder)}
        linked = [name for name in (RECORD, LOCK) if (self.folder / name).is_symlink()]
        if linked:
            raise ValueError(f"{self.folder / linked[0]} must not be a link; {_ELSE}")
        others = sorted(name for name in names if not _is_ours(self.folder / name))
        if RECORD not in names and others:
            raise ValueError(
                f"a cache of samples must be a new or empty folder, or one prepared before; {self.folder} holds "
                f"{', '.join(others[:3])}{', …' * (len(others) > 3)} and no {RECORD}; {_ELSE}"
            )

    def _check(self, record: Any, path: Path) -> None:
        if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
            got = record.get("schema_version") if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{path} must have schema_version {SCHEMA_VERSION}, got {got!r}; {_ELSE}")
        problem = seal_problem(record)
        if problem is not None and not self.trusted:
            raise ValueError(
                f"the samples in {self.folder} are not known to be prepared by you, and PyHealth would unpickle them, "
                f"which can run anything: {problem}. Give another cache (or output) to prepare them from the tables, "
                "or --trust-cache (trust_cache=True in Python) if you trust whoever made them"
            )
        self.own = problem is None
        lacking = [key for key, kind in _KEYS.items() if not isinstance(record.get(key), kind)]
        if lacking or not _MADE.fullmatch(record["made"]):
            raise ValueError(f"{path} is damaged: {', '.join(lacking) or 'made'} is not as rollout writes it; {_ELSE}")
        for name, value in self.identity.items():
            if record.get(name) != value:
                raise ValueError(
                    f"{self.folder} holds samples of another run: {name} is {record.get(name)!r} there, {value!r} now; "
                    "give another output, or another cache"
                )

    @property
    def made(self) -> Path:
        """PyHealth's own cache."""
        return self.folder / self.record["made"]

    def find(self, key: str) -> Mapping[str, str] | None:
        """The entry of samples that are whole and unchanged; None when there are none.

        Raises:
            ValueError: If there are, and they are not as they were prepared.
        """
        entry = self.record["samples"].get(key)
        if entry is None or not (self.made.is_symlink() or self.made.exists()):
            return None
        try:
            below = f"{entry['path']}/"
            named = {"path": str(entry["path"]), **{name: str(entry[name]) for name in ("dataset_name", "task_name")}}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / RECORD} is damaged: its samples lack {error}; {_ELSE}") from error
        self._check_files(below)
        return named

    def _check_files(self, below: str = "") -> None:
        """Refuse files that differ from the record, are missing, or are there beside it."""
        known = {name: stamp for name, stamp in self.record["files"].items() if name.startswith(below)}
        found = set(_files(self.made, below))
        differ = sorted(found ^ set(known)) or [
            name for name, stamp in known.items() if stamp != _stamp(self.made / name)
        ]
        if differ or not known:
            raise ValueError(
                f"the samples in {self.folder} are not as they were prepared: {', '.join(differ[:3]) or below} in "
                f"{self.made.name} was added, removed or changed. Delete {self.folder} if it is yours to prepare them "
                f"anew, or {_ELSE}"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from preparing there.

        Raises:
            ValueError: If one does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another process is preparing samples in {self.folder}; wait for it, or use another"
            ) from None
        try:
            self.read()
            yield
        finally:
            lock.release()

    def begin(self) -> str | None:
        """Make ready to prepare samples: remove what a preparation that was cut short left, and note that one begins.

        Returns:
            Why no other process will be able to tell that these samples are ours; None when it will.

        Raises:
            ValueError: If what is there is not as it was prepared.
        """
        if not self.record["samples"] or not self.made.is_dir():
            self._remove_made()
            self.record |= {"made": f"pyhealth-{secrets.token_hex(8)}", "tables": {}, "files": {}, "samples": {}}
            trouble = self._write(pending=True)
            self.made.mkdir()
            return trouble
        if self.record["pending"] and self.own:
            for name in _files(self.made):
                if name not in self.record["files"]:
                    (self.made / name).unlink()
        self._check_files()
        return self._write(pending=True)

    def finish(self, key: str, entry: Mapping[str, str]) -> None:
        """Note that samples are there, and what every file is."""
        known = self.record["files"]
        self.record["files"] = {name: known.get(name) or _stamp(self.made / name) for name in _files(self.made)}
        self.record["samples"][key] = dict(entry)
        self._write(pending=False)

    def _remove_made(self) -> None:
        """Remove the folder of a preparation that was cut short, if it is ours."""
        if not _MADE.fullmatch(self.record["made"]) or not (self.made.is_symlink() or self.made.exists()):
            return
        if not self.own or self.made.is_symlink():
            raise ValueError(f"{self.made} was not made by you, or is a link, so it is not removed; {_ELSE}")
        shutil.rmtree(self.made)

    def _write(self, pending: bool) -> str | None:
        self.record["pending"] = pending
        self.record.pop(SEAL, None)
        trouble = None
        if self.own:  # what was trusted for once is not made ours
            self.record, trouble = seal_record(self.record)
        write_json(self.record, self.folder / RECORD)
        return trouble


def _is_ours(path: Path) -> bool:
    """Whether a file beside the record is the lock, or was to become the record."""
    if path.name == LOCK:
        return path.is_file() and not path.stat().st_size
    return path.name.startswith(f".{RECORD}.") and path.name.endswith(PARTIAL)


def _files(made: Path, below: str = "") -> list[str]:
    """The files below, by their path in the folder.

    Raises:
        ValueError: If there is a link or anything else that is neither file nor folder.
    """
    names: list[str] = []
    for place, folders, files in os.walk(made):
        for path in (made, *(Path(place, name) for name in (*folders, *files))):
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ValueError(f"{path} must be a file or a folder, not a link or a device; {_ELSE}")
        names += [Path(place, name).relative_to(made).as_posix() for name in files]
    return [name for name in names if name.startswith(below)]


def _stamp(path: Path) -> list[Any]:
    return [path.stat().st_size, digest_file(path)]


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
