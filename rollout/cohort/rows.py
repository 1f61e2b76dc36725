"""Attributions and predictions as Arrow tables, one row per real entry of a record, and as Parquet files."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rollout.cohort.shares import Measured, measure
from rollout.files import write_whole
from rollout.results.layout import ATTRIBUTION_SCHEMA, PREDICTION_SCHEMA

ROW_GROUP = 65536
_PADDING = re.compile(r"[<\[]\|?pad(ding)?\|?[>\]]", re.IGNORECASE)
VISIT_KEYS = ("visit_id", "admission_id", "record_id", "hadm_id")
"""Where PyHealth's tasks put the visit a sample is of, the first that is there."""


NO_PADDING_IDS: Mapping[str, int | None] = MappingProxyType({})


@dataclass(frozen=True)
class Decoder:
    """How one feature of a PyHealth dataset is read back.

    Attributes:
        value: Place of the value in a (time, value, …) tuple; None when the feature is one tensor.
        time: Place of the time; None when the feature has none.
        codes: Vocabulary by id, [V], or None for a numeric feature.
        multi_hot: Whether the last dimension runs over the vocabulary, rather than holding ids.
        nested: Whether a record is a list of visits, each with codes.
        whole: Whether a numeric record is one step to a model, however many numbers it holds.
        padding: The id that stands for no code; None when every id is a code.
        entries: What makes ids [S] of a record that holds none, such as the tokens of a text; None: it holds them.
    """

    value: int | None
    time: int | None
    codes: pa.Array | None
    multi_hot: bool
    nested: bool
    whole: bool = False
    padding: int | None = 0
    entries: Callable[[Any], Tensor] | None = None

    @property
    def has_ids(self) -> bool:
        """Whether the records are ids of codes, of which one may be padding."""
        return self.codes is not None and not self.multi_hot and self.entries is None

    def values(self, record: Any) -> Tensor:
        """The ids or numbers of a record."""
        return _part(record, self.value) if self.entries is None else self.entries(record)

    @property
    def granularity(self) -> str:
        """What has a score of its own: a `code`, a `visit` of codes, the `feature`, or a numeric `step`."""
        if self.codes is None:
            return "step"
        if self.nested:
            return "visit"
        return "feature" if self.multi_hot else "code"


def feature_decoders(
    dataset: Any,
    padding_ids: Mapping[str, int | None] = NO_PADDING_IDS,
    entries: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Decoder]:
    """Return a decoder for each input feature of a PyHealth `SampleDataset`, from its fitted processors.

    Args:
        dataset: The samples.
        padding_ids: Feature → the id that stands for no code; of the others it is that of the processor's `<pad>`.
        entries: Feature → what makes its entries, of those that a model makes itself.
    """
    return {
        key: entries_decoder(entries[key]) if key in entries else _decoder(key, processor, padding_ids)
        for key, processor in dataset.input_processors.items()
    }


def entries_decoder(entries: Any) -> Decoder:
    """Return the decoder of a feature whose entries a model makes itself (`rollout.pyhealth.entries`)."""
    codes = vocabulary_array(entries.vocabulary)
    return Decoder(None, None, codes, multi_hot=False, nested=False, padding=None, entries=entries)


def _decoder(feature: str, processor: Any, padding_ids: Mapping[str, int | None]) -> Decoder:
    try:
        schema = tuple(processor.schema())
    except NotImplementedError:
        raise ValueError(
            f"attribute_cohort: the entries of feature {feature!r} must be known, those of a "
            f"{type(processor).__name__} are where a TransformersModel or TransformerDeID is attributed; else give "
            "vocabularies= with the ids that stand for them, collate= and explain="
        ) from None
    paired = len(schema) > 1
    codes = getattr(processor, "code_vocab", None)
    labels = getattr(processor, "label_vocab", None)
    vocabulary = labels if codes is None else codes
    multi_hot = vocabulary is not None and not processor.is_token()
    return Decoder(
        value=schema.index("value") if paired else None,
        time=schema.index("time") if "time" in schema else None,
        codes=None if vocabulary is None else vocabulary_array(vocabulary),
        multi_hot=multi_hot,
        nested=vocabulary is not None and max(processor.dim()) > 1,
        whole=vocabulary is None and not paired and not _has_steps(processor),
        padding=None if vocabulary is None or multi_hot else padding_id(feature, vocabulary, padding_ids),
    )


