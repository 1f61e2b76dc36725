"""Plots of a record, PNG on a light background: speed-up, share of the ceilings, memory, scaling, samples a second."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import scaling
from bench.machine.record import Record, Result, find, per_second, ratio, results, seconds
from bench.pages import fits
from bench.pages.targets import curve, memory_limit
from bench.providers import chains
from bench.providers.chains import NAIVE, OURS, READ
from rollout.errors import require

DPI = 130
# One colour a provider in every plot; distinct for the colour-blind (Okabe & Ito).
COLOURS = {
    OURS: "#0072b2",
    f"{OURS}, triton": "#56b4e9",
    NAIVE: "#555555",
    chains.COMPILED: "#e69f00",
    "PyHealth's arithmetic": "#cc79a7",
    "PyHealth": "#cc79a7",
    "Abnar & Zuidema 2020": "#009e73",
    "Chefer 2021 (CVPR) rollout": "#d55e00",
    "plain forward": "#999999",
    READ: "#a00000",
}
MARKERS = dict(zip(COLOURS, "osD^vv<>PX", strict=True))
CEILING = {"color": "#a00000", "lw": 1.2, "ls": "--"}
GIB = 2**30


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Every plot the record has figures for; returns the files."""
    drawn = []
    for name, draw in PLOTS.items():
        figure = draw(record)
        if figure is not None:
            drawn.append(_save(figure, folder / f"{name}.png"))
    return drawn


def speed_up(record: Record) -> Any:
    """Speed-up over the naive chain against S: rows from maps, from Q,K, and the full matrix."""
    suites = [name for name in ("rows from maps", "rows from Q,K", "full matrix") if results(record, name)]
    if not suites:
        return None
    figure, axes = _panels(len(suites), "Speed-up over the naive chain", record)
    for axis, suite in zip(axes, suites, strict=True):
        for provider in _providers(record, suite):
            pairs = [
                (s, ratio(_at(record, suite, s, NAIVE), _at(record, suite, s, provider))) for s in _sizes(record, suite)
            ]
            points = [(s, value) for s, value in pairs if value is not None]
            if provider == READ:
                axis.plot(*zip(*points, strict=True), **CEILING, label="one read of the maps (ceiling)")
            elif points:
                _line(axis, points, provider)
        _s_axis(axis, _sizes(record, suite))
        axis.set_yscale("log")
        _plain(axis.yaxis)
        axis.set_title(suite, fontsize=10, loc="left")
        axis.set_ylabel("times as fast as the naive chain")
    return _legend(figure, axes)


def ceilings(record: Record) -> Any:
    """The rate each provider reaches in its own work against S, with the measured ceilings drawn in."""
    kinds = {
        "rows from maps": ("bytes", 1e9, "GB/s", (("read", "read"), ("copy", "copy")), (OURS, READ)),
        "full matrix": ("flop", 1e9, "GFLOP/s", (("matmul", "matmul, fp32"),), None),
        "rows from Q,K": ("flop", 1e9, "GFLOP/s", (("matmul", "matmul, fp32"),), None),
    }
    suites = [name for name in kinds if results(record, name) and record["suites"][name].get("ceilings")]
    if not suites:
        return None
    figure, axes = _panels(len(suites), "Rate of each provider's own work, and the machine's measured ceilings", record)
    for axis, suite in zip(axes, suites, strict=True):
        field, unit, name, lines, only = kinds[suite]
        measured = record["suites"][suite]["ceilings"]
        for provider in only or _providers(record, suite):
            found = [(s, _at(record, suite, s, provider)) for s in _sizes(record, suite)]
            points = [(s, each[field] / seconds(each) / unit) for s, each in found if each and each.get(field)]
            if points:
                _line(axis, points, provider)
        lowest = min(measured[key] for key, _ in lines) if len(lines) > 1 else None
        for key, text in lines:
            side = "top" if measured[key] == lowest else "bottom"
            axis.axhline(measured[key] / unit, **CEILING if key != "copy" else CEILING | {"ls": ":"})
            axis.annotate(f"{text} {measured[key] / unit:.0f} {name}", (0.02, measured[key] / unit), fontsize=8,
                          va=side, xycoords=("axes fraction", "data"), color=CEILING["color"])  # fmt: skip
        _s_axis(axis, _sizes(record, suite))
        highest = max(axis.get_ylim()[1], *(measured[key] / unit for key, _ in lines))
        axis.set_ylim(0, 1.12 * highest)
        axis.set_ylabel(f"{name}, float32")
        axis.set_title(suite, fontsize=10, loc="left")
        share = axis.secondary_yaxis("right", functions=_share_of(measured[lines[0][0]] / unit))
        share.set_ylabel(f"% of the {lines[0][0]} ceiling", fontsize=8)
        share.tick_params(labelsize=8)
    return _legend(figure, axes)


