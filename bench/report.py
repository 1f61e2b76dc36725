"""Tables from a record of `bench.run`; the README's is rendered between its markers, so no figure is typed by hand."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Result = dict[str, Any]

# Suite → {S: the least speed-up over the naive chain asked of it}.
TARGETS = {
    "rows from maps": {64: 2.5, 128: 3.5, 256: 5.0, 512: 10.0},
    "rows from Q,K": {64: 2.0, 128: 2.8, 256: 4.5, 512: 5.0},
    "rows from bf16 maps": {128: 20.0, 256: 20.0},
}
# Case → the least speed-up over PyHealth's interpreter asked of it.
PYHEALTH_TARGETS = {"lengths 256-512": 6.0, "log-normal, sorted": 8.0}
CAPTURE_TARGET = 1.40  # of a plain fused forward
BERT_SPEED, BERT_MEMORY = 3.0, 0.25  # times as fast as stored maps, and of their memory
READ = "one read of the maps"
READ_SHARE_TARGET = 0.70  # from S = 256


def tables(record: dict[str, Any]) -> str:
    """Every table of a record, in Markdown."""
    head = (
        f"{record['device']}, {record['results'][0]['threads']} threads, torch {record['versions']['torch']}, "
        f"{record['date']}; `make bench`. Medians; B=32 H=8 L=4, D=64 for Q,K; speed-up over the naive chain in the "
        f"same run."
    )
    parts = [head]
    for suite in TARGETS:
        rows = [row for seq in _sequences(record, suite) for row in [_row(record, suite, seq)] if row]
        if rows:
            header = ["S", "naive chain", "ours", "speed-up", "target", "read limit", "max err", "extra memory"]
            parts.append(f"**{suite[0].upper()}{suite[1:]}**\n\n" + _markdown(header, rows))
    memory = [r for r in record["results"] if r["suite"] == "memory against layers"]
    if memory:
        held = ", ".join(f"L={r['shape']['L']}: {_mib(r)}" for r in memory)
        parts.append(
            f"Extra memory of rows from maps against the number of layers (S={memory[0]['shape']['S']}): {held}."
        )
    return "\n\n".join([*parts, *_pyhealth(record), *_bert(record)])


def _bert(record: dict[str, Any]) -> list[str]:
    """A Hugging Face encoder from tokens to relevance, against stored maps and the naive chain."""
    found = {r["provider"]: r for r in record["results"] if r["suite"] == "BERT-base from tokens"}
    if len(found) < 2 or found["ours"]["shape"]["S"] < 512:  # the quick run's is no BERT
        return []
    naive, ours = found["naive chain"], found["ours"]
    speed, memory = _ratio(naive, ours), ours["peak_extra_bytes"] / naive["peak_extra_bytes"]
    shape = ", ".join(f"{name}={size}" for name, size in ours["shape"].items())
    return [
        f"BERT-base-shaped encoder ({shape}), tokens to relevance, against `output_attentions` and the naive chain: "
        f"{naive['seconds']['median']:.1f} s and {ours['seconds']['median']:.1f} s, {speed:.2f}× "
        f"(target {BERT_SPEED:g}×{', missed' if speed < BERT_SPEED else ''}); extra memory {_mib(naive)} and "
        f"{_mib(ours)}, {memory:.2f} of it (target {BERT_MEMORY:g}{', missed' if memory > BERT_MEMORY else ''})."
    ]


def _pyhealth(record: dict[str, Any]) -> list[str]:
    """PyHealth's Transformer end to end, and what capture adds to its forward."""
    found = {(r["case"], r["provider"]): r for r in record["results"] if r["suite"] == "PyHealth end to end"}
    parts = []
    rows = [_pyhealth_row(case, found) for case in dict.fromkeys(case for case, _ in found)]
    if rows:
        header = ["batches of 32", "plain forward", "PyHealth's", "ours", "speed-up", "target", "max err", "memory"]
        head = "**PyHealth's interpreter and ours, patients/s** (L=4, E=128; memory: PyHealth's, ours)"
        parts.append(f"{head}\n\n" + _markdown(header, rows))
    cost = {r["provider"]: r for r in record["results"] if r["suite"] == "overhead of capture, PyHealth"}
    if "capture" in cost and "fused forward" in cost:
        ratio, seq = _ratio(cost["capture"], cost["fused forward"]), cost["capture"]["shape"]["S"]
        missed = ", missed" if seq == 256 and ratio > CAPTURE_TARGET else ""
        parts.append(
            f"Capture takes {ratio:.2f} of a plain forward on fused attention at S={seq} "
            f"(target {CAPTURE_TARGET:.2f}{missed})."
        )
    return parts


def _pyhealth_row(case: str, found: dict[tuple[str, str], Result]) -> list[str]:
    theirs, ours = found[case, "PyHealth"], found[case, "ours"]
    speed = [f"{r['patients'] / r['seconds']['median']:.0f}" for r in (found[case, "plain forward"], theirs, ours)]
    ratio, target = _ratio(theirs, ours), PYHEALTH_TARGETS.get(case)
    missed = ", missed" if target is not None and ratio < target else ""
    wanted = "–" if target is None else f"{target:g}×{missed}"
    memory = f"{_mib(theirs)}, {_mib(ours)}"
    return [case, *speed, f"{ratio:.1f}×", wanted, f"{ours['error']:.1e}", memory]


def _row(record: dict[str, Any], suite: str, seq: int) -> list[str] | None:
    naive, ours = _find(record, suite, seq, "naive chain"), _find(record, suite, seq, "ours")
    if naive is None or ours is None:
        return None
    seconds, speed_up, target = ours["seconds"]["median"], _ratio(naive, ours), TARGETS[suite][seq]
    read = _find(record, suite, seq, READ)
    share = ""
    if read is not None:
        part = read["seconds"]["median"] / seconds
        share = f"{part:.0%}"
        if seq >= 256:
            share += f" of it (target {READ_SHARE_TARGET:.0%}{', missed' if part < READ_SHARE_TARGET else ''})"
    return [
        str(seq),
        f"{naive['seconds']['median'] * 1e3:.1f} ms",
        f"{seconds * 1e3:.2f} ms",
        f"{speed_up:.1f}×",
        f"{target:g}×{', missed' if speed_up < target else ''}",
        share or "–",
        f"{ours['error']:.1e}",
        _mib(ours),
    ]


def _ratio(slow: Result, fast: Result) -> float:
    return float(slow["seconds"]["median"] / fast["seconds"]["median"])


def _mib(result: Result) -> str:
    held = result["peak_extra_bytes"]
    return "–" if held is None else f"{held / 2**20:.0f} MiB"


def _find(record: dict[str, Any], suite: str, seq: int, provider: str) -> Result | None:
    for result in record["results"]:
        if (result["suite"], result["shape"]["S"], result["provider"]) == (suite, seq, provider):
            return result
    return None


def _sequences(record: dict[str, Any], suite: str) -> list[int]:
    return sorted({r["shape"]["S"] for r in record["results"] if r["suite"] == suite})


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "---|" * lines[0].count(" |"))
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def render(page: Path, record: dict[str, Any], marker: str = "bench") -> None:
    """Replace what stands between `<!-- bench -->` and `<!-- /bench -->` on a page.

    Raises:
        ValueError: the page lacks the markers.
    """
    text, start, end = page.read_text(), f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{page.name} must have the markers {start} and {end} once each")
    before, rest = text.split(start)
    page.write_text(f"{before}{start}\n{tables(record)}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
