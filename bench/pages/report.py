"""Renders every record under `bench/results/`: `python -m bench.pages`.

Into `bench/RESULTS.md` with its plots; and this machine's, or the only one, into the table of the README and the
verdicts of `bench/README.md`, between their markers.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

from bench.machine import host, record
from bench.machine.record import Record, Result, Suite, find, ratio, results
from bench.pages import tables
from bench.pages.targets import KERNELS, NO_GPU, NO_RUN, TRITON, judge_all
from bench.providers.chains import COMPILED, NAIVE, NATIVE
from bench.providers.kernels import FLEX
from bench.suites import SUITES
from rollout.bench.end_to_end import STOCK
from rollout.bench.measure import OURS
from rollout.files import put_between_markers

Devices = dict[str, dict[str, Record]]  # folder → the records of one machine, by "cpu" and "cuda"

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
INTRODUCTION = (
    "Rendered by `python -m bench.pages` from the records in `bench/results/`; what each suite times and how: "
    "[README.md](README.md). Share: the time of the work that cannot be left out, in the same run, over a provider's."
)


def load_all(root: Path) -> Devices:
    """Every machine with a record."""
    found: Devices = {}
    for file in sorted(root.glob("*/*.json")):
        if file.stem in ("cpu", "cuda"):
            found.setdefault(file.parent.name, {})[file.stem] = record.load(file)
    return found


def choose(found: Devices, here: str) -> Record | None:
    """The CPU record the README shows: this machine's; else the first."""
    there = {folder: records["cpu"] for folder, records in found.items() if "cpu" in records}
    return there.get(here, next(iter(there.values()), None))


def cuda_record(found: Devices) -> Record | None:
    """The first there is."""
    return next((records["cuda"] for records in found.values() if "cuda" in records), None)


def readme_table(shown: Record, cuda: Record | None) -> str:
    """What stands between the README's markers: peers, and shares of the work that cannot be left out; then the GPU."""
    rows = []
    for suite, which, peer in HEADLINES:
        found = results(shown, suite)
        theirs = find(found, provider=peer, **which)
        ours = find(found, provider=NATIVE, **which) or find(found, provider=OURS, **which)  # as "auto" takes them
        if theirs and ours:
            case = ", ".join(f"S={value}" if key == "S" else str(value) for key, value in which.items())
            compared = tables.speed_up(ours, found), tables.share(ours, found)
            rows.append([f"{suite}, {case}", peer, _figure(theirs), _figure(ours), *compared])
    dates = sorted({suite["date"] for suite in shown["suites"].values()})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    head = f"{shown['device']}, {shown['cores']} cores; `make bench`, {when}. Medians of one run. Share: the time of "
    head += "the work that cannot be left out, in the same run, over the time of ours."
    table = tables.markdown(["suite", "against", "theirs", "ours", "speed-up", "share"], rows)
    return "\n\n".join([head, table, *([gpu_table(cuda)] if cuda else [])])


def gpu_table(cuda: Record) -> str:
    """Ours in every case of the kernels: rate, the share of the ceiling that binds, and times as fast as the peers."""
    suite = cuda["suites"].get(KERNELS, {"date": NO_RUN, "results": []})
    found, limits = suite["results"], tables.ceilings_of(suite)
    rows = []
    for ours in (each for each in found if each["provider"] == TRITON):
        peers = (tables.among([name], ours, found) for name in (NAIVE, FLEX))
        over = [f"{ratio(peer, ours):.1f}×" if peer else tables.NONE for peer in peers]
        rows.append([ours["case"], tables.milliseconds(ours), tables.rate(ours, limits), *over])
    header = ["kernel", "time", "rate", f"over the {NAIVE}", "over FlexAttention"]
    return f"{cuda['device']}; `make gpu`, {suite['date']}.\n\n{tables.markdown(header, rows)}"


