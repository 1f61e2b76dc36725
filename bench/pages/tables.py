"""The tables of `bench/RESULTS.md`: one for any suite, and those of scaling, ceilings, targets and the GPU."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench import scaling
from bench.machine.ceilings import binding
from bench.machine.record import Record, Result, milliseconds, per_second, ratio, results, seconds
from bench.pages import fits
from bench.pages.targets import COHORT_CASE, NO_GPU, Verdict, curve, memory_limit, stop
from bench.providers import chains
from bench.providers.chains import Shape

# Who the others are measured against, the first that a group has.
BASELINES = (
    chains.NAIVE, "PyHealth", "Gildenblat 2020 (vit-explain)", "Chefer 2021 (ICCV)", "one worker", "fused forward",
    "plain forward", "sum(1)",
)  # fmt: skip
FULL_MIMIC = 236_532  # samples of InHospitalMortality in MIMIC-IV


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def mib(size: float | None) -> str:
    if size is None:
        return "–"
    return f"{size / 2**20:.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def group(result: Result) -> tuple[Any, ...]:
    """What a result may be compared with: the same case, method, shape and dtype."""
    return (result.get("case"), result.get("method"), tuple(result.get("shape", {}).items()), result.get("dtype"))


def label(result: Result) -> str:
    """The case, the method and the length of a result, as far as it has them."""
    parts = [str(result[key]) for key in ("method", "case") if key in result]
    shape = result.get("shape", {})
    if "S" in shape and not any(part.startswith("S=") for part in parts):
        parts.append(f"S={shape['S']}")
    return ", ".join(parts) or "–"


def shape_text(group_results: Sequence[Result]) -> str:
    """The sizes that all results of a suite share."""
    shapes = [result.get("shape", {}) for result in group_results]
    shared = [key for key in shapes[0] if len({shape.get(key) for shape in shapes}) == 1]
    dtypes = sorted({result["dtype"] for result in group_results if "dtype" in result})
    return ", ".join([f"{key}={shapes[0][key]}" for key in shared] + dtypes)


def suite_table(suite: dict[str, Any]) -> str:
    """Every result of a suite: median, spread, speed-up, rate and share of the ceiling that binds, memory, error."""
    found: list[Result] = sorted(suite["results"], key=lambda result: _order(result, suite["results"]))
    counted = any(per_second(result) is not None for result in found)
    several = any(result.get("shape", {}).get("L") != found[0].get("shape", {}).get("L") for result in found)
    header = ["case", "provider", "median", "middle half", "rounds", "speed-up"]
    header += ["samples/s"] if counted else ["rate", "of the ceiling"]
    rows = []
    for result in found:
        baseline = _baseline(result, found)
        faster = None if baseline is None or baseline is result else ratio(baseline, result)
        name = label(result) + (f", L={result['shape']['L']}" if several else "")
        row = [name, result["provider"], milliseconds(result), spread(result), str(result["seconds"]["rounds"])]
        row.append("–" if faster is None else f"{faster:.2f}×")
        row += [_per_second(result)] if counted else list(rate(result, suite.get("ceilings")))
        error = f"{result['error']:.1e}" if "error" in result else "–"
        rows.append([*row, mib(result.get("peak_extra_bytes")), error])
    return markdown([*header, "extra memory", "max err"], rows)


def _order(result: Result, found: list[Result]) -> tuple[Any, ...]:
    shape = result.get("shape", {})
    place = next((i for i, other in enumerate(found) if group(other) == group(result)), 0)
    return (str(result.get("method", "")), str(result.get("case", "")) == "", place if "case" in result else 0,
            shape.get("L", 0), shape.get("S", 0), result["provider"] not in BASELINES)  # fmt: skip


def _baseline(result: Result, found: list[Result]) -> Result | None:
    same = {other["provider"]: other for other in found if group(other) == group(result)}
    return next((same[name] for name in BASELINES if name in same), None)


def spread(result: Result) -> str:
    """The middle half of the rounds, as a share of the median."""
    taken = result["seconds"]
    if "q1" not in taken:
        return "–"
    low, high = (100 * (taken[key] / taken["median"] - 1) for key in ("q1", "q3"))
    return f"{low:+.0f} to {high:+.0f} %"


def rate(result: Result, ceilings: dict[str, float] | None) -> tuple[str, str]:
    """GB/s or GFLOP/s of the work a provider does, and its share of the ceiling that binds that work."""
    size, flop = result.get("bytes", 0), result.get("flop", 0)
    if not ceilings or not (size or flop):
        return "–", "–"
    found = binding(ceilings, size, flop, seconds(result))
    assert found is not None
    name, share = found
    text = gb(size / seconds(result)) if name == "read" else gflop(flop / seconds(result))
    return text, f"{share:.0%} of {name}"


def gb(per_s: float) -> str:
    return f"{per_s / 1e9:.1f} GB/s"


def gflop(per_s: float) -> str:
    return f"{per_s / 1e9:.0f} GFLOP/s" if per_s < 1e12 else f"{per_s / 1e12:.1f} TFLOP/s"


def _per_second(result: Result) -> str:
    found = per_second(result)
    return "–" if found is None else f"{found:,.0f}" if found >= 10 else f"{found:.2f}"


def ceilings_table(record: Record) -> str:
    """The ceilings as each suite's run found them."""
    rows = []
    for name, suite in record["suites"].items():
        if found := suite.get("ceilings"):
            values = [gb(found["read"]), gb(found["copy"]), gflop(found["matmul"]), mib(found["cache"])]
            rows.append([name, suite["date"], str(suite["threads"]), *values])
    return markdown(["measured for", "date", "threads", "read", "copy", "matmul, fp32", "last-level cache"], rows)


