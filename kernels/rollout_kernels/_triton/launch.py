"""Launch parameters: plain tables in `tuned/`, looked up by a plain function of shape, dtype and device.

`default.json` is safe wherever the kernels compile, `sm_80.json`, `sm_90.json` and `sm_100.json` suit one each, and
`<device>.json`, written by tune.py, takes their place on the device it was measured on. What decides the order
of a sample's sums (block sizes, parts, warps) depends on S, the dtype and the device alone; the batch decides no more
than how the same sums are spread over programs.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent / "tuned"
MAX_ROW = 8192  # the longest row of a map held on chip


@dataclass(frozen=True)
class RowsLaunch:
    """Launch of the kernels over maps: a block is BLOCK_I rows of SP columns; `maxnreg` keeps two programs resident."""

    rows: int
    padded: int
    parts: int
    stages: int
    num_warps: int
    maxnreg: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_I": self.rows, "SP": self.padded, "PARTS": self.parts, "STAGES": self.stages}

    @property
    def options(self) -> dict[str, object]:
        return {"num_warps": self.num_warps, "num_stages": 1, "maxnreg": self.maxnreg, "enable_fp_fusion": True}


@dataclass(frozen=True)
class ScoresLaunch:
    """Launch of a kernel from Q and K: tiles of `block_m` queries and `block_n` keys; `precision` is how tensor cores
    multiply float32: as six products of bfloat16 thirds, or three of tf32 halves where those take fewer registers."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str = "bf16x6"

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    @property
    def options(self) -> dict[str, object]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class ProductLaunch:
    """Launch of the product of two matrices: a block_m × block_n tile, block_k at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    @property
    def options(self) -> dict[str, object]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@cache
def table_name(device: torch.device) -> str:
    """The table that serves a device: its own (`nvidia_h200`), its architecture's (`sm_90`), or `default`."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    own = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")
    names = (own,) if torch.version.hip else (own, f"sm_{major}{minor}")
    return next((name for name in names if (_FOLDER / f"{name}.json").is_file()), "default")


@cache
def tables(name: str) -> dict[str, Any]:
    """One table of `tuned/`."""
    with open(_FOLDER / f"{name}.json") as file:
        return dict(json.load(file))


def width(dtype: torch.dtype) -> str:
    return "32" if dtype == torch.float32 else "16"


def padded(seq: int) -> int:
    """The power of two that holds a row of S columns, 32 at least."""
    return max(32, 1 << (seq - 1).bit_length())


def rows_launch(
    seq: int, dtype: torch.dtype, gradients: bool = False, wide: bool = True, name: str = "default"
) -> RowsLaunch:
    """The launch of the kernels over maps. With gradients two tensors are in flight, each half as deep; their
    addresses, or one for every element where loads are not wide, take the registers of a second resident program."""
    size = padded(seq)
    launch = RowsLaunch(padded=size, **tables(name)["rows"][width(dtype)][str(size)])
    if gradients:
        launch = replace(launch, stages=max(1, launch.stages // 2))
    if gradients or not wide:
        launch = replace(launch, maxnreg=min(255, 65536 // (32 * launch.num_warps)))
    return launch


def scores_launch(
    kernel: str, dtype: torch.dtype, head_dimension: int, name: str = "default", biased: bool = False
) -> ScoresLaunch:
    """The launch of `"logsumexp"`, `"columns"`, or `"fused"` for all that fuse a tile over its heads.

    It does not depend on S: the same tiles serve every length. A bias takes the registers of one more tile: with it
    every kernel has the tiles of `"fused"`, turned over for the log-sum-exp, whose rows are queries."""
    by_size = tables(name)["fused" if biased else kernel][width(dtype)]
    launch = ScoresLaunch(**by_size[str(head_dimension)])
    if biased and kernel == "logsumexp":
        launch = replace(launch, block_m=launch.block_n, block_n=launch.block_m)
    return launch


def product_launch(name: str = "default") -> ProductLaunch:
    """The launch of the full chain's product."""
    return ProductLaunch(**tables(name)["product"])


def splits(chains: int, seq: int, name: str, processors: int) -> bool:
    """Whether the work of each sample is split over programs: chains (B·R) too few to fill the device, or a row so
    long that w and its sums leave no registers for the loads."""
    limits = tables(name)
    return seq > limits["resident_longest"] or chains < limits["resident_per_processor"] * processors
