"""Attention that visits each score once: written out tile by tile, used for its output and for F_l, and dropped.

The heads of a tile are fused into F_l while they are in cache. F_l [b, n, n] is kept for the chain where all layers of
a group find room; where a record is so long that they do not, queries and keys are, and the chain makes the tiles anew.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rollout.pyhealth.merged.blocks import Block
from rollout_kernels import Method

# A tile of scores stays in the second-level cache between the products and the softmax.
TILE_BYTES = 1 << 20
_PAIRWISE: dict[str, Callable[..., Tensor]] = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}

# Fused maps that a group may keep, all layers together. By `test_visits` of `bench/test_pyhealth_end_to_end.py`, of
# four layers, kept is the faster up to 2048 rows (48 MB), and no longer surely at 4096 (192 MB).
KEPT_BYTES = 64 << 20

NEVER = -1e30  # a score that softmax makes exactly 0; an infinite one times 0 is no number


@dataclass(frozen=True)
class Keys:
    """How the rows of a group are attended.

    Attributes:
        bias: what is added to the scores of each row as a key, [b, n]: its log count, `NEVER` where it may not be
            attended and past a sample's last row.
        uniform: rows that are uniform over all positions, bool [b, n, 1]; None when there are none.
        shares: counts over their sum, [b, 1, n]: such a row; None when there are none.
    """

    bias: Tensor
    uniform: Tensor | None = None
    shares: Tensor | None = None

    def spread(self, maps: Tensor, rows: slice) -> Tensor:
        """Maps [..., b or h, r, n] of some rows, with the uniform ones as they are."""
        if self.uniform is None or self.shares is None:
            return maps
        return torch.where(self.uniform[:, rows], self.shares, maps)


def keys_of(counts: Tensor, valid: Tensor | None) -> Keys:
    """The `Keys` of counts [b, n] and which rows may be attended, bool [b, n] or None."""
    if valid is None:
        return Keys(counts.log().clamp_(min=NEVER))
    bias = torch.where(valid, counts, 0.0).log().clamp_(min=NEVER)
    return Keys(bias, ~valid.unsqueeze(2), (counts / counts.sum(1, keepdim=True)).unsqueeze(1))


@dataclass(frozen=True)
class Kept:
    """What the chain needs of a layer: F_l [b, n, n], or queries and keys [H, b, n, D + 1] to make it of again."""

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

    @staticmethod
    def project(block: Block, x: Tensor) -> Tensor:
        """Queries, keys and values of rows [N, E], head by head and with a column of 1 after each: [3H, N, D + 1]."""
        flat = flat_projections(block, x)
        parts = flat.new_ones(*flat.shape[:2], flat.shape[2] + 1)
        parts[..., :-1] = flat
        return parts

    def attend(self, layer: int, parts: Tensor) -> tuple[Tensor, Kept]:
        """softmax(QKᵀ/√D + bias)·V as [b, n, H·D], and what the chain needs of the layer.

        Args:
            layer: its number.
            parts: queries, keys and values [3, H, b, n, D + 1]: with a last column of 1 in the queries and of anything
                in the others. That of the keys is made the bias here, so that a product adds it.
        """
        query, key, value = parts
        heads, batch, rows, dim = value[..., :-1].shape
        self.add_bias(key)
        value, mixed = value[..., :-1], value.new_empty(heads, batch, rows, dim)
        fused = query.new_empty(batch, rows, rows) if self.keep else None
        for h, r in tiles(heads, batch, rows, query.itemsize):
            maps = self.maps(query, key, h, r)
            if r.stop - r.start == rows:
                torch.bmm(maps.flatten(0, 1), value[h].flatten(0, 1), out=mixed[h].flatten(0, 1))
            else:
                mixed[h, :, r] = torch.matmul(maps, value[h])
            if fused is not None:
                self.fuse(layer, maps, h, fused[:, r])
        return mixed.permute(1, 2, 0, 3).reshape(batch, rows, heads * dim), Kept(layer, fused, query, key)

    def add_bias(self, key: Tensor) -> None:
        """Make the last column of keys [H, b, n, D + 1] what the product with a 1 adds to the scores before scaling."""
        key[..., -1] = self.keys.bias * math.sqrt(key.shape[-1] - 1)

    def fused(self, kept: Kept) -> Iterator[tuple[slice, Tensor]]:
        """F_l of the group, [b, r, n], all of it or by slices of rows. The mean is left as a sum."""
        if kept.fused is not None:
            yield slice(None), kept.fused
            return
        heads, batch, rows, _ = kept.query.shape
        part = kept.query.new_empty(0)
        for h, r in tiles(heads, batch, rows, kept.query.itemsize):
            maps = self.maps(kept.query, kept.key, h, r)
            if h.start == 0:
                part = maps.new_empty(maps.shape[1:])
            self.fuse(kept.layer, maps, h, part)
            if h.stop == heads:
                yield r, part

    def maps(self, query: Tensor, key: Tensor, h: slice, r: slice) -> Tensor:
        """The softmax [h, b, r, n] of some heads and rows."""
        queries, keys = query[h, :, r].flatten(0, 1), key[h].flatten(0, 1).transpose(1, 2)
        scale = 1 / math.sqrt(query.shape[3] - 1)
        maps = torch.baddbmm(queries.new_empty(1, 1, 1), queries, keys, beta=0, alpha=scale)
        maps = torch.softmax(maps, -1, out=maps).view(h.stop - h.start, -1, *maps.shape[1:])
        return self.keys.spread(maps, r)

    def attend_top(self, scores: Tensor) -> Tensor:
        """Row 0 of the top block's maps, [b, H, n], from its scores."""
        return self.keys.spread((scores + self.keys.bias.unsqueeze(1)).softmax(-1), slice(0, 1))

    def fuse_top(self, maps: Tensor) -> Tensor:
        """Row 0 of F_L [b, n] from that of every head; the mean is left as a sum."""
        row = torch.empty_like(maps[:, 0])
        self.fuse(-1, maps.transpose(0, 1), slice(0, maps.shape[1]), row)
        return row

    def fuse(self, layer: int, maps: Tensor, h: slice, fused: Tensor) -> None:
        weights = None if self.weights is None else self.weights[layer, h]
        fuse_heads(maps, self.method, weights, fused, first=h.start == 0)


