"""Means and AUROCs with bootstrap intervals by patient, tests of differences, and Holm's correction.

The samples of one patient are alike, so patients, not samples, are drawn with replacement, and have their signs turned.
`scipy.stats.bootstrap` and `scipy.stats.permutation_test` give the same numbers (the tests say so), one column at a
time and in O(G²) for G patients; here one set of draws serves all columns as a matrix product, in O(G).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
NORMAL = NormalDist()
BLOCK = 4_000_000
"""Cells of a matrix of draws that are held at once."""


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
    """The mean of N values and its BCa interval over resampled groups.

    For a paired comparison give the differences. With few groups (fewer than about 20) a bootstrap interval is somewhat
    too narrow.

    Args:
        values: finite numbers [N].
        groups: [N], whom each value belongs to: the patient id.
        level: the share of resampled means inside the interval.
        draws: how many times the groups are resampled.
        seed: same seed, same interval.

    Raises:
        ValueError: nothing given, lengths differ, a value is not finite, fewer than 2 groups, or a bad level or draws.
    """
    value = np.asarray(values, dtype=np.float64)
    group, count = _grouped("bootstrap_mean", value, groups)
    size, total = np.bincount(group, minlength=count), np.bincount(group, value, minlength=count)
    _, low, high = bootstrap_means(total[:, None], size[:, None], level=level, draws=draws, seed=seed)
    return Interval(float(value.mean()), float(low[0]), float(high[0]), count)


def bootstrap_means(
    totals: ArrayLike, sizes: ArrayLike, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """K means of the values of G groups and their BCa intervals, all from the same resampled groups.

    The mean of a column is Σ totals / Σ sizes, over the values and not over the groups.

    Args:
        totals: finite numbers [G, K], sums of a group's values.
        sizes: [G, K] or [G, 1], how many values they are sums of; 0 where a group has none.
        level, draws, seed: as in `bootstrap_mean`. A draw without a value is left out of its column.

    Returns:
        Estimates, lower and upper ends, float64 [K]. NaN where there is no value; ends of NaN where fewer than 2
        groups have one.

    Raises:
        ValueError: a bad level or draws.

    Source: Efron 1987, Better Bootstrap Confidence Intervals, equations 2.3 and 6.6 (the acceleration by the
    jackknife); Davison & Hinkley 1997, section 3.8 (clusters resampled whole).
    """
    check_level("bootstrap_means", level)
    return _bootstrap([_means_of(totals, sizes)], level, draws, seed)


def bootstrap_differences(
    totals: ArrayLike,
    sizes: ArrayLike,
    to_totals: ArrayLike,
    to_sizes: ArrayLike,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[Floats, Floats, Floats]:
    """K differences of means, Σ totals / Σ sizes − Σ to_totals / Σ to_sizes, and their BCa intervals.

    The same G groups are drawn for both, so a group may have values in one mean alone, or in both.

    Args:
        totals, sizes, to_totals, to_sizes: [G, K], as in `bootstrap_means`.
        level, draws, seed: as in `bootstrap_means`.

    Returns:
        As `bootstrap_means`: NaN where either mean has no value; ends of NaN where fewer than 2 groups have one in
        either.

    Raises:
        ValueError: a bad level or draws.

    Source: as `bootstrap_means`.
    """
    check_level("bootstrap_differences", level)
    return _bootstrap([_means_of(totals, sizes), _means_of(to_totals, to_sizes)], level, draws, seed)


def _means_of(totals: ArrayLike, sizes: ArrayLike) -> tuple[Floats, Floats]:
    return np.asarray(totals, dtype=np.float64), np.asarray(sizes, dtype=np.float64)


def _bootstrap(
    means: Sequence[tuple[Floats, Floats]], level: float, draws: int, seed: int
) -> tuple[Floats, Floats, Floats]:
    """A mean, or the first less the second, with its interval, from (totals, sizes) of each."""

    def contrast(reduce: Callable[[Floats], Floats]) -> Floats:
        found = [reduce(total) / reduce(size) for total, size in means]
        return found[0] - found[1] if len(found) > 1 else found[0]

    groups, columns = means[0][0].shape
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = contrast(lambda x: x.sum(0))
        parts = [contrast(lambda x, w=weights: w @ x) for weights in _resampled(groups, draws, seed)]  # type: ignore[misc]
        jackknife = contrast(lambda x: x.sum(0) - x)
    drawn = np.concatenate([np.empty((0, columns)), *parts])
    enough = np.logical_and.reduce([np.broadcast_to((size > 0).sum(0) > 1, estimate.shape) for _, size in means])
    low, high = np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
    for k in np.flatnonzero(enough):
        found = drawn[:, k]
        low[k], high[k] = _bca(found[np.isfinite(found)], estimate[k], jackknife[:, k], level)
    return estimate, low, high


def _bca(drawn: Floats, estimate: float, jackknife: Floats, level: float) -> tuple[float, float]:
    """The quantiles of the draws at `level`, moved for bias and skew."""
    below = (np.sum(drawn < estimate) + np.sum(drawn <= estimate)) / (2 * len(drawn))
    least = 0.5 / len(drawn)
    bias = NORMAL.inv_cdf(float(np.clip(below, least, 1 - least)))
    gap = jackknife.mean() - jackknife
    spread = float((gap**2).sum()) ** 1.5
    skew = float((gap**3).sum()) / (6 * spread) if spread > 0 else 0.0
    shares = []
    for end in ((1 - level) / 2, (1 + level) / 2):
        z = bias + NORMAL.inv_cdf(end)
        shares.append(NORMAL.cdf(bias + z / (1 - skew * z)) if skew * z < 1 else float(z > 0))
    low, high = np.quantile(drawn, shares)
    return float(low), float(high)


def sign_flip_test(totals: ArrayLike, *, flips: int = 9999, seed: int = 0) -> Floats:
    """The two-sided p of paired differences: how often is the sum as far from 0 when whole groups change their sign?

    Under the null hypothesis a group's differences are as likely as their negatives. All 2^G signs are gone through
    where they are no more than `flips`, and the p is exact; else `flips` random ones are, and the p is
    (1 + as far) / (1 + flips).

    Args:
        totals: finite numbers [G, K], sums of a group's differences.
        flips: how many random signs.
        seed: same seed, same p.

    Returns:
        float64 [K].

    Source: Fisher 1935, The Design of Experiments, section 21; Phipson & Smyth 2010 (the 1 that is added).
    """
    total = np.asarray(totals, dtype=np.float64)
    groups = len(total)
    exact = groups < 60 and 2**groups <= flips
    wanted = np.abs(total.sum(0)) * (1 - 1e-9)  # sums that differ in their rounding alone are equal
    as_far = np.zeros(total.shape[1])
    for signs in _all_signs(groups) if exact else _random_signs(groups, flips, seed):
        as_far += (np.abs(signs @ total) >= wanted).sum(0)
    return as_far / 2**groups if exact else (1 + as_far) / (1 + flips)


def permutation_test(
    totals: ArrayLike,
    sizes: ArrayLike,
    to_totals: ArrayLike,
    to_sizes: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    *,
    flips: int = 9999,
    seed: int = 0,
) -> Floats:
    """The two-sided p of K differences of means between two cohorts: how often is one as large when groups change side?

    Under the null hypothesis it does not matter of which cohort a group is: those of one cohort alone are dealt out
    anew, as many to each, and those of both exchange what they have in one for what they have in the other, or not.

    Args:
        totals, sizes, to_totals, to_sizes: [G, K], as in `bootstrap_differences`.
        first, second: bool [G], whether the group is of the first cohort, of the second, or of both.
        flips: how many random changes.
        seed: same seed, same p.

    Returns:
        float64 [K]; a change that leaves a mean without a value counts as one that is as large.

    Source: Pitman 1937, Significance Tests Which May be Applied to Samples from Any Populations; Phipson & Smyth 2010
    (the 1 that is added).
    """
    one, of_one, two, of_two = *_means_of(totals, sizes), *_means_of(to_totals, to_sizes)
    both = (np.asarray(first, dtype=bool) & np.asarray(second, dtype=bool))[:, None]
    kept, moved = np.where(both, one, one + two), np.where(both, two, 0.0)
    of_kept, of_moved = np.where(both, of_one, of_one + of_two), np.where(both, of_two, 0.0)

    def difference(side: Floats) -> Floats:
        """Of sides [n, G], 1 where a group's `kept` goes to the first cohort and its `moved` to the second."""
        with np.errstate(divide="ignore", invalid="ignore"):
            here = side @ (kept - moved) + moved.sum(0)
            of_here = side @ (of_kept - of_moved) + of_moved.sum(0)
            there, of_there = (kept + moved).sum(0) - here, (of_kept + of_moved).sum(0) - of_here
            return np.where((of_here > 0) & (of_there > 0), here / of_here - there / of_there, np.inf)

    sides = np.asarray(first, dtype=np.float64)
    wanted, as_far = np.abs(difference(sides[None])) * (1 - 1e-9), np.zeros(one.shape[1])
    alone, rng = np.flatnonzero(~both[:, 0]), np.random.default_rng(seed)
    rows = max(1, BLOCK // max(len(sides), 1))
    for start in range(0, flips, rows):
        drawn = rng.integers(0, 2, (min(rows, flips - start), len(sides))).astype(np.float64)
        drawn[:, alone] = rng.permuted(np.tile(sides[alone], (len(drawn), 1)), axis=1)
        as_far += (np.abs(difference(drawn)) >= wanted).sum(0)
    return (1 + as_far) / (1 + flips)


def holm(p: ArrayLike) -> Floats:
    """P values corrected for their number, float64 [N]: the family-wise error is at most the level they are read at.

    Source: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.
    """
    value = np.asarray(p, dtype=np.float64)
    order = np.argsort(value, kind="stable")
    adjusted = np.empty_like(value)
    adjusted[order] = np.maximum.accumulate(value[order] * np.arange(len(value), 0, -1)).clip(max=1.0)
    return adjusted


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
        groups, level, draws, seed: as in `bootstrap_mean`, but the interval is of percentiles. A draw without a
            comparable pair is left out.

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
    check_level("bootstrap_auroc", level)
    weights = np.concatenate(list(_resampled(count, draws, seed)))
    drawn = ((weights @ pairs) * weights).sum(1)
    areas = ((weights @ won) * weights).sum(1)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(won.sum() / pairs.sum()), float(low), float(high), count)


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


