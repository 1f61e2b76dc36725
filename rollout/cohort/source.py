"""The samples of a cohort: read by number, collated, and described."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout.cohort.digest import digest_of
from rollout.cohort.identity import sampled_content
from rollout.cohort.rows import Decoder, feature_decoders, plain_decoder, vocabulary_array
from rollout.data.collate import Collate, Sample, pyhealth_collate
from rollout.results.manifest import CONTENT


@dataclass(frozen=True)
class Source:
    """A dataset as a cohort run sees it.

    Attributes:
        dataset: `len(dataset)` samples, each a mapping, by `dataset[i]`.
        collate: B samples → a batch the model takes.
        decoders: Feature → how its entries are read back, for the features that are attributed.
        description: What stands in the manifest of it.
        time: Feature with times → what they are counted in; None where that is not known.
        labels: Output → the names of its labels, by number.
    """

    dataset: Any
    collate: Collate
    decoders: Mapping[str, Decoder]
    description: Mapping[str, Any]
    time: Mapping[str, str | None] = field(default_factory=dict)
    labels: Mapping[str, list[str | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Sample:
        sample = self.dataset[number]
        if not isinstance(sample, Mapping):
            raise TypeError(f"a sample must be a mapping of features, got {type(sample).__name__}")
        return sample


def open_source(
    dataset: Any,
    collate: Collate | None = None,
    vocabularies: Mapping[str, Mapping[str, int] | None] | None = None,
    padding_ids: Mapping[str, int | None] | None = None,
    entries: Mapping[str, Any] | None = None,
) -> Source:
    """Look at a dataset: what it holds and how its entries are read back.

    Args:
        dataset: A PyHealth `SampleDataset`, or anything with `len` and `[i]` that gives mappings. A feature that its
            `time_units` names, with what its times are counted in, is a pair of times and values.
        collate: B samples → a batch; needed unless it is PyHealth's.
        vocabularies: For a dataset that is not PyHealth's: feature → code → id, or None for a numeric feature.
        padding_ids: Feature → the id that stands for no code, None when every id is a code. A feature that is left out
            has that of its vocabulary's `<pad>` or `[PAD]`, which PyHealth's processors have; 0 where the
            vocabulary has neither that nor a code 0.
        entries: Feature of PyHealth's → `rollout.pyhealth.entries.Entries`, of which its model makes them itself.

    Raises:
        TypeError: If it cannot be indexed, a needed argument is missing, or a padding id is no int.
        ValueError: If it is empty; if a padding id is not known, contradicts the vocabulary, or is of no such feature.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"attribute_cohort: dataset must have len() and dataset[i], got {type(dataset).__name__}; a PyHealth "
            "SampleDataset has both (not its dataloader)"
        )
    if len(dataset) == 0:
        raise ValueError("attribute_cohort: dataset must have at least one sample, got none")
    stated = dict(padding_ids or {})
    if vocabularies is not None:
        units = getattr(dataset, "time_units", {})
        decoders = {
            feature: plain_decoder(feature, codes, stated, timed=feature in units)
            for feature, codes in vocabularies.items()
        }
        schema: Any = {feature: dict(codes or {}) for feature, codes in vocabularies.items()}
    elif hasattr(dataset, "input_processors"):
        decoders = feature_decoders(dataset, stated, entries or {})
        schema = _schema(dataset)
    else:
        raise TypeError(
            "attribute_cohort: a dataset that is not a PyHealth SampleDataset needs vocabularies={feature: {code: id}} "
            f"(None for a numeric feature), got {type(dataset).__name__}"
        )
    _check_features(stated, decoders)
    if collate is None:
        if not hasattr(dataset, "input_processors"):
            raise TypeError(
                "attribute_cohort: a dataset that is not a PyHealth SampleDataset needs collate=, a function from a "
                "list of samples to a batch"
            )
        collate = pyhealth_collate
    description = {
        "name": str(getattr(dataset, "dataset_name", "") or type(dataset).__name__),
        "task": str(getattr(dataset, "task_name", "") or ""),
        "samples": len(dataset),
        "features": list(decoders),
        "padding_ids": {feature: decoder.padding for feature, decoder in decoders.items() if decoder.has_ids},
        "fingerprint": digest_of([len(dataset), schema]),
        CONTENT: sampled_content(dataset, len(dataset)),
    }
    if entries:
        description["entries"] = {feature: digest_of(one.described) for feature, one in entries.items()}
    time = {feature: _time_unit(dataset, feature) for feature, one in decoders.items() if one.time is not None}
    return Source(dataset, collate, decoders, description, time, _label_names(dataset))


_BETWEEN, _IN_STAY = "hours since the admission before (0 for the first)", "hours since admission"
_TASK_TIMES = {
    "MortalityPredictionStageNetMIMIC4": {"icd_codes": _BETWEEN, "labs": _IN_STAY},
    "LengthOfStayStageNetMIMIC4": {"icd_codes": _BETWEEN, "labs": _IN_STAY},
    "DKAPredictionMIMIC4": {"icd_codes": _BETWEEN, "labs": _BETWEEN},
    "T1DDKAPredictionMIMIC4": {"icd_codes": _BETWEEN, "labs": _BETWEEN},
}
"""Task of PyHealth → feature → what the task counts its times in. A StageNet processor takes times as they come."""


def _time_unit(dataset: Any, feature: str) -> str | None:
    if feature in getattr(dataset, "time_units", {}):
        return str(dataset.time_units[feature])
    processor = getattr(dataset, "input_processors", {}).get(feature)
    if type(processor).__name__ == "TemporalTimeseriesProcessor":  # it counts them itself
        return "hours since the first observation"
    return _TASK_TIMES.get(str(getattr(dataset, "task_name", "")), {}).get(feature)


def _label_names(dataset: Any) -> dict[str, list[str | None]]:
    """Of each output that has a vocabulary of labels."""
    found = {}
    for output, processor in getattr(dataset, "output_processors", {}).items():
        vocabulary = getattr(processor, "label_vocab", None)
        if isinstance(vocabulary, Mapping):
            found[output] = vocabulary_array(vocabulary).to_pylist()
    return found


def _check_features(stated: Mapping[str, int | None], decoders: Mapping[str, Decoder]) -> None:
    coded = [feature for feature, decoder in decoders.items() if decoder.has_ids]
    for feature in stated:
        if feature not in coded:
            raise ValueError(
                f"attribute_cohort: padding_ids must be of features that are ids of codes, {coded}, got {feature!r}"
            )


def _schema(dataset: Any) -> Any:
    """Per input and label its processor, and the vocabulary it was fitted with."""
    described = {}
    for kind in ("input_processors", "output_processors"):
        for feature, processor in getattr(dataset, kind, {}).items():
            codes = getattr(processor, "code_vocab", None)
            codes = getattr(processor, "label_vocab", None) if codes is None else codes
            described[f"{kind}.{feature}"] = [type(processor).__name__, None if codes is None else dict(codes)]
    return described