def exponents_table(record: Record) -> str:
    """Fitted exponents of time and of extra memory for each curve."""
    points, rows = results(record, "scaling"), []
    for source, provider, axes in scaling.curves():
        for axis in axes:
            found = curve(points, source, provider, axis)
            if len(found) < 2:
                continue
            values = [each["value"] for each in found]
            time = fits.power(values, [each["seconds"] for each in found])
            extra = fits.power(values, [each["extra"] or 0 for each in found])
            sizes = ", ".join(f"{k}={v}" for k, v in found[0]["shape"].items() if k != axis)
            worst = max(each["error"] for each in found)
            rows.append([
                source, provider, axis, f"{values[0]} … {values[-1]}", sizes, str(time), str(extra or "–"),
                f"{found[-1]['seconds']:.2g} s", mib(found[-1]["extra"]), f"{worst:.0e}",
            ])  # fmt: skip
    header = ["from", "provider", "axis", "sizes", "the rest", "exponent of time", "of extra memory", "time at the end",
              "extra memory there", "max err"]  # fmt: skip
    return markdown(header, rows)


def stops_table(record: Record) -> str:
    """Where each provider ends along S, and the length at which its memory passes the limit."""
    points, rows = results(record, "scaling"), []
    for source, provider, _ in scaling.curves():
        found, end = curve(points, source, provider, "S"), stop(points, source, provider, "S")
        if not found or end is None:
            continue
        total = found[-1]["inputs"] + (found[-1]["extra"] or 0)
        reached = f"S ≈ {reaches(source, found, memory_limit(points)):,}"
        why = {
            "memory": f"S={end['value']} needs {mib(end['predicted'])}",
            "time": f"S={end['value']} takes {end['predicted']:.0f} s a call" if "predicted" in end else "",
            "end": "the largest size tried",
        }[end["stopped"]]
        rows.append([source, provider, f"S={found[-1]['value']}", mib(total), why, reached])
    header = ["from", "provider", "last size run", "memory there, with inputs", "why it stops (predicted)",
              "its memory passes the limit at"]  # fmt: skip
    return markdown(header, rows)


