"""The cohort in numbers: samples, labels, predictions, lengths of the records, failures."""

from dataclasses import dataclass
from typing import Any

import polars as pl
from markupsafe import Markup

from rollout.report.bounds import ERRORS, EXACT_PATIENTS, FEATURES, LABELS
from rollout.report.charts import Axes, Bars, bar_chart
from rollout.report.sections.choice import predicted_right
from rollout.report.text import count
from rollout.results.attributions import CohortAttributions
from rollout.results.padding import pads

BINS = 20


def summary(cohort: CohortAttributions) -> dict[str, Any]:
    """What the summary shows; `shown` numbers are bounded, the totals are of the whole cohort."""
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
        "padded": pads(cohort.manifest["identity"]["plan"]),
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
    found = _values(cohort)
    value = pl.col("value")
    finite = value.is_finite().fill_null(False)
    ends = found.values.select(
        low=value.filter(finite).min(), high=value.filter(finite).max(), left_out=(~finite).sum()
    ).collect(engine="streaming")  # fmt: skip
    low, high, left_out = ends.row(0)
    if low is None:
        return None
    axis = found.axis if low >= 0 and high <= 1 else "predicted value"
    if axis != "predicted value":
        low, high = 0.0, 1.0
    width = (high - low) / BINS or 1.0
    place = ((value - low) / width).floor().clip(0, BINS - 1).cast(pl.Int32).alias("bin")
    counted = found.values.filter(finite).group_by("series", place).len().collect(engine="streaming")
    by_place = {(series, at): number for series, at, number in counted.rows()}
    series = [
        Bars([by_place.get((number, i), 0) for i in range(BINS)], f"series{number}", name)
        for number, name in enumerate(found.names)
        if any(drawn == number for drawn, _ in by_place)
    ]
    what = "labels" if cohort.label_kind == "multilabel" else "samples"
    title = f"Histogram of the {axis}, {count(sum(by_place.values()))} {what}"
    chart = bar_chart(title, series, Axes(x=axis, y=what, start=low, stop=low + BINS * width))
    if len(found.names) > 1:
        chart += Markup('<p class="keys">{}</p>').format(Markup("").join(
            Markup('<span class="key"><i class="swatch {}"></i>{}</span>').format(part.style, part.name)
            for part in series
        ))  # fmt: skip
    if left_out:
        chart += Markup('<p class="note">Not drawn: {} {} without a finite prediction.</p>').format(
            count(left_out), what
        )
    return chart


@dataclass(frozen=True)
class _Values:
    """What was predicted: `value` and `series` per sample, or per label.

    Attributes:
        names: What the series are, from 0 on, drawn from the bottom up.
        axis: What the value is, if none is below 0 or above 1.
    """

    values: pl.LazyFrame
    names: tuple[str, ...]
    axis: str


def _values(cohort: CohortAttributions) -> _Values:
    given = cohort.predictions.filter(pl.col("y_prob").list.len() > 0)
    first, truth = pl.col("y_prob").list.first(), pl.col("y_true").list.first().fill_nan(None)
    kind = cohort.label_kind
    if kind == "binary":
        frame = given.select(value=first, series=truth.cast(pl.Int32).fill_null(2))
        return _Values(frame, ("label 0", "label 1", "label not known"), "predicted probability")
    if kind == "multiclass":
        wrong = (~predicted_right()).cast(pl.Int32).fill_null(2)
        frame = given.select(value=pl.col("y_prob").list.max(), series=wrong)
        names = ("class predicted right", "wrong", "class not known")
        return _Values(frame, names, "probability of the predicted class")
    if kind == "multilabel":
        cells = given.filter(pl.col("y_true").list.len() == pl.col("y_prob").list.len())
        frame = cells.select("y_prob", "y_true").explode("y_prob", "y_true")
        label = (pl.col("y_true").fill_nan(None) > 0.5).cast(pl.Int32).fill_null(2)
        names = ("label not set", "label set", "label not known")
        return _Values(frame.select(value="y_prob", series=label), names, "predicted probability of a label")
    axis = "predicted value" if kind == "regression" else "predicted probability"
    return _Values(given.select(value=first, series=pl.lit(0, pl.Int32)), ("samples",), axis)


def _lengths(cohort: CohortAttributions) -> list[dict[str, Any]]:
    table = cohort.lengths()
    return [_length(table.filter(pl.col("feature") == feature), feature) for feature in cohort.features[:FEATURES]]


def _padding(cohort: CohortAttributions) -> list[dict[str, Any]]:
    """The features with relevance on padding: in how many samples, and how much of a row."""
    shares = cohort.manifest["padding_share"]
    shown = [name for name in cohort.features[:FEATURES] if name in shares and shares[name]["above"]]
    return [{"feature": name, **shares[name]} for name in shown]


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
