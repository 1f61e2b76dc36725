"""What objects show of themselves in a notebook: small tables of HTML, without script, network or file.

Every string of the data is escaped, cut, and shown without what does not print; the size is bounded whatever is shown.
Nothing beyond the standard library is imported: frames are handed in.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from rollout.errors import one_line

if TYPE_CHECKING:
    import polars as pl

    from rollout.results.attributions import CohortAttributions
    from rollout.results.comparison import CohortComparison
    from rollout.results.faithfulness import CohortFaithfulness

__all__ = ["Bar", "RecordView", "paragraph", "show_record", "table"]

TEXT, LINE = 60, 300
"""Signs of a cell, and of a line above or below a table."""
SAMPLES, FEATURES, PLACES, CODES, LEADERS = 6, 8, 100, 12, 5
MOST_ROWS = 2_000_000
"""Rows of a cohort up to which its leading codes are looked for, which takes a pass over them: about a second."""
COLOUR, AGAINST = "#4878a8", "#d1603d"
"""Of bars: relevance, and negative relevance. Text and ground are the notebook's."""
_LEFT = "text-align:left;vertical-align:top;padding:0 0.8em 0 0"
_NEEDED = ("sample", "feature", "visit", "position", "code", "attribution")
_OUTPUTS = {"y_prob": "prediction", "y_true": "truth"}

Names = Mapping[str, Mapping[str, str]]


