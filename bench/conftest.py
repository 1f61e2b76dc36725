"""What every benchmark shares: fixed threads, correctness before timing, flushed caches, what goes into the record."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.machine import host
from rollout.bench.measure import EventTimer, Flush, clock, measure_ceilings, peak_extra_bytes, relative_error

LONG_ENOUGH = float(os.environ.get("BENCH_SECONDS", "2"))  # for one timing: nine rounds, or fewer of a slow call
LONG = 1.0  # seconds; a longer call needs no warm-up beside its check
SHORT = 0.02  # seconds; a shorter call is at the mercy of a single interruption and gets 99 rounds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes; every provider checked, nothing timed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    timer = EventTimer(host.DEVICE) if host.DEVICE.type == "cuda" else time.perf_counter
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timer))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(host.THREADS)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def flush() -> Flush:
    return Flush(host.DEVICE)


@pytest.fixture(scope="module")
def ceilings(quick: bool) -> dict[str, Any] | None:
    """Measured anew for each module: a virtual machine's memory bandwidth is not the same all day."""
    return None if quick else asdict(measure_ceilings(host.DEVICE))


@pytest.fixture
def measure(benchmark: Any, quick: bool, flush: Flush, ceilings: dict[str, Any] | None) -> Callable[..., None]:
    """`measure(run, suite=…, provider=…, reference=…, tolerance=…, …)`: check, then time, then record.

    A wrong result has no time; without a reference there is nothing to check. `part` takes of the result what the
    reference is of. `cold`: the caches are flushed before every timed call, so that inputs come from memory. Where
    `problem()` has a reason why the provider cannot run here, it is skipped for that.
    """

    def _measure(
        run: Callable[[], Tensor],
        *,
        reference: Tensor | None = None,
        tolerance: float = 0.0,
        part: Callable[[Tensor], Tensor] = lambda result: result,
        cold: bool = True,
        problem: Callable[[], str | None] = lambda: None,
        **info: Any,
    ) -> None:
        if (reason := problem()) is not None:
            pytest.skip(reason)
        info.setdefault("dtype", "float32")
        with torch.inference_mode():
            result = run()
            if reference is not None:
                info["error"] = relative_error(part(result), reference)
                wrong = f"not timed: max|err|/max|ref| = {info['error']:.2e}, allowed {tolerance:.0e}"
                assert info["error"] <= tolerance, wrong
            del result
            if quick:
                benchmark.pedantic(lambda: None)  # the check was the point
                return
            # A long call is warm from its check.
            seconds = clock(lambda: info.update(peak_extra_bytes=peak_extra_bytes(run, host.DEVICE)), host.DEVICE)
            if seconds < LONG:
                seconds = clock(run, host.DEVICE)
            most = 9 if seconds > SHORT else 99
            if cold:
                seconds += clock(flush, host.DEVICE)  # every round pays for it
            state = "flushed before every call" if cold else "as the call before left it"
            rounds = max(3, min(most, int(LONG_ENOUGH / seconds)))
            info |= {"ceilings": ceilings, "threads": torch.get_num_threads(), "cache": state}
            benchmark.extra_info.update(info)
            benchmark.pedantic(run, setup=flush if cold else None, rounds=rounds, iterations=1, warmup_rounds=0)

    return _measure
