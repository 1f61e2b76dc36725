"""Renders every record under `bench/results/`: `python -m bench.pages`.

Into `bench/RESULTS.md` with its plots; and this machine's, or the only one, into the table of the README and the
verdicts of `bench/README.md`, between their markers.
"""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from bench.machine import host, record
from bench.machine.record import Record, Suite
from bench.pages import tables
from bench.pages.frame import frame_of, ratio
from bench.pages.plots import draw_all
from bench.pages.targets import KERNELS, NO_GPU, NO_RUN, TRITON
from bench.providers.chains import COMPILED, NAIVE, NATIVE
from bench.providers.kernels import FLEX
from bench.suites import SUITES
from rollout.bench.end_to_end import STOCK
from rollout.bench.measure import OURS
from rollout.files import put_between_markers, write_whole

Records = dict[Path, Record]  # by file: cpu.json or cuda.json in the folder of a device

# The README's rows: suite, which of its results, the peer.
HEADLINES = (
    *(("rows from maps", {"S": seq}, NAIVE) for seq in (64, 512)),
    ("rows from Q,K", {"S": 512}, NAIVE),
    ("PyHealth end to end", {"case": "log-normal, sorted"}, STOCK),
    *(("PyHealth on real records", {"case": f"MIMIC-IV drugs, {size}"}, STOCK) for size in ("E64 H2 L2", "E128 H8 L4")),
    ("class-specific relevance", {"case": "different codes", "S": 512}, STOCK),
    ("evaluation", {"case": "whole, log-normal, sorted, E64 H2 L2"}, STOCK),
    ("cohort run", {"case": "synthetic cohort"}, STOCK),
)
# What the record calls a ceiling, behind the name and before the form that the page has for it.
CEILINGS = (
    ("read", "read", tables.BYTES_A_SECOND), ("copy", "copy", tables.BYTES_A_SECOND),
    ("float32", "matmul", tables.FLOP_A_SECOND), ("bfloat16", "matmul_bf16", tables.FLOP_A_SECOND),
    ("last-level cache", "cache", tables.SIZE),
)  # fmt: skip
INTRODUCTION = (
    "Rendered by `python -m bench.pages` from the records in `bench/results/`; what each suite times and how: "
    "[README.md](README.md). Share: the time of the work that cannot be left out, in the same run, over a provider's."
)


def choose(found: Records, kind: str) -> Record | None:
    """The record of a `"cpu"` or a `"cuda"` device that is shown: this machine's; else the first."""
    there = {file.parent.name: each for file, each in found.items() if file.stem == kind}
    return there.get(host.folder().name, next(iter(there.values()), None))


def readme_table(shown: Record, cuda: Record | None) -> str:
    """What stands between the README's markers: peers, and shares of the work that cannot be left out; then the GPU."""
    frame, rows = frame_of(shown), []
    for suite, which, peer in HEADLINES:
        found = {row["provider"]: row for row in frame.filter(suite=suite, **which).to_dicts()}
        ours = found.get(NATIVE) or found.get(OURS)  # as "auto" takes them
        if ours and peer in found:
            case = ", ".join(f"S={value}" if key == "S" else str(value) for key, value in which.items())
            figures = {"theirs": _figure(found[peer]), "ours": _figure(ours)}
            compared = {column: tables.cell(ours, column) for column in ("speed-up", "share")}
            rows.append({"suite": f"{suite}, {case}", "against": peer} | figures | compared)
    dates = sorted({suite["date"] for suite in shown["suites"].values()})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    head = f"{shown['device']}, {shown['cores']} cores; `make bench`, {when}. Medians of one run. Share: the time of "
    head += "the work that cannot be left out, in the same run, over the time of ours."
    return "\n\n".join([head, tables.markdown(rows), *([gpu_table(cuda)] if cuda else [])])


