"""Attention that visits each score once: written out tile by tile, used for its output and for F_l, and dropped.

The heads of a tile are fused into F_l while they are in cache. F_l [b, n, n] is kept for the chain where all layers of
a group find room; where a record is so long that they do not, queries and keys are, and the chain makes the tiles anew.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout_kernels import Method

# A tile of scores stays in the second-level cache between the products and the softmax.
TILE_BYTES = 1 << 20
# Fused maps that a group may keep, all layers together; `bench/test_attend.py` times both sides.
KEPT_BYTES = 256 << 20


@dataclass(frozen=True)
class Keys:
    """What the rows of a group are attended with.

    Attributes:
        bias: log counts, -inf past a sample's last row and where a row may not be attended, [b, 1, n]; None when 0.
        uniform: rows that are uniform over all positions, bool [b, n, 1]; None when there are none.
        shares: counts over their sum, [b, 1, n]: such a row; None when there are none.
    """

    bias: Tensor | None
    uniform: Tensor | None = None
    shares: Tensor | None = None


def keys_of(counts: Tensor, valid: Tensor | None) -> Keys:
    """The `Keys` of counts [b, n] and which rows may be attended, bool [b, n] or None."""
    if valid is None:
        return Keys(None if bool((counts == 1).all()) else counts.log().unsqueeze(1))
    bias = torch.where(valid, counts, 0.0).log().unsqueeze(1)
    return Keys(bias, ~valid.unsqueeze(2), (counts / counts.sum(1, keepdim=True)).unsqueeze(1))


@dataclass(frozen=True)
class Kept:
    """What the chain needs of a layer: F_l [b, n, n], or queries and keys [H, b, n, D] to make it of again."""

    layer: int
    fused: Tensor | None
    query: Tensor
    key: Tensor


class Attention:
    """The attention of a group's layers, and how its heads are fused.

    Args:
        keys: of the group.
        method: of the rollout.
        weights: head weights [L, H] where the method has them.
        keep: keep F_l of each layer.
    """

    def __init__(self, keys: Keys, method: Method, weights: Tensor | None, *, keep: bool) -> None:
        self.keys, self.method, self.weights, self.keep = keys, method, weights, keep

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Kept]:
        """softmax(QKᵀ/√D + bias)·V of [H, b, n, D] as [b, n, H·D], and what the chain needs of the layer."""
        heads, batch, rows, dim = query.shape
        mixed = torch.empty_like(query)
        fused = query.new_empty(batch, rows, rows) if self.keep else None
        for h, r in _tiles(heads, batch, rows, query.itemsize):
            maps = self._maps(query, key, h, r)
            product = torch.bmm(maps.flatten(0, 1), value[h].flatten(0, 1))
            mixed[h, :, r] = product.view(maps.shape[0], batch, -1, dim)
            if fused is not None:
                self._fuse(layer, maps, h, fused[:, r])
        out = mixed.permute(1, 2, 0, 3).reshape(batch, rows, heads * dim)
        return out, Kept(layer, fused, query, key)

    def fused(self, kept: Kept) -> Iterator[tuple[slice, Tensor]]:
        """F_l of the group, [b, r, n], all of it or by slices of rows. The mean is left as a sum."""
        if kept.fused is not None:
            yield slice(None), kept.fused
            return
        heads, batch, rows, _ = kept.query.shape
        part = kept.query.new_empty(0)
        for h, r in _tiles(heads, batch, rows, kept.query.itemsize):
            maps = self._maps(kept.query, kept.key, h, r)
            if h.start == 0:
                part = maps.new_empty(maps.shape[1:])
            self._fuse(kept.layer, maps, h, part)
            if h.stop == heads:
                yield r, part

    def _maps(self, query: Tensor, key: Tensor, h: slice, r: slice) -> Tensor:
        """The softmax [h, b, r, n] of some heads and rows."""
        keys, queries = key[h].flatten(0, 1), query[h, :, r].flatten(0, 1)
        heads, scale = h.stop - h.start, 1 / math.sqrt(query.shape[3])
        bias, beta = self.keys.bias, 1
        if bias is None:
            bias, beta = queries.new_empty(1, 1, 1), 0
        elif heads > 1:
            bias = bias.repeat(heads, 1, 1)
        maps = torch.baddbmm(bias, queries, keys.transpose(1, 2), beta=beta, alpha=scale)
        torch.softmax(maps, -1, out=maps)
        maps = maps.view(heads, -1, *maps.shape[1:])
        if self.keys.uniform is not None:
            maps = torch.where(self.keys.uniform[:, r], self.keys.shares, maps)
        return maps

    def _fuse(self, layer: int, maps: Tensor, h: slice, fused: Tensor) -> None:
        """Add some heads [h, b, r, n] to F_l [b, r, n]."""
        fuse_heads(
            maps, self.method, None if self.weights is None else self.weights[layer, h], fused, first=h.start == 0
        )


def fuse_heads(maps: Iterable[Tensor], method: Method, weights: Tensor | None, fused: Tensor, *, first: bool) -> None:
    """Fuse heads, [b, r, n] each, into `fused` [b, r, n], which holds the heads before them unless these are the first."""
    for h, head in enumerate(maps):
        if weights is not None:
            weight = float(weights[h])
            torch.mul(head, weight, out=fused) if first and h == 0 else fused.add_(head, alpha=weight)
        elif first and h == 0:
            fused.copy_(head)
        elif method.head_fusion == "mean":
            fused.add_(head)
        elif method.head_fusion == "max":
            torch.maximum(fused, head, out=fused)
        else:
            torch.minimum(fused, head, out=fused)


def keeps_maps(batch: int, rows: int, layers: int, itemsize: int) -> bool:
    """Whether F_l [b, n, n] of so many layers is kept, rather than made again from queries and keys."""
    return layers * batch * rows * rows * itemsize <= KEPT_BYTES


def _tiles(heads: int, batch: int, rows: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """(heads, rows) of tiles of scores: all rows of as many heads as fit, else rows of one head."""
    entries = max(1, TILE_BYTES // itemsize)
    step = max(1, min(heads, entries // max(1, batch * rows * rows)))
    height = rows if batch * rows * rows <= entries else max(1, min(rows, entries // (batch * rows)))
    for row in range(0, rows, height):
        for head in range(0, heads, step):
            yield slice(head, min(head + step, heads)), slice(row, min(row + height, rows))
