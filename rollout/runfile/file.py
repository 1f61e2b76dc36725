"""Run files: which model on which samples, in TOML or JSON, every key of it checked before anything is read.

    [model]
    class = "Transformer"                  # in pyhealth.models
    weights = "weights.pt"                 # a state_dict, such as PyHealth's Trainer saves
    vocabulary = "vocabulary.json"         # the processors it was trained with, or "refit"
    arguments = { embedding_dim = 64, heads = 2, num_layers = 2 }

    [dataset]
    class = "MIMIC4Dataset"                # in pyhealth.datasets
    root = "cohort"
    arguments = { ehr_tables = ["diagnoses_icd", "procedures_icd", "prescriptions"] }
    cache = "samples"                      # optional: where the samples are prepared; default: in the output
    workers = 1                            # optional: processes PyHealth reads with

    [task]
    class = "MortalityPredictionMIMIC4"    # in pyhealth.tasks
    arguments = {}

    [run]
    output = "attributed"
    method = "rollout"                     # this and the rest as in rollout.attribute_cohort
    batch_tokens = 8192

For a Hugging Face classifier over a MEDS folder, see `rollout.runfile.events`.

Paths are relative to the file. Only classes of PyHealth can be named; nothing else is imported, and nothing is
unpickled but a cache that you prepared yourself (no key here can say otherwise: `rollout.data.cache`). `save_model`
writes such a file beside a model trained in Python.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.data.classes import did_you_mean, pyhealth_config
from rollout.data.samples import SampleSource, prepare_samples
from rollout.data.vocabulary import Vocabulary, read_vocabulary, vocabulary_of, write_vocabulary
from rollout.errors import one_line
from rollout.files import parse_json, usable_path
from rollout.results.layout import CACHE
from rollout.runfile import events
from rollout.runfile.events import MEDS, EventsRun
from rollout.runfile.hugging_face import AUTO
from rollout.runfile.settings import SETTINGS, check_settings
from rollout.runfile.toml import write_toml
from rollout.runfile.weights import (
    FOLDER,
    build_model,
    check_model,
    differences,
    load_model,
    read_weights,
    takes_folder,
    weights_digest,
    write_weights,
)

REFIT = "refit"
WEIGHTS, VOCABULARY, RUN = "weights.pt", "vocabulary.json", "run.toml"
_KEYS: dict[str, dict[str, type]] = {
    "model": {"class": str, "weights": str, "vocabulary": str, "arguments": dict},
    "dataset": {"class": str, "root": str, "arguments": dict, "cache": str, "workers": int},
    "task": {"class": str, "arguments": dict},
    "run": {"output": str, **dict.fromkeys(SETTINGS, object)},
}
_REQUIRED = {"model": ("class", "weights", "vocabulary"), "dataset": ("class", "root"), "task": ("class",), "run": ()}
_VOCABULARY_HINT = (
    f', the file save_model wrote, or "{REFIT}" to fit the processors on the tables read, which is right only if these '
    "are the ones the model was trained on"
)
MOST_BYTES = 2**20
"""Of a run file."""
_TYPES = {str: "text", dict: "a table", int: "a whole number"}


@dataclass(frozen=True)
class RunFile:
    """A run file that has been checked.

    Attributes:
        path: Of the file.
        model: Name of the model's class.
        arguments: Of the model, beside the dataset.
        weights: The file of its state_dict.
        vocabulary: The processors it was trained with; None when they are to be fitted on the samples read.
        source: Where the samples come from.
        cache: Where they are prepared; None: in the output.
        output: Where the results go; None when the file does not say.
        settings: Further arguments of `rollout.attribute_cohort`.
    """

    path: Path
    model: str
    weights: Path
    vocabulary: Vocabulary | None
    source: SampleSource
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cache: Path | None = None
    output: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def load(self, output: str | Path, *, trust_cache: bool = False) -> tuple[Any, Any]:
        """Return the model with its weights, and the samples, prepared in `output` unless the file names a cache.

        Args:
            output: Folder of the results.
            trust_cache: Whether to open samples that somebody else prepared; PyHealth unpickles them.

        Raises:
            ValueError: If the samples cannot be prepared, or weights, vocabulary and model do not fit each other.
        """
        state = read_weights(self.weights)
        self._check_tie(state)
        cache = self.cache or usable_path(output, "output") / CACHE
        if self.cache is None and cache.is_symlink():
            raise ValueError(f"{cache} must be a folder in the output, not a link; name another with [dataset] cache")
        dataset = prepare_samples(self.source, cache, self.vocabulary, trust_cache=trust_cache)
        return load_model(self.model, self.arguments, dataset, state, str(self.weights)), dataset

    def _check_tie(self, state: Mapping[str, Any]) -> None:
        tied = None if self.vocabulary is None else self.vocabulary.weights
        if tied is not None and tied != weights_digest(state):
            raise ValueError(
                f"{self.path}: [model] vocabulary was written with other weights than {self.weights}, so its ids may "
                "be those of another model: write both with save_model (or, if the weights were trained with this "
                "vocabulary, delete weights_sha256 from it)"
            )


def read_run_file(path: str | Path) -> RunFile | EventsRun:
    """Read and check a run file, `.json` or TOML; no table is read and no weight loaded.

    Raises:
        ValueError: naming, in one line, the first thing that is wrong, and what it should be.
    """
    try:
        return _read(usable_path(path, "a run file"))
    except ValueError as error:  # a path of the file's may have line ends
        raise ValueError(one_line(error)) from error


def _read(path: Path) -> RunFile | EventsRun:
    tables = _checked_tables(path, _parsed(path))
    model, dataset, task, run = (tables[name] for name in _KEYS)
    folder = path.parent

    def below(table: str, key: str) -> Path:
        return _below(folder, tables[table][key], f"{path}: [{table}] {key}")

    settings = {key: value for key, value in run.items() if key != "output"}
    if dataset["class"] == MEDS:
        check_settings(settings, lambda key: f"{path}: [run] {key}")
        return events.read_events(path, tables, settings, below)
    if model["class"] == AUTO:
        raise ValueError(f'{path}: [dataset] class must be "{MEDS}" for such a model, got {dataset["class"]!r}')
    for name in ("weights", "vocabulary"):
        if not (name == "vocabulary" and model[name] == REFIT) and not below("model", name).is_file():
            raise ValueError(f"{path}: [model] {name} must be a file, got {below('model', name)}: no such file")
    check_settings(settings, lambda key: f"{path}: [run] {key}")
    vocabulary = None if model["vocabulary"] == REFIT else read_vocabulary(below("model", "vocabulary"))
    source = SampleSource(
        dataset=dataset["class"],
        root=below("dataset", "root"),
        task=task["class"],
        dataset_arguments={
            key: _located(key, value, folder, str(path)) for key, value in dataset.get("arguments", {}).items()
        },
        task_arguments=task.get("arguments", {}),
        workers=dataset.get("workers", 1),
    )
    arguments = dict(model.get("arguments", {}))
    if takes_folder(model["class"]) and isinstance(arguments.get(FOLDER), str):
        found = _below(folder, arguments[FOLDER], f"{path}: [model] arguments.{FOLDER}")
        arguments[FOLDER] = str(found.absolute())
    try:
        check_model(model["class"], arguments)
        source.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return RunFile(
        path=path,
        model=model["class"],
        weights=below("model", "weights"),
        vocabulary=vocabulary,
        source=source,
        arguments=arguments,
        cache=below("dataset", "cache") if "cache" in dataset else None,
        output=below("run", "output") if "output" in run else None,
        settings=settings,
    )


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"a run file must be a TOML or JSON file, got {path}: that is a folder or a device")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"a run file must be a TOML or JSON file, got {path}: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"a run file must be of at most {MOST_BYTES:,} bytes; {path} is larger")
    try:
        text = content.decode("utf-8-sig")
        tables = parse_json(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"a run file must be TOML, or JSON if its name ends so; {path} is not: {reason}") from error
    if not isinstance(tables, dict):
        raise ValueError(f"{path} must be an object with {', '.join(_KEYS)}, got {type(tables).__name__}")
    return tables


def _checked_tables(path: Path, tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The four tables, their keys known, those required there, their values of the right type."""
    for name in tables:
        if name not in _KEYS:
            raise ValueError(
                f"{path} must hold {', '.join(f'[{key}]' for key in _KEYS)} only, got {name!r}"
                f"{did_you_mean(name, _KEYS)}"
            )
    dataset = tables.get("dataset")
    meds = isinstance(dataset, dict) and dataset.get("class") == MEDS
    required = events.REQUIRED if meds else _REQUIRED
    for name, keys in ({**_KEYS, **events.KEYS} if meds else _KEYS).items():
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} must be a table of keys and values, got {table!r}")
        for key, value in table.items():
            if key not in keys:
                raise ValueError(
                    f"{path}: [{name}] has no key {key!r}{did_you_mean(key, keys)} Its keys are {', '.join(keys)}"
                )
            if keys[key] is not object and (type(value) is not keys[key] or value == ""):
                raise ValueError(f"{path}: [{name}] {key} must be {_TYPES[keys[key]]}, got {value!r}")
        for key in required[name]:
            if key not in table:
                hint = _VOCABULARY_HINT if key == "vocabulary" and not meds else ""
                raise ValueError(f"{path}: [{name}] needs {key}{hint}")
    return {name: tables.get(name, {}) for name in _KEYS}


