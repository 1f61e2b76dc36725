"""Samples into a batch, as PyHealth's own loader does it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Sample = Mapping[str, Any]
Collate = Callable[[Sequence[Sample]], Mapping[str, Any]]


def pyhealth_collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Pad and stack samples as PyHealth's own loader does."""
    from pyhealth.datasets.utils import collate_fn_dict_with_padding

    padded: Callable[[list[Sample]], dict[str, Any]] = collate_fn_dict_with_padding
    return padded(list(samples))
