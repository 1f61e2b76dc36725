"""A whole cohort attributed and written, against PyHealth's interpreter in PyHealth's own loader loop.

Each measurement is a process of its own (`bench.cohort`), for its memory's sake; the seconds are those it took inside.
"""

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from bench import cohort
from bench.machine import host
from rollout.bench.end_to_end import STOCK
from rollout.bench.measure import OURS

SAMPLES, FEW = 20_000, 2_000
SHARED = 40_000  # between workers: their start is ten seconds or more, whatever there is to do
QUICK = 192
# Case → what is run, and on how many samples.
CASES = {
    "synthetic cohort": ("race", SAMPLES),  # reading and writing included; PyHealth's: 40 of its batches at random
    "workers": ("workers", SHARED),  # one thread, against two worker processes of one thread, their start included
    f"memory, {FEW:,} samples": ("memory", FEW),  # peak memory of the process against the size of the cohort
    f"memory, {SAMPLES:,} samples": ("memory", SAMPLES),
}
PROVIDERS = {"race": (STOCK, OURS), "workers": ("one worker", "two workers"), "memory": (OURS,)}


@cache
def measured(plan: str, samples: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.cohort", "--plan", plan, "--samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("case", "provider"), [(case, who) for case in CASES for who in PROVIDERS[CASES[case][0]]])
def test_cohort(case: str, provider: str, benchmark: Any, quick: bool) -> None:
    plan, samples = CASES[case]
    found = measured(plan, QUICK if quick else samples)[provider]
    benchmark.pedantic(lambda: None)  # the child's seconds are the timing: `elapsed`
    benchmark.extra_info.update(
        {key: value for key, value in found.items() if key != "seconds"},
        suite="cohort run",
        case=case,
        provider=provider,
        threads=1 if plan == "workers" else host.THREADS,
        elapsed=found["seconds"],
        shape={"H": cohort.HEADS, "L": cohort.LAYERS, "E": cohort.EMBEDDING},
    )
