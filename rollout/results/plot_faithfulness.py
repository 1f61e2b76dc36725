"""The picture of an evaluation: what taking codes out or leaving them alone does, and each method beside random."""

from pathlib import Path
from typing import Any

import polars as pl

from rollout.results.drawing import GREY, LINES, new_figure, plain, saved, tidy, visible
from rollout.results.faithfulness import RANDOM, CohortFaithfulness, open_faithfulness
from rollout.results.measures import BETTER, MEASURES, WORSE

DASHES = ("-", "--", "-.", ":")
NAME = 34
PANELS = {
    "without": ("Deletion: the top codes taken out", "top codes taken out (%)"),
    "only": ("Insertion: the top codes alone", "top codes kept (%)"),
}


def plot_faithfulness(
    source: CohortFaithfulness | str | Path, path: str | Path | None = None, title: str | None = None
) -> Any:
    """Draw the deletion and insertion curves of each method with their bands, and its paired differences to random.

    Left: the mean probability of the class followed; a method that finds what the model uses falls faster than random
    in the first panel and rises faster in the second. Right: differences with their intervals, turned so that right is
    better in every measure (log-odds, of another unit, are in `differences`). A filled dot is a difference that stands
    after the correction for all comparisons; a hollow one does not.

    Args:
        source: An evaluation, or its folder.
        path: PNG to write.
        title: Of the figure; None: how many samples and patients.

    Returns:
        The `Figure`.

    Raises:
        ValueError: If no sample was evaluated, or there is no method `random`.
    """
    found = source if isinstance(source, CohortFaithfulness) else open_faithfulness(source)
    if not found.samples:
        raise ValueError("plot_faithfulness: there is nothing to draw, no sample was evaluated")
    table = found.differences(RANDOM).filter(pl.col("measure") != "log_odds")
    rows = [
        (measure, part) for measure in MEASURES if not (part := table.filter(pl.col("measure") == measure)).is_empty()
    ]
    lines = sum(part.height + 1 for _, part in rows)
    figure = new_figure((15, max(4.6, 0.27 * lines + 1.4)))
    left, middle, right = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1, 1, 1.15]})
    _draw_curves((left, middle), found)
    _draw_forest(right, rows, found.methods)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=min(len(names), 5), fontsize=9)
    text = f"Faithfulness over {found.samples:,} samples of {found.patients:,} patients" if title is None else title
    figure.suptitle(plain(visible(text)), x=0.01, ha="left", fontsize=12)
    return saved(figure, path)


def line_styles(methods: list[str]) -> dict[str, tuple[str, str]]:
    """Method → colour and dash; random is grey."""
    others = [name for name in methods if name != RANDOM]
    found = {
        name: (LINES[place % len(LINES)], DASHES[place // len(LINES) % len(DASHES)])
        for place, name in enumerate(others)
    }
    return {**found, RANDOM: (GREY, "--")}


def _draw_curves(axes: tuple[Any, Any], found: CohortFaithfulness) -> None:
    table, styles = found.curves(), line_styles(found.methods)
    for axis, (direction, (title, name)) in zip(axes, PANELS.items(), strict=True):
        for method in found.methods:
            part = table.filter((pl.col("direction") == direction) & (pl.col("method") == method))
            x, y = part["share"].to_numpy(), part["probability"].to_numpy()
            colour, dash = styles[method]
            axis.plot(x, y, dash, color=colour, lw=1.8, marker="o", ms=3.5, label=_name(method))
            if not part["probability_low"].has_nulls():
                ends = part["probability_low"].to_numpy(), part["probability_high"].to_numpy()
                axis.fill_between(x, *ends, color=colour, alpha=0.15, lw=0)
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel(name, fontsize=9)
        tidy(axis)
    axes[0].set_ylabel("mean probability of the class followed", fontsize=9)
    low, high = min(axis.get_ylim()[0] for axis in axes), max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)


def _draw_forest(axis: Any, rows: list[tuple[str, pl.DataFrame]], methods: list[str]) -> None:
    styles, labels, place = line_styles(methods), [], 0
    for measure, part in rows:
        sign = MEASURES[measure]
        labels.append((place, measure.replace("_", " ")))
        place += 1
        for row in part.rows(named=True):
            labels.append((place, _name(row["method"])))
            if row["difference"] is not None:
                _draw_difference(axis, row, sign, place, styles[row["method"]][0])
            place += 1
    axis.axvline(0, color="#404040", lw=0.9)
    axis.set_yticks([at for at, _ in labels], [text for _, text in labels])
    axis.set_ylim(place - 0.3, -0.7)
    axis.set_title("Beside random, on the same samples", loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel("← worse        difference to random        better →", fontsize=9)
    tidy(axis)
    measures = {at for at, text in labels if text in {name.replace("_", " ") for name, _ in rows}}
    for tick, (at, _) in zip(axis.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if at in measures else "normal")


def _draw_difference(axis: Any, row: dict[str, Any], sign: int, place: int, colour: str) -> None:
    stands = row["verdict"] in (BETTER, WORSE)
    if row["low"] is not None:
        axis.plot([sign * row["low"], sign * row["high"]], [place, place], color=colour, lw=1.8)
    axis.plot(sign * row["difference"], place, "o", ms=6, color=colour, mfc=colour if stands else "white")


def _name(method: str) -> str:
    text = visible(method) or "(empty string)"
    return plain(text if len(text) <= NAME else text[: NAME - 1] + "…")
