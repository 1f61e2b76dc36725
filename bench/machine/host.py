"""What the suites run on, and the folder its record goes to.

`BENCH_DEVICE` (cpu, cuda; default cpu) and `OMP_NUM_THREADS` (default 2) choose it.
"""

import os
import re
from pathlib import Path

import torch

from rollout.bench.measure import device_name

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
DEVICE = torch.device(os.environ.get("BENCH_DEVICE", "cpu"))
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def folder() -> Path:
    """`bench/results/<device>`, where this machine's record is."""
    name = device_name(DEVICE) + ("" if DEVICE.type == "cuda" else f" {os.cpu_count()} cores")
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
