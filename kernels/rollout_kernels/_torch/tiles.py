"""How a ragged batch is cut into tiles that fit in cache: neighbouring samples together, long samples by rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

# A tile of several samples is as wide as its longest. It may waste on padding this share of its entries, or as many
# as are fused in the time a further tile would cost.
PADDING_SHARE = 0.25
PADDING_ENTRIES = 1 << 15


@dataclass(frozen=True)
class Tile:
    """Rows `rows` of samples `samples`, columns 0..width.

    Attributes:
        samples, rows: slices of the batch and of the query positions.
        width: n, the longest length in the tile.
        lengths: the valid length of each sample, on the host; empty when they were left on the device.
        beyond: bool [b, n], True past a sample's end, or None when no sample ends before n.
        skippable: whether it pays to look if all start weights of the tile are 0, and skip it.
    """

    samples: slice
    rows: slice
    width: int
    lengths: list[int]
    beyond: Tensor | None = None
    skippable: bool = False

    @property
    def padded(self) -> Tensor | None:
        """bool [b, r, n], True outside a sample's valid block; made anew each time: kept, they would add up to B·S²."""
        return None if self.beyond is None else self.beyond[:, self.rows, None] | self.beyond[:, None, :]

    @property
    def padded_rows(self) -> Tensor | None:
        """bool [b, r], True for rows past a sample's end."""
        return None if self.beyond is None else self.beyond[:, self.rows]


def tiles(
    batch: int,
    seq: int,
    lengths: Tensor | None,
    budget: int,
    *,
    columns: int = 0,
    whole: bool = False,
    single: bool = False,
    skippable: bool = False,
) -> list[Tile]:
    """Tiles of at most `budget` entries [b, r, n], in batch order, together covering every valid row once.

    Args:
        batch, seq: B and S.
        lengths: long [B] or None. On a GPU they stay there unless `whole` or `single` asks for the values: tiles are
            then S wide and masked.
        budget: entries a tile may have; one row of one sample is always allowed.
        columns: entries a row takes in memory, where that is more than its width.
        whole: keep all rows of a sample in one tile, even past the budget.
        single: one sample a tile.
        skippable: passed on to the tiles.
    """
    if not batch:
        return []
    if lengths is not None and lengths.device.type != "cpu" and not (whole or single):
        return _device_tiles(batch, seq, lengths, budget)
    valid = [seq] * batch if lengths is None else lengths.tolist()
    device = torch.device("cpu") if lengths is None else lengths.device
    result: list[Tile] = []
    first = 0
    while first < batch:
        last = first + 1 if single else _run(valid, first, budget, columns)
        width = max(valid[first:last])
        beyond = _beyond(valid[first:last], width, device)
        step = width if whole or last - first > 1 else max(1, min(width, budget // max(width, columns)))
        for row in range(0, width, step):
            rows = slice(row, min(row + step, width))
            result.append(Tile(slice(first, last), rows, width, valid[first:last], beyond, skippable))
        first = last
    return result


def _run(valid: list[int], first: int, budget: int, columns: int) -> int:
    """The end of the run of samples from `first` that share a tile."""
    width, used, last = valid[first], valid[first] ** 2, first + 1
    while last < len(valid):
        wider, more = max(width, valid[last]), used + valid[last] ** 2
        rows = wider * (last + 1 - first)
        area = rows * wider
        if rows * max(wider, columns) > budget or area - more > max(PADDING_SHARE * area, PADDING_ENTRIES):
            break
        width, used, last = wider, more, last + 1
    return last


def _beyond(valid: list[int], width: int, device: torch.device) -> Tensor | None:
    if min(valid) == width:
        return None
    return torch.arange(width, device=device) >= torch.tensor(valid, device=device)[:, None]


def _device_tiles(batch: int, seq: int, lengths: Tensor, budget: int) -> list[Tile]:
    positions = torch.arange(seq, device=lengths.device)
    samples = max(1, budget // (seq * seq))
    step = seq if samples > 1 else max(1, min(seq, budget // seq))
    result = []
    for first in range(0, batch, samples):
        chunk = slice(first, min(first + samples, batch))
        beyond = positions >= lengths[chunk, None]
        for row in range(0, seq, step):
            rows = slice(row, min(row + step, seq))
            result.append(Tile(chunk, rows, seq, [], beyond))
    return result
