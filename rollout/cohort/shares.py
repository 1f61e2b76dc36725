"""How much of a feature's relevance lies on positions without an entry, and what its row sums to.

A position without an entry is padding: of a batch, of the sample's own tensor, or a visit without codes. A model that
masks it gives it no relevance. Where one does not, the relevance of a sample, and what is predicted of it, depend on
what padding its batch needed; the share is measured, so that it is said wherever it happens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far from 1 the sum of a row may be, by the dtype of the relevance: half precision rounds every map and entry."""


@dataclass(frozen=True)
class Measured:
    """Of one feature, for the B samples of a batch.

    Attributes:
        share: Of the row on positions without an entry, float64 [B], of absolute values; NaN where it is not known:
            the record has no entry, the row is all 0 or not finite.
        total: The sum of the row, float64 [B].
        has_entries: Whether the record has an entry, bool [B].
        tolerance: How far from 1 `total` may be by rounding.
    """

    share: np.ndarray
    total: np.ndarray
    has_entries: np.ndarray
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
        total = flat.sum(1)
    has_entries = real.any(1)
    share = np.where(has_entries & np.isfinite(share), share, np.nan)
    return Measured(share, total, has_entries, TOLERANCES.get(dtype, TOLERANCES[torch.float32]))


def wrong_sums(measured: Mapping[str, Measured], index: np.ndarray, *, zero_rows: bool = False) -> dict[int, str]:
    """Sample → reason, of the samples with a row that does not sum to 1; what has no entry has no row.

    Args:
        measured: By feature.
        index: The numbers of the samples.
        zero_rows: Whether a row of nothing but 0 is right too.
    """
    wrong: dict[int, str] = {}
    for feature, rows in measured.items():
        off = rows.has_entries & ~(np.abs(rows.total - 1.0) <= rows.tolerance)
        if zero_rows:
            off &= ~(np.isnan(rows.share) & (rows.total == 0.0))
        for number, total in zip(index[off].tolist(), rows.total[off].tolist(), strict=True):
            wrong.setdefault(
                number, f"the relevance of feature {feature!r} sums to {total:.6g}, must be 1 by the method"
            )
    return wrong
