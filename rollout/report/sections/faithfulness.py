"""Is it true? The curves, each method beside random, the measures in numbers, and the same by group."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from markupsafe import Markup

from rollout.report.bounds import ERRORS, GROUPS, METHODS
from rollout.report.charts import Axes, Line, line_chart
from rollout.report.forest import Row, forest_chart
from rollout.report.text import shown
from rollout.results.attributions import CohortAttributions
from rollout.results.drawing import LINES
from rollout.results.faithfulness import RANDOM, CohortFaithfulness
from rollout.results.groups import BY
from rollout.results.measures import BETTER, MEASURES, WORSE

GROUPED = ("comprehensiveness", "sufficiency")
FOLDED = ("deletion", "insertion", "log_odds")
"""Measures that say in another way what those of `GROUPED` say."""
TITLES = {"predicted": "By the class predicted", "label": "By the true label", "length": "By the length of the record"}
MEANINGS = {
    "comprehensiveness": "what the probability loses without the top codes",
    "sufficiency": "what it loses with the top codes alone",
    "deletion": "area under the probability as top codes are taken out",
    "insertion": "area under the probability as top codes are put in",
    "log_odds": "change of the log of the probability without the top codes",
    "recall": "planted codes found among as many top codes",
    "planted_auc": "chance that a planted code ranks above another",
    "leave_one_out": "rank correlation with what taking each code out does",
}


def faithfulness(found: CohortFaithfulness, beside: CohortAttributions | None = None) -> dict[str, Any]:
    """What the section shows: at most `METHODS` methods, and tables of at most `GROUPS` groups.

    Args:
        found: The evaluation.
        beside: The attributions that are on the same page, if any.

    Raises:
        ValueError: If the evaluation is of another model than the attributions.
    """
    methods = _shown_methods(found.methods)
    styles = line_classes(found.methods)
    told = found.evaluation
    view: dict[str, Any] = {
        "samples": found.samples,
        "patients": found.patients,
        "ignored": _ignored(found),
        "failures": _failures(found),
        "methods": [{"name": name, "style": styles[name]} for name in methods],
        "methods_in_all": len(found.methods),
        "shares": [f"{share:g}" for share in found.shares],
        "metric": told.get("metric"),
        "replacement": told.get("replacement"),
        "level": found.level,
        "complete": found.complete,
        "apart": beside is not None and _of_other_samples(found, beside),
        "charts": [],
        "forest": None,
        "blocks": [],
        "not_better": [],
        "better": [],
        "groups": [],
    }
    if not found.samples:
        return view
    differences = found.differences(RANDOM)
    view["comparisons"] = differences["comparisons"].max()
    view["charts"] = _curves(found, methods, styles)
    view["forest"] = _forest(differences, methods, styles) if len(methods) > 1 else None
    view["blocks"] = _blocks(found.summary(), differences, methods)
    mains = differences.filter((pl.col("measure") == "comprehensiveness") & pl.col("method").is_in(methods))
    rows = {row["method"]: row for row in mains.rows(named=True)}
    view["better"] = [name for name in methods if name in rows and rows[name]["verdict"] == BETTER]
    view["not_better"] = [rows[name] for name in methods if name in rows and rows[name]["verdict"] != BETTER]
    view["groups"] = [group for by in BY if (group := _by(found, by, methods)) is not None]
    return view


def _of_other_samples(found: CohortFaithfulness, beside: CohortAttributions) -> bool:
    mine, other = (one.manifest["identity"] for one in (found, beside))
    if mine["model"]["fingerprint"] != other["model"]["fingerprint"]:
        raise ValueError(
            "evaluation must be of the model whose attributions the report is of, got one of another model"
        )
    return mine["dataset"]["fingerprint"] != other["dataset"]["fingerprint"]


def line_classes(methods: Sequence[str]) -> dict[str, str]:
    """Method → the class of its colour on the page."""
    others = [name for name in methods if name != RANDOM]
    return {**{name: f"m{place % len(LINES)}" for place, name in enumerate(others)}, RANDOM: "mr"}


def _shown_methods(methods: Sequence[str]) -> list[str]:
    others = [name for name in methods if name != RANDOM][: METHODS - 1]
    return [*others, *(name for name in methods if name == RANDOM)]


def _ignored(found: CohortFaithfulness) -> int:
    return int(found.predictions.select((~pl.col("evaluated")).sum()).collect(engine="streaming").item() or 0)


def _failures(found: CohortFaithfulness) -> dict[str, Any]:
    error = pl.col("error").str.slice(0, 200)
    counted = found.failures.group_by(error).agg(pl.len().alias("samples"), pl.col("sample").min().alias("example"))
    table = counted.sort(["samples", "example"], descending=[True, False]).collect(engine="streaming")
    return {"samples": int(table["samples"].sum()), "reasons": table.head(ERRORS).rows(named=True),
            "reasons_in_all": table.height}  # fmt: skip


def _curves(found: CohortFaithfulness, methods: Sequence[str], styles: Mapping[str, str]) -> list[dict[str, Any]]:
    table, charts = found.curves(), []
    for direction, title, name in (
        ("without", "Deletion: the top codes taken out", "top codes taken out (%)"),
        ("only", "Insertion: the top codes alone", "top codes kept (%)"),
    ):
        lines = []
        for method in methods:
            part = table.filter((pl.col("direction") == direction) & (pl.col("method") == method))
            y, low, high = (part[f"probability{end}"].to_list() for end in ("", "_low", "_high"))
            lines.append(Line(part["share"].to_list(), y, low, high, styles[method], method))
        ends = table.filter(pl.col("direction") == direction)["share"]
        axes = Axes(name, "mean probability", float(ends.min()), float(ends.max()), zero=False)  # type: ignore[arg-type]
        charts.append({"title": title, "chart": line_chart(f"{title}; a line per method", lines, axes)})
    return charts


def _forest(differences: pl.DataFrame, methods: Sequence[str], styles: Mapping[str, str]) -> Markup:
    rows: list[Row] = []
    for measure, sign in MEASURES.items():
        known = {row["method"]: row for row in differences.filter(pl.col("measure") == measure).rows(named=True)}
        if measure == "log_odds" or not known:  # of another unit
            continue
        rows.append(Row(measure.replace("_", " ")))
        for method in methods[:-1]:
            row = known[method]
            value, low, high = (None if row[key] is None else sign * row[key] for key in ("difference", "low", "high"))
            stands = row["verdict"] in (BETTER, WORSE)
            rows.append(Row(shown(method, 60), styles[method], value, low, high, stands))
    return forest_chart("Difference of each method to random, by measure", rows, "← worse than random · better →")


def _blocks(summary: pl.DataFrame, differences: pl.DataFrame, methods: Sequence[str]) -> list[dict[str, Any]]:
    """A block of the table per measure, a row per method."""
    joined = summary.join(
        differences.select("measure", "method", "difference", "p_holm", "verdict", "detectable",
                           difference_low="low", difference_high="high"),
        on=["measure", "method"], how="left",
    )  # fmt: skip
    rows = {(row["measure"], row["method"]): row for row in joined.rows(named=True)}
    return [
        {
            "measure": measure.replace("_", " "),
            "folded": measure in FOLDED,
            "high": sign > 0,
            "meaning": MEANINGS[measure],
            "rows": [rows[measure, method] for method in methods],
        }
        for measure, sign in MEASURES.items()
        if (measure, methods[0]) in rows
    ]


def _by(found: CohortFaithfulness, by: str, methods: Sequence[str]) -> dict[str, Any] | None:
    """The table of a grouping; None where there is nothing to go by."""
    if by == "label" and found.label_kind in (None, "regression"):
        return None
    try:
        summary = found.summary(by)
    except ValueError:  # no class was followed, or the codes were not counted
        return None
    names = summary["group"].unique(maintain_order=True).to_list()
    view: dict[str, Any] = {
        "by": by,
        "title": TITLES[by],
        "in_all": len(names),
        "groups": [],
        "too_many": len(names) > GROUPS,
    }
    if view["too_many"]:
        return view
    differences = found.differences(RANDOM, by, measures=GROUPED)
    words = _label_names(found) if by != "length" else {}
    for name in names:
        mine, other = (table.filter(pl.col("group") == name) for table in (summary, differences))
        main = mine.filter(pl.col("measure").is_in(GROUPED))
        view["groups"].append({
            "name": name, "label": words.get(name), "samples": main["samples"][0], "patients": main["patients"][0],
            "blocks": _blocks(main, other, methods),
        })  # fmt: skip
    view["comparisons"] = differences["comparisons"].max()
    return view


def _label_names(found: CohortFaithfulness) -> dict[str, str]:
    """Number of a class, as text → its name, where one output of the dataset has names."""
    labels = found.manifest.get("labels")
    if not isinstance(labels, Mapping) or len(labels) != 1:
        return {}
    (names,) = labels.values()
    return {str(number): name for number, name in enumerate(names) if name is not None and name != str(number)}
