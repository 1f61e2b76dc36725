"""A whole cohort attributed and written, against PyHealth's interpreter in PyHealth's own loader loop.

Each measurement is a process of its own (`bench.cohort`), for its memory's sake; the seconds are those it took inside.
"""

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from bench.machine import host
from rollout.bench.end_to_end import STOCK
from rollout.bench.measure import OURS

pytest.importorskip("pyhealth", reason="PyHealth is not installed: pip install 'attention-rollout[pyhealth]'")

from bench import cohort

SAMPLES, FEW, QUICK = 20_000, 2_000, 192
SHARED = 40_000  # between workers: their start is ten seconds or more, whatever there is to do
# Case → what is run, on how many samples, and whose figures it gives.
CASES = {
    "synthetic cohort": ("race", SAMPLES, (STOCK, OURS)),  # with reading and writing; PyHealth's: 40 batches at random
    "workers": ("workers", SHARED, ("one worker", "two workers")),  # of one thread each; the start of the two included
    f"memory, {FEW:,} samples": ("memory", FEW, (OURS,)),  # peak memory of the process against the size of the cohort
    f"memory, {SAMPLES:,} samples": ("memory", SAMPLES, (OURS,)),
}


@cache
def measured(plan: str, samples: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.cohort", "--plan", plan, "--samples", str(samples)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("case", "provider"), [(case, who) for case, (*_, whose) in CASES.items() for who in whose])
def test_cohort(case: str, provider: str, benchmark: Any, quick: bool) -> None:
    plan, samples, _ = CASES[case]
    benchmark.pedantic(lambda: None)  # the child's seconds are the timing: `elapsed`
    found = measured(plan, QUICK if quick else samples)[provider]
    info = {"suite": "cohort run", "case": case, "provider": provider}
    info["shape"] = {"H": cohort.HEADS, "L": cohort.LAYERS, "E": cohort.EMBEDDING}
    benchmark.extra_info.update(found, threads=1 if plan == "workers" else host.THREADS, **info)
