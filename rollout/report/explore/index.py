"""What is kept in memory of a cohort: a row per sample, per record and per code. The records' entries stay on disk."""

from dataclasses import dataclass

import polars as pl

from rollout.report.text import shown
from rollout.results.attributions import CohortAttributions, named
from rollout.results.labels import labels_of
from rollout.results.places import RECORD, find_places, merged

CODES = ["feature", "code"]


@dataclass(frozen=True)
class Index:
    """What a cohort is searched by.

    Attributes:
        samples: Per `sample`, in order: `patient_id`, `visit_id`, `prediction` (of several outputs the highest),
            `predicted` (of several the number of that one, else null), `label` (float; several labels: a list of int;
            null without one), `entries` (of all features together).
        records: Per `sample` and `feature`: `last` and `even`, as of `rollout.results.places`.
        codes: Per `feature` and `code`: `name` (null where there is none) and `samples` (that have it).
        kind: Of the labels: see `rollout.results.labels`.
        several: Whether the model has several outputs.
    """

    samples: pl.DataFrame
    records: pl.DataFrame
    codes: pl.DataFrame
    kind: str | None
    several: bool


def build_index(cohort: CohortAttributions) -> Index:
    """Read a cohort once, part by part.

    Raises:
        ValueError: If a file of a part does not hold what was written, or an attribution is no finite number.
    """
    samples, several = read_samples(cohort)
    parts = [attributions for attributions, _ in cohort.parts()] or [cohort.attributions]
    records = pl.concat([_records(rows, cohort) for rows in parts]).sort("sample").rechunk()
    codes = pl.DataFrame(merged(map(_codes, parts), CODES)).sort("samples", *CODES, descending=[True, False, False])
    return Index(samples, records, codes.with_columns(named(cohort.names)), cohort.label_kind, several)


def read_samples(cohort: CohortAttributions) -> tuple[pl.DataFrame, bool]:
    """The `samples` of an index, and whether the model has several outputs."""
    several = (cohort.predictions.select(pl.col("y_prob").list.len().max()).collect().item() or 0) > 1
    parts = list(cohort.parts()) or [(cohort.attributions, cohort.predictions)]
    samples = [_samples(*part, cohort.label_kind, several) for part in parts]
    return pl.concat(samples).sort("sample").rechunk(), several


def _samples(attributions: pl.LazyFrame, predictions: pl.LazyFrame, kind: str | None, several: bool) -> pl.DataFrame:
    prob = pl.col("y_prob").list.eval(pl.when(pl.element().is_finite()).then(pl.element()))
    entries = attributions.group_by("sample").agg(pl.len().cast(pl.UInt32).alias("entries"))
    labels = labels_of(predictions, "multilabel").group_by("sample").agg(pl.col("label").sort())
    if kind != "multilabel":
        labels = predictions.select("sample", label=_finite(pl.col("y_true").list.first()).cast(pl.Float64))
    return (
        predictions.select(
            "sample",
            "patient_id",
            "visit_id",
            prediction=prob.list.max() if several else prob.list.first(),
            predicted=prob.list.arg_max().cast(pl.Int32) if several else pl.lit(None, pl.Int32),
        )
        .join(labels, on="sample", how="left")
        .join(entries, on="sample", how="left")
        .with_columns(pl.col("entries").fill_null(0))
        .collect()
    )


def _finite(value: pl.Expr) -> pl.Expr:
    return pl.when(value.is_finite()).then(value)


def _records(attributions: pl.LazyFrame, cohort: CohortAttributions) -> pl.DataFrame:
    rows = attributions.select(*RECORD, "visit", "position", "attribution").collect()
    places = find_places(rows, cohort.read_position, cohort.whole_features).group_by(RECORD)
    found = places.agg(pl.col("last").first().cast(pl.Int32), pl.col("even").max())
    return found.with_columns(pl.col("feature").cast(pl.Categorical)).collect()


def _codes(attributions: pl.LazyFrame) -> pl.DataFrame:
    known = attributions.select("sample", *CODES).filter(pl.col("code").is_not_null())
    return known.group_by(CODES).agg(pl.col("sample").n_unique().alias("samples")).collect(engine="streaming")


def put_beside(index: Index, other: CohortAttributions) -> pl.DataFrame:
    """The samples of `index` with what another run says of each: `beside`, its prediction, and `difference`.

    Raises:
        ValueError: If a sample of both is of another patient or visit, or no sample is in both.
    """
    found, several = read_samples(other)
    keys = ["patient_id", "visit_id"]
    theirs = found.select("sample", *keys, beside="prediction", beside_predicted="predicted")
    both = index.samples.join(theirs, on="sample", how="left", suffix="_beside", maintain_order="left")
    known = pl.col("sample").is_in(found["sample"].implode())
    differ = pl.any_horizontal(*(pl.col(key).ne_missing(pl.col(f"{key}_beside")) for key in keys))
    for row in both.filter(known & differ).head(1).rows(named=True):
        here, there = (
            f"patient {shown(row[f'patient_id{end}'], 40)!r}, visit {shown(row[f'visit_id{end}'], 40)!r}"
            for end in ("", "_beside")
        )
        raise ValueError(
            f"beside must be a run of the same samples, got sample {row['sample']} of {there} there, of {here} here"
        )
    if not both.select(known.any()).item():
        raise ValueError("beside must be a run of the same samples, got one that has none of them")
    one_each = not (index.several or several)
    difference = pl.col("beside") - pl.col("prediction") if one_each else pl.lit(None, pl.Float32)
    return both.drop(f"{key}_beside" for key in keys).with_columns(difference=difference)
