"""Whether a layer does what its blocks say: tried, because a later PyHealth may know positions in a way of its own."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rollout.pyhealth.merged.blocks import Block
from rollout.pyhealth.merged.encode import encode
from rollout.pyhealth.merged.rows import rows_of
from rollout_kernels import Method

ALLOWED = 1e-3  # of the largest number: far above rounding, far below what a position is told by
_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def behaves(layer: Any, blocks: list[Block]) -> bool:
    """Whether a `TransformerLayer` gives row 0 as its blocks do, on rows some equal and some masked; tried once."""
    if layer not in _tried:
        _tried[layer] = _behaves(layer, blocks)
    return _tried[layer]


def _behaves(layer: Any, blocks: list[Block]) -> bool:
    output = blocks[0].output
    drawn = torch.randn(4, len(output), generator=torch.Generator().manual_seed(0)).to(output)
    x = drawn[torch.tensor([[0, 1, 0, 2, 1, 3], [1, 2, 2, 3, 0, 0]])]
    valid = torch.tensor([[True, True, True, False, True, True], [False, True, True, True, False, True]])
    maps = [part.attention.attn_map for part in layer.transformer]
    with torch.no_grad():
        _, wanted = layer(x, valid)
        found, _ = encode(blocks, rows_of(x, valid), Method())
    for part, attention in zip(layer.transformer, maps, strict=True):  # a forward pass drops the last map
        part.attention.attn_map = attention
    return bool(((found - wanted).abs() <= ALLOWED * wanted.abs().amax()).all())
