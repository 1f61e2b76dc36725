"""The chain in pure torch: rows, and the full product. Where the layer's F comes from is a `Source`.

The row chain is w ← w·M_L, then ·M_{L−1} … down to ·M_1 for each start row w: O(S²) a layer instead of O(S³). The
renormalisation of row i divides w_i: w·rownorm(M) = (w / d)·M with d the row sums of M, so M itself is never written.
A one-hot start needs one row per head of the top layer.
"""

from typing import Protocol

import torch
from torch import Tensor

from rollout_kernels._problem import MapsProblem, Problem, QKProblem, shape_result, start_weights
from rollout_kernels._torch.fuse import Scratch, discard_smallest
from rollout_kernels._torch.maps import MapsSource
from rollout_kernels._torch.qk import QKSource
from rollout_kernels._torch.tiles import Tile
from rollout_kernels._torch.values import input_norms


class Source(Protocol):
    """Where the fused maps F_l of a problem come from, tile by tile."""

    rows_sum_to_one: bool
    """Every row of every F_l sums to 1 by construction, so that renormalisation divides by a constant."""

    def plan(self) -> list[Tile]:
        """Tiles that cover every valid row of every sample once."""

    def fused(self, layer: int, tile: Tile) -> tuple[Tensor, float]:
        """F_l of a tile as (values [b, r, n], factor), F = factor · values, 0 outside the valid blocks."""

    def weighted(self, layer: int, tile: Tile, weights: Tensor) -> Tensor:
        """weights [b, R, r] times F_l of the tile: [b, R, n]."""

    def start_rows(self, layer: int) -> tuple[Tensor, float]:
        """Row `rows[b]` of F_l of each sample as (values [B, 1, S], factor); what lies on padding is undefined."""


def source_of(problem: Problem) -> Source:
    """What gives the fused maps of a problem."""
    scratch = Scratch(problem.compute_dtype, problem.device)
    if isinstance(problem, QKProblem):
        return QKSource(problem, scratch)
    assert isinstance(problem, MapsProblem)
    return MapsSource(problem, scratch)


def rollout(problem: Problem) -> Tensor:
    """The rows [B, S] or [B, R, S], or the full matrix [B, S, S]; 0 outside each sample's valid prefix."""
    source = source_of(problem)
    if problem.form == "full":
        return _full(problem, source)
    return shape_result(problem, _rows(problem, source))


def _rows(problem: Problem, source: Source) -> Tensor:
    layers = problem.layers
    if problem.form == "row" and not problem.method.needs_whole_map:
        layers -= 1
        weights, residual = start_row(problem, source, layers)
        weights.scatter_add_(2, problem.start_rows.view(-1, 1, 1), residual)
        if problem.method.renormalize:
            weights.div_(weights.sum(-1, keepdim=True))
    else:
        weights = start_weights(problem)
    plan = source.plan()
    for layer in reversed(range(layers)):
        result = torch.zeros_like(weights)
        for tile in plan:
            _step(problem, source, layer, tile, weights, result)
        weights = result
    return weights


def start_row(problem: Problem, source: Source, layer: int) -> tuple[Tensor, Tensor]:
    """Row `rows[b]` of attention·F_l, [B, 1, S], 0 on padding, and the residual to be added there, [B, 1, 1]."""
    values, factor = source.start_rows(layer)
    row = values * factor
    if problem.lengths is not None:
        padded = torch.arange(problem.seq, device=problem.device) >= problem.lengths[:, None]
        row.masked_fill_(padded[:, None], 0.0)
    if problem.method.normalize_attention:
        row /= _divisors(row)
    row *= problem.method.attention_weight
    residual = residuals(problem, layer)
    if isinstance(residual, Tensor):
        return row, residual.gather(1, problem.start_rows.view(-1, 1)).unsqueeze(1)
    return row, torch.full_like(row[:, :, :1], residual)


def residuals(problem: Problem, layer: int, tile: Tile | None = None) -> float | Tensor:
    """The residual's weight: one for every row, or that of each row of a tile, [b, r], or of all, [B, S]."""
    if problem.values is None:
        return problem.method.residual
    return input_norms(problem, layer) if tile is None else input_norms(problem, layer, tile.samples, tile.rows)


