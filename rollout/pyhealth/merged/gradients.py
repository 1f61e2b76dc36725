"""The gradient-weighted methods on the distinct rows of each record.

Let P [n, n] be a map of distinct rows, row g for c_g positions. Each position of group g has A_ij = P_gg' / c_g' with
each position of g', and what y loses or gains with that one entry is G_ij = (∂y/∂P_gg') / c_g: the c_g rows of a group
are alike to y, because position 0, of which alone y is made, is a group of its own. So summed over g', the entries of
max(A ∘ G, 0) are max(P ∘ ∂y/∂P, 0) / c_g, and the chain is that of the rollout.

Source: Chefer, Gur & Wolf 2021 (ICCV), arXiv:2103.15679, equations 5 and 6.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rollout.pyhealth.merged.attend import Keys, fuse_heads, keys_of
from rollout.pyhealth.merged.blocks import Block
from rollout.pyhealth.merged.encode import Run, head_weights
from rollout.pyhealth.merged.rows import Merged, Rows
from rollout_kernels import Method

Gradients = Mapping[Tensor, Tensor]


class GradientEncoding:
    """A forward pass in autograd, and from its maps' gradients the relevance.

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
        outputs = []
        for group in self._merged.groups:
            attention = _GradientAttention(keys_of(group.counts, group.valid), group.counts, method, weights)
            run = Run(blocks, method, group, attention)
            output, top = run.forward(rows.table, None)
            outputs.append(output)
            self._runs.append((run, attention, top))
        order = torch.cat([group.samples for group in self._merged.groups]).argsort()
        self.output = torch.cat(outputs)[order]

    @property
    def maps(self) -> list[Tensor]:
        """What gradients are wanted of."""
        return [each for _, attention, top in self._runs for each in (*attention.maps, top)]

    def relevance(self, gradients: Gradients) -> Tensor:
        """The row of the chain [B, S], with the gradient of each of `maps`."""
        relevance = self.output.new_zeros(len(self.output), self._merged.width)
        for run, attention, top in self._runs:
            attention.gradients = gradients
            row = run.chain(top)
            relevance[run.group.samples, : row.shape[1]] = row
        return self._merged.share(relevance)


class _GradientAttention:
    """The attention of a group's layers in autograd, their maps kept."""

    def __init__(self, keys: Keys, counts: Tensor, method: Method, weights: Tensor | None) -> None:
        self.keys, self.method, self.weights = keys, method, weights
        self.maps: list[Tensor] = []
        self.gradients: Gradients = {}
        self._counts = counts.clamp(min=1)

    def attend(self, layer: int, parts: Tensor) -> tuple[Tensor, tuple[int, Tensor]]:
        query, key, value = parts[..., :-1]
        scores = query @ key.transpose(-1, -2) / math.sqrt(key.shape[3]) + self.keys.bias.unsqueeze(1)
        maps = _taking_gradients(self.keys.spread(scores.softmax(-1), slice(None)))
        self.maps.append(maps)
        mixed = maps @ value
        return mixed.permute(1, 2, 0, 3).reshape(*mixed.shape[1:3], -1), (layer, maps)

    def fused(self, kept: tuple[int, Tensor]) -> Iterator[tuple[slice, Tensor]]:
        layer, maps = kept
        yield slice(None), self._fused(layer, maps).div_(self._counts.unsqueeze(2))

    def attend_top(self, scores: Tensor) -> Tensor:
        maps = self.keys.spread((scores + self.keys.bias.unsqueeze(1)).softmax(-1), slice(0, 1))
        return _taking_gradients(maps)

    def fuse_top(self, maps: Tensor) -> Tensor:
        return self._fused(-1, maps, heads=1)  # position 0 is one

    def _fused(self, layer: int, maps: Tensor, heads: int = 0) -> Tensor:
        weighted = (maps.detach() * self.gradients[maps]).movedim(heads, 0)
        if self.method.gradients == "clamp_then_fuse":
            weighted.clamp_(min=0)
        fused = torch.empty_like(weighted[0])
        fuse_heads(weighted, self.method, None if self.weights is None else self.weights[layer], fused, first=True)
        return fused.clamp_(min=0) if self.method.gradients == "fuse_then_clamp" else fused


def _taking_gradients(maps: Tensor) -> Tensor:
    """A map that depends on nothing that takes gradients becomes a leaf."""
    return maps if maps.requires_grad else maps.requires_grad_()
