"""The record of a machine's runs: `bench/results/<device>/cpu.json` (or cuda.json), suite by suite.

    {"schema": 3, "device": …, "cores": …, "suites": {name: {"date", "versions", "threads", "ceilings", "results"}}}

A suite is replaced as a whole when it is run again, so every suite has its own date. Times are in seconds, memory in
bytes, `ceilings` in bytes and operations a second.
"""

import datetime
import json
import platform
from pathlib import Path
from typing import Any

from rollout.bench.table import versions
from rollout.files import read_json, write_whole

SCHEMA = 3
PACKAGES = ("torch", "numpy", "triton", "pyhealth", "transformers")
KEPT = ("min", "median", "max", "q1", "q3", "rounds")

Record = dict[str, Any]
Suite = dict[str, Any]
Result = dict[str, Any]


def load(path: Path) -> Record:
    """A stored record.

    Raises:
        ValueError: it is not a record of this schema; the message says what to do.
    """
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"bench: {error}; remove it and run `make bench` again") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"bench: {path} must have schema {SCHEMA}; remove it and run `make bench` again")
    return found


def save(path: Path, record: Record) -> None:
    """Write a record whole, or leave the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def by_suite(raw: dict[str, Any]) -> dict[str, Suite]:
    """pytest-benchmark's JSON as suites: what ran, how long it took, and once a suite what its figures depend on."""
    suites: dict[str, Suite] = {}
    today = {"date": datetime.date.today().isoformat(), "python": platform.python_version()}
    for entry in raw["benchmarks"]:
        info = dict(entry["extra_info"])
        own = {"ceilings": info.pop("ceilings", None), "threads": info.pop("threads"), "versions": versions(PACKAGES)}
        suite = suites.setdefault(info.pop("suite"), today | own | {"results": []})
        # A call timed in a process of its own says itself how long it took.
        elapsed = info.pop("elapsed", None)
        taken = {"median": elapsed, "rounds": 1} if elapsed else {key: entry["stats"][key] for key in KEPT}
        suite["results"].append({"seconds": taken, **info})
    return suites
