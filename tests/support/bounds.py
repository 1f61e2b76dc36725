"""What a reader of a few kilobytes may take, and what a refusal of them looks like."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS, MEBIBYTES = 20, 400
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def bounded() -> Iterator[None]:
    """Fails if what is done within does not end, or (on Linux) takes memory out of any measure."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    held = _mebibytes("VmRSS")
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # the peak is counted from here
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        taken = _mebibytes("VmHWM") - held
        assert taken < MEBIBYTES, f"it took {taken:.0f} MiB"


def _mebibytes(name: str) -> float:
    lines = _STATUS.read_text().splitlines() if _CLEAR.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)


def refused(error: Exception) -> None:
    """An error says something, in one line."""
    assert str(error).strip()
    assert len(str(error).splitlines()) == 1, str(error)
