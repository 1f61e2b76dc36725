"""The cohort in numbers: samples, labels, predictions, lengths of the records, failures."""

from typing import Any

import polars as pl
from markupsafe import Markup

from rollout.report.bounds import ERRORS, EXACT_PATIENTS, FEATURES, LABELS
from rollout.report.charts import Axes, Bars, bar_chart
from rollout.report.text import count
from rollout.results.attributions import CohortAttributions

BINS = 20
NOTABLE = 1e-6
"""A share of a row above this is no rounding."""


def summary(cohort: CohortAttributions) -> dict[str, Any]:
    """What the summary shows; ``shown`` numbers are bounded, the totals are of the whole cohort."""
    labels = cohort.labels()
    patients, exact = _patients(cohort)
    return {
        "samples": cohort.samples,
        "planned": cohort.planned,
        "patients": patients,
        "patients_exact": exact,
        "rows": int(cohort.attributions.select(pl.len()).collect().item()),
        "labels": labels.head(LABELS).rows(named=True),
        "labels_in_all": labels.height,
        "labelled": int(labels["samples"].sum()),
        "label_kind": cohort.label_kind,
        "predictions": predictions(cohort),
        "lengths": _lengths(cohort),
        "padding": _padding(cohort),
        "padded": _is_padded(cohort),
        "features_in_all": len(cohort.features),
        "failures": _failures(cohort),
    }


def _patients(cohort: CohortAttributions) -> tuple[int, bool]:
    exact = cohort.samples <= EXACT_PATIENTS
    column = pl.col("patient_id")
    counted = cohort.predictions.select(column.n_unique() if exact else column.approx_n_unique())
    return int(counted.collect(engine="streaming").item()), exact


def predictions(cohort: CohortAttributions) -> Markup | None:
    """A histogram of what was predicted, by truth where it is known; None when nothing was."""
    values, names, axis = _values(cohort)
    ends = values.select(low=pl.col("value").min(), high=pl.col("value").max()).collect(engine="streaming")
    low, high = ends.row(0)
    if low is None:
        return None
    if axis != "predicted value":
        low, high = 0.0, 1.0
    width = (high - low) / BINS or 1.0
    place = ((pl.col("value") - low) / width).floor().clip(0, BINS - 1).cast(pl.Int32).alias("bin")
    found = values.group_by("series", place).len().collect(engine="streaming")
    by_place = {(row[0], row[1]): row[2] for row in found.rows()}
    series = [
        Bars([by_place.get((key, i), 0) for i in range(BINS)], f"series{number}", name)
        for number, (key, name) in enumerate(names)
    ]
    what = "labels" if cohort.label_kind == "multilabel" else "samples"
    axes = Axes(x=axis, y=what, start=low, stop=low + BINS * width)
    title = f"Histogram of the {axis}, {count(sum(by_place.values()))} {what}"
    chart = bar_chart(title, series, axes)
    if len(series) == 1:
        return chart
    keys = Markup("").join(
        Markup('<span class="key"><i class="swatch {}"></i>{}</span>').format(part.style, part.name) for part in series
    )
    return chart + Markup('<p class="keys">{}</p>').format(keys)


def _values(cohort: CohortAttributions) -> tuple[pl.LazyFrame, list[tuple[int, str]], str]:
    """(``value``, ``series``), (series, name) from the bottom up, and what the value is."""
    given = cohort.predictions.filter(pl.col("y_prob").list.len() > 0)
    first, truth = pl.col("y_prob").list.first(), pl.col("y_true").list.first()
    kind = cohort.label_kind
    if kind == "binary":
        frame = given.select(value=first, series=truth.fill_null(0).cast(pl.Int32))
        return frame, [(0, "label 0"), (1, "label 1")], "predicted probability"
    if kind == "multiclass":
        right = (pl.col("y_prob").list.arg_max() == truth.cast(pl.UInt32)).fill_null(False).cast(pl.Int32)
        frame = given.select(value=pl.col("y_prob").list.max(), series=right)
        return frame, [(1, "class predicted right"), (0, "wrong")], "probability of the predicted class"
    if kind == "multilabel":
        cells = given.filter(pl.col("y_true").list.len() == pl.col("y_prob").list.len())
        frame = cells.select("y_prob", "y_true").explode("y_prob", "y_true")
        renamed = frame.select(value=pl.col("y_prob"), series=(pl.col("y_true") > 0.5).cast(pl.Int32))
        return renamed, [(0, "label not set"), (1, "label set")], "predicted probability of a label"
    frame = given.select(value=first, series=pl.lit(0, pl.Int32))
    if kind is None:
        bounded = given.select(inside=(first.min() >= 0) & (first.max() <= 1)).collect(engine="streaming").item()
        return frame, [(0, "samples")], "predicted probability" if bounded else "predicted value"
    return frame, [(0, "samples")], "predicted value"


def _lengths(cohort: CohortAttributions) -> list[dict[str, Any]]:
    table = cohort.lengths()
    return [_length(table.filter(pl.col("feature") == feature), feature) for feature in cohort.features[:FEATURES]]


def _padding(cohort: CohortAttributions) -> list[dict[str, Any]]:
    """Of each feature with relevance on padding: in how many samples, and how much of a row."""
    found = []
    for place, feature in enumerate(cohort.features[:FEATURES]):
        share = pl.col("padding_share").list.get(place, null_on_oob=True).cast(pl.Float64)
        row = cohort.predictions.select(
            samples=share.count(), above=(share > NOTABLE).sum(), mean=share.mean(), max=share.max()
        ).collect(engine="streaming").row(0, named=True)  # fmt: skip
        if row["above"]:
            found.append({"feature": feature, **row})
    return found


def _is_padded(cohort: CohortAttributions) -> bool:
    """Whether batches of the run were padded."""
    plan = cohort.manifest["identity"].get("plan")
    return not isinstance(plan, dict) or not (plan.get("equal_lengths") is True or plan.get("batch_samples") == 1)


def _length(table: pl.DataFrame, feature: str) -> dict[str, Any]:
    entries = table.filter(pl.col("unit") == "entries")
    visits = table.filter(pl.col("unit") == "visits")
    return {
        "feature": feature,
        "records": int(entries["records"].sum()),
        "quantiles": _quantiles(entries),
        "visits": _quantiles(visits) if visits.height else None,
    }


def _quantiles(table: pl.DataFrame) -> tuple[int | None, int | None, int | None]:
    """(median, 90th percentile, largest) of lengths counted; the least length that at least that share is within."""
    if table.is_empty():
        return None, None, None
    ordered = table.sort("length").with_columns(share=pl.col("records").cum_sum() / pl.col("records").sum())
    lengths = [int(ordered.filter(pl.col("share") >= q - 1e-12)["length"][0]) for q in (0.5, 0.9)]
    return lengths[0], lengths[1], int(ordered["length"][-1])


def _failures(cohort: CohortAttributions) -> dict[str, Any]:
    grouped = (
        cohort.failures.with_columns(pl.col("error").str.slice(0, 200))
        .group_by("error")
        .agg(pl.len().alias("samples"), pl.col("sample").min().alias("example"))
        .sort(["samples", "example"], descending=[True, False])
        .collect(engine="streaming")
    )
    return {
        "samples": int(grouped["samples"].sum()),
        "reasons": grouped.head(ERRORS).rows(named=True),
        "reasons_in_all": grouped.height,
    }
