"""The samples of a PyHealth dataset and task: prepared once in a cache folder, read from there afterwards.

PyHealth sorts events of the same time in no fixed order, so two preparations of the same tables give the codes of an
admission in different orders; and it finds the cache of a ``MIMIC4Dataset`` by the path of the tables, not by what they
hold. So a run must read the samples it began with: what was prepared, and from which tables, stands beside them.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rollout.data.classes import check_arguments, did_you_mean, named_class, root_argument
from rollout.data.quiet import quiet_pyhealth
from rollout.data.vocabulary import Vocabulary
from rollout.errors import CohortError
from rollout.files import write_json

SCHEMA_VERSION = 1
RECORD, LOCK, PREPARED = "prepared.json", ".lock", "pyhealth"
_SET_HERE = ("cache_dir", "num_workers")


@dataclass(frozen=True)
class SampleSource:
    """Where samples come from: a dataset of ``pyhealth.datasets`` over a folder, and a task of ``pyhealth.tasks``.

    Attributes:
        dataset: Name of the dataset's class.
        root: Its folder.
        task: Name of the task's class.
        dataset_arguments: Of the dataset, such as its tables.
        task_arguments: Of the task.
        workers: Processes PyHealth reads with.
    """

    dataset: str
    root: Path
    task: str
    dataset_arguments: Mapping[str, Any] = field(default_factory=dict)
    task_arguments: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1

    def check(self) -> None:
        """Check classes, arguments and the folder; PyHealth is imported, no table read.

        Raises:
            ValueError: naming what PyHealth does not have or take.
        """
        dataset = named_class("dataset", self.dataset, "[dataset] class")
        root = root_argument(dataset, "[dataset] class")
        check_arguments(dataset, self.dataset_arguments, (root, *_SET_HERE), "[dataset] arguments")
        if "cxr_root" in self.dataset_arguments:
            raise ValueError("[dataset] arguments must not have 'cxr_root': PyHealth would write an index beside it")
        check_arguments(named_class("task", self.task, "[task] class"), self.task_arguments, (), "[task] arguments")
        if not self.root.is_dir():
            raise ValueError(f"[dataset] root must be a folder with tables, got {self.root}: no such folder")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which samples there are, the tables aside."""
        return {
            "dataset": self.dataset,
            "dataset_arguments": dict(self.dataset_arguments),
            "task": self.task,
            "task_arguments": dict(self.task_arguments),
        }


def prepare_samples(source: SampleSource, cache: str | Path, vocabulary: Vocabulary | None = None) -> Any:
    """Return the samples of a source as a PyHealth ``SampleDataset``, prepared in ``cache`` unless they are there.

    Args:
        source: What to read.
        cache: Folder for PyHealth's event table and samples, and for ``prepared.json``, which says what they are.
            Nothing is written elsewhere. PyHealth pickles its own cache, and unpickles it here.
        vocabulary: Processors to use as they are; None fits them on these samples.

    Raises:
        ValueError: If the source cannot be read or gives no samples, if ``vocabulary`` is of another task, if the cache
            holds other samples, if its tables have changed since, or if another process is preparing it.
        CohortError: If the disk is full or fails.
    """
    source.check()
    folder = Path(cache).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _held(folder):
            record = _read_record(folder, source)
            key = _key(vocabulary)
            if key not in record["samples"]:
                if not record["samples"]:
                    shutil.rmtree(folder / PREPARED, ignore_errors=True)
                _prepare(source, folder, vocabulary, key, record)
            return _opened(folder, record["samples"][key])
    except OSError as error:
        raise CohortError(
            f"cannot prepare samples in {folder}: {error}. When that is mended, the same command begins again there"
        ) from error


def _key(vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return "fitted here"
    return hashlib.sha256(json.dumps(vocabulary.described()).encode()).hexdigest()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is preparing samples in {folder}; wait for it, or use another") from None
    try:
        yield
    finally:
        lock.release()


def _read_record(folder: Path, source: SampleSource) -> dict[str, Any]:
    """What the cache holds, checked against the source; an empty record when it holds nothing that is whole."""
    empty: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **source.identity, "tables": {}, "samples": {}}
    try:
        record = json.loads((folder / RECORD).read_bytes())
        samples, tables = dict(record["samples"]), dict(record["tables"])
        whole = {key: entry for key, entry in samples.items() if (folder / entry["path"] / "index.json").is_file()}
        known = record["schema_version"] == SCHEMA_VERSION and all(name in record for name in empty)
    except (OSError, ValueError, KeyError, TypeError):
        return empty
    if not known or not whole:
        return empty
    here = json.loads(json.dumps(source.identity))
    for name, value in here.items():
        if record[name] != value:
            raise ValueError(
                f"{folder} holds samples of another run: {name} is {record[name]!r} there, {value!r} now; give another "
                "output, or another cache"
            )
    changed = [name for name, stamp in tables.items() if not _unchanged(source.root / name, stamp)]
    if changed:
        raise ValueError(
            f"{', '.join(changed[:5])} in {source.root} changed since the samples in {folder} were prepared; put the "
            "tables back, or give another output (or cache) to begin anew"
        )
    return {**record, "samples": whole}


