"""Which codes of a cohort draw the relevance: one number per code, from the rows of its attributions.

Relevance cannot be averaged as it stands. Each record's relevance sums to 1, so that of a long record is spread
thinner; the position the model reads keeps the residual's share whatever code stands there; and a code looks relevant
when the codes beside it happen to be dull. So, per feature:

1. the place the model reads (0, for PyHealth's Transformer) is left out;
2. an entry is a code at a place, and has the place's `lift` (see `rollout.results.places`): 1 is what an even spread
   over the other places would give;
3. `effect` of a code = its term in  log lift = record + code,  fitted by least squares over all entries: how much
   more relevance it draws than the average code *of the same records*, on a log scale. Where attention is a softmax
   over the codes of one record, this term is the code's attention logit;
4. codes in few records are left out, and `score` = effect − 2 standard errors, so that a chance finding in a few
   records does not lead;
5. features are ranked apart: each has attention of its own that sums to 1, so their sizes do not compare.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl

from rollout.results.places import RECORD, find_cells

FLOOR = 1e-4
"""Lift below which an entry counts as drawing nothing: keeps the logarithm finite."""


def rank_codes(
    rows: pl.DataFrame,
    minimum_share: float = 0.01,
    read_position: int | None = 0,
    whole_features: Collection[str] = (),
) -> pl.DataFrame:
    """Rank the codes of each feature by the relevance they draw, net of the record they stand in.

    Args:
        rows: Attribution rows: `sample`, `feature`, `visit`, `position`, `code`, `attribution`.
        minimum_share: Codes in fewer than this share of the records of their feature, or in fewer than 5, are left
            out.
        read_position: The place left out of every record; negative: counted from its end; None: none.
        whole_features: Of the cohort: those that have one score for all their codes, which is one place.

    Returns:
        One row per code, best first within its feature: `feature`, `rank` (from 1), `code`, `score`,
        `effect`, `error` (standard error), `lift` (mean), `entries` and `records`. Features in the order of the rows.

    Raises:
        ValueError: If a row has no feature, no place from 0 on, or no finite attribution.
    """
    entries = (
        find_cells(rows, read_position, whole_features).drop_nulls("lift").sort(*RECORD, "place", "code").collect()
    )
    of_feature = entries.partition_by("feature", as_dict=True)
    features = rows["feature"].unique(maintain_order=True)
    parts = [_rank_feature(of_feature[feature,], minimum_share) for feature in features if (feature,) in of_feature]
    return pl.concat(parts) if parts else pl.DataFrame(schema=_SCHEMA)


_SCHEMA = {
    "feature": pl.String,
    "rank": pl.UInt32,
    "code": pl.String,
    "score": pl.Float64,
    "effect": pl.Float64,
    "error": pl.Float64,
    "lift": pl.Float64,
    "entries": pl.UInt32,
    "records": pl.UInt32,
}


def _rank_feature(entries: pl.DataFrame, minimum_share: float) -> pl.DataFrame:
    names = entries["code"].unique().sort()
    code = entries["code"].cast(pl.Enum(names)).to_physical().to_numpy().astype(np.int64)
    _, record = np.unique(entries["sample"].to_numpy(), return_inverse=True)
    effect, error = _code_effects(np.log(np.maximum(entries["lift"].to_numpy(), FLOOR)), record, code)
    counted = entries.group_by("code").agg(
        pl.col("lift").mean(), pl.len().alias("entries"), pl.col("sample").n_unique().alias("records")
    )
    fitted = pl.DataFrame({"code": names, "effect": effect, "error": error, "score": effect - 2.0 * error})
    ranked = (
        fitted.join(counted, on="code")
        .filter(pl.col("records") >= max(5.0, minimum_share * entries["sample"].n_unique()))
        .sort(["score", "code"], descending=[True, False])
        .with_columns(feature=pl.lit(entries["feature"][0]), rank=1 + pl.int_range(pl.len(), dtype=pl.UInt32))
    )
    return ranked.select(pl.col(name).cast(kind) for name, kind in _SCHEMA.items())


def _code_effects(
    values: np.ndarray, record: np.ndarray, code: np.ndarray, tolerance: float = 1e-7, steps: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """Fit values = record term + code term by alternating means; return the code terms and their standard errors.

    The terms are centred to mean 0 over the entries. Each entry counts once; the standard error is that of a mean of
    independent residuals.
    """
    in_record, of_code = np.bincount(record), np.bincount(code)
    effect = np.zeros(len(of_code))
    for _ in range(steps):
        level = np.bincount(record, values - effect[code]) / in_record
        new = np.bincount(code, values - level[record]) / of_code
        new -= (new * of_code).sum() / of_code.sum()
        change = np.abs(new - effect).max(initial=0.0)
        effect = new
        if change < tolerance:
            break
    level = np.bincount(record, values - effect[code]) / in_record
    residual = values - effect[code] - level[record]
    spread = np.bincount(code, residual**2) / np.maximum(of_code - 1, 1)
    return effect, np.sqrt(spread / of_code)


def planted_found(ranking: pl.DataFrame, planted: Mapping[str, Iterable[str]]) -> dict[str, tuple[int, int]]:
    """Return per feature (planted codes among its top k, k), k being the number of planted codes of the feature."""
    found = {}
    for feature, codes in planted.items():
        wanted = set(codes)
        top = ranking.filter((pl.col("feature") == feature) & (pl.col("rank") <= len(wanted)))
        found[feature] = (sum(code in wanted for code in top["code"]), len(wanted))
    return found


def planted_codes(truth: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return feature → planted codes of a `truth.json`."""
    return {feature: [row["code"] for row in rows] for feature, rows in truth["planted"].items()}
