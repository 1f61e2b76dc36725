"""Run files of a Hugging Face classifier over a MEDS folder: class, weights and task named, no code needed.

[model]
class = "transformers:AutoModelForSequenceClassification"
weights = "model"                      # a folder with config.json and model.safetensors
vocabulary = "vocabulary.json"         # code → id, or a WordLevel tokenizer.json; "refit": fitted on the folder
arguments = { first = "[CLS]", last = "[SEP]" }  # tokens that begin and end a record; "" where none does

[dataset]
class = "MEDS"
root = "meds"
arguments = { max_events = 510, split = "held_out" }

[task]
labels = "meds/labels/mortality.parquet"  # a file or folder of MEDS's label schema
value = "boolean_value"                # optional: which of its columns, where there are several

[run]
output = "attributed"
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rollout._capture.read_rows import positions_read
from rollout.cohort.explain import chain_of
from rollout.cohort.settings import OWN_PATH_OFF, WORDS
from rollout.data.classes import did_you_mean
from rollout.data.meds.dataset import MedsDataset
from rollout.data.meds.labels import read_labels
from rollout.data.meds.vocabulary import fit_vocabulary, padding_of, read_code_ids, special_token
from rollout.files import first_line
from rollout.runfile.hugging_face import (
    AUTO,
    check_folder,
    check_outputs,
    check_vocabulary,
    explain_events,
    inputs_of,
    load_classifier,
    longest_input,
    predict_events,
)

MEDS = "MEDS"
"""The `[dataset] class` of such a run file."""
REFIT = "refit"
KEYS: dict[str, dict[str, type]] = {
    "model": {"class": str, "weights": str, "vocabulary": str, "arguments": dict},
    "dataset": {"class": str, "root": str, "arguments": dict},
    "task": {"labels": str, "value": str},
}
REQUIRED = {"model": ("class", "weights", "vocabulary"), "dataset": ("class", "root"), "task": ("labels",), "run": ()}
_OPTIONS: dict[str, dict[str, type]] = {
    "model": {"first": str, "last": str},
    "dataset": {"max_events": int, "split": str},
}
_TYPES = {str: "text", int: "a whole number"}
PROBED = (3, 7, 5, 2)
"""Lengths of the records that the classifier's head is asked about."""


