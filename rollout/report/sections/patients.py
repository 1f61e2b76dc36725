"""The patient view: each chosen record as a timeline coloured by relevance, with prediction and truth."""

from typing import Any

import polars as pl
from markupsafe import Markup

from rollout.report import scale
from rollout.report.bounds import CHIPS, FEATURES, LEADERS, VISIT_CODES, VISITS
from rollout.report.charts import Axes, stem_chart
from rollout.report.sections.choice import chosen
from rollout.report.sections.summary import NOTABLE
from rollout.report.text import number, percent, shown
from rollout.results.attributions import CohortAttributions


def patients(cohort: CohortAttributions, patient: str | None) -> dict[str, Any]:
    """The chosen samples, each with its features as timelines.

    Raises:
        ValueError: If no attributed sample is of the patient asked for.
    """
    found, in_all = chosen(cohort, patient)
    return {
        "asked": patient,
        "in_all": in_all,
        "samples": [_sample(cohort, one.sample, one.why) for one in found],
        "legend": scale.legend(),
        "read_position": cohort.read_position,
        "chips": CHIPS,
        "visits": VISITS,
        "visit_codes": VISIT_CODES,
        "leaders": LEADERS,
    }


def _sample(cohort: CohortAttributions, sample: int, why: str) -> dict[str, Any]:
    rows = cohort.sample(sample)
    known = cohort.predictions.filter(pl.col("sample") == sample).collect(engine="streaming").row(0, named=True)
    padding = dict(zip(cohort.features, known["padding_share"] or [], strict=False))
    present = rows["feature"].unique(maintain_order=True).to_list()
    return {
        "sample": sample,
        "why": why,
        "patient": known["patient_id"],
        "visit": known["visit_id"],
        "prediction": prediction_text(known["y_prob"], cohort.label_kind),
        "truth": truth_text(known["y_true"], cohort.label_kind),
        "share": known["y_prob"][0] if cohort.label_kind == "binary" and known["y_prob"] else None,
        "target": known.get("target_class"),
        "features": [
            _feature(cohort, rows.filter(pl.col("feature") == name), name, padding.get(name) or 0.0)
            for name in present[:FEATURES]
        ],
        "without": [name for name in cohort.features[:FEATURES] if name not in present],
        "features_hidden": max(len(present) - FEATURES, 0),
    }


def prediction_text(prob: list[float] | None, kind: str | None) -> str:
    """What was predicted, in words."""
    if not prob:
        return "no prediction kept"
    if kind == "multilabel":
        over = [i for i, p in enumerate(prob) if p >= 0.5]
        top = max(range(len(prob)), key=lambda i: prob[i])
        return f"{len(over)} of {len(prob)} labels at 0.5 or more; highest label {top}, {percent(prob[top])}"
    if len(prob) > 1:
        top = max(range(len(prob)), key=lambda i: prob[i])
        return f"class {top} with {percent(prob[top])}"
    return percent(prob[0]) if kind == "binary" else number(prob[0])


def truth_text(true: list[float] | None, kind: str | None) -> str:
    """What was true, in words."""
    if not true:
        return "not known"
    if kind == "multilabel":
        on = [str(i) for i, value in enumerate(true) if value == 1]
        return f"labels {', '.join(on[:20])}{' …' if len(on) > 20 else ''}" if on else "no label"
    if kind == "regression":
        return number(true[0])
    return f"{'class' if kind == 'multiclass' else 'label'} {true[0]:g}"


