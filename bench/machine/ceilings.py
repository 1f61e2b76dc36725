"""What the machine can do at most, measured: reading memory, copying it, multiplying matrices.

A call that must read `bytes` and do `flop` operations takes at least max(bytes / read, flop / matmul) seconds; the
larger of the two is the ceiling that binds, and the share of it is that floor over the time taken.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.machine import host


@dataclass(frozen=True)
class Ceilings:
    """read, copy: bytes per second (copy counts its read and its write); matmul: float32 operations per second.

    `cache` is the size of the last-level cache in bytes.
    """

    read: float
    copy: float
    matmul: float
    cache: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(size: int | None = None, side: int = 2048) -> Ceilings:
    """Measure them on `host.DEVICE`.

    Args:
        size: bytes of the buffer read and copied; default sixteen times the last-level cache.
        side: rows of the square float32 matrices multiplied.
    """
    cache = host.cache_bytes()
    source = torch.ones((size or 16 * cache) // 4, device=host.DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=host.DEVICE) for _ in range(2))
    with torch.inference_mode():
        product = _best(lambda: torch.mm(a, b))
        return Ceilings(
            read=source.nbytes / _best(source.sum),
            copy=2 * source.nbytes / _best(lambda: target.copy_(source)),
            matmul=2 * side**3 / product,
            cache=cache,
        )


def _best(run: Callable[[], object], rounds: int = 9) -> float:
    """Seconds of the second fastest of several calls: a ceiling is what the machine does when left alone."""
    times = []
    for _ in range(rounds + 2):
        host.synchronize()
        started = time.perf_counter()
        run()
        host.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.quantiles(times[2:], n=rounds)[0] if rounds > 1 else times[-1]


def binding(ceilings: dict[str, float], size: float, flop: float, seconds: float) -> tuple[str, float] | None:
    """Which ceiling binds a call, `"read"` or `"matmul"`, and the share of it reached; None when it has no work."""
    floors = {"read": size / ceilings["read"], "matmul": flop / ceilings["matmul"]}
    name = max(floors, key=lambda key: floors[key])
    return (name, floors[name] / seconds) if floors[name] > 0 else None
