"""Launch parameters: plain tables in `tuned/`, looked up by a plain function of shape, dtype and device.

`default.json` is safe wherever the kernels compile, `sm_80.json`, `sm_90.json` and `sm_100.json` suit one each, and
`<device>.json`, written by tune.py, takes their place on the device it was measured on. What decides the order
of a sample's sums (block sizes, parts, warps) depends on S, the dtype and the device alone; the batch decides no more
than how the same sums are spread over programs.
"""

import json
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent / "tuned"
MAX_ROW = 8192  # the longest row of a map held on chip
PREPARE = {"num_warps": 4, "num_stages": 1}  # options of a launch of next to no work


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
        options: dict[str, object] = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        return options if rocm() else {**options, "maxnreg": self.maxnreg}


@dataclass(frozen=True)
class ScoresLaunch:
    """Launch of a kernel from Q and K: tiles of `block_m` queries and `block_n` keys; `precision` is how tensor cores
    multiply float32: as six products of bfloat16 thirds, or three of tf32 halves where those take fewer registers;
    `maxnreg`, where it is set, keeps as many programs resident on any release of Triton; 255 keeps the assembler from
    spilling a little to reach 128 of its own accord."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str = "bf16x6"
    maxnreg: int | None = None

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    @property
    def options(self) -> dict[str, object]:
        capped = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True, **capped}


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


@dataclass(frozen=True)
class Target:
    """A device, as far as a launch depends on it.

    Attributes:
        table: the table of `tuned/` that serves it.
        processors: its multiprocessors.
        cannot: why no kernel runs on it, or "".
    """

    table: str
    processors: int = 1
    cannot: str = ""

    def refusals(self) -> list[str]:
        return [self.cannot] if self.cannot else []


@cache
def target(device: torch.device) -> Target:
    """What is known of a device."""
    if device.type == "cpu":
        return Target("default", cannot="" if interpreting() else "tensors are on cpu")
    if device.type != "cuda":
        return Target("default", cannot=f"tensors are on {device.type}")
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    old = not rocm() and capability < (8, 0)
    return Target(
        table_name(name, capability),
        torch.cuda.get_device_properties(device).multi_processor_count,
        f"{name} is older than compute capability 8.0" if old else "",
    )


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, so that tensors may be on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def rocm() -> bool:
    """Whether kernels are compiled for AMD, whose compiler refuses options that are Nvidia's alone."""
    return torch.version.hip is not None


def table_name(name: str, capability: tuple[int, int]) -> str:
    """The table that serves a device: its own (`nvidia_h200`), its architecture's (`sm_90`), or `default`."""
    own = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    names = (own,) if rocm() else (own, f"sm_{capability[0]}{capability[1]}")
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


@cache
def rows_launch(
    seq: int, dtype: torch.dtype, gradients: bool = False, load: int = 16, name: str = "default"
) -> RowsLaunch:
    """The launch of the kernels over maps, where one load takes `load` bytes.

    Two tensors, or more addresses where loads are less than 16 bytes, take registers that two programs of a
    multiprocessor do not have: one program of twice the warps has as many threads, each with half as much to hold. The
    bits of a sample stay, as warps have no part in the order of its sums. Rows of an odd number of elements, which are
    read one by one, have blocks of half the rows, whatever their strides.
    """
    size = padded(seq)
    launch = RowsLaunch(padded=size, **tables(name)["rows"][width(dtype)][str(size)])
    if gradients or load < 16:
        most = launch.rows * size // (32 * 8)  # eight elements a thread: one load of 16 bytes where they have 16 bits
        launch = replace(launch, num_warps=max(launch.num_warps, min(16, 2 * launch.num_warps, most)))
    if seq % 2:
        launch = replace(launch, rows=max(1, launch.rows // 2))
    if gradients or (load == dtype.itemsize and seq % 2 == 0):  # two tensors, or addresses: half as deep in flight
        launch = replace(launch, stages=max(1, launch.stages // 2))
    return launch


def scores_launch(
    kernel: str,
    dtype: torch.dtype,
    head_dimension: int,
    name: str = "default",
    biased: bool = False,
    capped: bool = False,
) -> ScoresLaunch:
    """The launch of `"logsumexp"`, `"columns"`, `"gradients"` for columns of gradient-weighted maps, or `"fused"` for
    all that fuse a tile over its heads.

    It does not depend on S: the same tiles serve every length. A bias takes the registers of one more tile: with it
    every kernel has the tiles of `"fused"`, turned over for the log-sum-exp, whose rows are queries; with a soft cap
    or sinks too, and of the largest tiles halves."""
    by_size = tables(name)["fused" if biased or capped else kernel][width(dtype)]
    launch = ScoresLaunch(**by_size[str(head_dimension)])
    if capped and launch.block_m * launch.block_n >= 16 * 32 * launch.num_warps:  # entries a thread
        launch = replace(launch, block_n=launch.block_n // 2)
    if (biased or capped) and kernel == "logsumexp":
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
