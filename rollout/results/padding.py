"""Relevance that lies on padding, counted over a cohort and said in words: for the commit records and the manifest."""

from collections.abc import Mapping, Sequence
from typing import Annotated, TypedDict

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, with_config

NOTABLE = 1e-6
"""A share of a row above this is no rounding."""
NOTE = "Relevance on padding: "
"""Begins the note of a manifest."""

_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Share = Annotated[float, Field(ge=0, le=1.000001)]


@with_config(_STRICT)
class ShareCount(TypedDict):
    """Of one feature in one part: `samples` of which the share on padding is known, the `sum` of their shares, the
    largest, and how many are `above` 1e-6."""

    samples: _Count
    sum: Annotated[float, Field(ge=0, lt=2**53)]
    max: _Share
    above: _Count


@with_config(_STRICT)
class PaddingShare(TypedDict):
    """Of one feature in the cohort: as in `ShareCount`, with the mean; None where the share is known of no sample."""

    samples: _Count
    mean: _Share | None
    max: _Share | None
    above: _Count


def count_shares(shares: np.ndarray) -> ShareCount:
    """Count the shares of one feature, float [n], NaN where they are not known."""
    known = shares[~np.isnan(shares)]
    return {
        "samples": len(known),
        "sum": float(known.sum()),
        "max": float(known.max(initial=0.0)),
        "above": int((known > NOTABLE).sum()),
    }


def count_padding(predictions: pa.Table, features: Sequence[str]) -> dict[str, ShareCount]:
    """Count the column `padding_share` of a part's predictions, feature by feature."""
    rows = predictions["padding_share"].to_pylist()
    columns = [np.array([row[place] if row else None for row in rows], dtype=float) for place in range(len(features))]
    return {feature: count_shares(column) for feature, column in zip(features, columns, strict=True)}


def add_up_shares(parts: Sequence[Mapping[str, ShareCount]], features: Sequence[str]) -> dict[str, PaddingShare]:
    """Add up what the parts counted, feature by feature."""
    return {feature: _added([part[feature] for part in parts if feature in part]) for feature in features}


def _added(parts: Sequence[ShareCount]) -> PaddingShare:
    samples = sum(part["samples"] for part in parts)
    return {
        "samples": samples,
        "mean": sum(part["sum"] for part in parts) / samples if samples else None,
        "max": max(part["max"] for part in parts) if samples else None,
        "above": sum(part["above"] for part in parts),
    }


def pads(plan: Mapping[str, int | bool]) -> bool:
    """Whether a plan, as the manifest has it, lets samples be padded to the size of others."""
    return not plan.get("equal_lengths") and plan.get("batch_samples") != 1


def padding_note(shares: Mapping[str, PaddingShare], padded: bool) -> str | None:
    """What is on padding, in words; None when nothing is.

    Args:
        shares: Of `add_up_shares`.
        padded: Whether batches are padded, so that the numbers are not those of each sample alone.
    """
    said = [
        f"feature {feature!r} in {one['above']} of {one['samples']} samples, on average {one['mean']:.3g} and at most "
        f"{one['max']:.3g} of a row"
        for feature, one in shares.items()
        if one["above"]
    ]
    if not said:
        return None
    why = (
        "The model does not mask this padding, so relevance and predictions depend on which samples stand in a batch; "
        "equal_lengths=True or batch_samples=1 gives each sample's own"
        if padded
        else "No batch was padded: these are positions of the samples themselves that hold no entry, such as visits "
        "without codes"
    )
    return f"{NOTE}{'; '.join(said)}. {why}"
