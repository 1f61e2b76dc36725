"""Runs killed at random moments by SIGKILL and started again end with the rows of an unbroken run, bit for bit."""

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.support.toy_cohort import assert_same, attribute

COUNT = 600
FORKS = multiprocessing.get_context("forkserver")  # a kill needs a process; a fork of one that has torch starts at once


@pytest.fixture(scope="module", autouse=True)
def preloaded():
    FORKS.set_forkserver_preload(["tests.support.killed_run"])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, float]:
    """The folder of an unbroken run of the same cohort, and the seconds it took in a process of its own."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    seconds = 0.0
    for attempt in range(2):  # the first one starts the server
        child, begun = _start(out / str(attempt)), time.perf_counter()
        child.join()
        assert child.exitcode == 0
        seconds = time.perf_counter() - begun
    return out / "0", seconds


def _start(out: Path):
    from tests.support.killed_run import run

    child = FORKS.Process(target=run, args=(str(out), COUNT))
    child.start()
    return child


def _kill_and_resume(out: Path, unbroken: tuple[Path, float], seed: int) -> int:
    """Kill two or more runs at random moments, then let one end; return how many were killed at work."""
    whole, seconds = unbroken
    moments, killed = random.Random(seed), 0
    for _ in range(8):
        child = _start(out)
        child.join(moments.uniform(0.0, seconds))
        if child.exitcode is None:
            child.kill()
            killed += 1
        child.join()
        if not killed:  # it came to its end: the machine is faster than when it was measured
            shutil.rmtree(out, ignore_errors=True)
            seconds /= 2
        if killed >= 2:
            break
    attribute(out, COUNT)
    assert_same(out, whole)
    return killed


@pytest.mark.parametrize("seed", range(3))
def test_killed_runs_lose_nothing(tmp_path, unbroken, seed: int) -> None:
    assert _kill_and_resume(tmp_path / "out", unbroken, seed) > 0


@pytest.mark.slow
def test_fifty_killed_runs_lose_nothing(tmp_path, unbroken) -> None:
    killed = [_kill_and_resume(tmp_path / f"out-{seed}", unbroken, 100 + seed) for seed in range(50)]
    assert sum(killed) >= 50
    print(f"{sum(killed)} kills in 50 cohorts, every one with the rows of an unbroken run")
