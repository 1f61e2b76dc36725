"""Rows from stored maps on a CPU, compiled: `rows.c`, called by `ctypes` on torch's own pool of threads.

The extension is optional: where it was not built, or cannot be loaded, that is a reason why this backend cannot serve,
and the torch backend does.
"""

from rollout_kernels._native.library import unusable
from rollout_kernels._native.rows import refusals_maps, rows_from_maps

__all__ = ["refusals_maps", "rows_from_maps", "unusable"]
