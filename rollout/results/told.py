"""An evaluation as a few lines of text, for a terminal."""

import polars as pl

from rollout.results.faithfulness import RANDOM, CohortFaithfulness
from rollout.results.text_table import aligned

SHOWN = ("comprehensiveness", "sufficiency", "recall", "planted_auc", "leave_one_out")
WANTED = {"sufficiency": "low"}
NAMED = {"planted_auc": "planted AUC", "leave_one_out": "leave one out"}


def told(found: CohortFaithfulness) -> str:
    """Each method's measures with their intervals, and what they mean.

    `*` marks a difference from the random ranking that stands after Holm's correction for all that are shown.
    """
    if not found.samples:
        return "No sample was evaluated: PyHealth's metric leaves out those below the threshold."
    measures = [name for name in SHOWN if name in found.measures]
    heads = [f"{NAMED.get(name, name)} ({WANTED.get(name, 'high')} is good)" for name in measures]
    summary = found.summary().filter(pl.col("measure").is_in(measures))
    differences = found.differences(measures=measures)
    verdicts = {(row["method"], row["measure"]): row["verdict"] for row in differences.iter_rows(named=True)}
    cells = {(row["method"], row["measure"]): _cell(row, verdicts) for row in summary.iter_rows(named=True)}
    table = [["", *heads], *([name, *(cells[name, measure] for measure in measures)] for name in found.methods)]
    lines = aligned(table)
    lines.append(
        f"{found.samples:,} samples of {found.patients:,} patients; intervals of {found.level:.0%}, by patient"
    )
    return "\n".join([*lines, *_conclusions(found.methods, verdicts)])


def _cell(row: dict[str, object], verdicts: dict[tuple[str, str], str]) -> str:
    mean, low, high = row["mean"], row["low"], row["high"]
    mark = "*" if verdicts.get((str(row["method"]), str(row["measure"]))) in ("better", "worse") else " "
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return "–" if mean is None else f"{mean:.3f}{mark}{interval}"


def _conclusions(methods: list[str], verdicts: dict[tuple[str, str], str]) -> list[str]:
    """By comprehensiveness: who is better than chance, who is worse, and of whom it is not shown."""
    by_verdict: dict[str, list[str]] = {}
    for name in methods:
        if name != RANDOM:
            by_verdict.setdefault(verdicts[name, "comprehensiveness"], []).append(name)
    known = ("better", "worse")
    words = {verdict: f"{verdict} than random" if verdict in known else verdict for verdict in by_verdict}
    return [f"{words[verdict]}, by comprehensiveness: {', '.join(names)}" for verdict, names in by_verdict.items()]
