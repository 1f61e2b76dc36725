"""Measuring for `rollout bench`: a row of its table is checked against float64, then timed in turns."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

OURS = "ours"
MOST_ROUNDS, FEWEST_ROUNDS = 99, 3

Runs = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Settings:
    """What to run: B, H, L and D, the sequence lengths S, the device, and how long a pair is timed, about, in seconds.

    Raises:
        ValueError: a size below 1, no sequence length, seconds not positive, or a device torch cannot use.
    """

    device: str = "cpu"
    batch: int = 32
    heads: int = 8
    layers: int = 4
    size: int = 64
    sequences: tuple[int, ...] = (64, 128, 256, 512)
    seconds: float = 2.0

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "layers", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"bench: {name} must be at least 1, got {getattr(self, name)}")
        if not self.sequences or min(self.sequences) < 1:
            raise ValueError(f"bench: sequences must be one or more lengths of at least 1, got {self.sequences}")
        if not (0 < self.seconds < math.inf):
            raise ValueError(f"bench: seconds must be positive, got {self.seconds}")
        try:
            if torch.device(self.device).type not in ("cpu", "cuda"):
                raise RuntimeError("only cpu and cuda are timed")
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"bench: device must be one that torch can use here, got {self.device!r}: {reason}"
            ) from None

    @property
    def target(self) -> torch.device:
        return torch.device(self.device)


@dataclass(frozen=True)
class Row:
    """One line of a table: what was computed, by whom, how fast and how exactly.

    Attributes:
        table: `"rows from maps"`, `"rows from Q,K"`, or `"patients"`.
        case: S=…, or the lengths of the records.
        seconds: provider → median of a call; only of those whose result is right.
        error: provider → max|err| / max|ref| against float64.
        peak: provider → most memory a call adds, bytes; None where it cannot be asked.
        wrong: what is wrong with which provider; empty when all are right.
        skipped: why nothing was run; empty when it was.
        backend: what served ours.
        rate: bytes or float operations a second that ours had to read or do at least; share: of the limit that binds.
        patients: in one call; of the table of patients.
    """

    table: str
    case: str
    seconds: Mapping[str, float]
    error: Mapping[str, float]
    peak: Mapping[str, int | None]
    wrong: tuple[str, ...] = ()
    skipped: str = ""
    backend: str = ""
    rate: float | None = None
    share: float | None = None
    patients: int | None = None

    @property
    def speedup(self) -> float | None:
        """The peer's time over ours."""
        if OURS not in self.seconds or len(self.seconds) < 2:
            return None
        (peer,) = (seconds for name, seconds in self.seconds.items() if name != OURS)
        return peer / self.seconds[OURS]


@dataclass(frozen=True)
class Ceilings:
    """Measured limits: bytes a second read, and copied (read and write counted), and float32 operations a second."""

    read: float
    copy: float
    matmul: float

    @property
    def memory(self) -> float:
        """The faster of reading and copying: a GPU reaches its bandwidth only when it copies."""
        return max(self.read, self.copy)


def relative_error(result: Tensor, reference: Tensor) -> float:
    """max|result − reference| / max|reference|; NaN counts as infinitely wrong."""
    error = float((result.double() - reference).abs().max() / reference.abs().max())
    return math.inf if math.isnan(error) else error


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory one call adds to what was held before it, in bytes: the GPU allocator's, or resident memory.

    None where the system has no /proc to ask. Run it once before: libraries' own first-call memory is not meant.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - held)
    with suppress(OSError, AttributeError):  # memory the allocator kept would hide what this call needs
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the process's peak becomes what it holds now
        held = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - held)
    except OSError:
        return None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def alternate(runs: Runs, seconds: float, device: torch.device) -> dict[str, float]:
    """Median seconds of a call of each, taken in turns for about `seconds` in all; each has been called before."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        for name in sorted(runs, reverse=bool(rounds % 2)):
            times[name].append(_clock(runs[name], device))
        rounds += 1
    return {name: statistics.median(taken) for name, taken in times.items()}


def _clock(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU between events, so that waiting for the device is not counted."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def measure_ceilings(device: torch.device, size: int = 2**29, side: int | None = None) -> Ceilings:
    """Measure them with `size` bytes, more than a cache holds, and side × side matrices; medians of seven calls."""
    side = side or (1536 if device.type == "cpu" else 8192)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.rand(side, side, device=device) for _ in range(2))
    runs: Runs = {"read": source.sum, "copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    found = {}
    for name, run in runs.items():
        run()
        found[name] = statistics.median(_clock(run, device) for _ in range(7))
    return Ceilings(source.nbytes / found["read"], 2 * source.nbytes / found["copy"], 2 * side**3 / found["matmul"])


def compare(
    row: Row, runs: Runs, reference: Tensor, allowed: Mapping[str, float], seconds: float, device: torch.device
) -> Row:
    """`row` with the errors of all, and with the times and memory of those that are right."""
    error = {name: relative_error(run(), reference) for name, run in runs.items()}
    wrong = tuple(f"{name} is {error[name]:.1e} off float64, allowed {allowed[name]:.0e}"
                  for name in runs if not error[name] <= allowed[name])  # fmt: skip
    right = {name: run for name, run in runs.items() if error[name] <= allowed[name]}
    peak = {name: peak_extra_bytes(run, device) for name, run in right.items()}
    return replace(row, seconds=alternate(right, seconds, device), error=error, peak=peak, wrong=wrong)


def does_not_fit(needed: int, device: torch.device) -> str:
    """Why the inputs and what is made of them do not fit in memory; empty when they do, or nobody can say."""
    available = _available_bytes(device)
    if available is None or needed <= available:
        return ""
    return f"needs about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"


def _available_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
