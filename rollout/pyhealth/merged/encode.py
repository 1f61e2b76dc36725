"""An encoder's row 0 and its relevance, from the distinct rows of a batch, group by group."""

import math

import torch
from torch import Tensor

from rollout.pyhealth.merged.attend import Attention, Kept, keeps_maps, keys_of
from rollout.pyhealth.merged.blocks import Block
from rollout.pyhealth.merged.rows import Group, Merged, Rows
from rollout_kernels import Method

_PLAIN = Method()


def encode(blocks: list[Block], rows: Rows, method: Method) -> tuple[Tensor, Tensor]:
    """Row 0 of what the top block gives, [B, E], and the row of the rollout from it, [B, S].

    Args:
        blocks: of the encoder, input side first; at least one.
        rows: of the batch, on a CPU.
        method: one of `serves`, without gradients.

    Raises:
        ValueError: `method.start_layer` leaves no layer, or its head weights are not those of the encoder's heads.
    """
    weights = head_weights(blocks, method)
    merged = Merged(rows)
    output = torch.empty_like(rows.table[rows.index[:, 0]])
    relevance = output.new_zeros(len(output), merged.width)
    first = Attention.project(blocks[0], rows.table) if len(blocks) > 1 else None
    for group in merged.groups:
        keep = keeps_maps(group.counts, len(blocks) - 1 - method.start_layer)
        run = Run(blocks, method, group, Attention(keys_of(group.counts, group.valid), method, weights, keep=keep))
        output[group.samples], maps = run.forward(rows.table, first)
        row = run.chain(maps)
        relevance[group.samples, : row.shape[1]] = row
    return output, merged.share(relevance)


def first_rows(blocks: list[Block], rows: Rows) -> Tensor:
    """Row 0 of what the top block gives, [B, E], and no relevance; as `encode` otherwise."""
    output = torch.empty_like(rows.table[rows.index[:, 0]])
    first = Attention.project(blocks[0], rows.table) if len(blocks) > 1 else None
    for group in Merged(rows).groups:
        attention = Attention(keys_of(group.counts, group.valid), _PLAIN, None, keep=False)
        output[group.samples], _ = Run(blocks, _PLAIN, group, attention).forward(rows.table, first)
    return output


def head_weights(blocks: list[Block], method: Method) -> Tensor | None:
    """The head weights [L, H] where the method has them; raises as `encode`."""
    if method.start_layer >= len(blocks):
        raise ValueError(
            f"AttentionRollout: start_layer must leave a layer, less than L = {len(blocks)}, got {method.start_layer}"
        )
    return method.head_weights(len(blocks), blocks[0].heads, "AttentionRollout")


def serves(method: Method) -> bool:
    """Whether equal rows may be merged for a method, and one row of a layer needs no other."""
    return not (method.needs_whole_map or method.matrices or method.values)


class Run:
    """One group on its way up through the blocks, and down the chain."""

    def __init__(self, blocks: list[Block], method: Method, group: Group, attention: Attention) -> None:
        self.blocks, self.method, self.group, self.attention = blocks, method, group, attention
        self._kept: list[Kept] = []

    def forward(self, table: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Row 0 of the top block's output, [b, E], and of its maps, [b, H, n]; `first` holds block 0's projections."""
        index, size = self.group.rows.flatten(), self.group.rows.shape
        x = table.index_select(0, index)
        for layer, block in enumerate(self.blocks[:-1]):
            parts = self.attention.project(block, x) if layer or first is None else first.index_select(1, index)
            mixed, kept = self.attention.attend(layer, parts.view(3, block.heads, *size, -1))
            if layer >= self.method.start_layer:
                self._kept.append(kept)
            in_place = None if torch.is_grad_enabled() else x
            x = torch.addmm(x, mixed.view(len(x), -1), block.output.T, out=in_place)
            x = _fed(block, x, self.group.valid)
        return self._top(x.view(*size, -1))

    def _top(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The top block for row 0 of x [b, n, E]; no other row is projected.

        q₀·(W_K y_j) = (W_Kᵀ q₀)·y_j, and Σ_j a_j W_V y_j = W_V Σ_j a_j y_j.
        """
        block, (batch, _, width) = self.blocks[-1], x.shape
        y = block.norm(x)
        to_query, to_key, to_value = block.projections.view(3, block.heads, -1, width)
        query = torch.matmul(to_query, y[:, 0].T) / math.sqrt(width // block.heads)
        scores = torch.bmm(torch.bmm(query.transpose(1, 2), to_key).transpose(0, 1), y.transpose(1, 2))
        maps = self.attention.attend_top(scores)
        mixed = torch.bmm(torch.bmm(maps, y).transpose(0, 1), to_value.transpose(1, 2))
        row = torch.addmm(x[:, 0], mixed.transpose(0, 1).reshape(batch, width), block.output.T)
        return _fed(block, row, None if self.group.valid is None else self.group.valid[:, 0]), maps

    def chain(self, maps: Tensor) -> Tensor:
        """Row 0 of M_L · … · M_1, [b, n], from that of the top block's maps, [b, H, n].

        `own`, what row 0 keeps for itself by the one path that never attends, goes beside the row: it is added in the
        end or left out, and never subtracted.
        """
        residual, factor = self.method.residual, self._factor
        row = self._normalised(self.attention.fuse_top(maps)).mul_(factor)
        own = torch.full_like(row[:, :1], residual)
        if self.method.renormalize:
            sums = row.sum(1, keepdim=True).add_(residual)
            row, own = row / sums, own / sums
        for kept in reversed(self._kept):
            whole, result = row.clone(), torch.zeros_like(row)
            whole[:, :1] += own
            own = own * residual
            for r, unscaled in self.attention.fused(kept):
                fused = self._normalised(unscaled)
                start, stays = whole[:, r], row[:, r]
                if self.method.renormalize:
                    sums = fused.sum(2).mul_(factor).add_(residual)
                    start, stays = start / sums, stays / sums
                    if not r.start:  # row 0 is among them
                        own = own / sums[:, :1]
                result += torch.bmm(start.unsqueeze(1), fused).squeeze(1).mul_(factor)
                result[:, r].add_(stays, alpha=residual)
            row = result
        if self.method.own_path:
            row[:, :1] += own
            return row
        sums = row.sum(1, keepdim=True)
        return row / torch.where(sums == 0, 1.0, sums)

    @property
    def _factor(self) -> float:
        """What the fused heads are multiplied with: the weight of F_l, and for the mean 1/H."""
        fusion, weight = self.method.head_fusion, self.method.attention_weight
        summed = isinstance(fusion, str) and fusion == "mean" and not self.method.normalize_attention
        return weight / self.blocks[0].heads if summed else weight

    def _normalised(self, fused: Tensor) -> Tensor:
        """Rows of F_l divided by their sums where the method says so; a row that sums to 0 stays."""
        if not self.method.normalize_attention:
            return fused
        sums = fused.sum(-1, keepdim=True)
        return fused / torch.where(sums == 0, 1.0, sums)


def _fed(block: Block, x: Tensor, valid: Tensor | None) -> Tensor:
    """Rows [N, E] after the feed-forward network, which leaves those that may not be attended as they are."""
    out = x if valid is None and not torch.is_grad_enabled() else x.clone()
    block.feed_forward(x, out)
    return out if valid is None else torch.where(valid.reshape(-1, 1), out, x)
