"""The gradient-weighted methods on the distinct rows of each record.

Let P [n, n] be a map of distinct rows, row g for c_g positions. Each position of group g has A_ij = P_gg' / c_g' with
each position of g', and what y loses or gains with that one entry is G_ij = (∂y/∂P_gg') / c_g: the c_g rows of a group
are alike to y, because position 0, of which alone y is made, is a group of its own. So summed over g', the entries of
max(A ∘ G, 0) are max(P ∘ ∂y/∂P, 0) / c_g, and the chain is that of the rollout.

A map is never stored: with O = P·V the attention's output, ∂y/∂P = ∂y/∂O·Vᵀ, so that both are made tile by tile from Q,
K, V and ∂y/∂O, and autograd goes through fused attention.

Source: Chefer, Gur & Wolf 2021 (ICCV), arXiv:2103.15679, equations 5 and 6.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from rollout.pyhealth.merged.attend import Attention, Kept, flat_projections, keys_of, tiles
from rollout.pyhealth.merged.blocks import Block
from rollout.pyhealth.merged.encode import Run, head_weights
from rollout.pyhealth.merged.rows import Group, Merged, Rows
from rollout_kernels import Method

Gradients = Mapping[Tensor, Tensor]


class GradientEncoding:
    """A forward pass in autograd, of which the attention is all that takes gradients, and the relevance from them.

    Args:
        blocks, rows: as `encode` has them.
        method: one of `serves`, with gradients.

    Attributes:
        output: row 0 of what the top block gives, [B, E].
    """

    def __init__(self, blocks: list[Block], rows: Rows, method: Method) -> None:
        weights = head_weights(blocks, method)
        self._merged = Merged(rows)
        self._runs = []
        outputs, table = [], rows.table.detach()
        for group in self._merged.groups:
            attention = _GradientAttention(group, method, weights)
            run = Run(blocks, method, group, attention)
            output, top = run.forward(table, None)
            outputs.append(output)
            self._runs.append((run, attention, top))
        order = torch.cat([group.samples for group in self._merged.groups]).argsort()
        self.output = torch.cat(outputs)[order]

    @property
    def wanted(self) -> list[Tensor]:
        """What gradients are wanted of: the output of every attention, and row 0 of the top one's maps."""
        return [each for _, attention, top in self._runs for each in (*attention.outputs.values(), top)]

    def relevance(self, gradients: Gradients) -> Tensor:
        """The row of the chain [B, S], with the gradient of each of `wanted`."""
        relevance = self.output.new_zeros(len(self.output), self._merged.width)
        for run, attention, top in self._runs:
            attention.gradients = gradients
            row = run.chain(top)
            relevance[run.group.samples, : row.shape[1]] = row
        return self._merged.share(relevance)


class _GradientAttention(Attention):
    """The attention of a group's layers in autograd, and F_l by its gradients."""

    def __init__(self, group: Group, method: Method, weights: Tensor | None) -> None:
        super().__init__(keys_of(group.counts, group.valid), method, weights, keep=False)
        self.outputs: dict[int, Tensor] = {}
        self.gradients: Gradients = {}
        self._values: dict[int, Tensor] = {}
        self._counts = group.counts.clamp(min=1).unsqueeze(2)

    @staticmethod
    def project(block: Block, x: Tensor) -> Tensor:
        return flat_projections(block, x)

    def attend(self, layer: int, parts: Tensor) -> tuple[Tensor, Kept]:
        query, key, value = parts.transpose(1, 2)
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=self.keys.bias[:, None, None])
        if self.keys.uniform is not None and self.keys.shares is not None:
            output = torch.where(self.keys.uniform.unsqueeze(1), self.keys.shares.unsqueeze(1) @ value, output)
        if layer >= self.method.start_layer:
            output = self.outputs[layer] = _taking_gradients(output)
        kept_query, kept_key, self._values[layer] = parts.detach()
        return output.transpose(1, 2).flatten(2), Kept(layer, None, kept_query, kept_key)

    def fused(self, kept: Kept) -> Iterator[tuple[slice, Tensor]]:
        query, key = functional.pad(kept.query, (0, 1), value=1.0), functional.pad(kept.key, (0, 1))
        self.add_bias(key)
        value, slopes = self._values[kept.layer], self.gradients[self.outputs[kept.layer]].transpose(0, 1)
        heads, batch, rows, _ = value.shape
        part = value.new_empty(0)
        for h, r in tiles(heads, batch, rows, value.itemsize):
            maps = self.maps(query, key, h, r)
            if h.start == 0:
                part = maps.new_empty(maps.shape[1:])
            self.fuse(kept.layer, self._weigh(maps, slopes[h, :, r] @ value[h].mT), h, part)
            if h.stop == heads:
                yield r, self._clamped(part).div_(self._counts[:, r])

    def attend_top(self, scores: Tensor) -> Tensor:
        return _taking_gradients(super().attend_top(scores))

    def fuse_top(self, maps: Tensor) -> Tensor:
        return self._clamped(super().fuse_top(self._weigh(maps.detach().clone(), self.gradients[maps])))

    def _weigh(self, maps: Tensor, slopes: Tensor) -> Tensor:
        """Maps, in place, with the gradient of each entry."""
        maps.mul_(slopes)
        return maps.clamp_(min=0) if self.method.gradients == "clamp_then_fuse" else maps

    def _clamped(self, fused: Tensor) -> Tensor:
        return fused.clamp_(min=0) if self.method.gradients == "fuse_then_clamp" else fused


def _taking_gradients(found: Tensor) -> Tensor:
    """What depends on nothing that takes gradients becomes a leaf."""
    return found if found.requires_grad else found.requires_grad_()
