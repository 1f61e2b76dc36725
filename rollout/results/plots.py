"""Pictures for notebooks and files: the leading codes of a cohort, one record, and relevance by place.

Each function takes a `CohortAttributions` or a frame, returns a matplotlib `Figure`, and writes a PNG when given a
`path`. No figure is registered with pyplot, so none is left open.
"""

import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rollout.errors import require
from rollout.results.attributions import CohortAttributions
from rollout.results.drawing import new_figure, plain, saved, tidy, visible
from rollout.results.places import find_places, place_of

PLAIN, PLANTED, READ = "#4878a8", "#d1603d", "#b8b8b8"
ESTIMATES = {
    "effect": "log relevance above the average code of the same records (bars: ± 2 standard errors)",
    "lift": "mean lift (1: an even spread over the record)",
    "relevance": "mean relevance in the records that have the code",
    "prevalence": "share of the samples that have the code",
}

Names = Mapping[str, Mapping[str, str]]
Planted = Mapping[str, Collection[str]]


def plot_top_codes(
    source: CohortAttributions | pl.DataFrame,
    names: Names | None = None,
    planted: Planted | None = None,
    path: str | Path | None = None,
    top: int = 10,
    *,
    by: str = "lift",
    **options: Any,
) -> Any:
    """Draw the leading codes of each feature, planted ones marked.

    Args:
        source: A cohort, or a frame from `rank_codes` (effects with 2-standard-error bars) or from `top_codes`.
        names: Feature → code → name; None: the cohort's, or the frame's column `name`. A code without one is shown
            as it is.
        planted: Feature → planted codes, when the truth is known.
        path: PNG to write.
        top: Codes per feature.
        by: For a cohort, or a frame without effects: `lift`, `relevance` or `prevalence`.
        **options: For a cohort: further arguments of `top_codes`, such as `label` or `minimum_records`.

    Returns:
        The `Figure`.

    Raises:
        ValueError: If there is no code to draw, or the columns needed are not there.
    """
    _check_top(top)
    table = source.top_codes(by=by, k=top, **options) if isinstance(source, CohortAttributions) else source
    value = "effect" if "effect" in table.columns else by
    if value not in ESTIMATES or not {"feature", "code", value} <= set(table.columns):
        raise ValueError(f"plot_top_codes: source must have feature, code and {value!r}, got {table.columns}")
    if table.is_empty():
        raise ValueError("plot_top_codes: there is no code to draw; try a lower minimum_records")
    planted = planted or {}
    features = table["feature"].unique(maintain_order=True).to_list()
    rows = {f: table.filter(pl.col("feature") == f).head(top) for f in features}
    heights = [max(len(part), 3) for part in rows.values()]
    figure = new_figure((9.5, 0.33 * sum(heights) + 1.0 * len(features) + 0.6))
    axes = figure.subplots(
        len(features), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )  # fmt: skip
    for axis, feature in zip(axes[:, 0], features, strict=True):
        part, known = rows[feature], set(planted.get(feature, ()))
        place = np.arange(len(part))
        colours = [PLANTED if code in known else PLAIN for code in part["code"]]
        error = 2 * part["error"].to_numpy() if value == "effect" else None
        axis.barh(place, part[value].to_numpy(), xerr=error, color=colours, error_kw={"lw": 0.8, "capsize": 2})
        called = _names_of(part, feature, source, names)
        labels = [_label(code, called.get(code), code in known) for code in part["code"]]
        axis.set_yticks(place, labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(plain(feature), loc="left", fontsize=10, fontweight="bold")
        if value == "lift":
            axis.axvline(1, color="#404040", lw=0.7, ls=":")
        tidy(axis)
    axes[-1, 0].set_xlabel(ESTIMATES[value], fontsize=9)
    if any(planted.values()):
        figure.legend(*_keys(PLANTED, PLAIN), loc="outside upper right", ncols=2, fontsize=8)
    what = "Codes that the most samples have" if value == "prevalence" else "Codes that draw the most relevance"
    figure.suptitle(what, x=0.01, ha="left", fontsize=12)
    return saved(figure, path)


def plot_record(
    source: CohortAttributions | pl.DataFrame,
    names: Names | None = None,
    planted: Planted | None = None,
    title: str | None = None,
    path: str | Path | None = None,
    listed: int = 12,
    *,
    sample: int | None = None,
    read_position: int | None = 0,
) -> Any:
    """Draw one sample: relevance of every entry in record order, and beside it the leading entries by name.

    Args:
        source: The attribution rows of one sample, or a cohort.
        names: As in `plot_top_codes`.
        planted: As in `plot_top_codes`.
        title: Of the figure; None: patient, visit and sample.
        path: PNG to write.
        listed: Entries named per feature.
        sample: Of a cohort, which sample.
        read_position: The place the model reads, drawn in grey: 0 the first, −1 the last, None: none. Of a cohort, its
            own `read_position` is taken.

    Returns:
        The `Figure`.

    Raises:
        ValueError: If a cohort comes without a sample, or the rows are none or of several samples.
    """
    _check_top(listed, "listed")
    rows = _sample_rows(source, sample)
    whole: Collection[str] = ()
    if isinstance(source, CohortAttributions):
        names, read_position, whole = names or source.names, source.read_position, source.whole_features
    planted = planted or {}
    features = rows["feature"].unique(maintain_order=True).to_list()
    figure = new_figure((14, 2.9 * len(features) + 0.7))
    axes = figure.subplots(len(features), 2, squeeze=False, gridspec_kw={"width_ratios": [1.5, 1]})
    for (left, right), feature in zip(axes, features, strict=True):
        part = _marked(rows.filter(pl.col("feature") == feature), read_position, whole, set(planted.get(feature, ())))
        _draw_sequence(left, part, feature)
        _draw_leaders(right, part, (names or {}).get(feature, {}), listed)
    axes[-1, 0].set_xlabel("place in the record", fontsize=9)
    axes[-1, 1].set_xlabel("relevance (%)", fontsize=9)
    shown = [PLANTED] if any(planted.values()) else []
    grey = [] if read_position is None else [READ]
    figure.legend(*_keys(*shown, PLAIN, *grey), loc="outside lower left", ncols=3, fontsize=9)
    figure.suptitle(plain(title or _title(rows)), x=0.01, ha="left", fontsize=12)
    return saved(figure, path)


def plot_positions(
    source: CohortAttributions | pl.DataFrame,
    path: str | Path | None = None,
    feature: str | None = None,
    *,
    value: str = "lift",
    places: int = 60,
    from_end: bool = False,
) -> Any:
    """Draw mean lift or relevance by position, and by visit of nested features, with the records that reach each place.

    Args:
        source: A cohort, or a frame from `by_position` or `by_visit`.
        path: PNG to write.
        feature: One feature; None: each of them.
        value: `lift` or `relevance`.
        places: Places drawn of each feature.
        from_end: Of a cohort: count from the last place of each record. The place the model reads is left out.

    Returns:
        The `Figure`.

    Raises:
        ValueError: If there is nothing to draw, or `value` is another.
    """
    _check_top(places, "places")
    if value not in ("lift", "relevance"):
        raise ValueError(f"plot_positions: value must be 'lift' or 'relevance', got {value!r}")
    tables = [
        part.rename({unit: "place"}).with_columns(unit=pl.lit(unit))
        for unit, part in _place_tables(source, feature, from_end)
    ]
    table = pl.concat(tables)
    features = table["feature"].unique(maintain_order=True).to_list()
    if not features:
        raise ValueError("plot_positions: there are no places to draw")
    figure = new_figure((9.5, 2.6 * len(features) + 0.6))
    axes = figure.subplots(len(features), 1, squeeze=False)[:, 0]
    for axis, one in zip(axes, features, strict=True):
        part = table.filter(pl.col("feature") == one)
        part = part.filter(pl.col("place") < pl.col("place").min() + places)
        axis.bar(part["place"].to_numpy(), part[value].to_numpy(), width=0.85, color=PLAIN)
        if value == "lift":
            axis.axhline(1, color="#404040", lw=0.7, ls=":")
        unit = part["unit"][0]
        axis.set_xlabel(f"{unit}s before the last (0: the last)" if from_end else f"{unit} (0: the first)", fontsize=9)
        axis.set_ylabel("mean lift (×)" if value == "lift" else "mean relevance", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        ends = [f"{part['records'][i]:,} records reach {unit} {part['place'][i]}" for i in (0, -1)]
        axis.set_title(plain(one), loc="left", fontsize=10, fontweight="bold")
        axis.set_title("; ".join(ends), loc="right", fontsize=8, color="#505050")
        tidy(axis)
    figure.suptitle(
        f"{'Lift' if value == 'lift' else 'Relevance'} by place in the record", x=0.01, ha="left", fontsize=12
    )
    return saved(figure, path)


def _place_tables(
    source: CohortAttributions | pl.DataFrame, feature: str | None, from_end: bool
) -> list[tuple[str, pl.DataFrame]]:
    if isinstance(source, CohortAttributions):
        options: dict[str, Any] = {"from_end": from_end, "read_position": "auto"}
        return [("position", source.by_position(feature, **options)), ("visit", source.by_visit(feature, **options))]
    unit = next((name for name in ("position", "visit") if name in source.columns), None)
    if unit is None or not {"feature", "lift", "relevance", "records"} <= set(source.columns):
        raise ValueError(f"plot_positions: source must be from by_position or by_visit, got columns {source.columns}")
    return [(unit, source if feature is None else source.filter(pl.col("feature") == feature))]


def _sample_rows(source: CohortAttributions | pl.DataFrame, sample: int | None) -> pl.DataFrame:
    if isinstance(source, CohortAttributions):
        if sample is None:
            raise ValueError("plot_record: sample must say which sample of the cohort to draw, got None")
        rows = source.sample(sample)
        if rows.is_empty():
            raise ValueError(f"plot_record: sample {sample} has no entries to draw")
    else:
        rows = source if sample is None else source.filter(pl.col("sample") == sample)
    if rows["sample"].n_unique() != 1:
        raise ValueError(
            f"plot_record: source must have the rows of one sample, got {rows['sample'].n_unique()}; give sample="
        )
    return rows


def _marked(rows: pl.DataFrame, read: int | None, whole: Collection[str], planted: set[str]) -> pl.DataFrame:
    """Rows in record order with their `colour`, whether the model reads at their place, and what `even` there is."""
    places = find_places(rows, read, whole).select("place", "read", "even").collect()
    ordered = rows.with_columns(place_of(whole)).sort("place", "position")
    flagged = ordered.join(places, on="place", how="left", maintain_order="left")
    plain = pl.when("read").then(pl.lit(READ)).otherwise(pl.lit(PLAIN))
    hit = pl.col("code").is_in(list(planted)).fill_null(False)
    return flagged.with_columns(planted=hit, colour=pl.when(hit).then(pl.lit(PLANTED)).otherwise(plain))


def _draw_sequence(axis: Any, part: pl.DataFrame, feature: str) -> None:
    percent, count = 100 * part["attribution"].to_numpy(), len(part)
    nested = part["visit"].null_count() < count
    place, read = np.arange(count), part["read"].to_numpy()
    axis.bar(place, percent, width=0.9, color=part["colour"].to_list())
    others = percent[~read] if not read.all() else percent
    even = 100 * (part.select(pl.col("even").max()).item() or 0.0)
    ceiling = 1.25 * max(float(others.max()), even, 0.0) or 1.0
    axis.set_ylim(min(1.25 * float(others.min()), 0.0), ceiling)
    for at in np.flatnonzero(read & (percent > ceiling))[:1]:
        axis.text(at + 0.5, 0.97 * ceiling, f"↑ {percent[at]:.0f} %", va="top", fontsize=8, color="#707070")
    if even:
        _draw_even(axis, even, max(count - 0.5, 11.5))
    if nested:
        for at in np.flatnonzero(np.diff(part["visit"].to_numpy())):
            axis.axvline(at + 0.5, color="#909090", lw=0.6)
    axis.set_xlim(-0.6, max(count - 0.4, 11.6))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("relevance (%)", fontsize=9)
    kind = "codes" if part["code"].null_count() < count else "steps"
    size = f"{count} {kind} in {part['visit'].n_unique()} visits" if nested else f"{count} {kind}"
    axis.set_title(plain(f"{feature} ({size})"), loc="left", fontsize=10, fontweight="bold")
    tidy(axis)


def _draw_even(axis: Any, even: float, right: float) -> None:
    """A line where the lift is 1."""
    axis.axhline(even, color="#404040", lw=0.7, ls=":")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    axis.text(right, even, "even spread", bbox=box, ha="right", va="bottom", fontsize=7, color="#404040")


def _draw_leaders(axis: Any, part: pl.DataFrame, names: Mapping[str, str], listed: int) -> None:
    nested = part["visit"].null_count() < len(part)
    units = part.unique("visit", keep="first", maintain_order=True) if nested else part
    leaders = units.sort("attribution", descending=True, maintain_order=True).head(listed)
    axis.barh(
        np.arange(len(leaders)), 100 * leaders["attribution"].to_numpy(), color=leaders["colour"].to_list()
    )  # fmt: skip
    labels = []
    for row in leaders.rows(named=True):
        if nested:
            codes = part.filter(pl.col("visit") == row["visit"])["code"].to_list()
            labels.append(_label(f"visit {row['visit']}:", ", ".join(map(str, codes)), False, width=44))
        elif row["code"] is None:
            labels.append(f"step {row['position']}")
        else:
            labels.append(_label(row["code"], names.get(row["code"]), row["planted"], width=44))
    axis.set_yticks(np.arange(len(leaders)), labels, fontsize=7)
    axis.set_ylim(max(len(leaders), 6) - 0.4, -0.6)
    tidy(axis)


def _title(rows: pl.DataFrame) -> str:
    first = rows.row(0, named=True)
    patient, visit = (visible(first.get(key))[:40] for key in ("patient_id", "visit_id"))
    at = "" if first.get("visit_id") is None else f", visit {visit}"
    return f"Patient {patient}{at} (sample {first['sample']}): relevance of each entry"


def _names_of(part: pl.DataFrame, feature: str, source: Any, names: Names | None) -> Mapping[str, str]:
    if names is not None:
        return names.get(feature, {})
    if isinstance(source, CohortAttributions):
        return source.names.get(feature, {})
    if "name" not in part.columns:
        return {}
    return {code: name for code, name in part.select("code", "name").rows() if name is not None}


def _label(code: str | None, name: str | None, planted: bool, width: int = 58) -> str:
    code = "(empty string)" if code == "" else code
    text = f"{code}  {name}" if name else f"{code}"
    return ("★ " if planted else "") + plain(textwrap.shorten(visible(text), width=width, placeholder=" …"))


def _keys(*colours: str) -> tuple[list[Any], list[str]]:
    patches = require("matplotlib.patches", "plots")
    words = {
        PLANTED: "planted risk code",
        PLAIN: "other entries",
        READ: "place the model reads (keeps the residual's share)",
    }
    return [patches.Patch(color=colour) for colour in colours], [words[colour] for colour in colours]


def _check_top(value: int, name: str = "top") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