def cohort_table(record: Record) -> str:
    """The cohort runs: samples a second, where the time went, peak memory; and what a full MIMIC-IV would take."""
    found, rows = results(record, "cohort run"), []
    for each in found:
        baseline = _baseline(each, found)
        faster = None if baseline is None or baseline is each else ratio(baseline, each)
        stages = ", ".join(f"{name} {spent:.1f}" for name, spent in each.get("stages", {}).items())
        beside = f"{each['bookkeeping']:.0%}" if "bookkeeping" in each else "–"
        rows.append([
            each["case"], each["provider"], f"{each['samples']:,}", f"{seconds(each):.1f} s", _per_second(each),
            "–" if faster is None else f"{faster:.2f}×", stages or "–", beside, mib(each.get("peak_bytes")),
        ])  # fmt: skip
    header = ["case", "provider", "samples", "time", "samples/s", "speed-up", "seconds by stage",
              "beside model and chain", "peak memory"]  # fmt: skip
    return "\n\n".join([markdown(header, rows), *_full_mimic(found)])


def _full_mimic(found: list[Result]) -> list[str]:
    rates = {each["provider"]: per_second(each) for each in found if each.get("case") == COHORT_CASE}
    hours = {name: FULL_MIMIC / rate / 3600 for name, rate in rates.items() if rate}
    if not hours:
        return []
    told = ", ".join(f"{name} {taken:.1f} h" for name, taken in hours.items())
    return [f"Estimate, not a measurement: the {FULL_MIMIC:,} samples of in-hospital mortality of full MIMIC-IV would "
            f"take, at these rates: {told}."]  # fmt: skip


def reaches(source: str, found: list[Result], limit: float) -> int:
    """The first S, to two digits, at which inputs (exactly) and extra memory (its fit) together pass the limit."""
    fit = fits.power([each["value"] for each in found], [each["extra"] or 0 for each in found])
    last = found[-1]
    sizes = {key: size for key, size in last["shape"].items() if key in "BHL"}

    def needed(seq: int) -> float:
        # Memory that does not grow, as a buffer of one size, is the last that was seen.
        extra = max(last["extra"] or 0, fit.at(seq) if fit is not None and fit.exponent > 0 else 0)
        return scaling.input_bytes(source, Shape(S=seq, **sizes)) + extra

    low, high = 1, 2
    while needed(high) <= limit:
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= limit else (low, middle)
    digits = 10 ** max(0, len(str(high)) - 2)
    return round(high / digits) * digits


def verdict_table(found: Iterable[Verdict]) -> str:
    rows = [[each.what, each.wanted, each.found, each.verdict, each.suite] for each in found]
    return markdown(["target", "asked", "measured", "verdict", "suite"], rows)


def gpu_table(gpu: Record | None) -> str:
    """The cases of `bench.gpu`, or the words that keep their place."""
    if gpu is None:
        return f"Kernels, case by case (`python -m bench.gpu`): **{NO_GPU}**."
    rows = []
    for each in gpu["results"]:
        shape = ", ".join(f"{key}={value}" for key, value in each["shape"].items() if value)
        if "failed" in each:
            rows.append([each["name"], shape, each["dtype"], f"wrong, not timed: {each['failed']}", "–", "–", "–"])
            continue
        speed = f"{each['tflop_s']:.0f} TFLOP/s" if "tflop_s" in each else f"{each['gb_s']:.0f} GB/s"
        share = f"{each['share_of_copy']:.0%} of copy" if "share_of_copy" in each else "–"
        peers = ", ".join(f"{name} {ms / each['ms']:.1f}×" for name, ms in each.get("peers_ms", {}).items())
        rows.append([each["name"], shape, each["dtype"], f"{each['ms']:.3f} ms", speed, share, peers or "–"])
    header = ["case", "shape", "dtype", "time", "rate", "of the ceiling", "speed-up over"]
    ceilings = gpu["ceilings"]
    head = f"{gpu['device']}, {gpu['date']}: copy {ceilings['copy_gb_s']:.0f} GB/s, bf16 matmul "
    return f"{head}{ceilings['matmul_tflop_s']:.0f} TFLOP/s.\n\n" + markdown(header, rows)