def _prepare(
    source: SampleSource, folder: Path, vocabulary: Vocabulary | None, key: str, record: dict[str, Any]
) -> None:
    dataset_class = named_class("dataset", source.dataset, "[dataset] class")
    task = _called("[task]", named_class("task", source.task, "[task] class"), source.task_arguments)
    if vocabulary is not None:
        _check_features(task, vocabulary)
    inputs, outputs = (None, None) if vocabulary is None else vocabulary.build()
    arguments = {
        root_argument(dataset_class, "[dataset] class"): str(source.root.absolute()),
        **source.dataset_arguments,
        "cache_dir": str((folder / PREPARED).absolute()),
        "num_workers": source.workers,
    }
    with quiet_pyhealth(), redirect_stdout(sys.stderr):
        dataset = _called("[dataset]", dataset_class, arguments)
        record["tables"] = {name: _stamp(source.root / name) for name in _table_files(dataset, source.root)}
        write_json({**record, "samples": {}} if not record["samples"] else record, folder / RECORD)
        try:
            samples = dataset.set_task(
                task, num_workers=source.workers, input_processors=inputs, output_processors=outputs
            )
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise
            raise ValueError(
                f"PyHealth made no {source.task} samples of the tables in {source.root}: "
                f"{type(error).__name__}: {error}"
            ) from error
    record["samples"][key] = {
        "path": str(Path(samples.path).relative_to(folder.absolute())),
        "dataset_name": samples.dataset_name,
        "task_name": samples.task_name,
    }
    write_json(record, folder / RECORD)


def _opened(folder: Path, entry: Mapping[str, str]) -> Any:
    with quiet_pyhealth():
        from pyhealth.datasets import SampleDataset

        return SampleDataset(str(folder.absolute() / entry["path"]), entry["dataset_name"], entry["task_name"])


def _called(where: str, made: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        return made(**arguments)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise ValueError(f"{where}: {made.__name__} did not take its arguments: {error}") from error


def _check_features(task: Any, vocabulary: Vocabulary) -> None:
    for name, schema, known in (
        ("inputs", task.input_schema, vocabulary.inputs),
        ("outputs", task.output_schema, vocabulary.outputs),
    ):
        wanted = {key for key, spec in schema.items() if not _ignored(spec)}
        if wanted != set(known):
            raise ValueError(
                f"the vocabulary must be that of {type(task).__name__}, whose {name} are "
                f"{', '.join(sorted(wanted))}; its {name} are {', '.join(sorted(known))}"
            )


def _ignored(spec: Any) -> bool:
    named = spec[0] if isinstance(spec, tuple) else spec
    return named == "ignore" or getattr(named, "__name__", "") == "IgnoreProcessor"


def _table_files(dataset: Any, root: Path) -> list[str]:
    """The files PyHealth reads, relative to the root where they are under it; all under the root where none is named.

    Raises:
        ValueError: If a table is unknown, or has no file.
    """
    files: set[Path] = set()
    for part in (getattr(dataset, "sub_datasets", None) or {"": dataset}).values():
        if part.config is None:
            files.update(path for path in Path(part.root).rglob("*") if path.is_file())
            continue
        for table in part.tables:
            if table not in part.config.tables:
                raise ValueError(
                    f"[dataset] arguments: {type(part).__name__} has no table {table!r}"
                    f"{did_you_mean(table, part.config.tables)} It has {', '.join(part.config.tables)}"
                )
            config = part.config.tables[table]
            for name in (config.file_path, *(join.file_path for join in config.join)):
                files.update(_existing(Path(part.root), name, table))
    root = root.absolute()
    return sorted(str(path.relative_to(root) if path.is_relative_to(root) else path) for path in files)


def _existing(root: Path, name: str, table: str) -> list[Path]:
    twin = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    for candidate in (name, twin):
        path = root / candidate
        if path.is_file():
            return [path]
        if path.is_dir():
            return [below for below in path.rglob("*") if below.is_file()]
    matched = [path for path in root.glob(name) if path.is_file()] if any(c in name for c in "*?[") else []
    if not matched:
        raise ValueError(f"[dataset] root: {root} has no {name}, which the table {table!r} needs")
    return matched


def _stamp(path: Path) -> list[Any]:
    """Size, time of change, and digest of a file."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, _digest(path)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unchanged(path: Path, stamp: Any) -> bool:
    """Whether a file is as it was; its content is read only when its time says otherwise."""
    try:
        size, changed, digest = stamp
        stat = path.stat()
        return stat.st_size == size and (stat.st_mtime_ns == changed or _digest(path) == digest)
    except (OSError, TypeError, ValueError):
        return False
