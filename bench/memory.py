"""Peak memory of one call."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_extra_bytes(run: Callable[[], object]) -> int | None:
    """The most resident memory one call adds to what the process held before it, in bytes; None where there is no
    /proc to ask.

    Run it once before: libraries' own first-call memory is not meant.
    """
    if not _CLEAR.exists():
        return None
    gc.collect()
    # Memory the allocator kept after earlier calls would hide what this one needs.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # resets the process's peak to what it holds now
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)
