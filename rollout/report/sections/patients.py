"""The patient view: each chosen record as a timeline coloured by relevance, with prediction and truth."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from markupsafe import Markup

from rollout.report import scale
from rollout.report.bounds import CHIPS, FEATURES, LEADERS, VISIT_CODES, VISITS
from rollout.report.charts import Axes, stem_chart
from rollout.report.sections.choice import Chosen, chosen
from rollout.report.text import chance, finite, in_percent, number, shown
from rollout.results.attributions import CohortAttributions
from rollout.results.padding import NOTABLE
from rollout.results.places import find_places, place_of


def patients(cohort: CohortAttributions, patient: str | None) -> dict[str, Any]:
    """The chosen samples, each with its features as timelines.

    Raises:
        ValueError: If no attributed sample is of the patient asked for.
    """
    found, in_all = chosen(cohort, patient)
    return {
        "asked": patient,
        "in_all": in_all,
        "samples": [record_view(cohort, one) for one in found],
        "read_position": cohort.read_position,
    }


def record_view(cohort: CohortAttributions, one: Chosen, entries: int = CHIPS, visits: int = VISITS) -> dict[str, Any]:
    """One sample with its features as timelines.

    Args:
        cohort: Its cohort.
        one: The sample, with its rows.
        entries: The first so many of a flat feature are shown.
        visits: The last so many of a nested one.
    """
    known, kind = one.rows.row(0, named=True), cohort.label_kind
    whole = cohort.whole_features
    places = find_places(one.rows, cohort.read_position, whole).drop("sample", "last").collect()
    rows = one.rows.with_columns(place_of(whole)).sort("place", "position").join(
        places, on=["feature", "place"], how="left", maintain_order="left"
    )  # fmt: skip
    parts = rows.partition_by("feature", as_dict=True)
    padding = {
        name: share
        for name, share in zip(cohort.features, known["padding_share"] or [], strict=False)
        if share is not None and share > NOTABLE
    }
    present = [name for name in cohort.features if (name,) in parts]
    present += sorted({name for (name,) in parts} - set(present))
    return {
        "sample": one.sample,
        "why": one.why,
        "patient": known["patient_id"],
        "visit": known["visit_id"],
        "prediction": prediction_text(known["y_prob"], kind),
        "truth": truth_text(known["y_true"], kind),
        "share": finite(known["y_prob"][0]) if kind == "binary" and known["y_prob"] else None,
        "target": known.get("target_class"),
        "features": [
            {**_feature(cohort, parts[name,], name, entries, visits), "padding": padding.get(name)}
            for name in present[:FEATURES]
        ],
        "without": [name for name in cohort.features[:FEATURES] if name not in present],
        "features_hidden": max(len(present) - FEATURES, 0),
    }


def prediction_text(prob: Sequence[float | None] | None, kind: str | None) -> str:
    """What was predicted, in words."""
    if not prob:
        return "no prediction kept"
    known = {i: value for i, value in enumerate(map(finite, prob)) if value is not None}
    if not known:
        return "no finite prediction"
    top = max(known, key=lambda i: known[i])
    if kind == "multilabel":
        over = sum(value >= 0.5 for value in known.values())
        return f"{over} of {len(prob)} labels at 0.5 or more; highest label {top}, {chance(known[top])}"
    if len(prob) > 1:
        return f"class {top} with {chance(known[top])}"
    return chance(known[top]) if kind == "binary" else number(known[top])


def truth_text(true: Sequence[float | None] | None, kind: str | None) -> str:
    """What was true, in words."""
    known = [finite(value) for value in true or ()]
    if all(value is None for value in known):
        return "not known"
    if kind == "multilabel":
        on = [str(i) for i, value in enumerate(known) if value == 1]
        return f"labels {', '.join(on[:20])}{' …' if len(on) > 20 else ''}" if on else "no label"
    if kind == "regression":
        return number(known[0])
    return f"{'class' if kind == 'multiclass' else 'label'} {number(known[0])}"


def _feature(cohort: CohortAttributions, rows: pl.DataFrame, name: str, entries: int, visits: int) -> dict[str, Any]:
    """The timeline of one feature: visits with their codes, or entries in order, the leading ones, and a chart."""
    nested, coded = (rows[key].null_count() < rows.height for key in ("visit", "code"))
    others, read = rows.filter(~pl.col("read")), rows.filter("read")
    timed, names = others["time"].is_finite().any(), cohort.names.get(name, {})
    view: dict[str, Any] = {
        "name": name,
        "entries": rows.height,
        "time_unit": cohort.time_units.get(name),
        "places": rows["place"].n_unique(),
        "nested": nested,
        "even": rows["even"].max(),
        "reads": read.height > 0,
        "leaders": [],
        "visits": _visits(rows, names, visits) if nested else [],
        "chips": [],
        "chart": None,
        "held": None,
    }
    if coded and not nested:
        view["chips"] = _chips(rows.head(entries), names)
        view["leaders"] = _chips(others.sort("relevance", descending=True, maintain_order=True).head(LEADERS), names)
    if not nested and (timed or not coded):
        view["chart"] = _chart(cohort, others, name, timed) if others.height > coded else None
        view["held"] = read["relevance"].first() if read.height else None
    return view


def _chips(rows: pl.DataFrame, names: Mapping[str, str]) -> list[dict[str, Any]]:
    keys = ("code", "relevance", "lift", "place", "time", "read")
    return [
        {
            **{key: row[key] for key in keys},
            "name": names.get(row["code"] or ""),
            "level": "read" if row["read"] else f"l{scale.level(row['lift'])}",
        }
        for row in rows.select(keys).rows(named=True)
    ]


def _visits(rows: pl.DataFrame, names: Mapping[str, str], most: int) -> list[dict[str, Any]]:
    """The visits in order; of a long record the last ones, and of a visit its first codes."""
    last = rows["place"].unique().sort().tail(most)
    parts = rows.filter(pl.col("place").is_in(last.implode())).partition_by("place", maintain_order=True)
    codes = [_chips(part.head(VISIT_CODES), names) for part in parts]
    return [
        {**chips[0], "codes": chips, "hidden": part.height - len(chips)}
        for part, chips in zip(parts, codes, strict=True)
    ]


def _chart(cohort: CohortAttributions, rows: pl.DataFrame, name: str, timed: bool) -> Markup:
    """A stem for each entry, the place the model reads left out: it would press down the others."""
    where = pl.col("time" if timed else "place").cast(pl.Float64).alias("where")
    drawn = rows.with_columns(where).filter(pl.col("where").is_finite())
    kept = drawn.sort(pl.col("relevance").abs(), descending=True, maintain_order=True).head(CHIPS).sort("place")
    percent = in_percent(cohort.manifest)
    places, unit = kept["where"].to_list(), 100 if percent else 1
    time = shown(cohort.time_units.get(name) or "in the unit of the data", 40)
    axes = Axes(
        x=f"time ({time})" if timed else "position (0: the first)",
        y="relevance (%)" if percent else "relevance",
        start=min(places),
        stop=max(places),
        line=unit * rows["even"][0],
        whole=not timed,
    )
    over = "time" if timed else "the record"
    title = f"{shown(name, 60)}: relevance over {over}, {len(places)} of {rows.height} entries"
    styles = [f"l{scale.level(lift)}" for lift in kept["lift"]]
    return stem_chart(title, places, (unit * kept["relevance"]).to_list(), styles, axes)
