"""Means and AUROCs with bootstrap intervals by patient.

The samples of one patient are alike, so patients, not samples, are drawn with replacement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval, from `groups` patients."""

    estimate: float
    low: float
    high: float
    groups: int

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the interval."""
        return not self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def bootstrap_mean(
    values: ArrayLike, groups: Sequence[Any], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """The mean of N values and its percentile interval over resampled groups.

    For a paired comparison give the differences. With few groups (fewer than about 20) a percentile interval is
    somewhat too narrow.

    Args:
        values: finite numbers [N].
        groups: [N], whom each value belongs to: the patient id.
        level: the share of resampled means inside the interval.
        draws: how many times the groups are resampled.
        seed: same seed, same interval.

    Raises:
        ValueError: nothing given, lengths differ, a value is not finite, fewer than 2 groups, or a bad level or draws.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, sections 8.3 and 13.3.
    """
    value = np.asarray(values, dtype=np.float64)
    group, count = _grouped("bootstrap_mean", value, groups)
    size = np.bincount(group, minlength=count)
    total = np.bincount(group, value, minlength=count)
    weights = _resampled(count, draws, seed)
    low, high = _quantiles("bootstrap_mean", (weights @ total) / (weights @ size), level)
    return Interval(float(value.mean()), low, high, count)


def bootstrap_auroc(
    y_true: ArrayLike,
    y_prob: ArrayLike,
    groups: Sequence[Any],
    *,
    strata: Sequence[Any] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The area under the ROC curve and its percentile interval over resampled groups.

    AUROC = P(y_prob of a positive > y_prob of a negative), ties counting half.

    Args:
        y_true: 0 or 1, [N].
        y_prob: finite numbers [N].
        strata: [N]; only pairs of the same stratum are compared. Give the model a prediction came from: the
            probabilities of different models are not on one scale.
        groups, level, draws, seed: as in `bootstrap_mean`. A draw without a comparable pair is left out.

    Raises:
        ValueError: there is no pair to compare; also as `bootstrap_mean`.
    """
    label, prob = np.asarray(y_true, dtype=np.float64), np.asarray(y_prob, dtype=np.float64)
    group, count = _grouped("bootstrap_auroc", prob, groups)
    if label.shape != prob.shape or not np.isin(label, (0, 1)).all():
        raise ValueError(f"bootstrap_auroc: y_true must be {len(prob)} zeros and ones, got {label.shape}: {label[:5]}")
    stratum = _numbered([0] * len(prob) if strata is None else strata)
    won, pairs = _pair_counts(label, prob, group, count, stratum)
    if not pairs.any():
        raise ValueError("bootstrap_auroc: there must be a positive and a negative sample in one stratum, got none")
    weights = _resampled(count, draws, seed).astype(np.float64)
    drawn = ((weights @ pairs) * weights).sum(1)
    areas = ((weights @ won) * weights).sum(1)[drawn > 0] / drawn[drawn > 0]
    low, high = _quantiles("bootstrap_auroc", areas, level)
    return Interval(float(won.sum() / pairs.sum()), low, high, count)


def _pair_counts(label: Floats, prob: Floats, group: Any, count: int, stratum: Any) -> tuple[Floats, Floats]:
    """Per pair of groups (positive's, negative's) [G, G]: pairs won, and pairs compared."""
    won, pairs = np.zeros((count, count)), np.zeros((count, count))
    for s in np.unique(stratum):
        positive = np.flatnonzero((stratum == s) & (label == 1))
        negative = np.flatnonzero((stratum == s) & (label == 0))
        difference = prob[positive][:, None] - prob[negative][None]
        cells = np.ix_(group[positive], group[negative])
        rows, columns = np.broadcast_arrays(*cells)
        np.add.at(won, (rows, columns), (difference > 0) + 0.5 * (difference == 0))
        np.add.at(pairs, (rows, columns), 1.0)
    return won, pairs


def _numbered(groups: Sequence[Any]) -> Any:
    """Groups as 0, 1, … in order of first appearance."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(g, len(numbers)) for g in groups], dtype=np.int64)


def _grouped(name: str, values: Floats, groups: Sequence[Any]) -> tuple[Any, int]:
    if values.ndim != 1 or len(values) == 0 or len(groups) != len(values):
        raise ValueError(f"{name}: needs N ≥ 1 values with one group each, got {values.shape} and {len(groups)} groups")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: values must be finite, got {int((~np.isfinite(values)).sum())} NaN or Inf")
    group = _numbered(groups)
    count = int(group.max()) + 1
    if count < 2:
        raise ValueError(f"{name}: needs at least 2 groups to resample, got {count}")
    return group, count


def _resampled(groups: int, draws: int, seed: int) -> Any:
    """How often each group is drawn in each resample, int [draws, G]."""
    if draws < 1:
        raise ValueError(f"bootstrap: draws must be at least 1, got {draws}")
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)


def _quantiles(name: str, draws: Floats, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"{name}: level must lie between 0 and 1, got {level}")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
