"""The demo's two pictures: the most relevant codes of a cohort, and one patient's record."""

import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rollout.extras import require

PLAIN, PLANTED, READ = "#4878a8", "#d1603d", "#b8b8b8"
DPI = 150


def plot_top_codes(
    ranking: pl.DataFrame,
    names: Mapping[str, Mapping[str, str]],
    planted: Mapping[str, Collection[str]],
    path: str | Path,
    top: int = 10,
) -> Path:
    """Draw the leading codes of each feature with their effect and its 2-standard-error bar; planted ones marked.

    Args:
        ranking: From ``rank_codes``.
        names: Feature → code → name; a code without a name is shown as it is.
        planted: Feature → planted codes; empty when the truth is not known.
        path: PNG to write.
        top: Codes per feature.
    """
    plt = _pyplot()
    features = ranking["feature"].unique(maintain_order=True).to_list()
    rows = {f: ranking.filter(pl.col("feature") == f).head(top) for f in features}
    heights = [max(len(part), 3) for part in rows.values()]
    figure, axes = plt.subplots(
        len(features), 1, figsize=(9.5, 0.33 * sum(heights) + 1.0 * len(features) + 0.6), squeeze=False,
        sharex=True, gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for axis, feature in zip(axes[:, 0], features, strict=True):
        part, known = rows[feature], set(planted.get(feature, ()))
        effect, place = part["effect"].to_numpy(), np.arange(len(part))
        colours = [PLANTED if code in known else PLAIN for code in part["code"]]
        axis.barh(place, effect, xerr=2 * part["error"].to_numpy(), color=colours, error_kw={"lw": 0.8, "capsize": 2})
        labels = [_label(code, names.get(feature, {}).get(code), code in known) for code in part["code"]]
        axis.set_yticks(place, labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{feature}", loc="left", fontsize=10, fontweight="bold")
        _tidy(axis)
    axes[-1, 0].set_xlabel(
        "log relevance above the average code of the same records (bars: ± 2 standard errors)", fontsize=9
    )
    legend = [plt.Rectangle((0, 0), 1, 1, color=PLAIN)]
    if any(planted.values()):
        legend = [plt.Rectangle((0, 0), 1, 1, color=PLANTED), *legend]
        figure.legend(legend, ["planted risk code", "other code"], loc="outside upper right", ncols=2, fontsize=8)
    figure.suptitle("Codes that draw the most relevance", x=0.01, ha="left", fontsize=12)
    return _save(figure, path)


def plot_record(
    rows: pl.DataFrame,
    names: Mapping[str, Mapping[str, str]],
    planted: Mapping[str, Collection[str]],
    title: str,
    path: str | Path,
    listed: int = 12,
) -> Path:
    """Draw one sample: relevance of every entry in record order, and beside it the leading entries by name.

    Args:
        rows: The attribution rows of one sample.
        names: As in ``plot_top_codes``.
        planted: As in ``plot_top_codes``.
        title: Of the figure.
        path: PNG to write.
        listed: Entries named per feature.
    """
    plt = _pyplot()
    features = rows["feature"].unique(maintain_order=True).to_list()
    figure, axes = plt.subplots(
        len(features), 2, figsize=(14, 2.9 * len(features) + 0.7), squeeze=False, layout="constrained",
        gridspec_kw={"width_ratios": [1.5, 1]},
    )  # fmt: skip
    for (left, right), feature in zip(axes, features, strict=True):
        part = rows.filter(pl.col("feature") == feature).sort(pl.coalesce("visit", "position"), "position")
        known = set(planted.get(feature, ()))
        _draw_sequence(left, part, known, feature)
        _draw_leaders(right, part, known, names.get(feature, {}), listed)
    axes[-1, 0].set_xlabel("position in the record", fontsize=9)
    axes[-1, 1].set_xlabel("relevance (%)", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (PLAIN, READ)]
    labels = ["code", "position the model reads (keeps the residual's share)"]
    if any(planted.values()):
        handles, labels = [plt.Rectangle((0, 0), 1, 1, color=PLANTED), *handles], ["planted risk code", *labels]
    figure.legend(handles, labels, loc="outside lower left", ncols=3, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return _save(figure, path)


def _draw_sequence(axis: Any, part: pl.DataFrame, known: set[str], feature: str) -> None:
    percent, count = 100 * part["attribution"].to_numpy(), len(part)
    place = np.arange(count)
    colours = _colours(part, known)
    axis.bar(place, percent, width=0.9, color=colours)
    others = percent[1:] if count > 1 else percent
    ceiling = 1.25 * max(float(others.max()), 100 / count)
    axis.set_ylim(0, ceiling)
    if percent[0] > ceiling:
        axis.text(0.5, 0.97 * ceiling, f"↑ {percent[0]:.0f} %", va="top", fontsize=8, color="#707070")
    axis.axhline(100 / count, color="#404040", lw=0.7, ls=":")
    axis.text(
        max(count - 0.5, 11.5),
        100 / count,
        "even spread",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        ha="right",
        va="bottom",
        fontsize=7,
        color="#404040",
    )
    axis.set_xlim(-0.6, max(count - 0.4, 11.6))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("relevance (%)", fontsize=9)
    axis.set_title(f"{feature} ({count} codes)", loc="left", fontsize=10, fontweight="bold")
    _tidy(axis)


def _draw_leaders(axis: Any, part: pl.DataFrame, known: set[str], names: Mapping[str, str], listed: int) -> None:
    leaders = part.with_row_index("order").sort("attribution", descending=True).head(listed)
    colours = [_colours(part, known)[i] for i in leaders["order"]]
    place = np.arange(len(leaders))
    axis.barh(place, 100 * leaders["attribution"].to_numpy(), color=colours)
    labels = [_label(code, names.get(code), code in known, width=44) for code in leaders["code"]]
    axis.set_yticks(place, labels, fontsize=7)
    axis.set_ylim(max(len(leaders), 6) - 0.4, -0.6)
    _tidy(axis)


def _colours(part: pl.DataFrame, known: set[str]) -> list[str]:
    read = (part["visit"].fill_null(part["position"]) == 0).to_list()
    codes = part["code"].to_list()
    return [PLANTED if c in known else READ if r else PLAIN for c, r in zip(codes, read, strict=True)]


def _label(code: str | None, name: str | None, planted: bool, width: int = 58) -> str:
    text = f"{code}  {name}" if name else f"{code}"
    mark = "★ " if planted else ""
    return mark + textwrap.shorten(text, width=width, placeholder=" …").replace("$", r"\$")


def _tidy(axis: Any) -> None:
    axis.tick_params(labelsize=8)
    axis.grid(axis="both", color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    figure.savefig(path, dpi=DPI, facecolor="white")
    _pyplot().close(figure)
    return path


def _pyplot() -> Any:
    matplotlib = require("matplotlib", "plots")
    matplotlib.use("Agg")
    return require("matplotlib.pyplot", "plots")
