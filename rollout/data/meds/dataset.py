"""A cohort straight from a MEDS folder: one record per label, of the events up to its prediction time."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rollout.data.meds.folder import MedsFolder
from rollout.data.meds.labels import check_known, read_labels
from rollout.data.meds.vocabulary import check_code_ids, fit_vocabulary, padding_of, read_code_ids, special_token

FEATURE = "codes"
"""The one feature of a record."""
TIME_UNIT = "hours before the prediction time"
LABEL = "label"
HELD_SHARDS = 2
"""Shards of events that stand in memory at a time."""
HOUR = 3_600_000_000
NO_TIME = np.iinfo(np.int64).min
_KINDS = {
    "boolean_value": "binary",
    "integer_value": "multiclass",
    "categorical_value": "multiclass",
    "float_value": "regression",
}


@dataclass(frozen=True)
class _Shard:
    """The events of a shard in memory, E of them, by subject and time.

    Attributes:
        events: As `MedsFolder.events` gives them.
        times: Microseconds, int64 [E]; `NO_TIME` where there is none.
        ids: Of their codes, int32 [E].
        visits: The last event up to each that names a visit, int64 [E]; −1: none does.
        places: Subject → where its events begin and end.
    """

    events: pl.DataFrame
    times: np.ndarray
    ids: np.ndarray
    visits: np.ndarray
    places: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, events: pl.DataFrame, vocabulary: Mapping[str, int], unknown: int) -> "_Shard":
        ids = events["code"].replace_strict(
            list(vocabulary), list(vocabulary.values()), default=unknown, return_dtype=pl.Int32
        )
        named = np.where(events["visit_id"].is_not_null().to_numpy(), np.arange(len(events)), -1)
        counts = events.group_by("subject_id", maintain_order=True).len()
        ends = counts["len"].cum_sum().to_list()
        places = zip(counts["subject_id"], zip([0, *ends[:-1]], ends, strict=True), strict=True)
        times = events["time"].to_physical().fill_null(NO_TIME).to_numpy()
        return cls(events, times, ids.to_numpy(), np.maximum.accumulate(named), dict(places))


class MedsDataset:
    """The records of a task over a MEDS folder, as `rollout.attribute_cohort` takes them.

        data = MedsDataset("meds", "meds/labels/mortality.parquet", "vocabulary.json")
        rollout.attribute_cohort(model, data, "attributed", explain=…, **data.arguments)

    Sample i is of row i of `labels`. Its record are the subject's events up to and including its prediction time: first
    those without a time, then the others by time, equal times in the order of the table. A sample is a mapping of

    - `patient_id`: the subject, as a string; `visit_id`: the visit of the record's last event that names one
      (`hadm_id`, `visit_id` or `encounter_id`), else None;
    - `codes`: hours before the prediction time, float32 [S] (NaN for an event without a time), and ids of codes,
      int64 [S]; a code that the vocabulary lacks has the id of its `<unk>` or `[UNK]`;
    - `label`: float32 [1] for a boolean or a measured value, int64 [] for a class; there is none where the labels
      have no value.

    A record is read when it is asked for, with the shard it stands in. Two shards are held at most, of the subjects
    that have labels. `dataset[i]` raises a ValueError where the subject has no event with a time up to the prediction
    time, and where there is a code that neither the vocabulary nor its `<unk>` stands for.

    Args:
        root: The MEDS folder.
        labels: A Parquet file of MEDS's label schema, or a folder of them.
        vocabulary: Code → id, or a file as `read_code_ids` reads it; None: fitted on the folder.
        max_events: Of a longer record only so many events, the last ones, are kept. None: all of them.
        split: Only subjects of this split, by `metadata/subject_splits.parquet`.
        value: The column of the labels to take, when there are several.
        classes: For `categorical_value`: label → its number; None: by their names, from 0.

    Attributes:
        folder: The MEDS folder.
        labels: `subject_id`, `prediction_time`, `value`, `shard`: a row per sample, by shard, subject and time.
        vocabulary: Code → id.
        kind: The column that labels come from; None without labels.

    Raises:
        ValueError: If folder, labels or vocabulary are not what they must be, or labels are of unknown subjects.
    """

    dataset_name = "MEDS"

    def __init__(
        self,
        root: str | Path,
        labels: str | Path,
        vocabulary: Mapping[str, int] | str | Path | None = None,
        *,
        max_events: int | None = None,
        split: str | None = None,
        value: str | None = None,
        classes: Mapping[str, int] | None = None,
    ) -> None:
        if max_events is not None and (type(max_events) is not int or max_events < 1):
            raise ValueError(f"max_events must be a whole number from 1, got {max_events!r}")
        self.folder, self.max_events = MedsFolder(root), max_events
        task = read_labels(labels, value)
        self.task_name, self.kind, rows = task.name, task.kind, task.rows
        subjects = self.folder.subjects()
        if split is not None:
            rows = rows.join(self.folder.split(split).to_frame(), on="subject_id", how="semi")
            if rows.is_empty():
                raise ValueError(f"labels must have a row of a subject of split {split!r}, got none in {labels}")
        check_known(rows, subjects, self.folder.root)
        self.labels = rows.join(subjects, on="subject_id").sort("shard", "subject_id", "prediction_time")
        self.vocabulary = _vocabulary(root, vocabulary)
        self._unknown = self.vocabulary.get(special_token(self.vocabulary, "unk") or "", -1)
        self.classes = _numbered(self.labels["value"], classes) if self.kind == "categorical_value" else None
        self._held: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Any]:
        subject, value = self.labels["subject_id"][number], self.labels["value"][number]
        shard, start, stop = self._place(number)
        ids, then = shard.ids[start:stop], shard.times[start:stop]
        if self._unknown < 0 and (ids < 0).any():
            code = shard.events["code"][start + int((ids < 0).argmax())]
            raise ValueError(
                f"subject {subject} has the code {code!r}, which the vocabulary lacks, and it has no <unk>"
            )
        now = self.labels["prediction_time"].to_physical()[number]
        hours = np.where(then == NO_TIME, np.nan, (now - np.where(then == NO_TIME, now, then)) / HOUR)
        named = shard.visits[stop - 1]
        sample = {
            "patient_id": str(subject),
            "visit_id": shard.events["visit_id"][int(named)] if named >= start else None,
            FEATURE: (torch.from_numpy(hours.astype(np.float32)), torch.from_numpy(ids.astype(np.int64))),
        }
        return sample if self.kind is None else {**sample, LABEL: self._label(value)}

    def events(self, number: int) -> pl.DataFrame:
        """The events of a sample's record: `subject_id`, `time`, `code`, `numeric_value`, `visit_id`.

        Raises:
            ValueError: If there is none with a time up to the prediction time; if the shard cannot be read.
        """
        shard, start, stop = self._place(number)
        return shard.events[start:stop]

    def _place(self, number: int) -> tuple["_Shard", int, int]:
        """The shard of a sample, and from where to where its record goes: events are sorted, those without a time
        first.
        """
        shard = self._shard(self.labels["shard"][number])
        begin, end = shard.places[self.labels["subject_id"][number]]
        times = shard.times[begin:end]
        stop = begin + int(np.searchsorted(times, self.labels["prediction_time"].to_physical()[number], side="right"))
        if stop == begin or shard.times[stop - 1] == NO_TIME:
            subject, time = self.labels.select("subject_id", pl.col("prediction_time").cast(pl.String)).row(number)
            first = shard.events[begin:end].select(pl.col("time").min().cast(pl.String)).item()  # of any year
            raise ValueError(
                f"subject {subject} has no event with a time up to its prediction_time {time}; "
                + ("none of its events has one" if first is None else f"the first is at {first}")
            )
        return shard, begin if self.max_events is None else max(begin, stop - self.max_events), stop

    def _shard(self, number: int) -> "_Shard":
        with self._lock:
            if number not in self._held:
                while len(self._held) >= HELD_SHARDS:
                    self._held.popitem(last=False)
                wanted = self.labels.filter(pl.col("shard") == number)["subject_id"].unique()
                self._held[number] = _Shard.of(self.folder.events(number, wanted), self.vocabulary, self._unknown)
            self._held.move_to_end(number)
            return self._held[number]

    def _label(self, value: Any) -> Tensor:
        if self.classes is not None:
            return torch.tensor(self.classes[value])
        return torch.tensor(value) if self.kind == "integer_value" else torch.tensor([float(value)])

    @property
    def patient_to_index(self) -> dict[str, list[int]]:
        """Patient → the numbers of the samples, as PyHealth's datasets have it."""
        grouped = self.labels.with_row_index("sample").group_by("subject_id", maintain_order=True).agg("sample")
        return {str(subject): numbers for subject, numbers in grouped.rows()}

    def subset(self, numbers: Sequence[int]) -> "MedsDataset":
        """The same dataset with these samples only, in the order of their numbers."""
        chosen = copy.copy(self)
        chosen.labels = self.labels[sorted(numbers)]
        return chosen

    @property
    def vocabularies(self) -> dict[str, dict[str, int]]:
        """Feature → code → id."""
        return {FEATURE: self.vocabulary}

    @property
    def time_units(self) -> dict[str, str]:
        """Feature → what its times are counted in."""
        return {FEATURE: TIME_UNIT}

    @property
    def output_schema(self) -> dict[str, str]:
        """Label → its kind, as PyHealth's datasets say it."""
        return {} if self.kind is None else {LABEL: _KINDS[self.kind]}

    @property
    def collate(self) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Samples → batch: `codes` as (hours [B, S], ids [B, S]) and `label`, [B, 1] or [B]."""
        return partial(collate_events, padding=padding_of(self.vocabulary))

    @property
    def arguments(self) -> dict[str, Any]:
        """What `attribute_cohort` and `evaluate_cohort` need beside the dataset."""
        return {
            "vocabularies": self.vocabularies,
            "collate": self.collate,
            "padding_ids": {FEATURE: padding_of(self.vocabulary)},
        }

    @cached_property
    def code_names(self) -> dict[str, dict[str, str]]:
        """Feature → code → description, of the codes in the vocabulary that have one."""
        return {FEATURE: self.folder.described(self.vocabulary)}


def collate_events(samples: Sequence[Mapping[str, Any]], padding: int = 0) -> dict[str, Any]:
    """Pad records on the right and stack them: hours with NaN, ids with the padding."""
    hours, ids = zip(*(sample[FEATURE] for sample in samples), strict=True)
    batch: dict[str, Any] = {
        FEATURE: (
            pad_sequence(list(hours), batch_first=True, padding_value=float("nan")),
            pad_sequence(list(ids), batch_first=True, padding_value=padding),
        )
    }
    if LABEL in samples[0]:
        batch[LABEL] = torch.stack([sample[LABEL] for sample in samples])
    return batch


def _vocabulary(root: str | Path, given: Mapping[str, int] | str | Path | None) -> dict[str, int]:
    if given is None:
        return fit_vocabulary(root)
    return read_code_ids(given) if isinstance(given, str | Path) else check_code_ids(given, "vocabulary")


def _numbered(values: pl.Series, classes: Mapping[str, int] | None) -> dict[str, int]:
    found = sorted(values.unique())
    if classes is None:
        return {label: number for number, label in enumerate(found)}
    if not isinstance(classes, Mapping) or not all(type(number) is int and number >= 0 for number in classes.values()):
        raise ValueError(f"classes must be label → a whole number from 0 on, got {classes!r}")
    unknown = [label for label in found if label not in classes]
    if unknown:
        raise ValueError(f"labels must be among {', '.join(map(repr, classes))}, got {unknown[0]!r}")
    return dict(classes)
