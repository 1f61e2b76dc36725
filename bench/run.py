"""Run the benchmarks, keep the record, render the pages: `python -m bench.run [--quick] [--suite NAME …]`.

The full run writes `bench/results/<device>/cpu.json` and renders the README's table, `bench/RESULTS.md` and the plots
from it. `--suite` runs some suites alone and puts them in the stored record in place of their own; `--quick` checks
that every provider still gives right numbers, times nothing and writes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import suites
from bench.machine import host


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="small shapes; everything checked, nothing timed or written"
    )
    parser.add_argument("--suite", action="append", metavar="NAME", help="run this suite only; may be given again")
    parser.add_argument("--list", action="store_true", help="the names of the suites")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=host.DEVICE)
    parser.add_argument("--out", type=Path, help="write the record here and render no page")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(suites.NAMES))
        return 0
    wanted = options.suite or list(suites.NAMES)
    try:
        selected = suites.selections(wanted)
    except ValueError as error:
        parser.error(str(error))
    if options.device != host.DEVICE:  # read once, at import: start again with it set
        again = [sys.executable, "-m", "bench.run", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(again, env=os.environ | {"BENCH_DEVICE": options.device}, check=False).returncode
    present = {file: nodes for file, nodes in selected.items() if (host.ROOT / "bench" / file).exists()}
    for file in selected.keys() - present.keys():
        print(f"bench.run: bench/{file} is not there; its suites are left out")
    return quick(present, wanted) if options.quick else full(present, wanted, options.out)


def quick(selected: dict[str, list[str]], wanted: list[str]) -> int:
    """Every provider checked once on small shapes, in one process; the curves of scaling as far as S=256."""
    status = 0
    if selected:
        nodes = [node for nodes in selected.values() for node in nodes]
        status = _pytest([*nodes, "--quick", "--benchmark-disable"])
    if suites.SCALING in wanted:
        import torch

        from bench import scaling

        torch.set_num_threads(host.THREADS)
        flush, checked = host.Flush(), 0
        for source, name, axes in scaling.curves():
            for axis in axes:
                checked += sum("error" in each for each in scaling.climb(source, name, axis, scaling.QUICK, flush))
        print(f"scaling: {checked} points right")
    return status


def full(selected: dict[str, list[str]], wanted: list[str], out: Path | None) -> int:
    """Times the suites, merges them into the stored record, renders the pages; a file with a failure is not kept."""
    from bench.machine import record
    from bench.pages import report
    from bench.providers import chains

    path = out or host.folder() / f"{host.DEVICE}.json"
    kept = record.load(path) if path.exists() else record.empty(host.device_name())
    failed: list[str] = []
    for file, nodes in selected.items():
        started = time.perf_counter()
        found = time_file(nodes)
        if found is None:
            failed.append(file)
            continue
        kept = record.merge(kept, found)
        record.save(path, kept)  # after each file: an interrupted run keeps what it has
        print(f"bench.run: {file} took {time.perf_counter() - started:.0f} s: {', '.join(found) or 'all skipped'}")
    if suites.SCALING in wanted:
        kept = record.merge(kept, {suites.SCALING: scaling_suite()})
    if "rows from maps" in wanted:
        kept["compiler"] = chains.compiler_problem()
    record.save(path, kept)
    print(f"wrote {path}")
    if out is None:
        for page in report.write_all():
            print(f"wrote {page.relative_to(host.ROOT)}")
        found_devices = report.devices(host.RESULTS)
        shown = report.chosen(found_devices, host.folder())
        if shown is not None and shown.cpu is not None:
            print(report.readme_table(shown, report.all_verdicts(found_devices, shown)))
    for file in failed:
        print(
            f"bench.run: {file} FAILED; its suites in the record are those of an earlier run, or none", file=sys.stderr
        )
    return int(bool(failed))


def scaling_suite() -> dict[str, Any]:
    from bench import scaling
    from bench.machine import ceilings, record

    limits = scaling.default_limits()
    found = record.context(host.THREADS) | {"ceilings": ceilings.measure().as_dict()}
    return found | {"memory_limit": limits.memory, "results": scaling.run_all(limits)}


def time_file(nodes: list[str]) -> dict[str, dict[str, Any]] | None:
    """The suites of one file, timed in a process of their own; None when a provider was wrong or raised."""
    from bench.machine import record

    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        if _pytest([*nodes, f"--benchmark-json={raw}", "--benchmark-disable-gc", "--benchmark-columns=median,rounds"]):
            return None
        return record.by_suite(json.loads(raw.read_text())) if raw.exists() and raw.stat().st_size else {}


def _pytest(arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    status = subprocess.run(command, cwd=host.ROOT, check=False).returncode
    return 0 if status == 5 else status  # 5: nothing to run, as where a library is missing


if __name__ == "__main__":
    raise SystemExit(main())
