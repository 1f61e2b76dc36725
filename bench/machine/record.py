"""The record of a machine's runs: `bench/results/<device>/cpu.json` (or cuda.json), suite by suite.

    {"schema": 2, "device": …, "cores": …, "suites": {name: {"date", "versions", "threads", "ceilings", "results"}}}

A suite is replaced as a whole when it is run again, so every suite has its own date. Times are in seconds, memory in
bytes, `ceilings` in bytes and operations a second.
"""

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = 2
PACKAGES = ("torch", "numpy", "triton", "pyhealth", "transformers")
KEPT = ("min", "median", "max", "q1", "q3", "rounds")

Record = dict[str, Any]
Result = dict[str, Any]


def empty(device: str) -> Record:
    return {"schema": SCHEMA, "device": device, "cores": os.cpu_count(), "suites": {}}


def load(path: Path) -> Record:
    """A stored record.

    Raises:
        ValueError: it is not a record of this schema; the message says what to do.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"bench: {path} must be a record of bench.run, got {error}; remove it and run again") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"bench: {path} must have schema {SCHEMA}; remove it and run `make bench` again")
    return found


def save(path: Path, record: Record) -> None:
    """Write a record whole, or leave the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    draft.replace(path)


def context(threads: int) -> dict[str, Any]:
    """What a suite's figures depend on beside the machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "threads": threads,
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def by_suite(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """pytest-benchmark's JSON as suites: what ran, how long it took, the ceilings of the run, once a suite."""
    suites: dict[str, dict[str, Any]] = {}
    for entry in raw["benchmarks"]:
        info = dict(entry["extra_info"])
        ceilings, threads = info.pop("ceilings", None), info.pop("threads", 0)
        name = info.pop("suite", None) or entry["name"]
        suite = suites.setdefault(name, context(threads) | {"ceilings": ceilings, "results": []})
        # A call timed in a process of its own says itself how long it took.
        elapsed = info.pop("elapsed", None)
        taken = {"median": elapsed, "rounds": 1} if elapsed else {key: entry["stats"][key] for key in KEPT}
        suite["results"].append({"seconds": taken, **info})
    return suites


def merge(record: Record, suites: dict[str, dict[str, Any]]) -> Record:
    """A record with these suites in place of its own of those names."""
    return record | {"suites": record["suites"] | suites}


def results(record: Record | None, suite: str) -> list[Result]:
    """The results of a suite; none when it is not in the record."""
    return [] if record is None else list(record["suites"].get(suite, {}).get("results", []))


def find(record: Record | None, suite: str, **wanted: Any) -> Result | None:
    """The first result of a suite with these fields; a size (S=…) is looked up in its shape."""
    for result in results(record, suite):
        if all(result.get(key, result.get("shape", {}).get(key)) == value for key, value in wanted.items()):
            return result
    return None


def seconds(result: Result) -> float:
    return float(result["seconds"]["median"])


def ratio(slow: Result | None, fast: Result | None) -> float | None:
    """How many times as fast `fast` is, by medians; by samples a second where both say how many samples they did."""
    if slow is None or fast is None:
        return None
    rates = per_second(slow), per_second(fast)
    if rates[0] and rates[1]:
        return rates[1] / rates[0]
    return seconds(slow) / seconds(fast)


def per_second(result: Result) -> float | None:
    """Samples a second: as given, or samples (patients) over the median; None for a result that counts none."""
    given = result.get("samples_per_second")
    if given is not None:
        return float(given)
    count = result.get("samples", result.get("patients"))
    return None if count is None else count / seconds(result)


def milliseconds(result: Result) -> str:
    taken = 1e3 * seconds(result)
    return f"{taken:.2f} ms" if taken < 10 else f"{taken:.1f} ms" if taken < 1e3 else f"{taken / 1e3:.2f} s"
