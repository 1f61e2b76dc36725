"""The groups of a feature's codes over a cohort: relevance, lift and prevalence of each, with intervals by patient."""

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from rollout.intervals import bootstrap_means
from rollout.results.by_patient import blocks, number_patients, spread
from rollout.results.code_groups import Groups, group_codes
from rollout.results.places import RECORD, find_cells, merged

if TYPE_CHECKING:
    from rollout.results.attributions import CohortAttributions

_SUMS = ["relevance", "lift", "entries", "records", "present"]
MEASURES = {
    "relevance": ("relevance", "records"),
    "lift": ("lift", "entries"),
    "prevalence": ("present", "samples"),
}
"""Measure → what is summed, and what it is divided by."""
_SCHEMA = {
    "group": pl.String,
    **{f"{name}{end}": pl.Float64 for name in MEASURES for end in ("", "_low", "_high")},
    **dict.fromkeys(("records", "entries", "patients", "codes"), pl.Int64),
}


def group_table(
    cohort: "CohortAttributions",
    feature: str,
    by: str | Path | Groups,
    read_position: int | None,
    download: bool,
    drawn: Mapping[str, Any],
) -> pl.DataFrame:
    """One row per group that the cohort has: see `CohortAttributions.top_groups`.

    Parts are read one by one, twice; what is held are sums by patient and group.
    """
    codes = _codes(cohort, feature)
    groups = group_codes(codes, by, feature, download=download)
    index = number_patients(cohort.predictions)[0]
    patients = int(index["patient"].n_unique())
    parts = (_part_sums(cohort, part, feature, read_position, groups, index) for part in cohort.part_ranges)
    sums = merged(parts, ["patient", "code"])
    if sums is None or not sums.height:
        return pl.DataFrame(schema=_SCHEMA)
    names = sums["code"].unique().sort(nulls_last=True)
    numbers = pl.DataFrame({"code": names, "column": pl.int_range(len(names), eager=True)})
    estimates = _estimates(sums.join(numbers, on="code", nulls_equal=True), index, patients, len(names), drawn)
    sizes = groups.group_by("group").agg(pl.len().alias("codes"))
    table = pl.DataFrame({"group": names, **estimates}).join(sizes, on="group", how="left", nulls_equal=True)
    return table.select(pl.col(name).cast(kind) for name, kind in _SCHEMA.items()).with_columns(
        pl.col(pl.Float64).fill_nan(None)
    )


def leading(table: pl.DataFrame, order: str, minimum_records: int, k: int | None) -> pl.DataFrame:
    """The first `k` groups in enough records, best first; that of the codes without one last.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_order("top_groups", "order", order, minimum_records, k)
    enough, nameless = table.filter(pl.col("records") >= minimum_records), pl.col("group").is_null()
    named = enough.filter(~nameless).sort([order, "group"], descending=[True, False], nulls_last=True)
    return pl.concat([named if k is None else named.head(k), enough.filter(nameless)])


def check_order(where: str, name: str, order: str, minimum_records: int, k: int | None) -> None:
    """Refuse arguments of a table of the leading codes or groups that are out of range.

    Raises:
        ValueError: naming `where` and the argument; `name` is that of `order`.
    """
    if order not in MEASURES:
        raise ValueError(f"{where}: {name} must be one of {', '.join(MEASURES)}, got {order!r}")
    check_count(where, "minimum_records", minimum_records, 0)
    if k is not None:
        check_count(where, "k", k, 1)


def check_count(where: str, name: str, value: Any, least: int) -> None:
    """Refuse what is no int, or is below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(f"{where}: {name} must be an int of at least {least}, got {value!r}")


def _codes(cohort: "CohortAttributions", feature: str) -> list[str]:
    found: set[str] = set()
    for part in cohort.part_ranges:
        found.update(cohort.rows_within(part, feature)["code"].drop_nulls().unique().to_list())
    return sorted(found)


def _part_sums(
    cohort: "CohortAttributions",
    part: range,
    feature: str,
    read_position: int | None,
    groups: pl.DataFrame,
    index: pl.DataFrame,
) -> pl.DataFrame:
    """Sums per `patient` and `code`, which is a group, of one part."""
    rows = cohort.rows_within(part, feature)
    by_record = (
        find_cells(rows, read_position, cohort.whole_features, groups)
        .group_by(*RECORD, "code")
        .agg(pl.col("relevance", "lift").sum(), pl.col("relevance").count().alias("entries"))
        .with_columns(records=(pl.col("entries") > 0).cast(pl.Int64), present=pl.lit(1))
    )
    return by_record.join(index.lazy(), on="sample").group_by("patient", "code").agg(pl.col(_SUMS).sum()).collect()


def _estimates(
    sums: pl.DataFrame, index: pl.DataFrame, patients: int, groups: int, drawn: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    samples = np.bincount(index["patient"].to_numpy(), minlength=patients).astype(np.float64)[:, None]
    found: dict[str, list[np.ndarray]] = {}
    for columns in blocks(3 * patients, groups):
        of_block = dict(zip(_SUMS, spread(sums, _SUMS, patients, columns), strict=True))
        of_block["samples"] = np.broadcast_to(samples, of_block["present"].shape)
        totals, sizes = (np.concatenate([of_block[pair[end]] for pair in MEASURES.values()], 1) for end in (0, 1))
        for end, values in zip(("", "_low", "_high"), bootstrap_means(totals, sizes, **drawn), strict=True):
            for name, part in zip(MEASURES, np.split(values, len(MEASURES)), strict=True):
                found.setdefault(f"{name}{end}", []).append(part)
        for name in ("records", "entries"):
            found.setdefault(name, []).append(of_block[name].sum(0).astype(np.int64))
        found.setdefault("patients", []).append((of_block["present"] > 0).sum(0))
    return {name: np.concatenate(parts) for name, parts in found.items()}