def plain_decoder(
    feature: str,
    vocabulary: Mapping[str, int] | None,
    padding_ids: Mapping[str, int | None] = NO_PADDING_IDS,
    *,
    timed: bool = False,
) -> Decoder:
    """Return the decoder of a feature that is one tensor: of ids [S] by their vocabulary, or of numbers for None.

    Args:
        feature: Its name.
        vocabulary: Code → id.
        padding_ids: As in `feature_decoders`.
        timed: Whether it is a pair instead, of times [S] and that tensor.
    """
    time, value = (0, 1) if timed else (None, None)
    if vocabulary is None:
        return Decoder(value, time, codes=None, multi_hot=False, nested=False, padding=None)
    padding = padding_id(feature, vocabulary, padding_ids)
    return Decoder(value, time, vocabulary_array(vocabulary), multi_hot=False, nested=False, padding=padding)


def _has_steps(processor: Any) -> bool:
    """Whether a dimension of a numeric record is time or space; as its processor says, else yes."""
    try:
        return any(processor.spatial())
    except (AttributeError, NotImplementedError):
        return True


def padding_id(feature: str, vocabulary: Mapping[Any, int], stated: Mapping[str, int | None]) -> int | None:
    """The id that stands for no code, None when every id is a code.

    It is the one stated; else the vocabulary's own, of `<pad>` or `[PAD]`; else 0 when no code has it.

    Raises:
        TypeError: If what is stated is no int.
        ValueError: If it is not the vocabulary's own; if none is stated, and the vocabulary gives 0 to a code, or names
            several paddings.
    """
    named = {str(code): number for code, number in vocabulary.items() if _PADDING.fullmatch(str(code))}
    if feature in stated:
        given = stated[feature]
        if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
            raise TypeError(f"attribute_cohort: padding_ids[{feature!r}] must be an int or None, got {given!r}")
        if given is not None and named and given not in named.values():
            raise ValueError(
                f"attribute_cohort: padding_ids[{feature!r}] is {given}, but the vocabulary of the feature says {named}"
            )
        return given
    if len(set(named.values())) == 1:
        return next(iter(named.values()))
    first = next((str(code) for code, number in vocabulary.items() if number == 0), None)
    if not named and first is None:
        return 0
    what = f"has several paddings, {named}" if named else f"gives id 0 to {first!r} and names no padding such as <pad>"
    raise ValueError(
        f"attribute_cohort: the vocabulary of feature {feature!r} {what}; say which id is padding with "
        f"padding_ids={{{feature!r}: id}}, or {{{feature!r}: None}} when every id is a code"
    )


def vocabulary_array(vocabulary: Mapping[Any, int]) -> pa.Array:
    """Return the codes by their id, string [V]; null where no code has the id."""
    names: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for name, number in vocabulary.items():
        names[number] = str(name)
    return pa.array(names, pa.string())


def measured_rows(
    samples: Sequence[Mapping[str, Any]],
    index: Sequence[int] | np.ndarray,
    attributions: Mapping[str, Tensor],
    decoders: Mapping[str, Decoder],
) -> tuple[pa.Table, dict[str, Measured]]:
    """Turn one batch's attributions into rows: every real entry of every record, padding left out.

    A flat code feature gives a row per code, `visit` null. A nested one gives a row per code with its visit and its
    position in the visit, each carrying the visit's score. A multi-hot feature gives a row per code that is present,
    `position` its place in the vector, carrying the score of its visit, or of the whole feature when it has no
    visits. A numeric feature gives a row per time step, `code` null; a whole tensor is one step.

    Args:
        samples: The B processed samples of the batch as the dataset gives them, not yet padded.
        index: Their numbers in the dataset, [B].
        attributions: Feature → scores [B, S], [B, V, C] or, for a feature that is one step, [B, 1]; S, V and C at
            least as long as the records.
        decoders: Of the same features, from `feature_decoders`.

    Returns:
        A table of `ATTRIBUTION_SCHEMA`, by feature, then by sample and position; and of each feature what its rows sum
        to and how much lies on padding.

    Raises:
        ValueError: If a feature's scores do not cover its records.
    """
    if len(samples) != len(index):
        raise ValueError(f"measured_rows: index must have one number per sample ({len(samples)}), got {len(index)}")
    parts, measured = [], {}
    for feature, scores in attributions.items():
        entries = _entries(feature, samples, scores.detach().float().cpu().numpy(), decoders[feature])
        parts.append(_rows(feature, samples, np.asarray(index, dtype=np.int64), entries))
        measured[feature] = measure(entries.scores, entries.at, scores.dtype)
    return pa.concat_tables(parts) if parts else ATTRIBUTION_SCHEMA.empty_table(), measured


