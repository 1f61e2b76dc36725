"""The fused maps F_l of stored attention maps, in pure torch."""

import torch
from torch import Tensor

from rollout_kernels._problem import MapsProblem
from rollout_kernels._torch.fuse import Scratch, fuse_by_function, fuse_heads
from rollout_kernels._torch.tiles import Tile, tiles
from rollout_kernels._torch.values import ValueTerms

# A tile's fused map stays in the second-level cache between the head sum, the row sum and the product.
CPU_TILE_BYTES = 4 << 20
GPU_TILE_BYTES = 256 << 20

# Whole rows are contiguous; up to this width (or half used) reading them whole beats reading their valid part.
WHOLE_ROWS = 512


class MapsSource:
    """F_l from stored maps: each is read once, tile by tile."""

    rows_sum_to_one = False

    def __init__(self, problem: MapsProblem, scratch: Scratch) -> None:
        self._problem, self._scratch = problem, scratch
        self._values = ValueTerms(problem, scratch)

    def plan(self) -> list[Tile]:
        problem = self._problem
        budget = CPU_TILE_BYTES if problem.device.type == "cpu" else GPU_TILE_BYTES
        return tiles(
            problem.batch,
            problem.seq,
            problem.lengths,
            budget // problem.compute_dtype.itemsize,
            columns=problem.seq if problem.seq <= WHOLE_ROWS else 0,
            whole=problem.method.needs_whole_map or problem.form == "full",
            single=callable(problem.method.head_fusion),
        )

    def fused(self, layer: int, tile: Tile) -> tuple[Tensor, float]:
        problem, n = self._problem, tile.width
        read = n if callable(problem.method.head_fusion) or problem.seq > max(WHOLE_ROWS, 2 * n) else problem.seq
        maps = problem.maps[layer][tile.samples, :, tile.rows, :read]
        gradients = None
        if problem.gradients is not None:
            gradients = problem.gradients[layer][tile.samples, :, tile.rows, :read]
        values, factor = self._fuse(layer, tile.samples, maps, gradients, tile.rows, own=tile.beyond is not None)
        values = values[:, :, :n]
        padded = tile.padded
        if padded is not None:
            values.masked_fill_(padded, 0.0)
        return values, factor

    def weighted(self, layer: int, tile: Tile, weights: Tensor) -> Tensor:
        values, factor = self.fused(layer, tile)
        return torch.bmm(weights, values).mul_(factor)

    def start_rows(self, layer: int) -> tuple[Tensor, float]:
        problem = self._problem
        samples = torch.arange(problem.batch, device=problem.device)
        maps = problem.maps[layer][samples, :, problem.start_rows].unsqueeze(2)
        gradients = None
        if problem.gradients is not None:
            gradients = problem.gradients[layer][samples, :, problem.start_rows].unsqueeze(2)
        return self._fuse(layer, slice(0, problem.batch), maps, gradients, problem.start_rows)

    def _fuse(
        self,
        layer: int,
        samples: slice,
        maps: Tensor,
        gradients: Tensor | None,
        rows: slice | Tensor,
        own: bool = False,
    ) -> tuple[Tensor, float]:
        """F of the samples from maps [b, H, r, n] of some rows, one slice or long [b], as (values, factor)."""
        method, weights = self._problem.method, None
        if method.values is not None:
            return self._values.fuse(layer, samples, maps, rows), 1.0
        if callable(method.head_fusion):
            return fuse_by_function(maps, gradients, method, self._problem.compute_dtype), 1.0
        if self._problem.head_weights is not None:
            weights = self._problem.head_weights[layer]
        return fuse_heads(maps, gradients, method, weights, self._scratch, own=own)