def _share_of(ceiling: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return (lambda value: 100 * value / ceiling), (lambda percent: percent * ceiling / 100)


def memory(record: Record) -> Any:
    """Memory with inputs against S, with the limit and, hollow, the first size that would go over it."""
    return _scaling(record, "Memory of one call, inputs included, against S (B=1, H=8, L=4)", _memory_panel)


def time_against_s(record: Record) -> Any:
    """Time against S, the fitted exponent of each in the legend of its panel."""
    return _scaling(
        record, "Time of one call against S (B=1, H=8, L=4); fitted exponent of the last sizes", _time_panel
    )


def _scaling(record: Record, title: str, panel: Callable[[Any, str, str, list[Result]], None]) -> Any:
    points = results(record, "scaling")
    if not points:
        return None
    sources = (scaling.MAPS_SOURCE, scaling.QK_SOURCE)
    figure, axes = _panels(2, title, record, height=4.4)
    for axis, source in zip(axes, sources, strict=True):
        sizes: list[int] = []
        for where, provider, _ in scaling.curves():
            if where == source and (found := curve(points, source, provider, "S")):
                sizes += [each["value"] for each in found]
                panel(axis, source, provider, points)
        sizes = [*sizes, *(int(line.get_xdata()[0]) for line in axis.lines if line.get_markerfacecolor() == "none")]
        _s_axis(axis, sorted(set(sizes)))
        axis.set_yscale("log")
        axis.set_title(f"rows from {source}", fontsize=10, loc="left")
        axis.legend(fontsize=8, loc="lower right" if panel is _memory_panel else "upper left", framealpha=0.9)
    return figure


def _memory_panel(axis: Any, source: str, provider: str, points: list[Result]) -> None:
    found = curve(points, source, provider, "S")
    _line(axis, [(each["value"], (each["inputs"] + (each["extra"] or 0)) / GIB) for each in found], provider)
    ends = [each for each in points if each.get("stopped") == "memory" and each["axis"] == "S"]
    for end in ends:
        if (end["source"], end["provider"]) == (source, provider):
            axis.plot(end["value"], end["predicted"] / GIB, marker=MARKERS[provider], mfc="none", ls="none",
                      color=COLOURS[provider], ms=8)  # fmt: skip
    if not [line for line in axis.lines if line.get_linestyle() == "--"]:
        limit = memory_limit(points) / GIB
        axis.axhline(limit, **CEILING)
        axis.annotate(f"limit {limit:.1f} GiB; hollow: predicted, not run", (0.02, limit), fontsize=8, ha="left",
                      va="bottom", xycoords=("axes fraction", "data"), color=CEILING["color"])  # fmt: skip
    axis.set_ylabel("GiB")


def _time_panel(axis: Any, source: str, provider: str, points: list[Result]) -> None:
    found = curve(points, source, provider, "S")
    fit = fits.power([each["value"] for each in found], [each["seconds"] for each in found])
    name = provider if fit is None else f"{provider}: S^{fit}"
    _line(axis, [(each["value"], each["seconds"]) for each in found], provider, name)
    axis.set_ylabel("seconds")


def samples_per_second(record: Record) -> Any:
    """Samples a second, end to end: PyHealth's interpreter, model families, the cohort run."""
    suites = [name for name in ("PyHealth end to end", "model families", "cohort run") if _cases(record, name)]
    if not suites:
        return None
    heights = [max(1, len(_cases(record, suite))) for suite in suites]
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(suites), 1, figsize=(10, 1.6 + 0.62 * sum(heights)), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    _title(figure, "Samples a second, end to end", record)
    for axis, suite in zip(axes[:, 0], suites, strict=True):
        _dots(axis, record, suite)
        axis.set_title(suite, fontsize=10, loc="left")
        axis.set_xlabel("samples/s (log scale)", fontsize=9)
    return figure


def _dots(axis: Any, record: Record, suite: str) -> None:
    """One row a case, one dot a provider: on a logarithmic axis the length of a bar would mean nothing."""
    cases = _cases(record, suite)
    who = [name for name in ("PyHealth", NAIVE, "plain forward", OURS) if find(record, suite, provider=name)]
    for row, case in enumerate(cases):
        there = {each["provider"]: per_second(each) for each in results(record, suite) if each.get("case") == case}
        rates = {name: rate for name in who if (rate := there.get(name))}
        axis.plot([min(rates.values()), max(rates.values())], [row, row], color="#d0d0d0", lw=2, zorder=1)
        for name, rate in rates.items():
            axis.plot(rate, row, marker=MARKERS[name], color=COLOURS[name], ms=8, ls="none", zorder=2)
            if name != "plain forward":
                above = name == OURS
                axis.annotate(f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}", (rate, row), fontsize=8, ha="center",
                              va="bottom" if above else "top", xytext=(0, 7 if above else -7),
                              textcoords="offset points", color=COLOURS[name])  # fmt: skip
    axis.set_yticks(range(len(cases)), [case or suite for case in cases], fontsize=9)
    axis.set_ylim(len(cases) - 0.5, -0.6)
    axis.set_xscale("log")
    axis.margins(x=0.08)
    _plain(axis.xaxis)
    axis.grid(axis="x", color="#e4e4e4", lw=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    line = _pyplot().Line2D
    handles = [line([], [], marker=MARKERS[name], color=COLOURS[name], ms=7, ls="none") for name in who]
    axis.legend(handles, who, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _cases(record: Record, suite: str) -> list[str | None]:
    """The cases that set someone beside ours."""
    theirs = [each for each in results(record, suite) if each["provider"] in (NAIVE, "PyHealth")]
    return list(dict.fromkeys(each.get("case") for each in theirs))


def _providers(record: Record, suite: str) -> list[str]:
    return list(dict.fromkeys(each["provider"] for each in results(record, suite)))


def _sizes(record: Record, suite: str) -> list[int]:
    return sorted({each["shape"]["S"] for each in results(record, suite)})


def _at(record: Record, suite: str, seq: int, provider: str) -> Result | None:
    return find(record, suite, S=seq, provider=provider)


def _panels(count: int, title: str, record: Record, height: float = 4.0) -> tuple[Any, list[Any]]:
    figure, axes = _pyplot().subplots(
        1, count, figsize=(max(8.0, 4.9 * count), height + 0.6), squeeze=False, layout="constrained"
    )
    _title(figure, title, record)
    return figure, list(axes[0])


def _title(figure: Any, title: str, record: Record) -> None:
    figure.suptitle(f"{title}\n{record['device']}, {record['cores']} cores", fontsize=11, x=0.01, ha="left")


def _line(axis: Any, points: Iterable[tuple[float, float]], provider: str, label: str | None = None) -> None:
    x, y = zip(*points, strict=True)
    colour, mark = COLOURS.get(provider, "#222222"), MARKERS.get(provider, "x")
    axis.plot(
        x, y, color=colour, marker=mark, ms=5, lw=2.2 if provider.startswith(OURS) else 1.4, label=label or provider
    )


def _s_axis(axis: Any, sizes: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes], fontsize=8, rotation=45 if len(sizes) > 6 else 0)
    axis.minorticks_off()
    axis.set_xlabel("S, sequence length (positions)")
    axis.grid(color="#e4e4e4", lw=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _plain(axis: Any) -> None:
    """Numbers as 2, 10, 300 on a logarithmic axis, and not as powers."""
    ticker = require("matplotlib.ticker", "plots")
    axis.set_major_locator(ticker.LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _legend(figure: Any, axes: list[Any]) -> Any:
    """One legend for all panels, below them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
    _pyplot().close(figure)
    return path


def _pyplot() -> Any:
    matplotlib = require("matplotlib", "plots")
    matplotlib.use("Agg")
    return require("matplotlib.pyplot", "plots")


PLOTS: dict[str, Callable[[Record], Any]] = {
    "speed-up": speed_up,
    "ceilings": ceilings,
    "scaling-time": time_against_s,
    "scaling-memory": memory,
    "samples-per-second": samples_per_second,
}