@dataclass(frozen=True)
class _Entries:
    """The real entries of one feature of a batch, as arrays [N]; `owner` is the row in the batch.

    `scores` are those of every position, padding included; `at` says where in them the entries' own are.
    """

    owner: np.ndarray
    visit: np.ndarray | None
    position: np.ndarray
    code: pa.Array
    time: pa.Array
    scores: np.ndarray
    at: tuple[np.ndarray, ...]


def _entries(feature: str, samples: Sequence[Mapping[str, Any]], scores: np.ndarray, decoder: Decoder) -> _Entries:
    values = [decoder.values(sample[feature]) for sample in samples]
    dims = values[0].dim() if values else 1
    if decoder.codes is None:
        return _step_entries(feature, samples, values, scores, decoder)
    if decoder.multi_hot and dims == 1:
        return _hot_entries(feature, torch.stack(values).numpy(), scores, decoder.codes)
    lengths = np.array([len(value) for value in values], dtype=np.int64)
    _check_cover(feature, scores, lengths)
    owner, place = _ragged(lengths)
    time = _times(feature, samples, lengths, decoder)
    flat = torch.cat(values).numpy()
    filled = flat != 0 if decoder.multi_hot else _real(flat, decoder.padding)
    if dims == 1:
        code = decoder.codes.take(pa.array(flat[filled]))
        owner, place = owner[filled], place[filled]
        return _Entries(owner, None, place, code, time.filter(pa.array(filled)), scores, (owner, place))
    if dims != 2:
        raise ValueError(f"measured_rows: feature {feature!r} must have records of 1 or 2 dimensions, got {dims}")
    step, column = np.nonzero(filled)
    code = decoder.codes.take(pa.array(column if decoder.multi_hot else flat[step, column]))
    owner, visit = owner[step], place[step]
    scores = _of_positions(scores)
    at = (owner, visit) if scores.ndim == 2 else (owner, visit, column)
    return _Entries(owner, visit, column, code, time.take(pa.array(step)), scores, at)


def _hot_entries(feature: str, flat: np.ndarray, scores: np.ndarray, codes: pa.Array) -> _Entries:
    """Entries of a multi-hot vector [B, F]: the codes present, with a score for all or for each."""
    owner, column = np.nonzero(flat)
    scores = scores.reshape(len(flat), -1)
    _check_cover(feature, scores, np.ones(len(flat), dtype=np.int64))
    if scores.shape[1] != flat.shape[1] or _are_copies(scores):
        scores = scores[:, :1]
    at = owner, column if scores.shape[1] == flat.shape[1] else np.zeros_like(column)
    return _Entries(owner, None, column, codes.take(pa.array(column)), _nulls(len(owner)), scores, at)


def _step_entries(
    feature: str, samples: Sequence[Mapping[str, Any]], values: list[Tensor], scores: np.ndarray, decoder: Decoder
) -> _Entries:
    """Entries of a numeric feature: one per time step, or one for a tensor the model takes as one step."""
    scores = scores if scores.ndim == 2 else scores.reshape(*scores.shape[:2], -1)[:, :, 0]
    whole = decoder.whole or (scores.shape[1] == 1 and decoder.time is None)
    lengths = np.array([1 if whole or value.dim() == 0 else len(value) for value in values], dtype=np.int64)
    _check_cover(feature, scores, lengths)
    owner, place = _ragged(lengths)
    code, scores = pa.nulls(len(owner), pa.string()), scores[:, :1] if whole else scores
    return _Entries(owner, None, place, code, _times(feature, samples, lengths, decoder), scores, (owner, place))


def _real(ids: np.ndarray, padding: int | None) -> np.ndarray:
    real: np.ndarray = np.ones(ids.shape, dtype=bool) if padding is None else ids != padding
    return real


def _of_positions(scores: np.ndarray) -> np.ndarray:
    """[B, V] for scores [B, V, C] that are a visit's own copied to its codes; others as they are."""
    return scores[:, :, 0] if scores.ndim == 3 and scores.shape[2] and _are_copies(scores) else scores


def _are_copies(scores: np.ndarray) -> bool:
    return bool((scores == scores[..., :1]).all())


