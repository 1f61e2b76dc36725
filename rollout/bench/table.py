"""The lines that `rollout bench` prints."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from rollout.bench.measure import OURS, PLAIN, Ceilings, Row, device_name
from rollout.bench.settings import Settings

PACKAGES = ("attention-rollout", "torch", "numpy", "triton", "pyhealth")
CASE, FLOOR = 26, 28  # characters of the first column, and of that of the floor
NOTES = """Medians of alternating calls, caches flushed before each, every result checked against float64 first.
Share: the time of the work that cannot be left out, over ours; it is measured in the same turns, and is no rollout.
Extra memory: the peer's, ours."""


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to: the device and what ran on it."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def head(found: dict[str, Any]) -> str:
    """The machine, in two lines; a third when it is busy with something else."""
    numbers = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"{found['device']}, {found['cores']} cores, {found['threads']} CPU threads",
        f"Python {found['python']}, {numbers}",
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
    name = row.table[0].upper() + row.table[1:]
    shape = f"B={settings.batch} H={settings.heads} L={settings.layers}"
    size = f" D={settings.size}" if row.table.endswith("from Q,K") else ""
    second = ("method", "of rollout") if row.peer == PLAIN else (OURS, "speed-up")
    columns = (row.peer, *second, row.floor, "share", "max err", "extra memory, MiB")
    return f"{name}, {shape}{size}, float32\n{_aligned('', columns)}   backend".rstrip()


def line(row: Row) -> str:
    """A row. A wrong provider has no figure, and the line says what is wrong."""
    if row.skipped:
        return f"{row.case:<{CASE}} skipped: {row.skipped}"
    cells = (
        _figure(row, row.peer),
        _figure(row, OURS),
        _ratio(row),
        _figure(row, row.floor),
        "–" if row.share is None else f"{row.share:.0%}",
        f"{row.error[OURS]:.0e}" if OURS in row.seconds else "–",
        ", ".join(_mebibytes(row.peak.get(name)) for name in (row.peer, OURS)),
    )
    start = f"{_aligned(row.case, cells)}   {row.backend}".rstrip()
    return start + "".join(f"\n{'':<{CASE}} WRONG, not timed: {what}" for what in row.wrong)


def _aligned(case: str, cells: tuple[str, ...]) -> str:
    widths = (14, 12, 9, FLOOR, 6, 8, 18)
    return f"{case:<{CASE}}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _figure(row: Row, name: str) -> str:
    """Milliseconds, or samples a second."""
    if name not in row.seconds:
        return "–"
    seconds = row.seconds[name]
    return f"{row.samples / seconds:.0f}" if row.samples else f"{1e3 * seconds:.2f} ms"


def _ratio(row: Row) -> str:
    """How much faster ours is; of a method what it takes beside plain rollout."""
    if row.speedup is None:
        return "–"
    return f"{row.speedup:.1f}×" if row.cost is None else f"{row.cost:.2f}×"


def _mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.0f}"
