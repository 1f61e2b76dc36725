"""How much of a feature's relevance lies on positions without an entry, and what its row sums to.

A position without an entry is padding: of a batch, of the sample's own tensor, or a visit without codes. A model that
masks it gives it no relevance. Where one does not, the relevance of a sample, and what is predicted of it, depend on
what padding its batch needed; the share is measured, so that it is said wherever it happens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

NOTABLE = 1e-6
"""A share of a row above this is no rounding."""
NOTE = "Relevance on padding: "
"""Begins the note of a manifest."""
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far from 1 the sum of a row may be, by the dtype of the relevance: half precision rounds every map and entry."""


@dataclass(frozen=True)
class Measured:
    """Of one feature, for the B samples of a batch.

    Attributes:
        share: Of the row on positions without an entry, float64 [B], of absolute values; NaN where it is not known:
            the record has no entry, the row is all 0 or not finite.
        total: The sum of the row, float64 [B]; NaN where the record has no entry.
        tolerance: How far from 1 ``total`` may be by rounding.
    """

    share: np.ndarray
    total: np.ndarray
    tolerance: float


def measure(scores: np.ndarray, at: tuple[np.ndarray, ...], dtype: torch.dtype) -> Measured:
    """Measure the rows of one feature.

    Args:
        scores: Of all positions, padding included, [B, S] or, with a score per code of a visit, [B, V, C].
        at: Where in them the entries are.
        dtype: Of the relevance as it was given.
    """
    count, real = len(scores), np.zeros(scores.shape, dtype=bool)
    real[at] = True
    flat, real = scores.reshape(count, -1).astype(np.float64), real.reshape(count, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.abs(np.where(real, 0.0, flat)).sum(1) / np.abs(flat).sum(1)
        total = np.where(real.any(1), flat.sum(1), np.nan)
    share = np.where(real.any(1) & np.isfinite(share), share, np.nan)
    return Measured(share, total, TOLERANCES.get(dtype, TOLERANCES[torch.float32]))


def wrong_sums(measured: Mapping[str, Measured], index: np.ndarray) -> dict[int, str]:
    """Sample → reason, of the samples with a row that does not sum to 1."""
    wrong: dict[int, str] = {}
    for feature, rows in measured.items():
        off = ~np.isnan(rows.total) & ~(np.abs(rows.total - 1.0) <= rows.tolerance)
        for number, total in zip(index[off].tolist(), rows.total[off].tolist(), strict=True):
            wrong.setdefault(
                number, f"the relevance of feature {feature!r} sums to {total:.6g}, must be 1 by the method"
            )
    return wrong


def count_shares(shares: np.ndarray) -> dict[str, Any]:
    """What a part's record says of one feature: samples of which the share is known, their sum, the largest, how many
    are above ``NOTABLE``."""
    known = shares[~np.isnan(shares)]
    return {
        "samples": len(known),
        "sum": float(known.sum()),
        "max": float(known.max(initial=0.0)),
        "above": int((known > NOTABLE).sum()),
    }


def add_up_shares(records: Iterable[Mapping[str, Any]], features: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Feature → ``mean``, ``max`` and number ``above`` 1e-6 of the share on padding, over the ``samples`` of the parts
    of which it is known; ``mean`` and ``max`` are None where it is known of none."""
    kept = list(records)
    return {feature: _added([record["padding"][feature] for record in kept]) for feature in features}


def _added(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    samples = sum(part["samples"] for part in parts)
    return {
        "samples": samples,
        "mean": sum(part["sum"] for part in parts) / samples if samples else None,
        "max": max(part["max"] for part in parts) if samples else None,
        "above": sum(part["above"] for part in parts),
    }


def padding_note(summary: Mapping[str, Mapping[str, Any]], pads: bool) -> str | None:
    """What is on padding, in words; None when nothing is.

    Args:
        summary: Of ``add_up_shares``.
        pads: Whether batches are padded, so that the numbers are not those of each sample alone.
    """
    said = [
        f"feature {feature!r} in {one['above']} of {one['samples']} samples, on average {one['mean']:.3g} and at most "
        f"{one['max']:.3g} of a row"
        for feature, one in summary.items()
        if one["above"]
    ]
    if not said:
        return None
    why = (
        "The model does not mask this padding, so relevance and predictions depend on which samples stand in a batch; "
        "equal_lengths=True or batch_samples=1 gives each sample's own"
        if pads
        else "No batch was padded: these are positions of the samples themselves that hold no entry, such as visits "
        "without codes"
    )
    return f"{NOTE}{'; '.join(said)}. {why}"