def _part(value: Any, place: int | None) -> Tensor:
    tensor: Tensor = value if place is None or isinstance(value, Tensor) else value[place]
    return tensor


def _check_cover(feature: str, scores: np.ndarray, lengths: np.ndarray) -> None:
    longest = int(lengths.max(initial=0))
    if scores.ndim < 2 or scores.shape[0] != len(lengths) or scores.shape[1] < longest:
        raise ValueError(
            f"measured_rows: scores of feature {feature!r} must be [{len(lengths)}, S, …] with S at least "
            f"{longest}, the longest record, got {list(scores.shape)}"
        )


def _ragged(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths [2, 0, 3] give owners 0 0 2 2 2 and places 0 1 0 1 2."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _times(feature: str, samples: Sequence[Mapping[str, Any]], lengths: np.ndarray, decoder: Decoder) -> pa.Array:
    """The time of every step, null where the sample has none."""
    if decoder.time is None:
        return _nulls(int(lengths.sum()))
    pieces = []
    for sample, length in zip(samples, lengths, strict=True):
        time = sample[feature][decoder.time]
        if time is None:
            pieces.append(np.full(length, np.nan, dtype=np.float32))
        elif len(time) == length:
            pieces.append(time.numpy().astype(np.float32))
        else:
            raise ValueError(f"measured_rows: feature {feature!r} has {length} steps but {len(time)} times")
    times = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.float32)
    return pa.array(times, pa.float32(), mask=np.isnan(times))


def _nulls(count: int) -> pa.Array:
    return pa.nulls(count, pa.float32())


def _rows(feature: str, samples: Sequence[Mapping[str, Any]], index: np.ndarray, entries: _Entries) -> pa.Table:
    owner, count = pa.array(entries.owner), len(entries.owner)
    visit = pa.nulls(count, pa.int32()) if entries.visit is None else pa.array(entries.visit, pa.int32())
    columns = [
        pa.array(index[entries.owner]),
        _ids(samples, "patient_id").take(owner),
        _ids(samples, *VISIT_KEYS).take(owner),
        pa.array([feature]).take(pa.array(np.zeros(count, dtype=np.int64))),
        visit,
        pa.array(entries.position, pa.int32()),
        entries.code,
        entries.time,
        pa.array(entries.scores[entries.at], pa.float32()),
    ]
    return pa.Table.from_arrays(columns, schema=ATTRIBUTION_SCHEMA)


def _ids(samples: Sequence[Mapping[str, Any]], *keys: str) -> pa.Array:
    """The first of the keys that a sample has, as a string; null when it has none."""
    found = [sample.get(keys[0]) for sample in samples]
    for key in keys[1:] if None in found else ():
        found = [sample.get(key) if value is None else value for sample, value in zip(samples, found, strict=True)]
    return pa.array([None if value is None else str(value) for value in found], pa.string())


def prediction_table(
    samples: Sequence[Mapping[str, Any]],
    index: Sequence[int] | np.ndarray,
    probability: Tensor | np.ndarray | None,
    truth: Tensor | np.ndarray | None,
    padding_share: np.ndarray | None = None,
) -> pa.Table:
    """Return one row per sample: `y_prob` and `y_true` [B, K] and `padding_share` [B, F] as lists.

    Null where None is given; a NaN among the shares is a null in its list.
    """
    columns = [
        pa.array(np.asarray(index, dtype=np.int64)),
        _ids(samples, "patient_id"),
        _ids(samples, *VISIT_KEYS),
        _lists(probability, len(samples)),
        _lists(truth, len(samples)),
        _lists(padding_share, len(samples), nan_is_null=True),
    ]
    return pa.Table.from_arrays(columns, schema=PREDICTION_SCHEMA)


def _lists(values: Tensor | np.ndarray | None, count: int, nan_is_null: bool = False) -> pa.Array:
    if values is None:
        return pa.nulls(count, pa.list_(pa.float32()))
    array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float32)
    rows = array.reshape(len(array), -1)
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    flat = rows.ravel()
    items = pa.array(flat, pa.float32(), mask=np.isnan(flat) if nan_is_null else None)
    return pa.ListArray.from_arrays(pa.array(offsets), items)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file, in row groups small enough to skip most of a part when one patient is asked for."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def write_parquet(table: pa.Table, path: str | Path) -> Path:
    """Write a Parquet file so that it is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, parquet_bytes(table))