def _below(folder: Path, text: str, name: str) -> Path:
    return usable_path(text if text.startswith("~") else folder / text, name)


def _located(key: str, value: Any, folder: Path, path: str) -> Any:
    """An argument that names a path (…root, …path), seen from the run file; a configuration may be PyHealth's own."""
    if not isinstance(value, str) or not key.endswith(("root", "path")):
        return value
    found = _below(folder, value, f"{path}: [dataset] arguments.{key}")
    if key == "config_path" and not found.exists():
        own = pyhealth_config(value)
        if own is None:
            raise ValueError(
                f"{path}: [dataset] arguments.{key} must be a file, or the name of one that PyHealth brings, such as "
                f"meds_with_hadm.yaml, got {found}: no such file"
            )
        found = own
    return str(found.absolute())


def save_model(
    model: Any,
    dataset: Any,
    folder: str | Path,
    *,
    arguments: Mapping[str, Any] | None = None,
    source: SampleSource | None = None,
    run: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
) -> Path:
    """Write a model trained in Python so that `rollout attribute <folder>/run.toml` attributes with it.

    Writes `weights.pt` (the state_dict), `vocabulary.json` (the fitted processors of `dataset`, with a digest of these
    weights) and, given a `source`, `run.toml`; each whole or not at all, `run.toml` last, in place of files of these
    names.

    Args:
        model: A model of `pyhealth.models`; of any class without `source`.
        dataset: The PyHealth `SampleDataset` it was built with.
        folder: Made if missing.
        arguments: The model was built with, beside `dataset`.
        source: Where the samples to attribute come from; another cohort than that of the training may be read.
        run: Of `[run]`: `output` (default `attributed`) and settings of `attribute_cohort`.
        cache: Where the samples are prepared; default: in the output.

    Returns:
        The run file, or the folder when there is none.

    Raises:
        ValueError: If a processor cannot be saved, a setting or argument is wrong, or a model built from
            `arguments` has other weights.
    """
    folder = Path(folder).expanduser()
    vocabulary_of(dataset)  # first: it refuses what cannot be saved
    name, arguments, run = type(model).__name__, dict(arguments or {}), dict(run or {})
    if source is not None:
        source.check()
        check_model(name, arguments)
        check_settings({key: run[key] for key in run if key != "output"}, lambda key: f"save_model: run[{key!r}]")
        differ = differences(build_model(name, arguments, dataset).state_dict(), model.state_dict())
        if differ:
            raise ValueError(f"save_model: arguments must be those {name} was built with: {'; '.join(differ[:3])}")
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(dataset, folder / VOCABULARY, write_weights(model, folder / WEIGHTS))
    if source is None:
        return folder
    if takes_folder(name):
        arguments[FOLDER] = _from(folder, Path(arguments[FOLDER]))
    tables: dict[str, dict[str, Any]] = {
        "model": {"class": name, "weights": WEIGHTS, "vocabulary": VOCABULARY, "arguments": arguments},
        "dataset": {
            "class": source.dataset,
            "root": _from(folder, source.root),
            "arguments": dict(source.dataset_arguments),
            **({} if cache is None else {"cache": _from(folder, Path(cache))}),
            "workers": source.workers,
        },
        "task": {"class": source.task, "arguments": dict(source.task_arguments)},
        "run": {"output": "attributed", **run},
    }
    return write_toml(tables, folder / RUN, "A run file: rollout attribute run.toml\nPaths are relative to this file.")


def _from(folder: Path, path: Path) -> str:
    """A path as the run file gives it: relative if it is in its folder, so that both can move, else absolute."""
    path, folder = Path(os.path.abspath(path.expanduser())), Path(os.path.abspath(folder))
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
