"""The chain as most public code writes it, and the floors: the work that no row chain can leave out."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

NAIVE, READ, PRODUCTS = "naive chain", "one read of the maps", "QKᵀ alone"
TILE_BYTES = 4 * 2**20  # of the products made at once: they stay in the cache


def naive_full(maps: Iterable[Tensor]) -> Tensor:
    """R as most public code computes it: mean over heads, ½(A + I), row sum, S×S products.

    Args:
        maps: L maps [B, H, S, S], input side first.

    Returns:
        [B, S, S], of the maps' dtype.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928, section 3.
    """
    product: Tensor | None = None
    for attention in maps:
        fused = attention.mean(1)
        matrix = 0.5 * (fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device))
        matrix = matrix / matrix.sum(-1, keepdim=True)
        product = matrix if product is None else torch.bmm(matrix, product)
    if product is None:
        raise ValueError("naive_full: maps must be one or more layers, got none")
    return product


def naive_chain(maps: Iterable[Tensor]) -> Tensor:
    """Row 0 of `naive_full`, [B, S]."""
    return naive_full(maps)[:, 0]


def softmax_maps(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Iterator[Tensor]:
    """softmax(QKᵀ/√D) of each layer, [B, H, S, S], one at a time."""
    for q, k in zip(queries, keys, strict=True):
        yield torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)


def naive_chain_qk(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """The maps of every layer, as a model returns them, then `naive_chain`."""
    return naive_chain(list(softmax_maps(queries, keys)))


def read_maps(maps: Sequence[Tensor]) -> Tensor:
    """One plain read of the maps a row chain must read: every layer but the top one, and of that one row per head.

    Sums the bytes as float32, whatever the dtype, so that memory is timed and no conversion. Not a rollout.
    """
    lower = [_words(attention).sum() for attention in maps[:-1]]
    return torch.stack([*lower, maps[-1][:, :, 0].sum(dtype=torch.float32)])


def _words(attention: Tensor) -> Tensor:
    flat = attention.view(-1)
    return flat.view(torch.float32) if flat.nbytes % 4 == 0 else flat


def multiply(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """The products QKᵀ alone that a row chain must make: every layer's, of the top one's a row per head.

    Tile by tile in the cache, none kept. Not a rollout.
    """
    batch, heads, seq, _ = queries[0].shape
    step = min(batch, max(1, TILE_BYTES // (heads * seq * seq * queries[0].element_size())))
    tile = queries[0].new_empty(step * heads, seq, seq)
    for q, k in zip(queries[:-1], keys[:-1], strict=True):
        for some_queries, some_keys in zip(q.split(step), k.split(step), strict=True):
            rows, columns = some_queries.flatten(0, 1), some_keys.flatten(0, 1)
            torch.bmm(rows, columns.transpose(1, 2), out=tile[: len(rows)])
    return queries[-1][:, :, :1] @ keys[-1].transpose(2, 3)
