"""A comparison of two runs, and the groups of a run's codes, as lines for a terminal."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from rollout.errors import one_line
from rollout.results.attributions import CohortAttributions
from rollout.results.comparison import CohortComparison
from rollout.results.text_table import aligned, cell, interval, number


def told_comparison(found: CohortComparison, shown: int = 20) -> str:
    """The runs, their predictions and rankings, the leading codes; `*`: it differs after Holm's correction."""
    lines = [f"{side}  {described(run)}" for side, run in (("a", found.a), ("b", found.b))]
    lines += [_samples(found), *(f"left out: {cell(note)}" for note in found.notes), ""]
    others, codes = found.table.filter(pl.col("code").is_null()), found.codes()
    rows = [["", "a", "b", "b − a", "p", "p (Holm)"]]
    rows += [_row(_measure(row), row, found.level) for row in others.iter_rows(named=True)]
    rows += [_row(_code(row), row, found.level) for row in codes.head(shown).iter_rows(named=True)]
    lines += aligned(rows)
    if codes.height > shown:
        lines.append(f"{codes.height - shown:,} more codes")
    tests = found.table["p"].count()
    lines.append(
        f"intervals of {found.level:.0%} by patient, of one comparison each; * differs after Holm's correction for all "
        f"{tests:,} tests"
    )
    return "\n".join(lines)


def described(run: CohortAttributions) -> str:
    """A run in one line: its folder, its model and its method."""
    identity = run.manifest["identity"]
    model, method = identity["model"]["class"].rpartition(".")[2], (identity.get("method") or {}).get("name")
    return f"{one_line(str(run.path))}: {cell(model)}, {cell(method or 'a method without a name')}"


def told_groups(table: pl.DataFrame, cohort: CohortAttributions, feature: str, shown: int = 30) -> str:
    """The first groups of a feature's codes, with intervals of 95 %, and that of the codes without one."""
    if table.is_empty():
        return f"{cell(feature)}: no group in enough records"
    rows = [["group", "relevance", "lift", "prevalence", "records", "codes"]]
    nameless = pl.col("group").is_null()
    named = table.filter(~nameless)
    for row in pl.concat([named.head(shown), table.filter(nameless)]).iter_rows(named=True):
        name = "(no group)" if row["group"] is None else cell(row["group"])
        values = [interval(*(row[f"{one}{end}"] for end in ("", "_low", "_high"))) for one in rows[0][1:4]]
        rows.append([name, *values, f"{row['records']:,}", f"{row['codes']:,}"])
    more = [f"{named.height - shown:,} more groups"] if named.height > shown else []
    return "\n".join([f"{described(cohort)}; {cell(feature)}", *aligned(rows), *more, "intervals of 95% by patient"])


def _samples(found: CohortComparison) -> str:
    if found.paired:
        return f"paired: the same {found.samples[0]:,} samples of {found.patients:,} patients"
    a, b = found.samples
    return f"not the same samples: {a:,} and {b:,}, of {found.patients:,} patients"


def _measure(row: Mapping[str, Any]) -> str:
    return row["measure"] if row["feature"] is None else f"{row['measure']}, {cell(row['feature'])}"


def _code(row: Mapping[str, Any]) -> str:
    name = "" if row["name"] is None else f" {cell(row['name'])}"
    return f"{row['measure']}, {cell(row['feature'])}: {cell(row['code'])}{name}"


def _row(name: str, row: Mapping[str, Any], level: float) -> list[str]:
    shown = row["p_holm"] is not None and row["p_holm"] <= 1 - level
    estimate = interval(row["estimate"], row["low"], row["high"], ".3f" if row["p"] is None else "+.3f")
    tests = ["" if row["p"] is None else number(row[p], ".4f") for p in ("p", "p_holm")]
    return [name, *("" if row[side] is None else number(row[side]) for side in "ab"), estimate, tests[0],
            tests[1] + (" *" if shown else "")]  # fmt: skip
