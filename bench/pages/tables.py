"""The tables of the pages: one for any suite, and those of scaling and of the targets."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from scipy import stats

from bench.machine.record import Record, Result, Suite, per_second, ratio, results, seconds
from bench.pages.targets import Verdict
from bench.providers.chains import CHEFER, GILDENBLAT, NAIVE, PRODUCTS, READ
from rollout.bench.end_to_end import FUSED, STOCK
from rollout.bench.measure import Ceilings

# Who the others are measured against, the first that a group has; and the work that none can leave out.
BASELINES = (NAIVE, STOCK, GILDENBLAT, CHEFER, "one worker", "fused forward", "plain forward")
FLOORS = (READ, PRODUCTS, FUSED)
TAIL = 4  # points of a curve that an exponent is fitted to
NONE = "–"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def mib(size: float | None) -> str:
    if size is None:
        return NONE
    return f"{size / 2**20:.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def milliseconds(result: Result) -> str:
    taken = 1e3 * seconds(result)
    return f"{taken:.2f} ms" if taken < 10 else f"{taken:.1f} ms" if taken < 1e3 else f"{taken / 1e3:.2f} s"


def gb(per_s: float) -> str:
    return f"{per_s / 1e9:.1f} GB/s"


def gflop(per_s: float) -> str:
    return f"{per_s / 1e9:.0f} GFLOP/s" if per_s < 1e12 else f"{per_s / 1e12:.1f} TFLOP/s"


def samples_a_second(result: Result) -> str:
    found = per_second(result)
    return NONE if found is None else f"{found:,.0f}" if found >= 10 else f"{found:.2f}"


def among(names: Sequence[str], result: Result, found: list[Result]) -> Result | None:
    """The first of these providers among the results that this one may be compared with: same case, shape and dtype."""
    keys = ("case", "method", "shape", "dtype")
    alike = [other for other in found if all(other.get(key) == result.get(key) for key in keys)]
    same = {other["provider"]: other for other in alike}
    return next((same[name] for name in names if name in same), None)


def speed_up(result: Result, found: list[Result]) -> str:
    """Over the baseline of its group."""
    baseline = among(BASELINES, result, found)
    return NONE if baseline is None or baseline is result else f"{ratio(baseline, result):.2f}×"


def share(result: Result, found: list[Result]) -> str:
    """The time of the work that cannot be left out over its own."""
    floor = among(FLOORS, result, found)
    part = seconds(floor) / seconds(result) if floor else 1.0
    return NONE if floor in (None, result) else f"{part:.0%} of {floor['provider']}"


def spread(result: Result) -> str:
    """The middle half of the rounds, as a share of the median."""
    taken = result["seconds"]
    if "q1" not in taken:
        return NONE
    low, high = (100 * (taken[key] / taken["median"] - 1) for key in ("q1", "q3"))
    return f"{low:+.0f} to {high:+.0f} %"


def rate(result: Result, ceilings: Ceilings | None) -> str:
    """GB/s or GFLOP/s of a provider's own work, and the share of the ceiling that binds it; of products if float32."""
    size, flop, taken = result.get("bytes", 0), result.get("flop", 0), seconds(result)
    binding = ceilings and ceilings.binding(size, flop, taken)
    if not binding:
        return NONE
    text = gb(size / taken) if binding[0] == "memory" else gflop(flop / taken)
    held = binding[0] == "memory" or result.get("dtype") == "float32"
    return f"{text}, {binding[1]:.0%} of {binding[0]}" if held else text


def ceilings_of(suite: Suite) -> Ceilings | None:
    return Ceilings(**suite["ceilings"]) if suite.get("ceilings") else None