@dataclass(frozen=True)
class EventsRun:
    """A run file of a Hugging Face classifier over MEDS that has been checked.

    Attributes:
        path: Of the file.
        weights: The model's folder.
        vocabulary: Its file of codes; None: fitted on the folder.
        root: The MEDS folder.
        labels: Of the task.
        value: Column of the labels; None: the only one.
        tokens: `first` and `last`, as they are given.
        options: Of `MedsDataset`: `max_events`, `split`.
        output: Where the results go; None when the file does not say.
        settings: Further arguments of `rollout.attribute_cohort`.
    """

    path: Path
    weights: Path
    vocabulary: Path | None
    root: Path
    labels: Path
    value: str | None = None
    tokens: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def samples(self) -> MedsDataset:
        """The records of the task.

        Raises:
            ValueError: If folder, labels or vocabulary are not what they must be.
        """
        config = check_folder(self.weights, "[model] weights")
        named = config.get("label2id") if read_labels(self.labels, self.value).kind == "categorical_value" else None
        vocabulary = fit_vocabulary(self.root) if self.vocabulary is None else read_code_ids(self.vocabulary)
        return MedsDataset(self.root, self.labels, vocabulary, value=self.value, classes=named, **self.options)

    def load(self, output: str | Path = "", *, trust_cache: bool = False) -> tuple[nn.Module, MedsDataset]:
        """Return the classifier and the records; nothing is prepared in `output`.

        Raises:
            ValueError: If they cannot be read, or do not fit each other.
        """
        dataset = self.samples()
        model = load_classifier(self.weights, "[model] weights")
        check_vocabulary(model, dataset.vocabulary, padding_of(dataset.vocabulary), "[model] vocabulary")
        return model, dataset

    def reading(self, model: nn.Module, dataset: MedsDataset) -> dict[str, Any]:
        """How the classifier reads a record: the arguments of `predict_events`, and `read`.

        Raises:
            ValueError: If the tokens that begin and end a record are not known, the labels are not of the model's
                classes, or the model cannot be captured, or reads rows that are not those of a rollout.
        """
        words = dataset.vocabulary
        first, last = (self._token(words, kind) for kind in ("first", "last"))
        padding, limit = padding_of(words), longest_input(model)
        largest = None
        if dataset.kind in ("integer_value", "categorical_value"):
            values = dataset.labels["value"]
            numbers = list(values) if dataset.classes is None else [dataset.classes[one] for one in values.unique()]
            largest = max(numbers)
            if min(numbers) < 0:
                raise ValueError(f"[task] labels must be classes from 0 on, got {min(numbers)}")
        single = check_outputs(model.config, dataset.kind, largest, "[model] weights")
        inputs = inputs_of(
            _probe(words, padding, limit, (first is not None) + (last is not None)), padding, first, last
        )
        try:
            read = positions_read(model, inputs)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"[model] weights: {type(model).__name__} cannot be explained: {first_line(error)}"
            ) from error
        return {"padding": padding, "first": first, "last": last, "single": single, "limit": limit, "read": read}

    def _token(self, words: Mapping[str, int], kind: str) -> int | None:
        given, found = self.tokens.get(kind), special_token(words, kind)
        what = "begins" if kind == "first" else "ends"
        if given is None and found is not None:
            raise ValueError(
                f"{self.path}: the vocabulary has {found!r}: say with [model] arguments.{kind} whether it {what} every "
                f'record: {kind} = "{found}", or {kind} = "" where none does'
            )
        if given and given not in words:
            raise ValueError(
                f"{self.path}: [model] arguments.{kind} {given!r} is not in the vocabulary{did_you_mean(given, words)}"
            )
        return words[given] if given else None

    def arguments(self, model: nn.Module, dataset: MedsDataset, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What `attribute_cohort` needs beside model, dataset and settings.

        Raises:
            ValueError: As `reading`; for a method that needs more than the attention.
        """
        method, backend = settings.get("method", "rollout"), settings.get("backend", "auto")
        explain = _explain(method, backend, self.reading(model, dataset))
        return {**dataset.arguments, "explain": explain, "code_names": dataset.code_names}

    def evaluation(
        self, model: nn.Module, dataset: MedsDataset, settings: Mapping[str, Any], methods: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What `evaluate_cohort` needs: every named method as a function, `explain` being that of `[run]`.

        Raises:
            ValueError: As `arguments`.
        """
        reading = self.reading(model, dataset)
        backend = settings.get("backend", "auto")
        found = {}
        for name, given in methods.items():
            chosen = settings.get("method", "rollout") if given == "explain" else given
            known = isinstance(chosen, str) and chosen.removesuffix(OWN_PATH_OFF) in WORDS["method"]
            found[name] = partial(relevance_of, _explain(chosen, backend, reading)) if known else given
        asked = {key: value for key, value in reading.items() if key != "read"}
        return {**dataset.arguments, "methods": found, "predict": partial(predict_events, **asked)}


def relevance_of(explain: Callable[..., Any], model: Any, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The scores alone of a function that `attribute_cohort` takes as `explain`."""
    found: Mapping[str, Tensor] = explain(model, batch).relevance
    return found


def _explain(method: str, backend: str, reading: Mapping[str, Any]) -> Callable[..., Any]:
    chain = chain_of(method)
    if chain is None or chain.gradients is not None or chain.values is not None:
        raise ValueError(
            f"[run] method must need nothing but attention for a model of transformers, got {method!r}; rollout, "
            "pyhealth, chefer_rollout and discard do"
        )
    return partial(explain_events, method=method, backend=backend, **reading)


def _probe(words: Mapping[str, int], padding: int, limit: int | None, added: int) -> Tensor:
    """Records of codes of different lengths, padded; the same each time."""
    codes = torch.tensor(sorted(number for number in words.values() if number != padding))
    lengths = [length if limit is None else max(1, min(length, limit - added)) for length in PROBED]
    ids = torch.full((len(lengths), max(lengths)), padding)
    for row, length in enumerate(lengths):
        ids[row, :length] = codes[torch.arange(row, row + length) * 7919 % len(codes)]
    return ids


def read_events(
    path: Path, tables: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], below: Callable[[str, str], Path]
) -> EventsRun:
    """Check the tables of such a run file; no event is read and no weight loaded.

    Args:
        path: Of the file.
        tables: Their keys and types are right.
        settings: Of `[run]`, checked.
        below: (table, key) → the path that stands there, seen from the file.

    Raises:
        ValueError: naming the first thing that is wrong.
    """
    model, dataset, task = (tables[name] for name in KEYS)
    if model["class"] != AUTO:
        raise ValueError(
            f'{path}: [model] class must be "{AUTO}" for [dataset] class "{MEDS}" (a model of PyHealth takes '
            f'PyHealth\'s "MEDSDataset"), got {model["class"]!r}'
        )
    for name, options in _OPTIONS.items():
        arguments: Mapping[str, Any] = tables[name].get("arguments", {})
        for key, value in arguments.items():
            if key not in options:
                raise ValueError(
                    f"{path}: [{name}] arguments has no {key!r}{did_you_mean(key, options)} It takes "
                    f"{', '.join(options)}"
                )
            if type(value) is not options[key] or (type(value) is int and value < 1):
                raise ValueError(f"{path}: [{name}] arguments.{key} must be {_TYPES[options[key]]}, got {value!r}")
    if settings.get("readout", "model") != "model" or "target_class" in settings or "query" in settings:
        raise ValueError(
            f"{path}: [run] readout, target_class and query are of PyHealth's models, not of transformers'"
        )
    refit = model["vocabulary"] == REFIT
    if not refit and not below("model", "vocabulary").is_file():
        raise ValueError(f"{path}: [model] vocabulary must be a file, got {below('model', 'vocabulary')}: no such file")
    check_folder(below("model", "weights"), f"{path}: [model] weights")
    if not below("dataset", "root").is_dir():
        raise ValueError(
            f"{path}: [dataset] root must be a MEDS folder, got {below('dataset', 'root')}: no such folder"
        )
    return EventsRun(
        path=path,
        weights=below("model", "weights"),
        vocabulary=None if refit else below("model", "vocabulary"),
        root=below("dataset", "root"),
        labels=below("task", "labels"),
        value=task.get("value"),
        tokens=model.get("arguments", {}),
        options=dataset.get("arguments", {}),
        output=below("run", "output") if "output" in tables["run"] else None,
        settings=settings,
    )
