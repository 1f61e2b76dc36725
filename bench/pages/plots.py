"""Plots of a record, PNG on a light background: speed-up, share of the ceilings, memory, scaling, samples a second."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine.record import Record, Result, Suite, per_second, ratio, results, seconds
from bench.pages.tables import among, ceilings_of, curves, exponent
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

Value = Callable[[Result], float | None]


class Panel(NamedTuple):
    """`lines`: label → provider and points, of S or the name of a case and a value; `level`: a dashed line, not log."""

    title: str
    ylabel: str
    lines: dict[str, tuple[str, list[tuple[Any, float]]]]
    level: float | None = None


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Every plot the record has figures for; returns the files."""
    drawn = []
    for name, (title, make) in PLOTS.items():
        panels = [panel for panel in make(record) if panel.lines]
        if panels:
            figure = _draw(f"{title}\n{record['device']}, {record['cores']} cores", panels)
            figure.savefig(folder / f"{name}.png", dpi=130, facecolor="white", metadata={"Software": None})
            require("matplotlib.pyplot", "plots").close(figure)
            drawn.append(folder / f"{name}.png")
    return drawn


def _panel(title: str, ylabel: str, found: Iterable[Result], x: Callable[[Result], Any], y: Value) -> Panel:
    panel = Panel(title, ylabel, {})
    for each in found:
        if (value := y(each)) is not None:
            panel.lines.setdefault(each["provider"], (each["provider"], []))[1].append((x(each), value))
    return panel


def _length(result: Result) -> int:
    return int(result["shape"]["S"])


def chains(record: Record, ylabel: str, value: Callable[..., float | None], level: float | None) -> Iterator[Panel]:
    for suite in CHAINS:
        here = record["suites"].get(suite, {"results": []})
        points = [each | {"y": value(each, here)} for each in here["results"]]
        yield _panel(suite, ylabel, points, _length, lambda each: each["y"])._replace(level=level)


def faster(result: Result, suite: Suite) -> float | None:
    """That of the work that cannot be left out is the most that can be had."""
    return ratio(among([NAIVE], result, suite["results"]), result)


def reached(result: Result, suite: Suite) -> float | None:
    limits = ceilings_of(suite)
    bound = limits and limits.binding(result.get("bytes", 0), result.get("flop", 0), seconds(result))
    return 100 * bound[1] if bound else None


def scaling(record: Record, ylabel: str, value: Callable[[Result], float], fitted: bool) -> Iterable[Panel]:
    panels: dict[str, Panel] = {}
    for (case, provider), points in curves(record).items():
        label = f"{provider}: S^{exponent(points, value)}" if fitted else provider
        panel = panels.setdefault(case, Panel(f"rows from {case}", ylabel, {}))
        panel.lines[label] = provider, [(_length(each), value(each)) for each in points]
    return panels.values()


def samples_per_second(record: Record) -> Iterator[Panel]:
    """Of the cases that set someone beside ours."""
    for suite in END_TO_END:
        found = results(record, suite)
        cases = {each["case"] for each in found if each["provider"] in (NAIVE, STOCK)}
        kept = [each for each in found if each["case"] in cases]
        yield _panel(suite, "samples a second", kept, lambda each: each["case"], per_second)


PLOTS: dict[str, tuple[str, Callable[[Record], Iterable[Panel]]]] = {
    "speed-up": ("Speed-up over the naive chain",
                 partial(chains, ylabel="times as fast as the naive chain", value=faster, level=None)),
    "ceilings": ("Share of the machine's measured ceilings, each provider in its own work",
                 partial(chains, ylabel="% of the ceiling that binds", value=reached, level=100.0)),
    "scaling-time": ("Time of one call against S (B=1, H=8, L=4); fitted exponent of the last sizes",
                     partial(scaling, ylabel="seconds", value=seconds, fitted=True)),
    "scaling-memory": ("Memory of one call, inputs included, against S (B=1, H=8, L=4)",
                       partial(scaling, ylabel="GiB", fitted=False,
                               value=lambda each: (each["inputs"] + (each["peak_extra_bytes"] or 0)) / 2**30)),
    "samples-per-second": ("Samples a second, end to end", samples_per_second),
}  # fmt: skip


def _draw(title: str, panels: list[Panel]) -> Any:
    require("matplotlib", "plots").use("Agg")
    plt, ticker = require("matplotlib.pyplot", "plots"), require("matplotlib.ticker", "plots")
    size = (max(8, 5.4 * len(panels)), 5.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    for axis, panel in zip(axes[0], panels, strict=True):
        places = list(dict.fromkeys(x for _, points in panel.lines.values() for x, _ in points))
        of_cases = isinstance(places[0], str)  # no line joins them
        for label, (provider, points) in panel.lines.items():
            colour, mark = STYLES.get(provider, ("#222222", "x"))
            axis.plot(*zip(*points, strict=True), color=colour, marker=mark, ms=5, label=label,
                      ls="none" if of_cases else "-", lw=2.2 if provider.startswith(OURS) else 1.4)  # fmt: skip
        if panel.level is None:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axis.axhline(panel.level, color="#a00000", lw=1.2, ls="--")
            axis.set_ylim(bottom=0)
        if not of_cases:
            axis.set_xscale("log", base=2)
        axis.set_xticks(places, [str(place) for place in places], fontsize=8, rotation=30, ha="right")
        axis.minorticks_off()
        axis.set(title=panel.title, ylabel=panel.ylabel, xlabel="" if of_cases else "S, sequence length (positions)")
        axis.grid(color="#e4e4e4", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, framealpha=0.9)
    return figure
