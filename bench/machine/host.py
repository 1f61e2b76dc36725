"""The machine a benchmark runs on: its device, threads, caches and memory, and the folder its record goes to.

`BENCH_DEVICE` (cpu, cuda; default cpu) and `OMP_NUM_THREADS` (default 2) choose what the suites run on.
"""

import os
import platform
import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
CACHE_WHEN_UNKNOWN = 64 * 2**20  # bytes
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
SIZES = {"K": 2**10, "M": 2**20, "G": 2**30}


def device_name() -> str:
    """The processor's or the GPU's name, as the system gives it."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def folder() -> Path:
    """`bench/results/<device>`, where this machine's record is."""
    name = device_name() if DEVICE == "cuda" else f"{device_name()} {os.cpu_count()} cores"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes() -> int:
    """Size of the last-level cache (the second level of a GPU); a stated guess where the system does not say."""
    if DEVICE == "cuda":
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", CACHE_WHEN_UNKNOWN))
    sizes = [_size(path.read_text().strip()) for path in CPU_CACHES.glob("index*/size")]
    return max(sizes, default=CACHE_WHEN_UNKNOWN)


def _size(text: str) -> int:
    return int(text[:-1]) * SIZES[text[-1]] if text[-1:] in SIZES else int(text)


def available_bytes() -> int:
    """Memory that can be had without swapping (free memory of a GPU); 4 GiB where the system does not say."""
    if DEVICE == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * 2**30


def synchronize() -> None:
    """Wait for a GPU; nothing on a CPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Flush:
    """Empties the caches: writes a buffer of four times the last-level cache, so that inputs come from memory."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(4 * cache_bytes() // 4, dtype=torch.float32, device=DEVICE)

    def __call__(self) -> None:
        self.buffer.add_(1.0)
        synchronize()
