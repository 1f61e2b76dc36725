"""One record as it is shown: its timelines, its features as in the report, and two runs of it entry by entry."""

from typing import Any

import polars as pl

from rollout.report import scale
from rollout.report.bounds import FEATURES
from rollout.report.lanes import Lane, Mark, lane_chart
from rollout.report.sections.choice import Chosen
from rollout.report.sections.patients import record_view
from rollout.report.text import in_percent, number, percent, shown, times
from rollout.results.attributions import CohortAttributions
from rollout.results.places import find_places, place_of

ENTRIES, VISITS, DIFFERENCES = 600, 100, 30
"""Bounds of a record's page; the CSV has every entry."""
WIDE, NARROW = 960, 350
ENTRY = ["feature", "place", "code"]


def show_record(cohort: CohortAttributions, sample: int, rows: pl.DataFrame) -> dict[str, Any]:
    """The view of a sample's rows, as the report shows a record, with `timelines`.

    Raises:
        ValueError: If the rows hold no finite numbers.
    """
    view = record_view(cohort, Chosen(sample, "", rows), ENTRIES, VISITS)
    return {**view, "timelines": _timelines(cohort, with_places(cohort, rows))}


def with_places(cohort: CohortAttributions, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of samples with `place`, `relevance`, `lift` and whether the model `read`s there, in their order."""
    whole = cohort.whole_features
    places = find_places(rows, cohort.read_position, whole).drop("last", "even").collect()
    placed = rows.with_columns(place_of(whole))
    return placed.join(places, on=["sample", "feature", "place"], how="left", maintain_order="left")


def _timelines(cohort: CohortAttributions, rows: pl.DataFrame) -> list[dict[str, Any]]:
    """A chart for the features of each unit of time, and one for those without times."""
    found = rows["feature"].unique().to_list()
    known = [name for name in cohort.features if name in found]
    features = (known + sorted(set(found) - set(known)))[:FEATURES]
    groups: dict[tuple[bool, str | None], list[str]] = {}
    for name in features:
        timed = bool(rows.filter(pl.col("feature") == name)["time"].is_finite().any())
        groups.setdefault((timed, cohort.time_units.get(name) if timed else None), []).append(name)
    return [_timeline(cohort, rows, names, *kind) for kind, names in groups.items()]


def _timeline(
    cohort: CohortAttributions, rows: pl.DataFrame, names: list[str], timed: bool, unit: str | None
) -> dict[str, Any]:
    drawn = rows.with_columns(at=pl.col("time" if timed else "place").cast(pl.Float64)).filter(
        pl.col("feature").is_in(names) & pl.col("at").is_finite()
    )
    lanes = [Lane(shown(name, 60), _marks(cohort, drawn.filter(pl.col("feature") == name), unit)) for name in names]
    axis = f"time ({shown(unit or 'in the unit of the data', 40)})" if timed else "place in the record (0: the first)"
    title = f"{', '.join(lane.name for lane in lanes)}: {drawn.height} entries, coloured by lift"
    charts = [lane_chart(title, lanes, axis, width, whole=not timed) for width in (WIDE, NARROW)]
    without = rows.filter(pl.col("feature").is_in(names)).height - drawn.height
    return {"wide": charts[0], "narrow": charts[1], "without": without, "timed": timed}


def _marks(cohort: CohortAttributions, rows: pl.DataFrame, unit: str | None) -> list[Mark]:
    share = percent if in_percent(cohort.manifest) else number
    marks = []
    for row in rows.rows(named=True):
        name = cohort.names.get(row["feature"], {}).get(row["code"] or "")
        what = "no code" if row["code"] is None else shown(row["code"], 60) or "empty string"
        where = "visit" if row["visit"] is not None else "position"
        when = "" if row["time"] is None else f", time {number(row['time'])} {shown(unit or '', 40)}".rstrip()
        lift = "the model reads here" if row["read"] else f"lift {times(row['lift'])}"
        named = f" {shown(name, 80)}" if name else ""
        words = f"{what}{named}: {where} {row['place']}{when}, relevance {share(row['relevance'])}, {lift}"
        style = "read" if row["read"] else f"l{scale.level(row['lift'])}"
        marks.append(Mark(row["at"], f"mark {style}", row["relevance"], words))
    return marks


def compare_records(one: pl.DataFrame, other: pl.DataFrame) -> dict[str, Any]:
    """Two runs of a record, entry by entry.

    Args:
        one: Rows of one sample, as of `with_places`.
        other: The same of the other run.

    Returns:
        `features`: per feature in both how many `places` they share and `correlation`, Spearman's of the lifts there
        (None for fewer than three, or where one does not differ); `entries`: those of both whose lifts differ most,
        with `lift` of one and `beside_lift` of the other; `in_all`: how many there are; `apart`: how many entries only
        one has. Where a model reads there is no lift to compare.
    """
    tables = [
        frame.select(*ENTRY, pl.col("lift").alias(lift), pl.lit(True).alias(f"has_{lift}")).unique(
            ENTRY, keep="first", maintain_order=True
        )
        for frame, lift in ((one, "lift"), (other, "beside_lift"))
    ]
    both = tables[0].join(tables[1], on=ENTRY, how="full", coalesce=True, nulls_equal=True)
    far = (pl.col("beside_lift") - pl.col("lift")).abs()
    shared = both.drop_nulls(["lift", "beside_lift"])
    differing = shared.filter(far > 0)
    entries = differing.sort(far, *ENTRY, descending=[True, False, False, False]).head(DIFFERENCES)
    places = shared.unique(["feature", "place"], keep="first", maintain_order=True)
    features = [
        {"name": name, "places": part.height, "correlation": _correlation(part)}
        for (name,), part in places.partition_by("feature", as_dict=True, maintain_order=True).items()
    ]
    apart = both.select((pl.col("has_lift").is_null() | pl.col("has_beside_lift").is_null()).sum()).item()
    return {"features": features, "entries": entries.rows(named=True), "in_all": differing.height, "apart": apart}


def _correlation(part: pl.DataFrame) -> float | None:
    if part.height < 3 or min(part["lift"].n_unique(), part["beside_lift"].n_unique()) < 2:
        return None
    found = part.select(pl.corr("lift", "beside_lift", method="spearman")).item()
    return None if found is None else float(found)