def _figure(result: Result) -> str:
    return f"{tables.samples_a_second(result)} samples/s" if "samples" in result else tables.milliseconds(result)


def page(folder: Path, found: Devices, verdicts: str, shown: Record | None) -> str:
    """RESULTS.md."""
    on = f" (CPU: {shown['device']})" if shown else ""
    parts = ["# Results", INTRODUCTION, f"## Targets{on}", verdicts]
    for name, records in found.items():
        for each in records.values():
            parts += _suites(each)
        pictures = sorted((folder / name).glob("*.png"))
        parts += [f"![{each.stem.replace('-', ' ')}](results/{name}/{each.name})" for each in pictures]
    if cuda_record(found) is None:
        parts += ["## On a GPU", f"The suites (`python -m bench.run --device cuda`): **{NO_GPU}**."]
    return "\n\n".join(parts) + "\n"


def _suites(found: Record) -> Iterator[str]:
    yield f"## {found['device']}, {found['cores']} cores"
    for name in SUITES:
        if name not in found["suites"]:
            continue
        here = found["suites"][name]
        yield f"### {name}\n\n{_context(here)}."
        yield tables.scaling_table(found) if name == "scaling" else tables.suite_table(here)
        if name == "rows from maps" and find(here["results"], provider=COMPILED) is None:
            yield "`torch.compile`: no compiler works on this machine."
    if left_out := [name for name in SUITES if name not in found["suites"]]:
        yield f"Not in this record: {', '.join(left_out)}."


def _context(suite: Suite) -> str:
    """What a suite's figures were taken on, and how noisy they are."""
    shapes = [result.get("shape", {}) for result in suite["results"]]
    shared = [f"{k}={v}" for k, v in shapes[0].items() if all(shape.get(k) == v for shape in shapes)]
    dtypes = sorted({result["dtype"] for result in suite["results"] if "dtype" in result})
    parts = [", ".join(shared + dtypes), f"{suite['date']}, {suite['threads']} thread{'s' * (suite['threads'] != 1)}"]
    parts.append(", ".join(f"{name} {number}" for name, number in suite["versions"].items()))
    if limits := tables.ceilings_of(suite):
        text = f"read {tables.gb(limits.read)}, copy {tables.gb(limits.copy)}, float32 {tables.gflop(limits.matmul)}"
        halves = "" if limits.matmul_bf16 is None else f", bfloat16 {tables.gflop(limits.matmul_bf16)}"
        parts.append(f"{text}{halves}, last-level cache {tables.mib(limits.cache)}")
    if states := sorted({each["cache"] for each in suite["results"] if "cache" in each}):
        parts.append(f"cache {' or '.join(states)}")
    if times := [each["seconds"] for each in suite["results"] if "q1" in each["seconds"]]:
        width = statistics.median((each["q3"] - each["q1"]) / each["median"] for each in times)
        parts.append(f"middle half of the rounds typically {width:.0%} of the median wide")
    return "; ".join(filter(None, parts))


def write_all(root: Path = host.ROOT, plots: bool = True) -> list[Path]:
    """Every page and plot; returns what was written."""
    folder = root / "bench" / "results"
    found = load_all(folder)
    shown, cuda = choose(found, host.folder().name), cuda_record(found)
    written = []
    if plots:
        from bench.pages.plots import draw_all

        for name, records in found.items():
            written += draw_all(records.get("cpu") or records["cuda"], folder / name)
    verdicts = tables.verdict_table(judge_all(shown, cuda))
    results_page = root / "bench" / "RESULTS.md"
    results_page.write_text(page(folder, found, verdicts, shown))
    written += [results_page, put_between_markers(root / "bench" / "README.md", "verdicts", verdicts)]
    if shown is not None:
        written.append(put_between_markers(root / "README.md", "bench", readme_table(shown, cuda)))
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-plots", action="store_true", help="pages only")
    options = parser.parse_args()
    for path in write_all(plots=not options.no_plots):
        print(path)
    return 0
