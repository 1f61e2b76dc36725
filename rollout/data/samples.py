"""The samples of a PyHealth dataset and task: prepared once in a cache folder, read from there afterwards.

PyHealth sorts events of the same time in no fixed order, so two preparations of the same tables give the codes of an
admission in different orders; and it finds the cache of a `MIMIC4Dataset` by the path of the tables, not by what they
hold. So a run must read the samples it began with: what was prepared, and from which tables, stands beside them.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.data.cache import SampleCache, digest_file
from rollout.data.classes import check_arguments, did_you_mean, named_class, root_argument
from rollout.data.quiet import quiet_pyhealth
from rollout.data.vocabulary import Vocabulary
from rollout.errors import CohortError
from rollout.files import usable_path

MOST_WORKERS = 512
_SET_HERE = ("cache_dir", "num_workers")


@dataclass(frozen=True)
class SampleSource:
    """Where samples come from: a dataset of `pyhealth.datasets` over a folder, and a task of `pyhealth.tasks`.

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
        if type(self.workers) is not int or not 1 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"[dataset] workers must be a whole number from 1 to {MOST_WORKERS}, got {self.workers!r}")
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


def prepare_samples(
    source: SampleSource, cache: str | Path, vocabulary: Vocabulary | None = None, *, trust_cache: bool = False
) -> Any:
    """Return the samples of a source as a PyHealth `SampleDataset`, prepared in `cache` unless they are there.

    PyHealth pickles its own cache, and unpickles it here: samples that are there are opened only if you prepared them
    (`rollout.data.cache`), unchanged since, or if they are trusted.

    Args:
        source: What to read.
        cache: New or empty folder, or one prepared before. It gets PyHealth's event table and samples, and
            `prepared.json`, which says what they are; nothing is written elsewhere but the key in your state folder.
        vocabulary: Processors to use as they are; None fits them on these samples.
        trust_cache: Whether to open samples that somebody else prepared. Whoever did can run anything as you.

    Raises:
        ValueError: If the source cannot be read or gives no samples, if `vocabulary` is of another task, if the cache
            holds other things, other samples, or samples that are not known to be yours or have changed, if its tables
            have changed since, or if another process is preparing it.
        CohortError: If the disk is full or fails.
    """
    source.check()
    folder, key = usable_path(cache, "cache"), _key(vocabulary)
    try:
        known = SampleCache(folder, json.loads(json.dumps(source.identity)), trust_cache)
        entry = _find(known, source, key)
        if entry is None:
            with known.lock():
                entry = _find(known, source, key) or _prepare(source, known, vocabulary, key)
        return _opened(known.made, entry)
    except OSError as error:
        raise CohortError(
            f"cannot prepare samples in {folder}: {error}. When that is mended, the same command begins again there"
        ) from error


def _key(vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return "fitted here"
    return hashlib.sha256(json.dumps(vocabulary.described()).encode()).hexdigest()


def _find(cache: SampleCache, source: SampleSource, key: str) -> Mapping[str, str] | None:
    """The entry of the samples in the cache, if they are there; the tables are then as they were."""
    tables = cache.record["tables"] if cache.record["samples"] else {}
    changed = [name for name, stamp in tables.items() if not _unchanged(source.root / name, stamp)]
    if changed:
        raise ValueError(
            f"{', '.join(changed[:5])} in {source.root} changed since the samples in {cache.folder} were prepared; put "
            "the tables back, or give another output (or cache) to begin anew"
        )
    return cache.find(key)


def _prepare(source: SampleSource, cache: SampleCache, vocabulary: Vocabulary | None, key: str) -> Mapping[str, str]:
    dataset_class = named_class("dataset", source.dataset, "[dataset] class")
    task = _called("[task]", named_class("task", source.task, "[task] class"), source.task_arguments)
    if vocabulary is not None:
        _check_features(task, vocabulary)
    inputs, outputs = (None, None) if vocabulary is None else vocabulary.build()
    trouble = cache.begin()
    if trouble is not None:
        warnings.warn(
            f"the samples in {cache.folder} cannot be marked as yours ({trouble}), so another process opens them only "
            "with --trust-cache; set XDG_STATE_HOME to a folder you can write to",
            stacklevel=3,
        )
    made = cache.made.absolute()
    arguments = {
        root_argument(dataset_class, "[dataset] class"): str(source.root.absolute()),
        **source.dataset_arguments,
        "cache_dir": str(made),
        "num_workers": source.workers,
    }
    with quiet_pyhealth(), redirect_stdout(sys.stderr):
        dataset = _called("[dataset]", dataset_class, arguments)
        cache.record["tables"] = {name: _stamp(source.root / name) for name in _table_files(dataset, source.root)}
        try:
            samples = dataset.set_task(
                task, num_workers=source.workers, input_processors=inputs, output_processors=outputs
            )
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise
            raise ValueError(
                f"PyHealth made no {source.task} samples of the tables in {source.root}: "
                f"{type(error).__name__}: {error}{_guard_hint(error)}"
            ) from error
    entry = {
        "path": Path(samples.path).relative_to(made).as_posix(),
        "dataset_name": samples.dataset_name,
        "task_name": samples.task_name,
    }
    cache.finish(key, entry)
    return entry


def _guard_hint(error: Exception) -> str:
    """PyHealth reads tables in a process of its own, which imports the script, and so runs what is unguarded there."""
    if "Nanny failed to start" not in str(error):
        return ""
    return (
        ' In a script, the call must stand under `if __name__ == "__main__":`, because the process that PyHealth reads '
        "the tables with imports the script"
    )


def _opened(made: Path, entry: Mapping[str, str]) -> Any:
    with quiet_pyhealth():
        from pyhealth.datasets import SampleDataset

        return SampleDataset(str(made.absolute() / entry["path"]), entry["dataset_name"], entry["task_name"])


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
    return [stat.st_size, stat.st_mtime_ns, digest_file(path)]


def _unchanged(path: Path, stamp: Any) -> bool:
    """Whether a file is as it was; its content is read only when its time says otherwise."""
    try:
        size, changed, digest = stamp
        stat = path.stat()
        return stat.st_size == size and (stat.st_mtime_ns == changed or digest_file(path) == digest)
    except (OSError, TypeError, ValueError):
        return False
