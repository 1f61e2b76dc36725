"""Measuring, in its one home: `rollout bench` and the benchmarks of this repository take every figure with these.

A result is checked against float64 before it is timed. The caches are flushed before every timed call, so that its
inputs come from memory, and what the machine does at most is measured in the same run.
"""

import ctypes
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

OURS, PLAIN = "ours", "rollout"
MOST_ROUNDS, FEWEST_ROUNDS = 99, 3
CACHE_WHEN_UNKNOWN = 64 * 2**20  # bytes
HEAD_START = 2_000_000  # cycles of a GPU, a millisecond at 2 GHz
MOST_FLUSHED = 512 * 2**20  # bytes; a virtual machine may be told of a cache that it shares with many others
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}

Runs = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Row:
    """One line of a table: what was computed, by whom, how fast and how exactly.

    Attributes:
        table: what the rows of one table have in common, as `"rows from maps"`.
        case: S=…, or the lengths of the records.
        peer: who ours is compared with.
        floor: what ours is measured by, the work that cannot be left out; it is no rollout, and is not checked.
        seconds: provider → median of a call; only of those whose result is right.
        error: provider → max|err| / max|ref| against float64.
        peak: provider → most memory a call adds, bytes; None where it cannot be asked.
        wrong: what is wrong with which provider; empty when all are right.
        skipped: why nothing was run; empty when it was.
        backend: what served ours.
        samples: in one call; None where the table gives times.
    """

    table: str
    case: str
    peer: str
    floor: str
    seconds: Mapping[str, float]
    error: Mapping[str, float]
    peak: Mapping[str, int | None]
    wrong: tuple[str, ...] = ()
    skipped: str = ""
    backend: str = ""
    samples: int | None = None

    @property
    def speedup(self) -> float | None:
        """The peer's time over ours."""
        return self._over_ours(self.peer)

    @property
    def share(self) -> float | None:
        """The floor's time over ours: 1 where ours takes no longer than the work that cannot be left out."""
        return self._over_ours(self.floor)

    @property
    def cost(self) -> float | None:
        """Our time over the peer's, which is that of plain rollout; None where the peer is another."""
        return 1 / self.speedup if self.peer == PLAIN and self.speedup else None

    def _over_ours(self, name: str) -> float | None:
        return self.seconds[name] / self.seconds[OURS] if {name, OURS} <= self.seconds.keys() else None


@dataclass(frozen=True)
class Ceilings:
    """What a machine does at most, measured.

    Attributes:
        read, copy: bytes a second; copy counts its read and its write.
        matmul: operations a second of a float32 product; matmul_bf16: of a bfloat16 one, on a GPU.
        cache: size of the last-level cache (of a GPU the second level), bytes.
    """

    read: float
    copy: float
    matmul: float
    cache: int
    matmul_bf16: float | None = None

    @property
    def memory(self) -> float:
        """The faster of reading and copying: a GPU reaches its bandwidth only when it copies."""
        return max(self.read, self.copy)

    def binding(self, size: float, flop: float, seconds: float) -> tuple[str, float] | None:
        """Which of `"memory"` and `"matmul"` (float32) binds a call, and the share of it reached.

        A call that must read `size` bytes and do `flop` operations takes at least the longer of the two times. None
        when it has no such work.
        """
        floors = {"memory": size / self.memory, "matmul": flop / self.matmul}
        name = max(floors, key=lambda key: floors[key])
        return (name, floors[name] / seconds) if floors[name] > 0 else None


def measure_ceilings(device: torch.device, size: int | None = None, side: int | None = None) -> Ceilings:
    """Measure them: the best but one of nine calls each, as a ceiling is what the machine does when left alone.

    Args:
        device: a CPU or a GPU.
        size: bytes of the buffer read and copied; default sixteen times the last-level cache, or as much of that as is
            an eighth of the memory available.
        side: rows of the square matrices multiplied; default 2048, and 8192 on a GPU.
    """
    cache = cache_bytes(device)
    size = size or min(16 * cache, (available_bytes(device) or 2**33) // 8)
    side = side or (2048 if device.type == "cpu" else 8192)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.rand(side, side, device=device) for _ in range(2))
    read, copy, product = (_best(run, device) for run in (source.sum, lambda: target.copy_(source), lambda: a @ b))
    flop = 2 * side**3
    halves = None
    if device.type == "cuda":
        c, d = a.bfloat16(), b.bfloat16()
        halves = flop / _best(lambda: c @ d, device)
    return Ceilings(source.nbytes / read, 2 * source.nbytes / copy, flop / product, cache, halves)


