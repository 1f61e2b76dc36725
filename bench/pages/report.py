"""Pages from the records, so that no figure is typed by hand: `python -m bench.pages`.

Renders every record under `bench/results/` into `bench/RESULTS.md` with its plots, and this machine's (or the only one)
into the table of the README and the verdicts of `bench/README.md`, between their markers.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import suites
from bench.machine import host, record
from bench.machine.record import Record, find, milliseconds, per_second, ratio
from bench.pages.tables import (
    ceilings_table,
    cohort_table,
    exponents_table,
    gpu_table,
    markdown,
    shape_text,
    stops_table,
    suite_table,
    verdict_table,
)
from bench.pages.targets import COHORT_CASE, MET, MISSED, NO_GPU, NO_RUN, PYHEALTH, SPEED, Verdict, verdicts
from bench.providers.chains import NAIVE, OURS

PAGE, PLOTS_BELOW = "RESULTS.md", "results"
# What a suite times, said once above its table.
ABOUT = {
    "rows from maps": "One row per sample from stored maps. Rate: what each provider "
    "itself must read or multiply (ours: all layers but the top one; the others: every map, and the full product).",
    "rows from maps, warm": "The same with the maps where the call before left them: in the cache, when they fit.",
    "rows from bf16 maps": "The same from bfloat16 maps; the naive chain in native bfloat16.",
    "memory against layers": "Ours from maps, more and more layers: extra memory beyond the maps.",
    "head sum": "The first step of a tile alone: heads added one by one, and `sum(1)`.",
    "full matrix": "All of R from stored maps.",
    "rows from Q,K": "One row per sample from queries and keys; the naive chain writes the softmax out first.",
    "other methods": "The row of other methods of the family from stored maps (and gradients, given to both).",
    "model families": "Batch to relevance, one model of each family, random weights; theirs as its users compute it.",
    "BERT-base from tokens": "A BERT-base-shaped encoder, tokens to relevance: `output_attentions` and the naive "
    "chain, and capture.",
    "overhead of capture": "What recording adds to a forward pass on fused attention (Hugging Face).",
    "PyHealth end to end": "PyHealth's Transformer, batches of 32 to attributions: PyHealth's interpreter and ours.",
    "overhead of capture, PyHealth": "What recording adds to PyHealth's Transformer on fused attention.",
    "cohort run": "A whole cohort, attributed and written; PyHealth's interpreter in PyHealth's own loader loop.",
}


INTRODUCTION = (
    "Rendered by `python -m bench.pages` from the records in `bench/results/`; how each figure is taken: "
    "[README.md](README.md). A heading names the suite its figures are from."
)


@dataclass(frozen=True)
class Device:
    """The records of one machine: `cpu` and `cuda` by bench.run, `gpu` by bench.gpu."""

    folder: Path
    cpu: Record | None = None
    cuda: Record | None = None
    gpu: Record | None = None

    @property
    def main(self) -> Record | None:
        return self.cpu or self.cuda

    @property
    def name(self) -> str:
        found = self.main or self.gpu
        return "" if found is None else str(found["device"])


def devices(root: Path) -> list[Device]:
    """Every machine with a record."""
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
        loaded: dict[str, Any] = {}
        for kind in ("cpu", "cuda"):
            if (folder / f"{kind}.json").exists():
                loaded[kind] = record.load(folder / f"{kind}.json")
        if (folder / "gpu.json").exists():
            loaded["gpu"] = json.loads((folder / "gpu.json").read_text())
        if loaded:
            found.append(Device(folder, **loaded))
    return found


def chosen(found: list[Device], folder: Path) -> Device | None:
    """The machine the README shows: this one; else the first with a CPU record."""
    here = [each for each in found if each.folder.name == folder.name]
    return next(iter(here or [each for each in found if each.cpu]), None)


def all_verdicts(found: list[Device], shown: Device | None) -> list[Verdict]:
    """The CPU's from the machine shown, the GPU's from the first that has them."""
    cuda = next((each.cuda for each in found if each.cuda), None)
    gpu = next((each.gpu for each in found if each.gpu), None)
    return verdicts(shown.cpu if shown else None, cuda, gpu)


def headline(cpu: Record, judged: list[Verdict]) -> str:
    """The README's table: the main suites, ours against the peer, with the targets."""
    rows = []
    for suite in ("rows from maps", "rows from Q,K"):
        for seq in SPEED[suite]:
            pair = [find(cpu, suite, S=seq, provider=who) for who in (NAIVE, OURS)]
            if pair[0] and pair[1]:
                target = _target(judged, f"CPU, {suite}, S={seq}, against")
                rows.append([f"{suite}, S={seq}", "naive chain", *map(milliseconds, pair), _times(*pair), target])  # type: ignore[arg-type]
    for suite, cases in (("PyHealth end to end", tuple(PYHEALTH)), ("cohort run", (COHORT_CASE,))):
        for case in cases:
            pair = [find(cpu, suite, case=case, provider=who) for who in ("PyHealth", OURS)]
            if pair[0] and pair[1]:
                target = _target(
                    judged, f"interpreter, {case}" if suite != "cohort run" else "CPU, cohort run, samples/s"
                )
                rows.append([f"{suite}, {case}", "PyHealth's interpreter", *map(_rate, pair), _times(*pair), target])
    rows.append(["everything on a GPU", "–", "–", "–", "–", _gpu_word(judged)])
    return markdown(["suite", "against", "theirs", "ours", "speed-up", "target"], rows)


def _rate(result: record.Result | None) -> str:
    found = None if result is None else per_second(result)
    return "–" if found is None else f"{found:,.0f} samples/s"