def suite_table(suite: Suite) -> str:
    """Every result of a suite; a column in which none has anything is left out."""
    found: list[Result] = sorted(suite["results"], key=lambda result: _order(result, suite["results"]))
    sizes = [key for key in "SL" if len({result.get("shape", {}).get(key) for result in found}) > 1]
    columns: dict[str, Callable[[Result], str]] = {
        "case": lambda result: _label(result, sizes),
        "provider": lambda result: result["provider"],
        "samples": lambda result: f"{result['samples']:,}" if "samples" in result else NONE,
        "median": milliseconds,
        "middle half": spread,
        "rounds": lambda result: str(result["seconds"]["rounds"]),
        "samples/s": samples_a_second,
        "speed-up": lambda result: speed_up(result, found),
        "share": lambda result: share(result, found),
        "rate": lambda result: rate(result, ceilings_of(suite)),
        "s by stage": lambda result: ", ".join(f"{k} {v:.1f}" for k, v in result.get("stages", {}).items()) or NONE,
        "beside model and chain": lambda result: f"{result['bookkeeping']:.0%}" if "bookkeeping" in result else NONE,
        "extra memory": lambda result: mib(result.get("peak_extra_bytes")),
        "peak memory": lambda result: mib(result.get("peak_bytes")),
        "max err": lambda result: f"{result['error']:.1e}" if "error" in result else NONE,
    }
    cells = {name: [column(result) for result in found] for name, column in columns.items()}
    kept = [name for name, column in cells.items() if set(column) != {NONE}]
    return markdown(kept, zip(*(cells[name] for name in kept), strict=True))


def _label(result: Result, sizes: Sequence[str]) -> str:
    """The method and the case of a result, and the sizes that differ within its suite."""
    parts = [str(result[key]) for key in ("method", "case") if key in result]
    shape = result.get("shape", {})
    parts += [f"{key}={shape[key]}" for key in sizes if key in shape and f"{key}={shape[key]}" not in parts]
    return ", ".join(parts) or NONE


def _order(result: Result, found: list[Result]) -> tuple[Any, ...]:
    """Methods by name, groups as they were run, and in a group the baseline first."""
    first = next(i for i, other in enumerate(found) if among([other["provider"]], result, found) is other)
    return (str(result.get("method", "")), first, result["provider"] not in BASELINES)


def curves(record: Record) -> dict[tuple[str, str], list[Result]]:
    """(case, provider) → the points of the scaling suite, shortest first."""
    found: dict[tuple[str, str], list[Result]] = {}
    for each in sorted(results(record, "scaling"), key=lambda each: (each["case"], each["shape"]["S"])):
        found.setdefault((each["case"], each["provider"]), []).append(each)
    return found


def exponent(points: Sequence[Result], value: Callable[[Result], float | None]) -> str:
    """b of y = a·S^b and its standard error: least squares on logarithms, over the last points that have a y."""
    pairs = [(math.log(each["shape"]["S"]), math.log(y)) for each in points if (y := value(each))][-TAIL:]
    if len(pairs) < 3:
        return NONE
    fit = stats.linregress(*zip(*pairs, strict=True))
    return f"{fit.slope:.2f} ± {fit.stderr if math.isfinite(fit.stderr) else 0.0:.2f}"  # of equal y scipy has no error


def scaling_table(record: Record) -> str:
    """Each provider's curve: fitted exponents, and what its largest size takes."""
    rows = []
    for (case, provider), points in curves(record).items():
        last = points[-1]
        rows.append([
            case, provider, f"{points[0]['shape']['S']} … {last['shape']['S']}", exponent(points, seconds),
            exponent(points, lambda each: each["peak_extra_bytes"]), milliseconds(last), mib(last["inputs"]),
            mib(last["peak_extra_bytes"]), f"{max(each['error'] for each in points):.0e}",
        ])  # fmt: skip
    ends = ["time at the end", "inputs there", "extra memory there", "max err"]
    return markdown(["from", "provider", "S", "exponent of time", "of extra memory", *ends], rows)


def verdict_table(found: Iterable[Verdict]) -> str:
    rows = []
    for each in found:
        told = NONE if each.found is None else f"{each.found:.3g}{each.target.unit}"
        rows.append([each.target.device, each.target.suite, each.target.what, each.target.asked, told, each.word])
    return markdown(["on", "suite", "target", "asked", "measured", "verdict"], rows)
