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

from bench import suites
from bench.machine import host, record
from rollout.bench.measure import device_name


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes; all checked, nothing timed or written")
    parser.add_argument(
        "--suite", action="append", choices=suites.SUITES, metavar="NAME", help="only this; may be given again"
    )
    parser.add_argument("--list", action="store_true", help="the names of the suites")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=host.DEVICE.type)
    parser.add_argument("--out", type=Path, help="write the record here and render no page")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(suites.SUITES))
        return 0
    selected = suites.select(options.suite or list(suites.SUITES))
    if options.device != host.DEVICE.type:  # read once, at import: start again with it set
        again = [sys.executable, "-m", "bench.run", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(again, env=os.environ | {"BENCH_DEVICE": options.device}, check=False).returncode
    if options.quick:  # every provider once, in one process
        return run_pytest([node for nodes in selected.values() for node in nodes], "--quick", "--benchmark-disable")
    failed = time_files(selected, options.out or host.folder() / f"{host.DEVICE.type}.json")
    if options.out is None:
        from bench.pages import report

        for page in report.write_all():
            print(f"wrote {page.relative_to(host.ROOT)}")
    for file in failed:
        print(f"bench.run: {file} FAILED; its suites in the record are those of an earlier run", file=sys.stderr)
    return int(bool(failed))


def time_files(selected: dict[str, list[str]], path: Path) -> list[str]:
    """Times the suites file by file and puts them in the stored record; the files that failed, which are not kept."""
    empty = {"schema": record.SCHEMA, "device": device_name(host.DEVICE), "cores": os.cpu_count(), "suites": {}}
    kept = record.load(path) if path.exists() else empty
    failed = []
    for file, nodes in selected.items():
        started = time.perf_counter()
        if (found := time_file(nodes)) is None:
            failed.append(file)
        else:
            kept["suites"] |= found
            record.save(path, kept)  # after each file: an interrupted run keeps what it has
            print(f"bench.run: {file} took {time.perf_counter() - started:.0f} s: {', '.join(found) or 'all skipped'}")
    return failed


def time_file(nodes: list[str]) -> dict[str, record.Suite] | None:
    """The suites of one file, timed in a process of their own; None when a provider was wrong or raised."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        if run_pytest(nodes, f"--benchmark-json={raw}", "--benchmark-disable-gc", "--benchmark-columns=median,rounds"):
            return None
        return record.by_suite(json.loads(raw.read_text())) if raw.exists() and raw.stat().st_size else {}


def run_pytest(nodes: list[str], *options: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes, *options]
    status = subprocess.run(command, cwd=host.ROOT, check=False).returncode
    return 0 if status == 5 else status  # 5: nothing to run, as where a library is missing


if __name__ == "__main__":
    raise SystemExit(main())