def flat_projections(block: Block, x: Tensor) -> Tensor:
    """Queries, keys and values of rows [N, E], head by head: [3H, N, D]."""
    return functional.linear(block.norm(x), block.projections).view(len(x), 3 * block.heads, -1).transpose(0, 1)


def fuse_heads(maps: Tensor, method: Method, weights: Tensor | None, fused: Tensor, *, first: bool) -> None:
    """Fuse heads [h, ...] into `fused` [...], which holds those below unless they are the first: the mean as a sum."""
    if weights is not None:
        if first:
            fused.zero_()
        for head, weight in zip(maps, weights.tolist(), strict=True):
            fused.add_(head, alpha=weight)
        return
    two = _PAIRWISE[str(method.head_fusion)]
    if not first:
        two(fused, maps[0], out=fused)
    elif len(maps) > 1:
        two(maps[0], maps[1], out=fused)
    else:
        fused.copy_(maps[0])
    for head in maps[2 if first else 1 :]:
        two(fused, head, out=fused)


def keeps_maps(counts: Tensor, layers: int) -> bool:
    """Whether F_l [b, n, n] of so many layers is kept for counts [b, n], or made again from queries and keys."""
    return layers * counts.numel() * counts.shape[1] * counts.itemsize <= KEPT_BYTES


def tiles(heads: int, batch: int, rows: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """(heads, rows) of tiles of scores: all rows of as many heads as fit, else rows of one head."""
    entries = max(1, TILE_BYTES // itemsize)
    step = max(1, min(heads, entries // max(1, batch * rows * rows)))
    height = rows if batch * rows * rows <= entries else max(1, min(rows, entries // (batch * rows)))
    for row in range(0, rows, height):
        for head in range(0, heads, step):
            yield slice(head, min(head + step, heads)), slice(row, min(row + height, rows))
