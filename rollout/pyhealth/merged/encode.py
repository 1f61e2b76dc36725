"""An encoder's row 0 and its relevance, from the distinct rows of a batch, group by group."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from rollout.pyhealth.merged.attend import Attention, Kept, Keys, keeps_maps, keys_of
from rollout.pyhealth.merged.blocks import Block
from rollout.pyhealth.merged.rows import Group, Merged, Rows
from rollout_kernels import Method


def encode(blocks: list[Block], rows: Rows, method: Method) -> tuple[Tensor, Tensor]:
    """Row 0 of what the top block gives, [B, E], and the row of the rollout from it, [B, S].

    Args:
        blocks: of the encoder, input side first; at least one.
        rows: of the batch, on a CPU.
        method: one of `serves`.

    Raises:
        ValueError: `method.start_layer` leaves no layer, or its head weights are not those of the encoder's heads.
    """
    if method.start_layer >= len(blocks):
        raise ValueError(
            f"AttentionRollout: start_layer must leave a layer, less than L = {len(blocks)}, got {method.start_layer}"
        )
    weights = method.head_weights(len(blocks), blocks[0].heads, "AttentionRollout")
    merged = Merged(rows)
    output = torch.empty_like(rows.table[rows.index[:, 0]])
    relevance = output.new_zeros(len(output), merged.width)
    first = _projected(blocks[0], rows.table) if len(blocks) > 1 else None
    for group in merged.groups:
        run = _Run(blocks, method, weights, group)
        x = run.below(rows.table, first)
        output[group.samples], row = run.top(x)
        relevance[group.samples, : row.shape[1]] = run.chain(row)
    return output, merged.share(relevance)


def serves(method: Method) -> bool:
    """Whether equal rows may be merged for a method, and one row of a layer needs no other."""
    return not (method.needs_whole_map or method.gradients or method.matrices)


def _projected(block: Block, x: Tensor) -> Tensor:
    """Queries, keys and values of rows [N, E], head by head and with a column of 1 after each: [3H, N, D + 1]."""
    flat = functional.linear(block.norm(x), block.projections).view(len(x), 3 * block.heads, -1)
    parts = flat.new_ones(flat.shape[1], len(x), flat.shape[2] + 1)
    parts[..., :-1] = flat.transpose(0, 1)
    return parts


class _Run:
    """One group on its way up through the blocks, and down the chain."""

    def __init__(self, blocks: list[Block], method: Method, weights: Tensor | None, group: Group) -> None:
        self.blocks, self.method, self.group = blocks, method, group
        self.keys: Keys = keys_of(group.counts, group.valid)
        keep = keeps_maps(group.counts, len(blocks) - 1 - method.start_layer)
        self.attention = Attention(self.keys, method, weights, keep=keep)
        self.kept: list[Kept] = []

    def below(self, table: Tensor, first: Tensor | None) -> Tensor:
        """The rows of the group after all blocks but the top one, [b, n, E]; `first` holds block 0's projections."""
        index, size = self.group.rows.flatten(), self.group.rows.shape
        x = table.index_select(0, index)
        for layer, block in enumerate(self.blocks[:-1]):
            parts = _projected(block, x) if layer or first is None else first.index_select(1, index)
            mixed, kept = self.attention.attend(layer, parts.view(3, block.heads, *size, -1))
            if layer >= self.method.start_layer:
                self.kept.append(kept)
            x.addmm_(mixed.view(len(x), -1), block.output.T)
            x = _fed(block, x, self.group.valid)
        return x.view(*size, -1)

    def top(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Row 0 of the top block's output, [b, E], and row 0 of M_L, [b, n]; no other row is projected.

        q₀·(W_K y_j) = (W_Kᵀ q₀)·y_j, and Σ_j a_j W_V y_j = W_V Σ_j a_j y_j.
        """
        block, (batch, _, width) = self.blocks[-1], x.shape
        y = block.norm(x)
        to_query, to_key, to_value = block.projections.view(3, block.heads, -1, width)
        query = torch.matmul(to_query, y[:, 0].T)
        scores = torch.bmm(torch.bmm(query.transpose(1, 2), to_key).transpose(0, 1), y.transpose(1, 2))
        scores.mul_(1 / math.sqrt(query.shape[1]))
        scores += self.keys.bias.unsqueeze(1)
        maps = self.keys.spread(scores.softmax(-1), slice(0, 1))
        mixed = torch.bmm(torch.bmm(maps, y).transpose(0, 1), to_value.transpose(1, 2))
        row = torch.addmm(x[:, 0], mixed.transpose(0, 1).reshape(batch, width), block.output.T)
        valid = None if self.group.valid is None else self.group.valid[:, 0]
        return _fed(block, row, valid), self._top_row(maps.transpose(0, 1))

    def _top_row(self, maps: Tensor) -> Tensor:
        """Row 0 of M_L [b, n] from that of every head, [H, b, n]."""
        row = torch.empty_like(maps[0])
        self.attention.fuse(len(self.blocks) - 1, maps, slice(0, len(maps)), row)
        row.mul_(self._factor)
        row[:, 0] += self.method.residual
        return row / row.sum(1, keepdim=True) if self.method.renormalize else row

    def chain(self, row: Tensor) -> Tensor:
        """row·M_{L−1} · … · M_1, [b, n]."""
        residual, factor = self.method.residual, self._factor
        for kept in reversed(self.kept):
            result = torch.zeros_like(row)
            for r, fused in self.attention.fused(kept):
                start = row[:, r]
                if self.method.renormalize:
                    start = start / fused.sum(2).mul_(factor).add_(residual)
                result += torch.bmm(start.unsqueeze(1), fused).squeeze(1).mul_(factor)
                result[:, r].add_(start, alpha=residual)
            row = result
        return row

    @property
    def _factor(self) -> float:
        """What the fused heads are multiplied with: the weight of F_l, and for the mean 1/H."""
        fusion, weight = self.method.head_fusion, self.method.attention_weight
        return weight / self.blocks[0].heads if isinstance(fusion, str) and fusion == "mean" else weight


def _fed(block: Block, x: Tensor, valid: Tensor | None) -> Tensor:
    """Rows [N, E] after the feed-forward network, which leaves those that may not be attended as they are."""
    if valid is None:
        block.feed_forward(x)
        return x
    fed = x.clone()
    block.feed_forward(fed)
    return torch.where(valid.reshape(-1, 1), fed, x)
