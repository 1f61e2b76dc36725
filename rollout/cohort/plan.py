"""Which samples go into which part and which batch: a pure function of their sizes and four settings.

A part is a run of consecutive samples: the unit that is written, and that a stopped run does again. Within a part the
samples are sorted, longest first, and cut into batches whose padded size stays within a budget of tokens. So at most
one part's samples are held at a time, and a batch's make-up depends on its part alone.

A model that does not mask padding gives a sample other numbers in every batch. With `equal_lengths` a batch holds
samples of one shape only, so that none is padded.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.cohort.rows import Decoder
from rollout.cohort.settings import check_count, check_flag


@dataclass(frozen=True)
class Plan:
    """How a cohort is cut up.

    Attributes:
        batch_tokens: Most tokens in a batch, padding included and all features added; a longer sample goes alone.
        batch_samples: Most samples in a batch.
        part_samples: Samples in a part; the last one may have fewer.
        equal_lengths: Whether a batch holds samples of equal shape only, so that no padding is made.

    Raises:
        ValueError, TypeError: If a setting is out of range or of another type.
    """

    batch_tokens: int = 8192
    batch_samples: int = 256
    part_samples: int = 2048
    equal_lengths: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "batch_samples", "part_samples"):
            check_count(name, getattr(self, name), f"attribute_cohort: {name}")
        check_flag("equal_lengths", self.equal_lengths, "attribute_cohort: equal_lengths")

    @property
    def pads(self) -> bool:
        """Whether samples may be padded to the size of others."""
        return not self.equal_lengths and self.batch_samples > 1

    def parts(self, samples: int) -> list[range]:
        """The sample numbers of each part."""
        size = self.part_samples
        return [range(start, min(start + size, samples)) for start in range(0, samples, size)]

    def group_of(self, sample: Mapping[str, Any]) -> Hashable:
        """What the samples of a batch must have in common.

        With `equal_lengths` the size of everything in them, so that they are stacked as they are. Else which members
        of a feature are missing, such as its times: PyHealth drops those of a whole batch for one sample without.
        """
        return _shape(sample) if self.equal_lengths else _missing(sample)

    def batches(self, lengths: np.ndarray, groups: Sequence[Hashable] | None = None) -> list[np.ndarray]:
        """Cut a part into batches.

        Args:
            lengths: int64 [n, F], tokens of each sample in each feature.
            groups: Of each sample, from `group_of`: only samples of equal ones share a batch. None: any may.

        Returns:
            Places in the part, int64 [b] each; every place is in one batch. Longest sample first, ties in order.
        """
        group = _numbered([None] * len(lengths) if groups is None else groups)
        order = np.lexsort((group, -lengths.sum(1), -lengths.max(1, initial=0)))
        batches: list[np.ndarray] = []
        begun, widest = 0, np.zeros(lengths.shape[1], dtype=np.int64)
        for place, sample in enumerate(order):
            wider = np.maximum(widest, lengths[sample])
            size = place - begun + 1
            full = size * int(wider.sum()) > self.batch_tokens or size > self.batch_samples
            if size > 1 and (full or group[sample] != group[order[begun]]):
                batches.append(order[begun:place])
                begun, wider = place, lengths[sample]
            widest = wider
        return [*batches, order[begun:]] if len(order) else []


def sample_lengths(sample: Mapping[str, Any], decoders: Mapping[str, Decoder]) -> list[int]:
    """Tokens of one sample in each feature: its codes, visits or time steps; 1 for what is one step to a model."""
    return [_length(sample[feature], decoder) for feature, decoder in decoders.items()]


def _numbered(groups: Sequence[Hashable]) -> np.ndarray:
    """A number for each group, int64 [n], in the order they come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def _missing(sample: Mapping[str, Any]) -> Hashable:
    return tuple(
        (key, place)
        for key, value in sample.items()
        if isinstance(value, tuple)
        for place, member in enumerate(value)
        if member is None
    )


def _shape(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((key, _shape(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        inner = [_shape(item) for item in value]
        return (len(value), tuple(inner) if any(inner) else None)
    shape = getattr(value, "shape", None)
    return value is None if shape is None else ("array", *shape)


def _length(value: Any, decoder: Decoder) -> int:
    if decoder.entries is not None:
        return len(decoder.entries(value))
    if decoder.value is not None and isinstance(value, tuple | list):
        value = value[decoder.value]
    dims = getattr(value, "ndim", 1)
    return 1 if dims == 0 or decoder.whole or (decoder.multi_hot and dims == 1) else len(value)
