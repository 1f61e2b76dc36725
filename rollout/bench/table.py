"""The lines that `rollout bench` prints."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rollout.bench.measure import OURS, Ceilings, Row, Settings

PACKAGES = ("attention-rollout", "torch", "numpy", "triton", "pyhealth")
COLUMNS = {
    "rows from maps": f"{'':<8} {'naive chain':>12} {'ours':>10} {'speed-up':>9} {'GB/s':>8} {'of memory':>10}",
    "rows from Q,K": f"{'':<8} {'naive chain':>12} {'ours':>10} {'speed-up':>9} {'GFLOP/s':>8} {'of matmul':>10}",
}
AFTER = f" {'max err':>8} {'extra memory, MiB':>18}   backend"
PATIENTS = f"{'':<20} {'PyHealth':>12} {'ours':>10} {'speed-up':>9} {'max err':>8} {'extra memory, MiB':>18}"
NOTES = """Medians of alternating calls, each result checked against float64 first. Extra memory: the peer's, ours.
Of memory: the maps a row chain must read (of the top layer one row per head), over the faster of read and copy; more
than 100 % where they lie in a cache. Of matmul: the products of Q and K it needs, over the float32 matmul."""


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to: the device and what ran on it."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name, as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def head(found: dict[str, Any]) -> str:
    """The machine, in two lines; a third when it is busy with something else."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    lines = [
        f"{found['device']}, {found['cores']} cores, {found['threads']} CPU threads",
        f"Python {found['python']}, {versions}",
    ]
    if found["load"] is not None and found["load"] > 0.5 * found["cores"]:
        lines.append(f"This machine is busy (load {found['load']:.1f} on {found['cores']} cores): figures will be off.")
    return "\n".join(lines)


def limits(ceilings: Ceilings) -> str:
    """The ceilings in one line."""
    return (
        f"read {ceilings.read / 1e9:.1f} GB/s, copy {ceilings.copy / 1e9:.1f} GB/s (read and written), "
        f"float32 matmul {ceilings.matmul / 1e9:.0f} GFLOP/s"
    )


def title(settings: Settings, row: Row) -> str:
    """What stands above the first row of a table."""
    shape = f"B={settings.batch} H={settings.heads} L={settings.layers}"
    if row.table == "patients":
        return f"Patients a second, PyHealth's Transformer end to end, {shape} E=128\n{PATIENTS}"
    size = f" D={settings.size}" if row.table == "rows from Q,K" else ""
    name = row.table[0].upper() + row.table[1:]
    return f"{name}, {shape}{size}, float32\n{COLUMNS[row.table]}{AFTER}"


def line(row: Row) -> str:
    """A row. A wrong provider has no figure, and the line says what is wrong."""
    if row.skipped:
        return f"{row.case:<8} skipped: {row.skipped}"
    peers = [name for name in row.error if name != OURS]
    times = [_figure(row, name) for name in (*peers, OURS)]
    speed = "–" if row.speedup is None else f"{row.speedup:.1f}×"
    error = f"{row.error[OURS]:.0e}" if OURS in row.seconds else "–"
    memory = ", ".join(_mebibytes(row.peak.get(name)) for name in (*peers, OURS))
    start = f"{row.case:<{20 if row.patients else 8}} {times[0]:>12} {times[1]:>10} {speed:>9}"
    if not row.patients:
        rate = "–" if row.rate is None else f"{row.rate / 1e9:.1f}"
        share = "–" if row.share is None else f"{row.share:.0%}"
        start += f" {rate:>8} {share:>10}"
    start += f" {error:>8} {memory:>18}" + (f"   {row.backend}" if row.backend else "")
    return start + "".join(f"\n{'':<8} WRONG, not timed: {what}" for what in row.wrong)


def _figure(row: Row, name: str) -> str:
    """Milliseconds, or patients a second."""
    if name not in row.seconds:
        return "–"
    seconds = row.seconds[name]
    return f"{row.patients / seconds:.0f}" if row.patients else f"{1e3 * seconds:.2f} ms"


def _mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.0f}"
