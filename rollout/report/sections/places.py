"""Relevance by position of the flat features, and by visit of the nested ones."""

from typing import Any

import polars as pl
from markupsafe import Markup

from rollout.report import text
from rollout.report.bounds import FEATURES, PLACES
from rollout.report.charts import Axes, Bars, bar_chart
from rollout.report.sections.codes import minimum_records
from rollout.results.attributions import CohortAttributions


def places(cohort: CohortAttributions) -> dict[str, Any]:
    """A chart per feature: mean lift at each of the first places; for visits, counted from the record's end too."""
    read = cohort.read_position
    positions = cohort.by_position(read_position=read)
    visits, back = cohort.by_visit(read_position=read), cohort.by_visit(from_end=True, read_position=read)
    held, least = _held(cohort), minimum_records(cohort.samples)
    features = []
    for feature in cohort.features[:FEATURES]:
        charts = []
        for table, unit, from_end in ((positions, "position", False), (visits, "visit", False), (back, "visit", True)):
            part = table.filter(pl.col("feature") == feature)
            kept = part.filter(pl.col("records") >= least)
            if kept.height > from_end:
                charts.append(_chart(kept, feature, unit, from_end, part.height))
        if charts:
            features.append({"name": feature, "charts": charts, "held": held.get(feature)})
    return {"features": features, "shown": PLACES, "minimum_records": least, "read_position": read}


def _held(cohort: CohortAttributions) -> dict[str, float]:
    """Feature → the mean relevance of the place the model reads."""
    read = cohort.read_position
    if read is None:
        return {}
    from_end = read < 0
    table = pl.concat(
        frame.select("feature", "relevance", place=pl.col(unit))
        for unit, frame in (
            ("position", cohort.by_position(from_end=from_end)),
            ("visit", cohort.by_visit(from_end=from_end)),
        )
    )
    place = -1 - read if from_end else read
    return dict(table.filter(pl.col("place") == place).select("feature", "relevance").rows())


def _chart(table: pl.DataFrame, feature: str, unit: str, from_end: bool, in_all: int) -> dict[str, Any]:
    """A bar for each of `PLACES` places, so that what is drawn does not grow with the largest number there is."""
    first = int(table[unit].min())  # type: ignore[arg-type]
    shown = table.filter(pl.col(unit) < first + PLACES)
    lifts = dict(shown.select(unit, "lift").rows())
    last = max(lifts)
    heights = [lifts.get(place, 0.0) for place in range(first, last + 1)]
    name = f"{unit}s before the last (0: the last)" if from_end else f"{unit} (0: the first)"
    axes = Axes(x=name, y="mean lift (×)", start=first, stop=last, line=1.0, whole=True)
    title = f"{text.shown(feature, 60)}: mean lift by {name}, {len(shown)} of {in_all} shown"
    chart: Markup = bar_chart(title, [Bars(heights, "series0", "lift")], axes)
    return {
        "chart": chart,
        "unit": unit,
        "from_end": from_end,
        "reach": (shown["records"][0], first, shown["records"][-1], last),
        "hidden": in_all - shown.height,
    }