def _best(run: Callable[[], object], device: torch.device, rounds: int = 9) -> float:
    with torch.inference_mode():
        for _ in range(2):
            run()
        return sorted(clock(run, device) for _ in range(rounds))[1]


def relative_error(result: Tensor, reference: Tensor) -> float:
    """max|result − reference| / max|reference|; infinite when a shape differs or a number is not finite."""
    if result.shape != reference.shape or not bool(torch.isfinite(result).all()):
        return math.inf
    return float((result.double() - reference).abs().max() / reference.abs().max())


class EventTimer:
    """A clock for a GPU: called before and after a call in turn, its second answer is the seconds between.

    They are those between two CUDA events. The device waits before the first for about a millisecond, in which the
    call is launched: what Python takes for that is counted only as far as it takes longer, or waits for the device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._begun: torch.cuda.Event | None = None

    def __call__(self) -> float:
        if self._begun is None:
            with torch.cuda.device(self.device):
                torch.cuda._sleep(HEAD_START)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        begun, self._begun = self._begun, None if self._begun is not None else event
        if begun is None:
            return 0.0
        event.synchronize()
        return begun.elapsed_time(event) / 1e3


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    timer: Callable[[], float] = EventTimer(device) if device.type == "cuda" else time.perf_counter
    started = timer()
    run()
    return timer() - started


class Flush:
    """Empties the caches: writes a buffer of twice the last-level cache, at most `MOST_FLUSHED`."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.zeros(min(2 * cache_bytes(device), MOST_FLUSHED) // 4, device=device)

    def __call__(self) -> None:
        self._buffer.add_(1.0)


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory one call adds to what was held before it, in bytes: the GPU allocator's, or resident memory.

    None where the system has no /proc to ask. The counters are the process's, so what ran before should be little. Run
    it once before: libraries' own first-call memory is not meant.
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
    except OSError:
        run()
        return None
    held = _kibibytes("/proc/self/status", "VmRSS") or 0
    run()
    return max(0, (_kibibytes("/proc/self/status", "VmHWM") or 0) - held)


def _kibibytes(path: str, field: str) -> int | None:
    """The bytes that a line `field: … kB` of a file of /proc tells; None where there is no such line."""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be had without swapping, free memory of a GPU; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _kibibytes("/proc/meminfo", "MemAvailable")


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache, of a GPU its second level; a stated guess where the system does not say."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", CACHE_WHEN_UNKNOWN))
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text.rstrip("KMG")) * UNITS.get(text[-1:], 1) for text in texts), default=CACHE_WHEN_UNKNOWN)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name, as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def alternate(
    runs: Mapping[str, Callable[[], object]], seconds: float, device: torch.device, flush: Callable[[], None]
) -> dict[str, float]:
    """Median seconds of a call of each, taken in turns for about `seconds` in all; each has been called before."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        for name in sorted(runs, reverse=bool(rounds % 2)):
            flush()
            times[name].append(clock(runs[name], device))
        rounds += 1
    return {name: statistics.median(taken) for name, taken in times.items()}


def compare(
    row: Row,
    runs: Runs,
    reference: Tensor,
    allowed: Mapping[str, float],
    seconds: float,
    device: torch.device,
    *,
    first: int | None = None,
) -> Row:
    """`row` with the errors of those that `allowed` names, and with the times and memory of the right and the floor.

    With `first`, the reference is of that many samples, the first ones.
    """
    error = {name: relative_error(runs[name]()[:first], reference) for name in allowed}
    wrong = tuple(f"{name} is {error[name]:.1e} off float64, allowed {most:.0e}"
                  for name, most in allowed.items() if not error[name] <= most)  # fmt: skip
    right = {name: run for name, run in runs.items() if name not in allowed or error[name] <= allowed[name]}
    _warm_up(right, allowed)
    peak = {name: peak_extra_bytes(run, device) for name, run in right.items()}
    return replace(row, seconds=alternate(right, seconds, device, Flush(device)), error=error, peak=peak, wrong=wrong)


def _warm_up(runs: Runs, called: Collection[str]) -> None:
    for name in runs.keys() - set(called):
        runs[name]()


def does_not_fit(needed: int, device: torch.device) -> str:
    """Why the inputs and what is made of them do not fit in memory; empty when they do, or nobody can say."""
    available = available_bytes(device)
    if available is None or needed <= available:
        return ""
    return f"needs about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"