def _resampled(groups: int, draws: int, seed: int) -> Iterator[Floats]:
    """How often each group is drawn in each resample, [draws, G] in blocks of rows."""
    if draws < 1:
        raise ValueError(f"bootstrap: draws must be at least 1, got {draws}")
    rng, rows = np.random.default_rng(seed), max(1, BLOCK // max(groups, 1))
    for first in range(0, draws if groups else 0, rows):
        block = min(rows, draws - first)
        drawn = rng.integers(0, groups, (block, groups)) + groups * np.arange(block)[:, None]
        yield np.bincount(drawn.ravel(), minlength=block * groups).reshape(block, groups).astype(np.float64)


def _all_signs(groups: int) -> Iterator[Floats]:
    numbers = np.arange(2**groups)[:, None] >> np.arange(groups) & 1
    yield (1.0 - 2.0 * numbers).astype(np.float64)


def _random_signs(groups: int, flips: int, seed: int) -> Iterator[Floats]:
    rng, rows = np.random.default_rng(seed), max(1, BLOCK // max(groups, 1))
    for first in range(0, flips, rows):
        yield 2.0 * rng.integers(0, 2, (min(rows, flips - first), groups), dtype=np.int8).astype(np.float64) - 1.0


def check_level(name: str, level: float) -> None:
    """Refuse a level that is no share."""
    if not 0 < level < 1:
        raise ValueError(f"{name}: level must lie between 0 and 1, got {level}")
