"""The statistics of a comparison: from sums by patient to differences with intervals and tests."""

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
import polars as pl

from rollout.intervals import Floats, bootstrap_differences, bootstrap_means, holm, permutation_test, sign_flip_test
from rollout.results.by_patient import blocks, spread
from rollout.results.compared import KEYS, RANKS, SAME, SUMS

_FLOATS = ("a", "b", "estimate", "low", "high", "p", "p_holm")
_SCHEMA = {
    **dict.fromkeys(KEYS[1:], pl.String), **dict.fromkeys(_FLOATS, pl.Float64),
    **dict.fromkeys(("records_a", "records_b", "patients"), pl.Int64),
}  # fmt: skip


def contrast_table(
    sums: pl.DataFrame | None,
    patients: int,
    sides: tuple[pl.Series, pl.Series] | None,
    drawn: Mapping[str, Any],
    flips: int,
) -> pl.DataFrame:
    """One row per measure, feature and code, in the order of `KEYS`: see `CohortComparison.table`.

    Args:
        sums: `SUMS` by `KEYS`; None: of nothing.
        patients: How many, numbered from 0.
        sides: Whether each is in a, in b; None: paired.
        drawn: `level`, `draws` and `seed` of the bootstrap.
        flips: Of the tests.

    Raises:
        ValueError: If the tests are too many for so few `flips`.
    """
    if sums is None or sums.is_empty():
        return pl.DataFrame(schema=_SCHEMA)
    keys = sums.select(KEYS[1:]).unique().sort(KEYS[1:]).with_columns(column=pl.int_range(pl.len()))
    levels = keys["measure"].is_in([SAME, RANKS]).to_numpy()
    alpha, tests = 1 - drawn["level"], int((~levels).sum())
    if tests > alpha * (1 + flips):
        raise ValueError(
            f"compare_cohorts: flips must be at least {ceil(tests / alpha)} for {tests} comparisons, got {flips}; or "
            "compare fewer codes (k)"
        )
    sums = sums.join(keys, on=KEYS[1:], nulls_equal=True)
    found: dict[str, list[Floats]] = {}
    for columns in blocks(2 * patients, keys.height):
        of_block = dict(zip(SUMS, spread(sums, SUMS, patients, columns), strict=True))
        for name, values in _estimates(of_block, sides, drawn, flips).items():
            found.setdefault(name, []).append(values)
    estimates = {name: np.concatenate(parts) for name, parts in found.items()}
    for name in ("a", "b", "p"):
        estimates[name] = np.where(levels, np.nan, estimates[name])
    tested = np.isfinite(estimates["p"])
    estimates["p_holm"] = np.full(keys.height, np.nan)
    estimates["p_holm"][tested] = holm(estimates["p"][tested])
    table = keys.drop("column").with_columns(pl.Series(name, column) for name, column in estimates.items())
    return table.select(pl.col(name).cast(kind) for name, kind in _SCHEMA.items()).with_columns(
        pl.col(pl.Float64).fill_nan(None)
    )


def _estimates(
    sums: Mapping[str, Floats], sides: tuple[pl.Series, pl.Series] | None, drawn: Mapping[str, Any], flips: int
) -> dict[str, Floats]:
    """Of some columns; `sums`: each [patients, columns]."""
    a, b, size_a, size_b = (sums[name] for name in SUMS[:4])
    if sides is None:
        estimate, low, high = bootstrap_means(b - a, size_b, **drawn)
        p = sign_flip_test(b - a, flips=flips, seed=drawn["seed"])
    else:
        estimate, low, high = bootstrap_differences(b, size_b, a, size_a, **drawn)
        first, second = (side.to_numpy() for side in sides)
        p = permutation_test(b, size_b, a, size_a, second, first, flips=flips, seed=drawn["seed"])
    with np.errstate(invalid="ignore"):
        means = {"a": a.sum(0) / size_a.sum(0), "b": b.sum(0) / size_b.sum(0)}
    return {
        **means, "estimate": estimate, "low": low, "high": high, "p": np.where(np.isfinite(estimate), p, np.nan),
        "records_a": sums["records_a"].sum(0), "records_b": sums["records_b"].sum(0),
        "patients": ((size_a > 0) | (size_b > 0)).sum(0),
    }  # fmt: skip
