"""The fitted processors of a PyHealth dataset as plain JSON, and back.

PyHealth fits its processors on the cohort it reads, so another cohort gives other code ids, and a model trained on the
first would read wrong codes without a word. `vocabulary.json` keeps the ids a model was trained with: per feature and
label the processor's class and its fitted state. Nothing is pickled. Beside weights it is tied to them by two digests,
of its own content and of the weights: one that was permuted, or belongs to another model of the same sizes, is refused.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from rollout.files import parse_json, write_json

SCHEMA_VERSION = 1
PADDING = ["<pad>", "<unk>"]
MOST_CELLS = 2**20
"""Codes, or numbers, that a step of a nested feature is padded to."""
LEAST_SECONDS, MOST_SECONDS = 1e-3, 1e9
"""Between two samples of a time series: what is measured is laid out in these steps."""
OWN, WEIGHTS = "sha256", "weights_sha256"
"""Keys of the digests of a vocabulary's own content, and of the weights it was written with."""


@dataclass(frozen=True)
class _Kind:
    """How one attribute of a processor is written and read back; `encode` and `decode` raise `ValueError`."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


@dataclass(frozen=True)
class SavedProcessor:
    """A processor as a vocabulary holds it: its class in `pyhealth.processors`, and its attributes."""

    name: str
    state: Mapping[str, Any]

    def build(self) -> Any:
        """A processor of PyHealth in that state."""
        from pyhealth import processors

        processor = getattr(processors, self.name)()
        vars(processor).update(self.state)
        return processor


@dataclass(frozen=True)
class Vocabulary:
    """The processors of the features and of the labels, by key, in the order of the dataset.

    Attributes:
        inputs: Of the features.
        outputs: Of the labels.
        weights: Digest of the weights it was written with; None when it was written without any.
    """

    inputs: Mapping[str, SavedProcessor]
    outputs: Mapping[str, SavedProcessor]
    weights: str | None = field(default=None, compare=False)

    def build(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return `input_processors` and `output_processors` for PyHealth's `set_task`."""
        return _built(self.inputs), _built(self.outputs)

    def described(self) -> dict[str, Any]:
        """Return the content of `vocabulary.json`, its digests aside."""
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        return {
            "schema_version": SCHEMA_VERSION,
            **{side: {key: _described(key, saved) for key, saved in part.items()} for side, part in sides.items()},
        }


def _built(part: Mapping[str, SavedProcessor]) -> dict[str, Any]:
    return {key: saved.build() for key, saved in part.items()}


def _described(key: str, saved: SavedProcessor) -> dict[str, Any]:
    kinds = _STATES[saved.name]
    state = {name: _encoded(key, name, kinds[name], value) for name, value in saved.state.items()}
    return {"processor": saved.name, "state": state}


def _encoded(key: str, attribute: str, kind: _Kind, value: Any) -> Any:
    try:
        return kind.encode(value)
    except ValueError as error:
        raise ValueError(f"vocabulary: {attribute} of feature {key!r} cannot be saved: {error}; {WAY_OUT}") from error


def vocabulary_of(dataset: Any) -> Vocabulary:
    """Return the fitted processors of a PyHealth `SampleDataset`.

    Raises:
        ValueError: If a processor's state is not made of vocabularies, sizes and scalars, naming it.
    """
    return Vocabulary(
        {key: _saved(key, processor) for key, processor in dataset.input_processors.items()},
        {key: _saved(key, processor) for key, processor in dataset.output_processors.items()},
    )


def _saved(key: str, processor: Any) -> SavedProcessor:
    kind = type(processor)
    name = kind.__name__
    if name not in _STATES or not kind.__module__.startswith("pyhealth.processors."):
        raise ValueError(
            f"vocabulary: feature {key!r} has a {kind.__module__}.{name}, whose state cannot be saved as plain JSON; "
            f"those that can are {', '.join(_STATES)}; {WAY_OUT}"
        )
    state = vars(processor)
    if set(state) != set(_STATES[name]):
        raise ValueError(
            f"vocabulary: the {name} of feature {key!r} must have the attributes {', '.join(_STATES[name])}, got "
            f"{', '.join(state) or 'none'}; {WAY_OUT}"
        )
    saved = SavedProcessor(name, {attribute: state[attribute] for attribute in _STATES[name]})
    _described(key, saved)
    return saved


def write_vocabulary(dataset: Any, path: str | Path, weights: str | None = None) -> Path:
    """Write `vocabulary.json` of a PyHealth `SampleDataset`, whole or not at all.

    Args:
        dataset: Whose processors to write.
        path: Of the file.
        weights: Digest of the weights it belongs to, which reading it beside others then refuses.

    Raises:
        ValueError: As `vocabulary_of`.
    """
    content = vocabulary_of(dataset).described()
    tied = {} if weights is None else {WEIGHTS: weights}
    return write_json({**content, OWN: _digest(content), **tied}, path)


