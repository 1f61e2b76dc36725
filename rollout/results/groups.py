"""The groups of an evaluation's samples: by the class predicted, by the true label, by the length of the record."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from rollout.results.labels import labels_of

BY = ("predicted", "label", "length")
QUARTERS = (0.25, 0.5, 0.75)


def grouped(
    by: str | None, index: pl.DataFrame, predictions: pl.LazyFrame, kind: str | None
) -> tuple[pl.DataFrame, list[str]]:
    """Each sample with its patient and the number of its group, and the names of the groups, in order.

    Args:
        by: None (one group), `predicted`, `label` or `length`. By length the samples are cut at the quartiles of the
            codes of their record; records of equal length stay together, so a group may be larger or lack. A sample
            without a label is in no group by label, a multilabel one in that of each of its labels.
        index: `sample`, `patient`, `target`, `codes` of the samples.
        predictions: `sample`, `y_true`.
        kind: Of the labels, as `rollout.results.labels.label_kind` says; for `label`.

    Raises:
        ValueError: If `by` is another, or there are no labels to go by.
    """
    samples = index.select("sample", "patient", "target", "codes")
    if by is None:
        return samples.select("sample", "patient", group=pl.lit(0)), ["all"] if samples.height else []
    if by == "predicted":
        if samples["target"].has_nulls():
            raise ValueError("by='predicted' needs the class that was followed, but there are samples without one")
        return _numbered(samples.select("sample", "patient", value="target"))
    if by == "label":
        if samples.height and kind in (None, "regression"):
            what = "no labels" if kind is None else "measured values, not classes, as labels"
            raise ValueError(f"by='label' needs labels, but the samples have {what}")
        labels = labels_of(predictions, kind).collect(engine="streaming")
        return _numbered(samples.join(labels, on="sample").select("sample", "patient", value="label"))
    if by == "length":
        return _by_length(samples)
    raise ValueError(f"by must be None or one of {BY}, got {by!r}")


def _numbered(samples: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    values = samples["value"].drop_nulls().unique().sort()
    table = pl.DataFrame({"value": values, "group": pl.Series(range(len(values)), dtype=pl.Int32)})
    return samples.join(table, on="value").drop("value"), [str(value) for value in values]


def _by_length(samples: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    if samples["codes"].has_nulls():
        raise ValueError("by='length' needs the codes of each record, but there are samples without a count")
    codes = samples["codes"].to_numpy()
    inner = sorted(set(np.quantile(codes, QUARTERS, method="inverted_cdf").tolist())) if len(codes) else []
    number = np.searchsorted(inner, codes, side="left")  # codes ≤ the edge belong below it
    present = np.unique(number)
    names = [_range_name(codes[number == one]) for one in present]
    return samples.select("sample", "patient").with_columns(group=pl.Series(np.searchsorted(present, number))), names


def _range_name(codes: Sequence[int] | np.ndarray) -> str:
    low, high = int(np.min(codes)), int(np.max(codes))
    return f"{low:,} codes" if low == high else f"{low:,}–{high:,} codes"
