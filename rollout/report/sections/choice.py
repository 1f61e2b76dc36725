"""Which samples the page shows: a handful that differ in prediction and truth, with records short enough to read."""

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from rollout.report.bounds import PATIENT_SAMPLES, SAMPLES
from rollout.results.attributions import CohortAttributions

CANDIDATES = 24
READABLE = (8, 150)
"""Entries, of all features together, of a record that is easy to read."""


@dataclass(frozen=True)
class Chosen:
    """A sample to show, why, and its rows with prediction and truth."""

    sample: int
    why: str
    rows: pl.DataFrame


def chosen(cohort: CohortAttributions, patient: str | None) -> tuple[list[Chosen], int]:
    """The samples to show, at most `SAMPLES` (or `PATIENT_SAMPLES` of a patient), and how many there were.

    Raises:
        ValueError: If no attributed sample is of the patient.
    """
    if patient is not None:
        rows = cohort.patient(patient)
        numbers = rows["sample"].unique().sort().to_list()
        reasons = dict.fromkeys(numbers[:PATIENT_SAMPLES], "of the patient asked for")
        return _with_rows(reasons, rows), len(numbers)
    reasons = _reasons(cohort)
    rows = cohort.with_predictions().filter(pl.col("sample").is_in(list(reasons))).collect(engine="streaming")
    return _with_rows(reasons, rows), cohort.samples


def _with_rows(reasons: dict[int, str], rows: pl.DataFrame) -> list[Chosen]:
    parts = rows.partition_by("sample", as_dict=True)
    return [Chosen(number, why, parts[number,]) for number, why in reasons.items()]


def _reasons(cohort: CohortAttributions) -> dict[int, str]:
    """Sample → why it is shown, in the order of the page. The rows of all candidates are counted in one reading."""
    kinds = [(why, frame.head(CANDIDATES).collect(engine="streaming")["sample"].to_list())
             for why, frame in _kinds(cohort)]  # fmt: skip
    sizes = _sizes(cohort, sorted({number for _, candidates in kinds for number in candidates}))
    found: dict[int, str] = {}
    for why, candidates in kinds:
        number = _readable([one for one in candidates if one in sizes and one not in found], sizes)
        if number is not None and len(found) < SAMPLES:
            found[number] = why
    return found


def _kinds(cohort: CohortAttributions) -> Iterator[tuple[str, pl.LazyFrame]]:
    """(why, samples in order of preference)."""
    first, truth = pl.col("y_prob").list.first(), pl.col("y_true").list.first()
    if cohort.label_kind == "multiclass":
        top = cohort.predictions.select("sample", value=pl.col("y_prob").list.max(), right=predicted_right())
        for right, words in ((True, "right"), (False, "wrong")):
            part = top.filter(pl.col("right") == right)
            yield f"surest prediction, {words}", _extreme(part, "highest")
            yield f"least sure prediction, {words}", _extreme(part, "lowest")
    values = cohort.predictions.select("sample", value=first, label=truth).filter(pl.col("value").is_finite())
    if cohort.label_kind == "binary":
        for label, extreme in ((1, "highest"), (0, "highest"), (1, "lowest"), (0, "lowest")):
            part = values.filter(pl.col("label") == label)
            yield f"{extreme} prediction with label {label}", _extreme(part, extreme)
        away = values.with_columns((pl.col("value") - 0.5).abs())
        yield "prediction nearest to 0.5", _extreme(away, "lowest")
    elif cohort.label_kind != "multiclass":
        yield "highest prediction", _extreme(values, "highest")
        yield "lowest prediction", _extreme(values, "lowest")
        away = values.with_columns((pl.col("value") - pl.col("value").mean()).abs())
        yield "prediction nearest to the mean", _extreme(away, "lowest")
    yield "the first sample that can be read", cohort.predictions.select("sample").bottom_k(CANDIDATES, by="sample")


def predicted_right() -> pl.Expr:
    """Whether the class with the highest probability is the true one; null where either is not known."""
    truth = pl.col("y_true").list.first().fill_nan(None)
    known = pl.col("y_prob").list.eval(pl.element().is_finite().fill_null(False)).list.all()
    return pl.when(known).then(pl.col("y_prob").list.arg_max().cast(pl.Int64) == truth.cast(pl.Int64, strict=False))


def _extreme(values: pl.LazyFrame, which: str) -> pl.LazyFrame:
    if which == "highest":
        return values.top_k(CANDIDATES, by=["value", -pl.col("sample")])
    return values.bottom_k(CANDIDATES, by=["value", "sample"])


def _sizes(cohort: CohortAttributions, candidates: list[int]) -> dict[int, tuple[int, int]]:
    """Sample → its number of entries and of visits; those without entries are left out."""
    rows = cohort.attributions.filter(pl.col("sample").is_in(candidates))
    visits = pl.col("visit").drop_nulls().n_unique()
    counted = rows.group_by("sample").agg(pl.len(), visits).collect(engine="streaming")
    return {number: (entries, visits) for number, entries, visits in counted.rows()}


def _readable(candidates: list[int], sizes: dict[int, tuple[int, int]]) -> int | None:
    """The first candidate whose record is easy to read and, if it has visits, has several; else the next best."""
    low, high = READABLE
    fit = [number for number in candidates if low <= sizes[number][0] <= high]
    several = [number for number in fit if sizes[number][1] != 1]
    return next(iter(several or fit or candidates), None)