class Bar(NamedTuple):
    """A cell: a bar of `share` (−1 to 1) of its full width, and a number."""

    share: float
    text: str


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", note: str = "") -> str:
    """A table; cells are strings, escaped here, or bars."""
    head = "".join(f'<th style="{_LEFT}">{_said(name)}</th>' for name in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"{paragraph(title)}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{paragraph(note)}"


def paragraph(text: str) -> str:
    """A line of text; nothing of none."""
    return f"<p>{_said(text, LINE)}</p>" if text else ""


def _cell(value: Any) -> str:
    if not isinstance(value, Bar):
        return f'<td style="{_LEFT}">{_said(value)}</td>'
    width = 100 * min(abs(value.share), 1.0)
    colour = COLOUR if value.share >= 0 else AGAINST
    bar = f'<div style="background:{colour};height:0.5em;width:{width:.1f}%"></div>'
    return f'<td style="{_LEFT};min-width:8em">{_said(value.text)}{bar}</td>'


def _said(value: Any, most: int = TEXT) -> str:
    text = "" if value is None else str(value)
    return f"<bdi>{escape(one_line(text, most))}</bdi>" if text else ""


def _number(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _interval(value: Any, low: Any, high: Any) -> str:
    return _number(value) + ("" if low is None or high is None else f" [{_number(low)}, {_number(high)}]")


class RecordView:
    """Some records; a notebook shows them as tables, a terminal as a frame. See `show_record`."""

    def __init__(self, rows: "pl.DataFrame", names: Names) -> None:
        self._rows, self._names = rows, names

    def __repr__(self) -> str:
        return repr(self._rows)

    def _repr_html_(self) -> str:
        samples = self._rows["sample"].unique(maintain_order=True).to_list()
        shown = [self._sample(self._rows.filter(self._rows["sample"] == number)) for number in samples[:SAMPLES]]
        return "".join(shown) + _more(len(samples) - SAMPLES, "samples")

    def _sample(self, rows: "pl.DataFrame") -> str:
        known = rows.row(0, named=True)
        said = [f"Sample {known['sample']}"]
        said += [f"patient {known['patient_id']}"] if known.get("patient_id") is not None else []
        for name, word in _OUTPUTS.items():
            if known.get(name) is not None:
                said.append(f"{word} {', '.join(map(_number, known[name][:CODES]))}")
        features = rows["feature"].unique(maintain_order=True).to_list()
        tables = [self._feature(rows.filter(rows["feature"] == name), name) for name in features[:FEATURES]]
        return paragraph(", ".join(said)) + "".join(tables) + _more(len(features) - FEATURES, "features")

    def _feature(self, rows: "pl.DataFrame", feature: str) -> str:
        nested, timed = rows["visit"].count() > 0, "time" in rows.columns and rows["time"].count() > 0
        place = "visit" if nested else "position"
        groups = [list(group) for _, group in groupby(rows.iter_rows(named=True), key=lambda row: row[place])]
        scores = [group[0]["attribution"] for group in groups]
        most = max((abs(score) for score in scores if math.isfinite(score)), default=0.0)
        cells = []
        for group, score in zip(groups[:PLACES], scores, strict=False):
            share = score / most if most > 0 and math.isfinite(score) else 0.0
            time = [_number(group[0]["time"])] if timed else []
            cells.append([group[0][place], *time, self._codes(feature, group), Bar(share, _number(score))])
        note = f"{len(groups) - PLACES:,} more places" if len(groups) > PLACES else ""
        return table([place, *(["time"] if timed else []), "code", "relevance"], cells, feature, note)

    def _codes(self, feature: str, group: Sequence[Mapping[str, Any]]) -> str:
        names = self._names.get(feature) or {}
        codes = [row["code"] for row in group if row["code"] is not None]
        said = [f"{code} {names[code]}" if code in names else code for code in codes[:CODES]]
        return "; ".join(said) + (f"; {len(codes) - CODES:,} more" if len(codes) > CODES else "")


def show_record(rows: "pl.DataFrame", names: Names | None = None) -> RecordView:
    """Attribution rows as tables in a notebook: each place of each record in order, its relevance a bar.

        show_record(cohort.patient("p17"), cohort.names)

    Bars are as long as the relevance is large beside the record's largest of the same feature.

    Args:
        rows: As `CohortAttributions.sample` and `patient` give them; the first `SAMPLES` samples, `FEATURES` features
            of each and `PLACES` places of each are shown.
        names: Feature → code → name.

    Raises:
        ValueError: If a column lacks.
    """
    lacking = [name for name in _NEEDED if name not in rows.columns]
    if lacking:
        raise ValueError(f"show_record: rows must have the columns {list(_NEEDED)}, got none called {lacking}")
    return RecordView(rows, names or {})


def _more(count: int, what: str) -> str:
    return paragraph(f"{count:,} more {what}") if count > 0 else ""


def cohort_html(cohort: "CohortAttributions") -> str:
    """What was run, on how many samples, and the leading codes of each feature by lift."""
    identity = cohort.manifest["identity"]
    method = identity.get("method") or {}
    failed = cohort.manifest["counts"]["failed"]
    facts = [
        ("folder", cohort.path),
        ("model", identity["model"]["class"]),
        ("dataset", f"{identity['dataset']['name']}, {identity['dataset']['task']}"),
        ("method", method.get("name") or "without a name"),
        ("samples", f"{cohort.samples:,} of {cohort.planned:,}" + (f", {failed:,} failed" if failed else "")),
        ("status", "complete" if cohort.complete else "not complete"),
    ]
    return table(["", "attributions"], facts) + _leaders(cohort)


def _leaders(cohort: "CohortAttributions") -> str:
    if cohort.rows > MOST_ROWS:
        return paragraph(f"{cohort.rows:,} rows; the leading codes: top_codes()")
    try:
        least = min(5, max(1, cohort.samples // 4))
        leaders = cohort.top_codes(by="lift", k=LEADERS, minimum_records=least)
    except ValueError as error:  # a part that is damaged: what else the folder says is still shown
        return paragraph(str(error))
    if leaders.is_empty():
        return ""
    names = cohort.features[:FEATURES]
    most = max((abs(one) for one in leaders["lift"].drop_nulls() if math.isfinite(one)), default=0.0) or 1.0
    rows = [
        [row["feature"], row["code"], row["name"], Bar((row["lift"] or 0.0) / most, _number(row["lift"])),
         f"{row['records']:,}"]
        for row in leaders.iter_rows(named=True) if row["feature"] in names
    ]  # fmt: skip
    note = f"leading codes by lift, in at least {least} records" + (
        f"; {len(cohort.features) - FEATURES:,} more features" if len(cohort.features) > FEATURES else ""
    )
    return table(["feature", "code", "name", "lift", "records"], rows, note=note)


def faithfulness_html(found: "CohortFaithfulness") -> str:
    """The summary: a row per method, each measure with its interval."""
    summary = found.summary().rows(named=True)
    cells = {(row["method"], row["measure"]): _interval(row["mean"], row["low"], row["high"]) for row in summary}
    rows = [[method, *(cells[method, name] for name in found.measures)] for method in found.methods[:PLACES]]
    said = f"{found.samples:,} samples of {found.patients:,} patients; intervals of {found.level:.0%}, by patient"
    said += "" if found.complete else "; not complete"
    return table(["method", *found.measures], rows, note=said)


def comparison_html(found: "CohortComparison") -> str:
    """The comparison of predictions and rankings, and the leading codes."""
    codes = found.codes().head(20)
    others = found.table.filter(found.table["code"].is_null())
    rows = [
        [row["measure"], row["feature"], row["code"], row["name"],
         *("" if row[side] is None else _number(row[side]) for side in "ab"),
         _interval(row["estimate"], row["low"], row["high"]),
         *("" if row[p] is None else f"{row[p]:.4f}" for p in ("p", "p_holm"))]
        for frame in (others, codes) for row in frame.iter_rows(named=True)
    ]  # fmt: skip
    said = f"a: {found.a.path}, b: {found.b.path}; " + ("paired" if found.paired else "not the same samples")
    heads = ["measure", "feature", "code", "name", "a", "b", "b − a", "p", "p (Holm)"]
    return table(heads, rows, said, f"intervals of {found.level:.0%}, by patient")
