"""What the labels of a cohort are: their kind, which sample has which, what they are called."""

from collections.abc import Mapping, Sequence

import polars as pl

NO_LABELS = pl.DataFrame(schema={"sample": pl.Int64, "label": pl.Int64})


def label_kind(predictions: pl.LazyFrame) -> str | None:
    """How `y_true` is read: `binary`, `multiclass`, `multilabel`, `regression`, or None when absent.

    One number per sample, whole and not negative, is a class: of two when `y_prob` is one number and none is above 1,
    of more when `y_prob` has several. Several zeros and ones are a set of labels. Anything else is a measured value.
    NaN is no label.
    """
    truth = pl.col("y_true")
    seen = predictions.select(
        wide=truth.list.len().max(), classes=pl.col("y_prob").list.len().max()
    ).collect(engine="streaming").row(0, named=True)  # fmt: skip
    if not seen["wide"]:
        return None
    known = predictions.select(truth.explode().fill_nan(None)).drop_nulls()
    values = known.select(
        top=truth.max(), low=truth.min(), whole=(truth == truth.round()).all()
    ).collect(engine="streaming").row(0, named=True)  # fmt: skip
    if values["top"] is None:
        return None
    if not values["whole"] or values["low"] < 0:
        return "regression"
    if seen["wide"] > 1:
        return "multilabel" if values["top"] <= 1 else "regression"
    if (seen["classes"] or 1) > 1:
        return "multiclass"
    return "binary" if values["top"] <= 1 else "regression"


def labels_of(predictions: pl.LazyFrame, kind: str | None) -> pl.LazyFrame:
    """`sample`, `label`: a row per sample, or per label that is set; samples without a label give none."""
    truth = predictions.select("sample", "y_true").filter(pl.col("y_true").list.len() > 0)
    if kind == "multilabel":
        places = pl.int_ranges(pl.col("y_true").list.len()).alias("label")
        cells = truth.with_columns(places).explode("y_true", "label")
        return cells.filter(pl.col("y_true") == 1).select("sample", "label")
    label = pl.col("y_true").list.first().fill_nan(None).cast(pl.Int64, strict=False).alias("label")
    return truth.select("sample", label).drop_nulls()


def count_labels(
    predictions: pl.LazyFrame, kind: str | None, vocabularies: Mapping[str, Sequence[str | None]]
) -> pl.DataFrame:
    """How many `samples` have each `label`, commonest first, and its `name`; none for measured values.

    Args:
        predictions: Rows of a run.
        kind: As `label_kind` says.
        vocabularies: Output of the dataset → its labels' names; of several outputs, `y_true` is not known to be one.
    """
    if kind in (None, "regression"):
        return pl.DataFrame(schema={"label": pl.Int64, "samples": pl.UInt32, "name": pl.String})
    counted = labels_of(predictions, kind).group_by("label").agg(pl.len().alias("samples")).collect(engine="streaming")
    (names,) = vocabularies.values() if len(vocabularies) == 1 else ([],)
    known = {number: name for number, name in enumerate(names) if name is not None}
    name = pl.col("label").replace_strict(list(known), list(known.values()), default=None, return_dtype=pl.String)
    return counted.with_columns(name=name if known else pl.lit(None, pl.String)).sort(
        ["samples", "label"], descending=[True, False]
    )