def _digest(content: Mapping[str, Any]) -> str:
    """Of what a vocabulary says, its digests aside, whatever the order of its keys."""
    said = {key: value for key, value in content.items() if key not in (OWN, WEIGHTS)}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read what `write_vocabulary` wrote; PyHealth is not imported. One from elsewhere, without digests, is read too.

    Raises:
        ValueError: If it cannot be read, is damaged, was changed since it was written, or is of another version.
    """
    path = Path(path)
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"vocabulary {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        got = content.get("schema_version") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"vocabulary {path} must have schema_version {SCHEMA_VERSION}, got {got!r}")
    sides = [_read_side(path, side, content.get(side)) for side in ("inputs", "outputs")]
    if OWN in content and content[OWN] != _digest(content):
        raise ValueError(
            f"vocabulary {path} was changed since it was written: its content is not that of its {OWN}, so codes may "
            f"have other ids than the model was trained with; put the file back (or, if it is right, delete its {OWN})"
        )
    return Vocabulary(sides[0], sides[1], content.get(WEIGHTS))


def _read_side(path: Path, side: str, part: Any) -> dict[str, SavedProcessor]:
    if not isinstance(part, dict) or not part:
        raise ValueError(f"vocabulary {path}: {side} must be an object of processors by feature, got {part!r}")
    return {key: _read_processor(f"vocabulary {path}: {side}.{key}", entry) for key, entry in part.items()}


def _read_processor(where: str, entry: Any) -> SavedProcessor:
    if not isinstance(entry, dict) or set(entry) != {"processor", "state"} or not isinstance(entry["state"], dict):
        raise ValueError(f"{where} must be an object with processor and state")
    name, state = entry["processor"], entry["state"]
    if not isinstance(name, str) or name not in _STATES:
        raise ValueError(f"{where} has the processor {name!r}; it must be one of {', '.join(_STATES)}")
    kinds = _STATES[name]
    if set(state) != set(kinds):
        raise ValueError(f"{where}.state must have {', '.join(kinds)}; got {', '.join(state) or 'nothing'}")
    decoded = {}
    for attribute, kind in kinds.items():
        try:
            decoded[attribute] = kind.decode(state[attribute])
        except ValueError as error:
            raise ValueError(f"{where}.state.{attribute}: {error}") from error
    cells = math.prod(value for attribute, value in decoded.items() if attribute.startswith("_max") and value)
    if cells > MOST_CELLS:
        raise ValueError(f"{where}.state must pad a step to at most {MOST_CELLS:,} codes, got {cells:,}")
    return SavedProcessor(name, decoded)


def _plain(code: Any) -> Any:
    """A code as JSON has it; numpy's scalars as Python's, which hash alike."""
    value = code.item() if hasattr(code, "item") and not isinstance(code, torch.Tensor) else code
    if not isinstance(value, str | int | float):
        raise ValueError(f"a code must be a string or a number, got {code!r} ({type(code).__name__})")
    return value


def _codes_of(vocabulary: Any) -> list[Any]:
    """Codes in the order of their ids, which are 0, 1, 2, …"""
    codes = sorted(vocabulary, key=vocabulary.get)
    if [vocabulary[code] for code in codes] != list(range(len(codes))):
        raise ValueError("its ids must be 0, 1, 2, … without gaps")
    return _of_one_type([_plain(code) for code in codes])


def _of_one_type(codes: list[Any]) -> list[Any]:
    """PyHealth sorts the codes of a processor it is given, so strings and numbers do not go together."""
    text = sum(isinstance(code, str) for code in codes)
    if text not in (0, len(codes)):
        raise ValueError("its codes must be all strings or all numbers (with <pad> and <unk>: strings)")
    return codes


def _vocabulary_from(codes: Any) -> dict[Any, int]:
    if not isinstance(codes, list):
        raise ValueError(f"must be a list of codes, got {type(codes).__name__}")
    vocabulary = {code: number for number, code in enumerate(_of_one_type([_plain(code) for code in codes]))}
    if len(vocabulary) != len(codes):
        raise ValueError("a code is there twice")
    return vocabulary


def _padded(decode: Callable[[Any], dict[Any, int]]) -> Callable[[Any], dict[Any, int]]:
    def checked(codes: Any) -> dict[Any, int]:
        vocabulary = decode(codes)
        if codes[:2] != PADDING:
            raise ValueError(f"must begin with {PADDING}, got {codes[:2]}")
        return vocabulary

    return checked


def _exactly(*kinds: type | None) -> Callable[[Any], Any]:
    """A value of one of these types, itself: True is no int."""

    def checked(value: Any) -> Any:
        if not any(value is None if kind is None else type(value) is kind for kind in kinds):
            wanted = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
            raise ValueError(f"must be {wanted}, got {value!r}")
        return value

    return checked


def _same(*kinds: type | None) -> _Kind:
    return _Kind(_exactly(*kinds), _exactly(*kinds))


def _count(*kinds: type | None) -> _Kind:
    """A whole number from 0 on, or None if that is among the kinds."""

    def checked(value: Any) -> Any:
        if _exactly(*kinds)(value) is not None and not 0 <= value < 2**31:
            raise ValueError(f"must be from 0 to {2**31 - 1}, got {value}")
        return value

    return _Kind(checked, checked)


def _no_mapping(value: Any) -> None:
    if value is not None:
        raise ValueError("a code_mapping is loaded from PyHealth's own tables, not from the vocabulary")


def _seconds(value: Any) -> float:
    if not isinstance(value, timedelta):
        raise ValueError(f"must be a timedelta, got {value!r}")
    return value.total_seconds()


def _interval(value: Any) -> timedelta:
    if type(value) not in (int, float) or not LEAST_SECONDS <= value <= MOST_SECONDS:
        raise ValueError(f"must be a number of seconds from {LEAST_SECONDS} to {MOST_SECONDS:.0e}, got {value!r}")
    return timedelta(seconds=value)


def _dtype_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _dtype(value: Any) -> torch.dtype:
    found = getattr(torch, value, None) if isinstance(value, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"must be the name of a torch dtype, got {value!r}")
    return found


def _flags(value: Any) -> tuple[bool, ...] | None:
    if value is not None and not (isinstance(value, list | tuple) and all(type(flag) is bool for flag in value)):
        raise ValueError(f"must be a list of true and false, or null, got {value!r}")
    return None if value is None else tuple(value)


_CODES = _Kind(_codes_of, _padded(_vocabulary_from))
_LABELS = _Kind(_codes_of, _vocabulary_from)
_COUNT, _COUNT_OR_NULL = _count(int), _count(int, None)
_FLAG, _FLAG_OR_NULL = _same(bool), _same(bool, None)
_TEXT, _NOTHING = _same(str), _Kind(_no_mapping, _no_mapping)
_INTERVAL = _Kind(_seconds, _interval)
_DTYPE = _Kind(_dtype_name, _dtype)
_SPATIAL = _Kind(lambda value: None if value is None else list(_flags(value) or ()), _flags)

_TOKENS = {"code_vocab": _CODES, "_next_index": _COUNT}
_SAMPLED = {"sampling_rate": _INTERVAL, "impute_strategy": _TEXT, "n_features": _COUNT_OR_NULL}
_STATES: dict[str, dict[str, _Kind]] = {
    "SequenceProcessor": {**_TOKENS, "_mapper": _NOTHING},
    "NestedSequenceProcessor": {**_TOKENS, "_max_inner_len": _COUNT, "_padding": _COUNT},
    "NestedMultiHotProcessor": {**_TOKENS, "_padding": _COUNT},
    "NestedFloatsProcessor": {"_max_inner_len": _COUNT, "forward_fill": _FLAG, "_padding": _COUNT},
    "DeepNestedSequenceProcessor": {**_TOKENS, "_max_middle_len": _COUNT, "_max_inner_len": _COUNT},
    "DeepNestedFloatsProcessor": {"_max_middle_len": _COUNT, "_max_inner_len": _COUNT, "forward_fill": _FLAG},
    "StageNetProcessor": {
        **_TOKENS, "_is_nested": _FLAG_OR_NULL, "_max_nested_len": _COUNT_OR_NULL, "_padding": _COUNT,
    },
    "StageNetTensorProcessor": {"_size": _COUNT_OR_NULL, "_is_nested": _FLAG_OR_NULL},
    "TimeseriesProcessor": _SAMPLED,
    "TemporalTimeseriesProcessor": _SAMPLED,
    "TensorProcessor": {
        "dtype": _DTYPE, "_n_dim": _COUNT_OR_NULL, "_feature_dim": _COUNT_OR_NULL, "_spatial_dims": _SPATIAL,
    },
    "MultiHotProcessor": {"label_vocab": _LABELS},
    "BinaryLabelProcessor": {"label_vocab": _LABELS},
    "MultiClassLabelProcessor": {"label_vocab": _LABELS},
    "MultiLabelProcessor": {"label_vocab": _LABELS},
    "RegressionLabelProcessor": {},
    "RawProcessor": {},
    "TextProcessor": {},
}  # fmt: skip
WAY_OUT = "build the model and the dataset in Python instead: rollout attribute --entry package.module:function"
