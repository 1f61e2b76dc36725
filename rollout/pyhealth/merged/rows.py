"""The distinct rows of a batch: equal positions of a record are one row that counts for all of them.

A group of c equal rows among the keys is one key with log c added to its scores, and as each of its positions gets the
same relevance, that of the group is shared out in equal parts. Position 0, which is read, is a group of its own: it
alone has the residual of a one-hot start.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}

# Samples of up to GROUP_WIDTH rows run together when their numbers of rows differ by at most GROUP_SLACK, longer ones
# when they do not differ: a further group costs time, and so does padding.
GROUP_WIDTH = 256
GROUP_SLACK = 24
GROUP_POSITIONS = 1024


@dataclass(frozen=True)
class Rows:
    """A batch of B samples of S positions.

    Attributes:
        table: the rows that occur, [T, E].
        index: the row of each position, long [B, S].
        valid: which positions may be attended, bool [B, S].
    """

    table: Tensor
    index: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Group:
    """Samples that run together, their distinct rows side by side.

    Attributes:
        samples: long [b].
        rows: rows of the table, long [b, n]: first that of position 0, past a sample's last row the same again.
        counts: how many positions each stands for, [b, n]; 0 past a sample's last row.
        valid: which may be attended, bool [b, n]; None when all that count may. What may not is uniform over all
            positions of its sample, and belongs to no group but those where position 0 itself may not be attended:
            from a valid position no other is reached.
    """

    samples: Tensor
    rows: Tensor
    counts: Tensor
    valid: Tensor | None


class Merged:
    """The distinct rows of each sample of a batch.

    Attributes:
        groups: every sample once, the longest first.
        width: the most distinct rows a sample has.
    """

    def __init__(self, rows: Rows) -> None:
        batch, seq = rows.index.shape
        start_valid = rows.valid[:, :1]
        self._kept = rows.valid | ~start_valid
        beyond = 2 * len(rows.table)
        key = rows.index + len(rows.table) * ~rows.valid
        rest = torch.where(self._kept, key, beyond)
        rest[:, 0] = -1
        ordered, order = rest.sort(1)
        slot = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
        slot = torch.cat([slot.new_zeros(batch, 1), slot], 1)
        self._slots = torch.empty_like(slot).scatter_(1, order, slot)
        sizes = torch.where(ordered < beyond, slot, 0).amax(1) + 1
        self.width = int(sizes.max())
        self._counts = rows.table.new_zeros(batch, seq).scatter_add_(1, self._slots, self._kept.to(rows.table))
        keys = key[:, :1].repeat(1, seq).scatter_(1, slot, torch.where(ordered < beyond, ordered, key[:, :1]))
        keys[:, 0] = key[:, 0]
        self.groups = [
            self._group(members, width, keys, len(rows.table)) for members, width in _alike(sizes, start_valid)
        ]

    def _group(self, members: list[int], width: int, keys: Tensor, size: int) -> Group:
        samples = torch.tensor(members)
        key, counts = keys[samples, :width], self._counts[samples, :width]
        valid = key < size
        return Group(samples, key % size, counts, None if bool(valid.all()) else valid)

    def share(self, relevance: Tensor) -> Tensor:
        """The relevance [B, S] of every position, from that of the distinct rows [B, width]."""
        each = relevance / self._counts[:, : self.width].clamp(min=1)
        shared = each.gather(1, self._slots.clamp(max=self.width - 1))
        return torch.where(self._kept, shared, 0.0)


def _alike(sizes: Tensor, start_valid: Tensor) -> list[tuple[list[int], int]]:
    """Samples to run together, the longest first, and their width; those whose position 0 is valid among themselves."""
    widths, starts = sizes.tolist(), start_valid[:, 0].tolist()
    groups: list[list[int]] = []
    for b in sorted(range(len(widths)), key=lambda b: (starts[b], -widths[b])):
        head = groups[-1][0] if groups else b
        slack = GROUP_SLACK if widths[head] <= GROUP_WIDTH else 0
        fits = starts[head] == starts[b] and widths[head] - widths[b] <= slack
        if groups and fits and (len(groups[-1]) + 1) * widths[head] <= GROUP_POSITIONS:
            groups[-1].append(b)
        else:
            groups.append([b])
    return [(group, widths[group[0]]) for group in groups]


def rows_of(x: Tensor, valid: Tensor) -> Rows:
    """The distinct rows of x [B, S, E], told apart by their bits; float32 or float64."""
    flat = x.flatten(0, 1).contiguous()
    bits = flat.detach().view(_INTEGERS[x.dtype])
    _, index = _sums(bits).unique(return_inverse=True)
    first = index.new_full((int(index.max()) + 1,), len(flat))
    first.scatter_reduce_(0, index, torch.arange(len(flat)), "amin")
    if not torch.equal(bits[first[index]], bits):  # two rows of one sum
        first = index = torch.arange(len(flat))
    return Rows(flat[first], index.view(valid.shape), valid)


def _sums(bits: Tensor) -> Tensor:
    """A number for each row of bits [N, E], long [N]: the same for the same bits, and hardly ever for others."""
    factors = torch.randint(1 << 62, bits.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 + 1
    return (bits * factors).sum(1)


def rows_of_ids(
    ids: Tensor, known: int, embed: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]
) -> Rows | None:
    """The rows of a batch of ids that are looked up, each id once; None when there are ids that cannot be.

    Args:
        ids: long [B, S].
        known: the ids are 0 … known − 1.
        embed: ids [1, T] → their rows [1, T, E].
        mask: [B, S, 1], not 0 where the row is not 0 → the valid positions, bool [B, S].
    """
    lowest, highest = ids.aminmax()
    if lowest < 0 or highest >= known:
        return None
    occurs = torch.zeros(known, dtype=torch.bool)
    occurs[ids] = True
    index = (occurs.cumsum(0) - 1)[ids]
    table = embed(occurs.nonzero().T)[0]
    return Rows(table, index, mask((table.abs() > 0).any(-1)[index].unsqueeze(-1).to(table)))
