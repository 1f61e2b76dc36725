"""The tables of the pages: one for any suite, and those of scaling and of the targets."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl
from scipy import stats

from bench.machine.record import Record
from bench.pages.frame import frame_of
from bench.pages.targets import CPU, GPU, TARGETS, judge

TAIL = 4  # points of a curve that an exponent is fitted to
NONE = "–"

# How a figure is told: below which bound times what, in which form.
Form = tuple[tuple[float, float, str], ...]
SECONDS: Form = ((1e-2, 1e3, "{:.2f} ms"), (1, 1e3, "{:.1f} ms"), (math.inf, 1, "{:.2f} s"))
SIZE: Form = ((10 * 2**30, 2**-20, "{:.0f} MiB"), (math.inf, 2**-30, "{:.1f} GiB"))
BYTES_A_SECOND: Form = ((math.inf, 1e-9, "{:.1f} GB/s"),)
FLOP_A_SECOND: Form = ((1e12, 1e-9, "{:.0f} GFLOP/s"), (math.inf, 1e-12, "{:.1f} TFLOP/s"))
SAMPLES_A_SECOND: Form = ((10, 1, "{:.2f}"), (math.inf, 1, "{:,.0f}"))

Row = dict[str, Any]  # of a frame


def tell(value: float | None, form: Form) -> str:
    return NONE if value is None else next(text.format(value * unit) for bound, unit, text in form if value < bound)


def rate(row: Row) -> str:
    """GB/s or GFLOP/s of a provider's own work, and the share of the ceiling that binds it; of products if float32."""
    field, form = ("bytes", BYTES_A_SECOND) if row["bound"] == "memory" else ("flop", FLOP_A_SECOND)
    text = tell(row[field] / row["median"], form)
    held = row["bound"] == "memory" or row["dtype"] == "float32"
    return f"{text}, {row['reached']:.0%} of {row['bound']}" if held else text


# Column → the field without which a result has nothing to say there, and what it says.
COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "case": ("label", "{label}".format_map),
    "provider": ("provider", "{provider}".format_map),
    "samples": ("samples", "{samples:,}".format_map),
    "median": ("median", lambda row: tell(row["median"], SECONDS)),
    "middle half": ("low", "{low:+.0f} to {high:+.0f} %".format_map),
    "rounds": ("rounds", "{rounds}".format_map),
    "samples/s": ("per_second", lambda row: tell(row["per_second"], SAMPLES_A_SECOND)),
    "speed-up": ("speed_up", "{speed_up:.2f}×".format_map),
    "share": ("share", "{share:.0%} of {floor}".format_map),
    "rate": ("bound", rate),
    "s by stage": ("stages", lambda row: ", ".join(f"{name} {taken:.1f}" for name, taken in row["stages"].items())),
    "beside model and chain": ("bookkeeping", "{bookkeeping:.0%}".format_map),
    "extra memory": ("peak_extra_bytes", lambda row: tell(row["peak_extra_bytes"], SIZE)),
    "peak memory": ("peak_bytes", lambda row: tell(row["peak_bytes"], SIZE)),
    "max err": ("error", "{error:.1e}".format_map),
}


def cell(row: Row, column: str) -> str:
    """What a result says in a column."""
    field, say = COLUMNS[column]
    return NONE if row[field] is None else say(row)


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A table of rows that all have the keys of the first, its header."""
    header = rows[0] if rows else {}
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *(row.values() for row in rows))]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def suite_table(found: pl.DataFrame) -> str:
    """Every result of a suite; a column in which none has anything is left out."""
    sizes = [key for key in ("S", "L") if found[key].n_unique() > 1]
    rows = [row | {"label": _label(row, sizes)} for row in found.to_dicts()]
    kept = [column for column, (field, _) in COLUMNS.items() if any(row[field] is not None for row in rows)]
    return markdown([{column: cell(row, column) for column in kept} for row in rows])


def _label(row: Row, sizes: Sequence[str]) -> str | None:
    """The method and the case of a result, and the sizes that differ within its suite."""
    of_sizes = [f"{key}={row[key]}" for key in sizes if row[key] is not None]
    return ", ".join(dict.fromkeys(filter(None, [row["method"], row["case"], *of_sizes]))) or None


def exponent(sizes: pl.Series, values: pl.Series) -> str:
    """b of y = a·S^b and its standard error: least squares on logarithms, over the last points that have a y."""
    points = pl.DataFrame([sizes.log(), values.log()]).filter(values > 0).tail(TAIL)
    if points.height < 3:
        return NONE
    fit = stats.linregress(*points)
    return f"{fit.slope:.2f} ± {fit.stderr if math.isfinite(fit.stderr) else 0.0:.2f}"  # of equal y scipy has no error


def scaling_table(found: pl.DataFrame) -> str:
    """Each provider's curve: fitted exponents, and what its largest size takes."""
    curves = found.sort("case", "S", "place").group_by("case", "provider", maintain_order=True)
    return markdown([
        {
            "from": case, "provider": provider, "S": f"{points['S'][0]} … {points['S'][-1]}",
            "exponent of time": exponent(points["S"], points["median"]),
            "of extra memory": exponent(points["S"], points["peak_extra_bytes"]),
            "time at the end": tell(points["median"][-1], SECONDS),
            "inputs there": tell(points["inputs"][-1], SIZE),
            "extra memory there": tell(points["peak_extra_bytes"][-1], SIZE),
            "max err": f"{points['error'].max():.0e}",
        }
        for (case, provider), points in curves
    ])  # fmt: skip


def verdict_table(cpu: Record | None, cuda: Record | None) -> str:
    """Every target, and what the records of a CPU and of a GPU say of it."""
    frames = {CPU: cpu and frame_of(cpu), GPU: cuda and frame_of(cuda)}
    rows = []
    for target in TARGETS:
        found, word = judge(target, frames[target.device])
        measured = NONE if found is None else f"{found:.3g}{target.unit}"
        rows.append({"on": target.device, "suite": target.suite, "target": target.what, "asked": target.asked,
                     "measured": measured, "verdict": word})  # fmt: skip
    return markdown(rows)