def _times(slow: record.Result | None, fast: record.Result | None) -> str:
    found = ratio(slow, fast)
    return "–" if found is None else f"{found:.1f}×"


def _target(judged: list[Verdict], part: str) -> str:
    found = next((each for each in judged if part in each.what and each.what.startswith("CPU")), None)
    return "–" if found is None else f"{found.wanted}, {found.verdict}"


def _gpu_word(judged: list[Verdict]) -> str:
    found = [each.verdict for each in judged if each.what.startswith("GPU")]
    if all(word == NO_GPU for word in found):
        return NO_GPU
    return ", ".join(f"{found.count(word)} {word}" for word in (MET, MISSED, NO_GPU) if word in found)


def readme_table(shown: Device, judged: list[Verdict]) -> str:
    """What stands between the README's markers."""
    assert shown.cpu is not None
    head = f"{shown.name}, {shown.cpu['cores']} cores; `make bench`, {_dates(shown.cpu)}. Medians of one run."
    count = ", ".join(
        f"{sum(each.verdict == word for each in judged)} {word}"
        for word in (MET, MISSED, NO_GPU, NO_RUN)
        if any(each.verdict == word for each in judged)
    )
    return f"{head}\n\n{headline(shown.cpu, judged)}\n\nTargets: {count}."


def _dates(found: Record) -> str:
    dates = sorted({suite["date"] for suite in found["suites"].values()})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "no date"


def page(found: list[Device], judged: list[Verdict], shown: Device | None) -> str:
    """RESULTS.md."""
    parts = ["# Results", INTRODUCTION]
    on = f" (CPU: {shown.name})" if shown else ""
    parts += [f"## Targets{on}", verdict_table(judged)]
    for device in found:
        for kind, each in (("CPU", device.cpu), ("GPU", device.cuda)):
            if each is not None:
                parts += list(_device_parts(device, kind, each))
    gpu = next((each.gpu for each in found if each.gpu), None)
    parts += ["## On a GPU", gpu_table(gpu)]
    if not any(each.cuda for each in found):
        parts.append(f"The suites above (`python -m bench.run --device cuda`): **{NO_GPU}**.")
    return "\n\n".join(parts) + "\n"


def _device_parts(device: Device, kind: str, found: Record) -> Iterator[str]:
    yield f"## {found['device']}, {found['cores']} cores ({kind})"
    for suite, text in ABOUT.items():
        if suite in found["suites"]:
            here = found["suites"][suite]
            yield f"### {suite}"
            yield f"{text} {shape_text(here['results'])}; {_context(here)}."
            yield cohort_table(found) if suite == "cohort run" else suite_table(here)
        else:
            yield f'### {suite}\n\n{text} Not in the record: `python -m bench.run --suite "{suite}"`.'
    if suites.SCALING in found["suites"]:
        here = found["suites"][suites.SCALING]
        yield "### scaling"
        yield (
            "Each provider in a process of its own; least squares on logarithms over "
            f"the last four sizes, ± its standard error. {_context(here)}."
        )
        yield exponents_table(found)
        yield stops_table(found)
    yield "### Ceilings\n\n" + ceilings_table(found)
    if compiler := found.get("compiler"):
        yield f"`torch.compile`: no compiler ({compiler})."
    yield from _plots(device)


def _context(suite: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in suite["versions"].items())
    noise = noise_of(suite["results"])
    spread = "" if noise is None else f"; middle half of the rounds typically {noise:.0%} of the median wide"
    states = sorted({each["cache"] for each in suite["results"] if "cache" in each})
    cache = f"; cache {' or '.join(states)}" if states else ""
    return f"{suite['date']}, {suite['threads']} thread{'s' * (suite['threads'] != 1)}, {versions}{cache}{spread}"


def noise_of(found: list[record.Result]) -> float | None:
    """The median over a suite's results of the width of the middle half of the rounds, as a share of the median."""
    widths = [
        (each["seconds"]["q3"] - each["seconds"]["q1"]) / each["seconds"]["median"]
        for each in found
        if isinstance(each.get("seconds"), dict) and "q1" in each["seconds"]
    ]
    return statistics.median(widths) if widths else None


def _plots(device: Device) -> Iterator[str]:
    for picture in sorted(device.folder.glob("*.png")):
        yield f"![{picture.stem.replace('-', ' ')}]({PLOTS_BELOW}/{device.folder.name}/{picture.name})"


def render(path: Path, text: str, marker: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->` on a page.

    Raises:
        ValueError: the page lacks the markers.
    """
    whole, start, end = path.read_text(), f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if whole.count(start) != 1 or whole.count(end) != 1:
        raise ValueError(f"{path.name} must have the markers {start} and {end} once each")
    before, rest = whole.split(start)
    path.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


def write_all(root: Path = host.ROOT, plots: bool = True) -> list[Path]:
    """Every page and plot; returns what was written."""
    folder = root / "bench" / "results"
    found = devices(folder)
    shown = chosen(found, host.folder())
    judged, written = all_verdicts(found, shown), []
    if plots:
        from bench.pages.plots import draw_all

        for each in found:
            if each.main is not None:
                written += draw_all(each.main, each.folder)
    results_page = root / "bench" / PAGE
    results_page.write_text(page(found, judged, shown))
    render(root / "bench" / "README.md", verdict_table(judged), "verdicts")
    written += [results_page, root / "bench" / "README.md"]
    if shown is not None and shown.cpu is not None:
        render(root / "README.md", readme_table(shown, judged), "bench")
        written.append(root / "README.md")
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=host.ROOT, help="the folder that holds README.md and bench/")
    parser.add_argument("--no-plots", action="store_true", help="pages only")
    options = parser.parse_args()
    for path in write_all(options.root, not options.no_plots):
        print(path)
    return 0