def row_sums(problem: Problem, source: Source, layer: int, tile: Tile) -> tuple[Tensor, float, Tensor, float | Tensor]:
    """F_l of a tile as (values, factor), the row sums of M_l, [b, r], and the residual's weight, one or [b, r]."""
    values, factor = _fused(problem, source, layer, tile)
    residual = residuals(problem, layer, tile)
    sums = _row_sums(values).mul_(problem.method.attention_weight * factor).add_(residual)
    if tile.padded_rows is not None:
        sums.masked_fill_(tile.padded_rows, 1.0)
    return values, factor, sums, residual


def _step(problem: Problem, source: Source, layer: int, tile: Tile, weights: Tensor, result: Tensor) -> None:
    """Add the tile's part of w·M_l to `result`."""
    method = problem.method
    start = weights[tile.samples, :, tile.rows]
    if tile.skippable and not bool(start.any()):
        return
    summed = method.renormalize and not (source.rows_sum_to_one and not method.discard_ratio)
    if not summed and not method.normalize_attention:
        if method.renormalize:
            start = start / (method.residual + method.attention_weight)
        product, factor, residual = source.weighted(layer, tile, start), 1.0, residuals(problem, layer, tile)
    else:
        values, factor, sums, residual = row_sums(problem, source, layer, tile)
        if method.renormalize:
            start = start / sums.unsqueeze(1)
        product = torch.bmm(start, values)
    # The residual is added after the product: accumulated first, a large w_i would swallow the small terms.
    result[tile.samples, :, : tile.width].add_(product, alpha=method.attention_weight * factor)
    if isinstance(residual, Tensor):
        result[tile.samples, :, tile.rows].addcmul_(start, residual.unsqueeze(1))
    else:
        result[tile.samples, :, tile.rows].add_(start, alpha=residual)


def _row_sums(values: Tensor) -> Tensor:
    """Sums over the last axis, [b, r]. `sum` is slow where rows are not contiguous; a product with ones is not."""
    if values.is_contiguous():
        return values.sum(-1)
    ones = torch.ones(1, dtype=values.dtype, device=values.device).expand(*values.shape[:1], values.shape[2], 1)
    return torch.bmm(values, ones).squeeze(-1)


def _fused(problem: Problem, source: Source, layer: int, tile: Tile) -> tuple[Tensor, float]:
    """F_l of a tile as (values, factor), what is discarded taken out and its rows divided as the method says."""
    values, factor = source.fused(layer, tile)
    if problem.method.discard_ratio:
        values = discard_smallest(values, problem.method.discard_ratio, tile.lengths)
    if problem.method.normalize_attention:
        return values / _divisors(values), 1.0
    return values, factor


def _divisors(values: Tensor) -> Tensor:
    """Row sums [..., 1]; 1 for a row that sums to 0."""
    sums = values.sum(-1, keepdim=True)
    return torch.where(sums == 0, 1.0, sums)


def _full(problem: Problem, source: Source) -> Tensor:
    """R = M_L · … · M_1, tile by tile of samples, so that R stays in cache across the layers.

    The identity stays out of the matrix product, M·R = F·R + r∘R: with it, rounding is several times larger.
    """
    method = problem.method
    result = torch.zeros(problem.batch, problem.seq, problem.seq, dtype=problem.compute_dtype, device=problem.device)
    for tile in source.plan():
        n, product = tile.width, None
        for layer in range(problem.layers):
            values, factor = _fused(problem, source, layer, tile)
            matrix = torch.mul(values, method.attention_weight * factor)
            weight = residuals(problem, layer, tile)
            if isinstance(weight, Tensor):
                residual = weight.unsqueeze(-1)
            else:
                residual = torch.full_like(matrix[..., :1], weight)
            if method.renormalize:
                sums = matrix.sum(-1, keepdim=True).add_(residual)
                if tile.padded_rows is not None:
                    sums.masked_fill_(tile.padded_rows.unsqueeze(-1), 1.0)
                matrix.div_(sums)
                residual.div_(sums)
            if product is None:
                product = matrix
                product.diagonal(dim1=1, dim2=2).add_(residual.squeeze(-1))
            else:
                product = torch.bmm(matrix, product).addcmul_(product, residual)
        assert product is not None
        padded = tile.padded
        if padded is not None:
            product.masked_fill_(padded, 0.0)
        result[tile.samples, :n, :n] = product
    return result
