"""An encoder's row 0 and its relevance, from the distinct rows of a batch, group by group."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from rollout.pyhealth.merged.attend import Attention, Kept, Keys, fuse_heads, keeps_maps, keys_of
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
    """Queries, keys and values of rows [N, E], head by head: [3H, N, D]."""
    flat = functional.linear(block.norm(x), block.projections)
    return flat.view(len(x), 3 * block.heads, -1).transpose(0, 1).contiguous()


class _Run:
    """One group on its way up through the blocks, and down the chain."""

    def __init__(self, blocks: list[Block], method: Method, weights: Tensor | None, group: Group) -> None:
        self.blocks, self.method, self.weights, self.group = blocks, method, weights, group
        self.keys: Keys = keys_of(group.counts, group.valid)
        keep = keeps_maps(*group.rows.shape, len(blocks) - 1 - method.start_layer, group.counts.itemsize)
        self.attention = Attention(self.keys, method, weights, keep=keep)
        self.kept: list[Kept] = []

    def below(self, table: Tensor, first: Tensor | None) -> Tensor:
        """The rows of the group after all blocks but the top one, [b, n, E]; `first` holds block 0's projections."""
        index, size = self.group.rows.flatten(), self.group.rows.shape
        x = table.index_select(0, index)
        for layer, block in enumerate(self.blocks[:-1]):
            parts = _projected(block, x) if layer or first is None else first.index_select(1, index)
            query, key, value = parts.view(3, block.heads, *size, -1)
            mixed, kept = self.attention.attend(layer, query, key, value)
            if layer >= self.method.start_layer:
                self.kept.append(kept)
            x += functional.linear(mixed.view(len(x), -1), block.output)
            x += self._fed(block, x, self.group.valid)
        return x.view(*size, -1)

    @staticmethod
    def _fed(block: Block, x: Tensor, valid: Tensor | None) -> Tensor:
        """What the feed-forward network adds to rows [N, E]: nothing where a row may not be attended."""
        fed = block.feed_forward(x)
        return fed if valid is None else torch.where(valid.reshape(-1, 1), fed, 0.0)

    def top(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Row 0 of the top block's output, [b, E], and row 0 of M_L, [b, n]; no other row is projected.

        q₀·(W_K y_j) = (W_Kᵀ q₀)·y_j, and Σ_j a_j W_V y_j = W_V Σ_j a_j y_j.
        """
        block, (batch, _, width) = self.blocks[-1], x.shape
        y = block.norm(x)
        to_query, to_key, to_value = block.projections.view(3, block.heads, -1, width)
        query = torch.matmul(to_query, y[:, 0].T)
        scores = torch.bmm(torch.bmm(query.permute(0, 2, 1), to_key).transpose(0, 1), y.transpose(1, 2))
        scores.mul_(1 / math.sqrt(query.shape[1]))
        if self.keys.bias is not None:
            scores += self.keys.bias
        maps = scores.softmax(-1)
        if self.keys.uniform is not None:
            maps = torch.where(self.keys.uniform[:, :1], self.keys.shares, maps)
        mixed = torch.bmm(torch.bmm(maps, y).transpose(0, 1), to_value.transpose(1, 2))
        row = x[:, 0] + functional.linear(mixed.transpose(0, 1).reshape(batch, width), block.output)
        valid = None if self.group.valid is None else self.group.valid[:, :1]
        return row + self._fed(block, row, valid), self._top_row(maps)

    def _top_row(self, maps: Tensor) -> Tensor:
        """Row 0 of M_L [b, n] from that of every head, [b, H, n]."""
        fused = torch.empty_like(maps[:, 0])
        weights = None if self.weights is None else self.weights[-1]
        fuse_heads(maps.unbind(1), self.method, weights, fused, first=True)
        row = fused.mul_(self._factor)
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
        mean = isinstance(fusion, str) and fusion == "mean"
        return weight / self.blocks[0].heads if mean else weight
