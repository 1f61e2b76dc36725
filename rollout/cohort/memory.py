"""Peak memory of this process."""

from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Count the peak from here on, where the system allows it."""
    with suppress(OSError):
        _CLEAR.write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Most memory this process has had resident, in bytes; 0 where the system does not tell."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def peak_gpu_memory() -> int:
    """Most memory of the current GPU in use by tensors, in bytes; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
