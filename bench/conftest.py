"""What every benchmark shares: fixed threads, correctness before timing, what goes into the record."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import peak_extra_bytes
from bench.providers import relative_error

LONG_ENOUGH = 30.0  # seconds for one timing: nine rounds, or fewer of a slow call
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes and few rounds")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture
def measure(benchmark: Any, quick: bool) -> Callable[..., None]:
    """`measure(run, reference=…, tolerance=…, **info)`: check, then time, then record. A wrong result has no time."""

    def _measure(
        run: Callable[[], Tensor], *, reference: Tensor | None = None, tolerance: float = 0.0, **info: Any
    ) -> None:
        started = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - started
        if reference is not None:
            error = relative_error(result, reference)
            assert error <= tolerance, f"not timed: max|err|/max|ref| = {error:.2e}, allowed {tolerance:.0e}"
            info["error"] = error
        del result
        info["peak_extra_bytes"] = peak_extra_bytes(run)
        benchmark.extra_info.update(info, threads=torch.get_num_threads())
        with torch.inference_mode():
            most = 9 if seconds > 0.02 else 99  # a call of microseconds is at the mercy of a single interruption
            rounds = 3 if quick else max(3, min(most, int(LONG_ENOUGH / seconds)))
            benchmark.pedantic(run, rounds=rounds, iterations=1, warmup_rounds=0 if seconds > 1.0 else 1)

    return _measure