def gpu_table(cuda: Record) -> str:
    """Ours in every case of the kernels: rate, the share of the ceiling that binds, and times as fast as the peers."""
    times = {f"over the {NAIVE}": ratio(NAIVE), "over FlexAttention": ratio(FLEX)}
    rows = [
        {"kernel": row["case"], "time": tables.cell(row, "median"), "rate": tables.cell(row, "rate")}
        | {name: tables.NONE if row[name] is None else f"{row[name]:.1f}×" for name in times}
        for row in frame_of(cuda).with_columns(**times).filter(suite=KERNELS, provider=TRITON).to_dicts()
    ]
    when = cuda["suites"].get(KERNELS, {"date": NO_RUN})["date"]
    return f"{cuda['device']}; `make gpu`, {when}.\n\n{tables.markdown(rows)}"


def _figure(row: tables.Row) -> str:
    return tables.cell(row, "median") if row["samples"] is None else f"{tables.cell(row, 'samples/s')} samples/s"


def page(found: Records, verdicts: str) -> str:
    """RESULTS.md."""
    shown = choose(found, "cpu")
    on = f" (CPU: {shown['device']})" if shown else ""
    parts = ["# Results", INTRODUCTION, f"## Targets{on}", verdicts]
    for file, each in found.items():
        pictures = sorted(file.parent.glob("*.png"))
        parts += _suites(each)
        parts += [f"![{each.stem.replace('-', ' ')}](results/{file.parent.name}/{each.name})" for each in pictures]
    if choose(found, "cuda") is None:
        parts += ["## On a GPU", f"The suites (`python -m bench.run --device cuda`): **{NO_GPU}**."]
    return "\n\n".join(parts) + "\n"


def _suites(record: Record) -> Iterator[str]:
    yield f"## {record['device']}, {record['cores']} cores"
    frame = frame_of(record)
    for (name,), found in frame.group_by("suite", maintain_order=True):
        yield f"### {name}\n\n{_context(record['suites'][name], found)}."
        yield tables.scaling_table(found) if name == "scaling" else tables.suite_table(found)
        if name == "rows from maps" and COMPILED not in found["provider"]:
            yield "`torch.compile`: no compiler works on this machine."
    if left_out := [name for name in SUITES if name not in record["suites"]]:
        yield f"Not in this record: {', '.join(left_out)}."


def _context(suite: Suite, found: pl.DataFrame) -> str:
    """What a suite's figures were taken on, and how noisy they are."""
    first, *others = (result.get("shape", {}).items() for result in suite["results"])
    shared = [f"{key}={size}" for key, size in first if all((key, size) in other for other in others)]
    dtypes, states = (found[name].drop_nulls().unique().sort().to_list() for name in ("dtype", "cache"))
    width = ((found["q3"] - found["q1"]) / found["median"]).median()
    ceilings = suite.get("ceilings") or {}
    limits = [f"{name} {tables.tell(ceilings[key], form)}" for name, key, form in CEILINGS if ceilings.get(key)]
    parts = [
        ", ".join(shared + dtypes),
        f"{suite['date']}, {suite['threads']} thread{'s' * (suite['threads'] != 1)}",
        ", ".join(f"{name} {number}" for name, number in suite["versions"].items()),
        ", ".join(limits),
        states and f"cache {' or '.join(states)}",
        width is not None and f"middle half of the rounds typically {width:.0%} of the median wide",
    ]
    return "; ".join(filter(None, parts))


def write_all(root: Path = host.ROOT, plots: bool = True) -> list[Path]:
    """Every page and plot; returns what was written."""
    files = sorted((root / "bench" / "results").glob("*/*.json"))
    found = {file: record.load(file) for file in files if file.stem in ("cpu", "cuda")}
    written = [picture for file, each in found.items() if plots for picture in draw_all(each, file.parent)]
    shown, cuda = choose(found, "cpu"), choose(found, "cuda")
    verdicts = tables.verdict_table(shown, cuda)
    written.append(write_whole(root / "bench" / "RESULTS.md", page(found, verdicts).encode()))
    written.append(put_between_markers(root / "bench" / "README.md", "verdicts", verdicts))
    if shown is not None:
        written.append(put_between_markers(root / "README.md", "bench", readme_table(shown, cuda)))
    return written
