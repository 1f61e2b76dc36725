"""Run the benchmarks, keep the record, print the tables: `python -m bench.run [--quick]`.

The full run writes `bench/results/<device>/cpu.json` and renders the README's table from it; the quick one checks
that every provider still gives right numbers and writes nothing.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import report

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "triton", "pytest-benchmark")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds, nothing written")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", "bench", "-q", f"--benchmark-json={raw}", "--benchmark-disable-gc"]
        command += ["--benchmark-columns=min,median,rounds", *(["--quick"] if options.quick else []), *rest]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            return status
        record = compact(json.loads(raw.read_text()))
    print(report.tables(record))
    if not options.quick and not rest:
        path = ROOT / "bench" / "results" / device_slug() / "cpu.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        report.render(ROOT / "README.md", record)
        print(f"wrote {path.relative_to(ROOT)} and the table in README.md")
    return 0


def compact(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of pytest-benchmark's record that is kept: what ran, on what, and how long it took, in seconds."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "results": [
            {
                "name": entry["name"],
                "seconds": {key: entry["stats"][key] for key in ("min", "median", "max", "rounds")},
                **entry["extra_info"],
            }
            for entry in raw["benchmarks"]
        ],
    }


def device_name() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{device_name()} {os.cpu_count()} cores".lower()).strip("-")


if __name__ == "__main__":
    raise SystemExit(main())
