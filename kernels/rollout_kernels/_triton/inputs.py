"""What every kernel over maps is handed: pointer tables, start rows and flags, made once on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from rollout_kernels._problem import MapsProblem
from rollout_kernels._triton import launch, layer

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FUSIONS = {"mean": layer.MEAN, "max": layer.MAX, "min": layer.MIN}
_GRADIENTS = {
    None: layer.NO_GRADIENTS,
    "clamp_then_fuse": layer.CLAMP_THEN_FUSE,
    "fuse_then_clamp": layer.FUSE_THEN_CLAMP,
}


@dataclass(frozen=True)
class MapInputs:
    """Arguments that the kernels over maps share.

    Attributes:
        pointers: maps table, gradients table, head weights, start, lengths, in the order of the kernels' signatures.
        scalars: L, R, S, row stride of the head weights, residual, attention.
        flags: the compile-time flags by name.
        out: float32 [B, R, S], not initialised.
    """

    pointers: tuple[Tensor, ...]
    scalars: tuple[int | float, ...]
    flags: dict[str, object]
    out: Tensor

    @property
    def layers(self) -> int:
        return int(self.scalars[0])


def map_inputs(problem: MapsProblem, start: Tensor, starts: int) -> MapInputs:
    """The kernels' arguments for one problem; `start` is long [B] (one-hot rows) or float32 [B, R, S]."""
    grads = problem.maps if problem.gradients is None else problem.gradients
    vector, aligned = vectors([*problem.maps, *grads])
    nothing = start  # a pointer the kernel does not read
    weights = nothing if problem.head_weights is None else head_weights(problem.head_weights, problem.device)
    pointers = (
        table(problem.maps, vector, problem.device),
        table(grads, vector, problem.device),
        weights,
        start,
        nothing if problem.lengths is None else problem.lengths.contiguous(),
    )
    method = problem.method
    stride_weights = weights.shape[1] if problem.head_weights is not None else 0
    scalars = (
        problem.layers, starts, problem.seq, stride_weights, float(method.residual), method.attention_weight,
    )  # fmt: skip
    return MapInputs(
        pointers=pointers,
        scalars=scalars,
        flags={
            "ONE_HOT": not start.is_floating_point(),
            "HAS_LENGTHS": problem.lengths is not None,
            "RENORMALIZE": method.renormalize,
            **map_flags(problem, vector, aligned),
        },
        out=torch.empty(problem.batch, starts, problem.seq, dtype=torch.float32, device=problem.device),
    )


def launch_of(problem: MapsProblem, arguments: MapInputs, name: str) -> launch.RowsLaunch:
    wide = arguments.flags["VEC"] != 1
    return launch.rows_launch(problem.seq, problem.maps[0].dtype, problem.gradients is not None, wide, name)


def map_flags(problem: MapsProblem, vector: int, aligned: bool) -> dict[str, object]:
    """The compile-time flags of `layer_rows`."""
    grads = problem.maps if problem.gradients is None else problem.gradients
    fusion = layer.WEIGHTS if problem.head_weights is not None else FUSIONS[str(problem.method.head_fusion)]
    return {
        "FUSION": fusion.value,
        "GRADIENTS": _GRADIENTS[problem.method.gradients].value,
        "DTYPE": DTYPES[problem.maps[0].dtype],
        "GRAD_DTYPE": DTYPES[grads[0].dtype],
        "VEC": vector,
        "ALIGNED": aligned,
        "UNIT_COLUMN": all(m.stride(-1) == 1 for m in (*problem.maps, *grads)),
    }


def vectors(tensors: Sequence[Tensor]) -> tuple[int, bool]:
    """How many elements one 16-byte load may take from every tensor (1 when strides forbid it), and whether every
    address is a multiple of 16 bytes."""
    aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
    vector = 16 // max(t.element_size() for t in tensors)
    fits = all(
        t.stride(-1) == 1 and t.shape[-1] % vector == 0
        and all(stride % vector == 0 for stride, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1)
        for t in tensors
    )  # fmt: skip
    return (vector, True) if aligned and fits else (1, aligned)


def table(tensors: Sequence[Tensor], vector: int, device: torch.device) -> Tensor:
    """int64 [L, 6] on the device: address, strides of batch, head and row in units of `vector`, of column, heads."""
    rows = tuple(
        (t.data_ptr(), t.stride(0) // vector, t.stride(1) // vector, t.stride(2) // vector, t.stride(3), t.shape[1])
        for t in tensors
    )
    return device_table(rows, device)


@lru_cache(maxsize=256)
def device_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The allocator hands out the same addresses call after call: most tables are on the device already."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def head_weights(weights: Sequence[Tensor], device: torch.device) -> Tensor:
    """float32 [L, H] on the device, rows of fewer heads filled with 0."""
    padded = torch.zeros(len(weights), max(w.numel() for w in weights), dtype=torch.float32)
    for row, w in zip(padded, weights, strict=True):
        row[: w.numel()] = w
    return padded.to(device)
