"""What every benchmark shares: fixed threads, correctness before timing, flushed caches, what goes into the record."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.machine import ceilings, host
from bench.machine.memory import peak_extra_bytes
from bench.providers.chains import relative_error

LONG_ENOUGH = float(os.environ.get("BENCH_SECONDS", "2.5"))  # for one timing: nine rounds, or fewer of a slow call
LONG = 1.0  # seconds; a longer call needs no warm-up beside its check
SHORT = 0.02  # seconds; a shorter call is at the mercy of a single interruption and gets 99 rounds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes; every provider checked, nothing timed")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def flush() -> host.Flush:
    return host.Flush()


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(host.THREADS)


@pytest.fixture(scope="module")
def module_ceilings(quick: bool) -> dict[str, Any] | None:
    """Measured anew for each module: a virtual machine's memory bandwidth is not the same all day."""
    torch.set_num_threads(host.THREADS)
    return None if quick else ceilings.measure().as_dict()


def taken(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@pytest.fixture
def measure(
    benchmark: Any, quick: bool, flush: host.Flush, module_ceilings: dict[str, Any] | None
) -> Callable[..., None]:
    """`measure(run, reference=…, tolerance=…, cold=True, **info)`: check, then time, then record.

    A wrong result has no time. `cold`: the caches are flushed before every timed call, so that inputs come from memory.
    """

    def _measure(
        run: Callable[[], Tensor],
        *,
        reference: Tensor | None = None,
        tolerance: float = 0.0,
        cold: bool = True,
        **info: Any,
    ) -> None:
        def whole() -> Tensor:
            result = run()
            host.synchronize()
            return result

        with torch.inference_mode():
            result = whole()
            if reference is not None:
                error = relative_error(result, reference)
                assert error <= tolerance, f"not timed: max|err|/max|ref| = {error:.2e}, allowed {tolerance:.0e}"
                info["error"] = error
            del result
            if quick:
                benchmark.pedantic(lambda: None)  # the check was the point
                return
            seconds = taken(lambda: info.update(peak_extra_bytes=peak_extra_bytes(whole)))
            if seconds < LONG:
                seconds = taken(whole)  # the warm-up; the measuring of memory, too, takes its time
            most = 9 if seconds > SHORT else 99
            if cold:
                seconds += taken(flush)  # every round pays for it
            rounds = max(3, min(most, int(LONG_ENOUGH / seconds)))
            state = "flushed before every call" if cold else "as the call before left it"
            benchmark.extra_info.update(info, ceilings=module_ceilings, threads=torch.get_num_threads(), cache=state)
            benchmark.pedantic(whole, setup=flush if cold else None, rounds=rounds, iterations=1, warmup_rounds=0)

    return _measure
