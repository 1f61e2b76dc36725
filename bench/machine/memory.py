"""Peak memory of one call: resident memory on a CPU, the allocator's on a GPU.

The counters are the process's, so what was run before it should be little: each suite and each curve of `bench.scaling`
runs in a process of its own.
"""

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from bench.machine import host

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_extra_bytes(run: Callable[[], object]) -> int | None:
    """The most memory one call adds to what the process held before it, in bytes; None where it cannot be asked
    (a CPU without a /proc that can be written).

    Run it once before: libraries' own first-call memory is not meant.
    """
    gc.collect()
    return _on_gpu(run) if host.DEVICE == "cuda" else _resident(run)


def _resident(run: Callable[[], object]) -> int | None:
    if not _CLEAR.exists():
        return None
    # Memory the allocator kept after earlier calls would hide what this one needs.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # resets the process's peak to what it holds now
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _on_gpu(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before)
