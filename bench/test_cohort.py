"""A whole cohort attributed and written, against PyHealth's interpreter in PyHealth's own loader loop.

Each measurement is a process of its own (`bench.cohort`), for its memory's sake; the seconds are those it took inside.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from bench import cohort
from bench.machine import host

SAMPLES, FEW = 20_000, 2_000
SHARED = 40_000  # between workers: their start is ten seconds or more, whatever there is to do
QUICK = 192


def _measured(plan: str, samples: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.cohort", "--plan", plan, "--samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _record(benchmark: Any, case: str, provider: str, found: dict[str, Any], threads: int) -> None:
    """Into pytest-benchmark's record: the child's seconds are the timing, so a call that takes none is timed here."""
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(
        {key: value for key, value in found.items() if key != "seconds"},
        suite="cohort run",
        case=case,
        provider=provider,
        threads=threads,
        elapsed=found["seconds"],
        samples_per_second=found["samples"] / found["seconds"],
        shape={"H": cohort.HEADS, "L": cohort.LAYERS, "E": cohort.EMBEDDING},
    )


@pytest.fixture(scope="module")
def race(quick: bool) -> dict[str, Any]:
    return _measured("race", QUICK if quick else SAMPLES)


@pytest.mark.parametrize("provider", ["PyHealth", "ours"])
def test_cohort(provider: str, race: dict[str, Any], benchmark: Any) -> None:
    """Samples a second, reading and writing included; stock timed on 40 of its batches, drawn at random."""
    _record(benchmark, "synthetic cohort", provider, race[provider], host.THREADS)


@pytest.fixture(scope="module")
def pair(quick: bool) -> dict[str, Any]:
    return _measured("workers", QUICK if quick else SHARED)


@pytest.mark.parametrize("provider", ["one worker", "two workers"])
def test_workers(provider: str, pair: dict[str, Any], benchmark: Any) -> None:
    """One thread against two worker processes of one thread, their start included."""
    _record(benchmark, "workers", provider, pair[provider], 1)


@pytest.mark.parametrize("samples", [FEW, SAMPLES])
def test_memory(samples: int, quick: bool, benchmark: Any) -> None:
    """Peak memory of the process against the size of the cohort."""
    found = _measured("memory", QUICK if quick else samples)["ours"]
    _record(benchmark, f"memory, {samples:,} samples", "ours", found, host.THREADS)
