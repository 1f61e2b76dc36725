"""Which samples go into which part and which batch: a pure function of their lengths and three settings.

A part is a run of consecutive samples: the unit that is written, and that a stopped run does again. Within a part the
samples are sorted, longest first, and cut into batches whose padded size stays within a budget of tokens. So at most
one part's samples are held at a time, and a batch's make-up depends on its part alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.cohort.rows import Decoder
from rollout.cohort.settings import check_count


@dataclass(frozen=True)
class Plan:
    """How a cohort is cut up.

    Attributes:
        batch_tokens: Most tokens in a batch, padding included and all features added; a longer sample goes alone.
        batch_samples: Most samples in a batch.
        part_samples: Samples in a part; the last one may have fewer.

    Raises:
        ValueError, TypeError: If a number is out of range or no int.
    """

    batch_tokens: int = 8192
    batch_samples: int = 256
    part_samples: int = 2048

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "batch_samples", "part_samples"):
            check_count(name, getattr(self, name), f"attribute_cohort: {name}")

    def parts(self, samples: int) -> list[range]:
        """The sample numbers of each part."""
        size = self.part_samples
        return [range(start, min(start + size, samples)) for start in range(0, samples, size)]

    def batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Cut a part into batches.

        Args:
            lengths: int64 [n, F], tokens of each sample in each feature.

        Returns:
            Places in the part, int64 [b] each; every place is in one batch. Longest sample first, ties in order.
        """
        order = np.lexsort((-lengths.sum(1), -lengths.max(1, initial=0)))
        batches: list[np.ndarray] = []
        begun, widest = 0, np.zeros(lengths.shape[1], dtype=np.int64)
        for place, sample in enumerate(order):
            wider = np.maximum(widest, lengths[sample])
            size = place - begun + 1
            if size > 1 and (size * int(wider.sum()) > self.batch_tokens or size > self.batch_samples):
                batches.append(order[begun:place])
                begun, wider = place, lengths[sample]
            widest = wider
        return [*batches, order[begun:]] if len(order) else []


def sample_lengths(sample: Mapping[str, Any], decoders: Mapping[str, Decoder]) -> list[int]:
    """Tokens of one sample in each feature: its codes, visits or time steps; 1 for what is one step to a model."""
    return [_length(sample[feature], decoder) for feature, decoder in decoders.items()]


def _length(value: Any, decoder: Decoder) -> int:
    if decoder.value is not None and isinstance(value, tuple | list):
        value = value[decoder.value]
    dims = getattr(value, "ndim", 1)
    return 1 if dims == 0 or decoder.whole or (decoder.multi_hot and dims == 1) else len(value)
