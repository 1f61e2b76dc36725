"""Plots of a record, PNG on a light background: speed-up, share of the ceilings, memory, scaling, samples a second."""

from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from bench.machine.record import Record
from bench.pages.frame import frame_of, ratio
from bench.pages.tables import exponent
from bench.providers.chains import COMPILED, NAIVE, NATIVE, PRODUCTS, READ
from rollout.bench.end_to_end import FUSED, STOCK
from rollout.bench.measure import OURS
from rollout.errors import require

# One colour and mark a provider in every plot; distinct for the colour-blind (Okabe & Ito).
STYLES = {
    OURS: ("#0072b2", "o"), f"{OURS}, triton": ("#56b4e9", "s"), NATIVE: ("#56b4e9", "h"), NAIVE: ("#555555", "D"),
    COMPILED: ("#e69f00", "^"),
    "PyHealth's arithmetic": ("#cc79a7", "v"), STOCK: ("#cc79a7", "v"), "Abnar & Zuidema 2020": ("#009e73", "<"),
    "Chefer 2021 (CVPR) rollout": ("#d55e00", ">"), "plain forward": ("#999999", "P"),
    **dict.fromkeys((READ, PRODUCTS, FUSED), ("#a00000", "X")),
}  # fmt: skip
CHAINS = ("rows from maps", "rows from Q,K", "full matrix")
END_TO_END = ("PyHealth end to end", "model families", "cohort run")


class Plot(NamedTuple):
    """`y` of some suites' results against S, or by case; `level`: a dashed line, on an axis that is not log."""

    title: str
    ylabel: str
    suites: tuple[str, ...]
    y: pl.Expr
    x: str = "S"
    level: float | None = None
    fitted: bool = False


PLOTS = {
    "speed-up": Plot("Speed-up over the naive chain", "times as fast as the naive chain", CHAINS, ratio(NAIVE)),
    "ceilings": Plot("Share of the machine's measured ceilings, each provider in its own work",
                     "% of the ceiling that binds", CHAINS, 100 * pl.col("reached"), level=100),
    "scaling-time": Plot("Time of one call against S (B=1, H=8, L=4); fitted exponent of the last sizes",
                         "seconds", ("scaling",), pl.col("median"), fitted=True),
    "scaling-memory": Plot("Memory of one call, inputs included, against S (B=1, H=8, L=4)", "GiB", ("scaling",),
                           (pl.col("inputs") + pl.col("peak_extra_bytes").fill_null(0)) / 2**30),
    # of the cases that set someone beside ours
    "samples-per-second": Plot("Samples a second, end to end", "samples a second", END_TO_END,
                               pl.when(ratio(NAIVE, STOCK).is_not_null()).then("per_second"), x="case"),
}  # fmt: skip


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Every plot the record has figures for; returns the files."""
    frame, machine = frame_of(record), f"{record['device']}, {record['cores']} cores"
    panel = pl.when(suite="scaling").then("rows from " + pl.col("case")).otherwise("suite")
    drawn = []
    for name, plot in PLOTS.items():
        found = frame.filter(pl.col("suite").is_in(plot.suites)).sort(["S", "place"] if plot.x == "S" else "place")
        points = found.select("provider", panel=panel, x=plot.x, y=plot.y).drop_nulls()
        if points.height:
            figure = _draw(plot, points.partition_by("panel", maintain_order=True))
            figure.suptitle(f"{plot.title}\n{machine}", fontsize=11, x=0.01, ha="left")
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=130, facecolor="white", metadata={"Software": None})
    return drawn


def _draw(plot: Plot, panels: list[pl.DataFrame]) -> Any:
    size, by_size = (max(8, 5.4 * len(panels)), 5.4), plot.x == "S"
    figure = require("matplotlib.figure", "plots").Figure(figsize=size, layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (provider,), line in panel.group_by("provider", maintain_order=True):
            colour, mark = STYLES.get(provider, ("#222222", "x"))
            label = f"{provider}: S^{exponent(line['x'], line['y'])}" if plot.fitted else provider
            axis.plot(line["x"], line["y"], color=colour, marker=mark, ms=5, label=label,
                      ls="-" if by_size else "none", lw=2.2 if provider.startswith(OURS) else 1.4)  # fmt: skip
        if plot.level is None:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(require("matplotlib.ticker", "plots").LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,g}")
        else:
            axis.axhline(plot.level, color="#a00000", lw=1.2, ls="--")
            axis.set_ylim(bottom=0)
        if by_size:
            axis.set(xscale="log", xlabel="S, sequence length (positions)")
        places = panel["x"].unique(maintain_order=True)
        axis.set_xticks(places, places.cast(pl.String), fontsize=8, rotation=30, ha="right")
        axis.minorticks_off()
        axis.set(title=panel["panel"][0], ylabel=plot.ylabel, axisbelow=True)
        axis.grid(color="#e4e4e4", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, framealpha=0.9)
    return figure
