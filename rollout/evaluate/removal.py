"""What stands in a record in place of the entries that are gone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

REMOVALS = ("delete", "pad", "resample")


@dataclass(frozen=True)
class Removal:
    """How entries are removed from the features of a batch.

    Attributes:
        kind: `"delete"`: codes are taken out and the rest moves up, as in ERASER; where a feature is no list of codes
            [B, S], its entries become padding in place. `"pad"`: they become padding where they stand. `"resample"`:
            other codes stand in their place.
        padding: feature → the id of padding; 0 where it does not say.
        drawn: feature → what stands in place of each entry, shaped like its values; for `"resample"`.
    """

    kind: str = "delete"
    padding: Mapping[str, int] = field(default_factory=dict)
    drawn: Mapping[str, Tensor] = field(default_factory=dict)

    def deletes(self, key: str, feature: Any) -> bool:
        """Whether entries of a feature are taken out, the rest moving up."""
        values = values_of(feature)
        return self.kind == "delete" and values.dim() == 2 and not values.is_floating_point()

    def cut(self, key: str, feature: Any, kept: Tensor, owner: Tensor) -> Any:
        """A feature with only the kept entries, for R records.

        Args:
            key: the feature's.
            feature: values [B, ...], or a tuple whose second member they are.
            kept: bool [R, ...].
            owner: long [R], the sample of each record.
        """
        if self.deletes(key, feature):
            return self._moved_up(key, feature, kept, owner)
        values = values_of(feature)[owner]
        other: Any = self.drawn[key][owner] if self.kind == "resample" else self.padding.get(key, 0)
        values = torch.where(kept, values, torch.as_tensor(other, dtype=values.dtype, device=values.device))
        if isinstance(feature, tuple):
            return (rows_of(feature[0], owner), values, *(rows_of(part, owner) for part in feature[2:]))
        return values

    def _moved_up(self, key: str, feature: Any, kept: Tensor, owner: Tensor) -> Any:
        """The kept entries of each record moved to its front, in order, and the width cut to the longest record."""
        if isinstance(feature, tuple):
            size = values_of(feature).shape[:2]
            return tuple(
                self._moved_up(key if place == 1 else "", part, kept, owner)
                if isinstance(part, Tensor) and part.shape[:2] == size
                else rows_of(part, owner)
                for place, part in enumerate(feature)
            )
        counts = kept.sum(1)
        record, place = kept.nonzero(as_tuple=True)
        slot = (kept.cumsum(1) - 1)[record, place]
        padding = self.padding.get(key, 0) if key else 0
        moved = feature.new_full((len(kept), max(1, int(counts.max())), *feature.shape[2:]), padding)
        moved[record, slot] = feature[owner[record], place]
        return moved


def values_of(feature: Any) -> Any:
    """The values of a feature: itself, or the second member of a tuple (PyHealth's `(time, value)`)."""
    return feature[1] if isinstance(feature, tuple) and len(feature) > 1 else feature


def rows_of(value: Any, owner: Tensor) -> Any:
    """The rows of samples of anything that has one for each: a tensor, a list, a tuple or mapping of such; else
    itself."""
    if isinstance(value, Tensor) and value.dim():
        return value[owner.to(value.device)]
    if isinstance(value, tuple):
        return tuple(rows_of(part, owner) for part in value)
    if isinstance(value, Mapping):
        return {key: rows_of(part, owner) for key, part in value.items()}
    if isinstance(value, list):
        return [value[number] for number in owner.tolist()]
    return value