def _feature(cohort: CohortAttributions, rows: pl.DataFrame, name: str, padding: float) -> dict[str, Any]:
    places = _places(rows, cohort.read_position, padding)
    nested = rows["visit"].null_count() < rows.height
    names = cohort.names.get(name, {})
    coded = rows["code"].null_count() < rows.height
    shown_rows = _joined(rows, places)
    view: dict[str, Any] = {
        "name": name,
        "entries": rows.height,
        "places": places.height,
        "nested": nested,
        "coded": coded,
        "padding": padding if padding > NOTABLE else None,
        "even": 1.0 / places.height,
        "leaders": [],
        "visits": [],
        "chips": [],
        "chart": None,
        "read_share": None,
    }
    if nested:
        view["visits"] = _visits(shown_rows, names)
        return view
    if coded:
        view["chips"] = [_chip(row, names) for row in shown_rows.head(CHIPS).rows(named=True)]
        leaders = shown_rows.filter(~pl.col("read")).sort("share", descending=True, maintain_order=True).head(LEADERS)
        view["leaders"] = [_chip(row, names) for row in leaders.rows(named=True)]
    timed = rows["time"].null_count() < rows.height
    others = shown_rows.filter(~pl.col("read"))
    if (timed or not coded) and others.height > 1:
        view["chart"] = _chart(others, name, timed, view["even"])
        view["read_share"] = places.filter("read")["share"].sum() if places["read"].any() else None
    return view


def _places(rows: pl.DataFrame, read: int | None, padding: float) -> pl.DataFrame:
    """The places of one record: ``place``, ``share`` of its relevance, ``lift`` without the place read, ``read``.

    ``padding`` is the share of the relevance that no place has.
    """
    place = pl.coalesce("visit", "position").alias("place")
    table = rows.group_by(place).agg(pl.col("attribution").cast(pl.Float64).mean().alias("score")).sort("place")
    where = None if read is None else (read if read >= 0 else int(table["place"].max()) + 1 + read)  # type: ignore[arg-type]
    flagged = table.with_columns(read=pl.lit(False) if where is None or table.height == 1 else pl.col("place") == where)
    others = flagged.filter(~pl.col("read"))
    spread = float(others["score"].sum()) / max(others.height, 1)
    total = float(table["score"].sum()) / max(1.0 - padding, 1e-9)
    return flagged.with_columns(
        share=pl.col("score") / total if total > 0 else pl.lit(0.0),
        lift=pl.col("score") / spread if spread > 0 else pl.lit(0.0),
    )


def _joined(rows: pl.DataFrame, places: pl.DataFrame) -> pl.DataFrame:
    place = pl.coalesce("visit", "position").alias("place")
    return rows.with_columns(place).join(places, on="place", how="left", maintain_order="left")


def _chip(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {
        "code": row["code"],
        "name": names.get(row["code"] or ""),
        "share": row["share"],
        "lift": row["lift"],
        "level": "read" if row["read"] else f"l{scale.level(row['lift'])}",
        "place": row["place"],
        "time": row["time"],
        "read": row["read"],
    }


def _visits(rows: pl.DataFrame, names: dict[str, str]) -> list[dict[str, Any]]:
    """The visits in order; of a long record the last ones, and of a visit its first codes."""
    visits = []
    for part in rows.partition_by("place", maintain_order=True)[-VISITS:]:
        chips = [_chip(row, names) for row in part.head(VISIT_CODES).rows(named=True)]
        visits.append({**chips[0], "codes": chips, "hidden": part.height - len(chips)})
    return visits


def _chart(rows: pl.DataFrame, name: str, timed: bool, even: float) -> Markup:
    """A stem for each entry, the place the model reads left out: it would press down the others."""
    drawn = rows.drop_nulls("time") if timed else rows
    kept = drawn.sort("share", descending=True).head(CHIPS).sort("place")
    where = (kept["time"] if timed else kept["place"]).cast(pl.Float64).to_list()
    styles = [f"l{scale.level(lift)}" for lift in kept["lift"]]
    heights = [100 * share for share in kept["share"].to_list()]
    axis = "time (in the unit of the data)" if timed else "position (0: the first)"
    axes = Axes(
        x=axis, y="relevance (%)", start=min(where, default=0), stop=max(where, default=0), line=100 * even,
        whole=not timed,
    )  # fmt: skip
    over = "time" if timed else "the record"
    title = f"{shown(name, 60)}: relevance over {over}, {len(where)} of {rows.height} entries"
    return stem_chart(title, where, heights, styles, axes)
