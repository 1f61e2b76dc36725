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
    """A sample to show, and why."""

    sample: int
    why: str


def chosen(cohort: CohortAttributions, patient: str | None) -> tuple[list[Chosen], int]:
    """The samples to show, at most ``SAMPLES`` (or ``PATIENT_SAMPLES`` of a patient), and how many there were.

    Raises:
        ValueError: If no attributed sample is of the patient.
    """
    if patient is not None:
        numbers = cohort.patient(patient)["sample"].unique().sort().to_list()
        return [Chosen(number, "of the patient asked for") for number in numbers[:PATIENT_SAMPLES]], len(numbers)
    found: list[Chosen] = []
    for why, frame in _kinds(cohort):
        candidates = frame.head(CANDIDATES).collect(engine="streaming")["sample"].to_list()
        taken = {one.sample for one in found}
        number = _readable(cohort, [sample for sample in candidates if sample not in taken])
        if number is not None and len(found) < SAMPLES:
            found.append(Chosen(number, why))
    return found, cohort.samples


def _kinds(cohort: CohortAttributions) -> Iterator[tuple[str, pl.LazyFrame]]:
    """(why, samples in order of preference)."""
    given = cohort.predictions.filter(pl.col("y_prob").list.len() > 0)
    first, truth = pl.col("y_prob").list.first(), pl.col("y_true").list.first()
    if cohort.label_kind == "multiclass":
        top = given.select("sample", value=pl.col("y_prob").list.max(),
                           right=pl.col("y_prob").list.arg_max() == truth.cast(pl.UInt32))  # fmt: skip
        for right, words in ((True, "right"), (False, "wrong")):
            part = top.filter(pl.col("right") == right)
            yield f"surest prediction, {words}", part.top_k(CANDIDATES, by=["value", -pl.col("sample")])
            yield f"least sure prediction, {words}", part.bottom_k(CANDIDATES, by=["value", "sample"])
    values = given.select("sample", value=first, label=truth)
    if cohort.label_kind == "binary":
        for label, extreme in ((1, "highest"), (0, "highest"), (1, "lowest"), (0, "lowest")):
            part = values.filter(pl.col("label") == label)
            yield f"{extreme} prediction with label {label}", _extreme(part, extreme)
        away = values.with_columns((pl.col("value") - 0.5).abs())
        yield "prediction nearest to 0.5", _extreme(away, "lowest")
    elif cohort.label_kind != "multiclass":
        yield "highest prediction", _extreme(values, "highest")
        yield "lowest prediction", _extreme(values, "lowest")
        middle = values.select(pl.col("value").mean()).collect(engine="streaming").item()
        if middle is not None:
            yield (
                "prediction nearest to the mean",
                _extreme(values.with_columns((pl.col("value") - middle).abs()), "lowest"),
            )
    yield "the first sample that can be read", cohort.predictions.select("sample").bottom_k(CANDIDATES, by="sample")


def _extreme(values: pl.LazyFrame, which: str) -> pl.LazyFrame:
    if which == "highest":
        return values.top_k(CANDIDATES, by=["value", -pl.col("sample")])
    return values.bottom_k(CANDIDATES, by=["value", "sample"])


def _readable(cohort: CohortAttributions, candidates: list[int]) -> int | None:
    """The first candidate whose record is easy to read and, if it has visits, has several; else the next best."""
    if not candidates:
        return None
    rows = cohort.attributions.filter(pl.col("sample").is_in(candidates))
    visits = pl.col("visit").drop_nulls().n_unique()
    counted = rows.group_by("sample").agg(pl.len(), visits).collect(engine="streaming")
    sizes = {number: (entries, visits) for number, entries, visits in counted.rows()}
    low, high = READABLE
    fit = [number for number in candidates if number in sizes and low <= sizes[number][0] <= high]
    several = [number for number in fit if sizes[number][1] != 1]
    return next(iter(several or fit or [number for number in candidates if number in sizes]), None)
