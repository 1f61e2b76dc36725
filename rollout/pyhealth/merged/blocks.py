"""What an encoder must be to run on the distinct rows of its records: attention blocks that know no positions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyhealth.models.transformer import (
    Attention,
    MultiHeadedAttention,
    PositionwiseFeedForward,
    SublayerConnection,
    TransformerBlock,
    TransformerLayer,
)
from torch import Tensor, nn
from torch.nn import functional

from rollout._capture.patch import foreign_forward


@dataclass(frozen=True)
class Block:
    """A block of an encoder: x ← x + W_O·attend(norm(x)), then x ← x + feed_forward(x), the latter row by row.

    Another encoder is served when it says this of itself: rows attend to all valid rows of their sample by scaled dot
    product, a row that is not valid is uniform over all positions and is not fed forward, and nothing else tells one
    position from another.

    Attributes:
        heads: H.
        norm: row by row, [..., E] → [..., E].
        projections: W_Q, W_K and W_V, one below the other, [3E, E].
        output: W_O [E, E].
        feed_forward: adds to `out` what the network makes of each row of `x`, both [N, E] and maybe one.
    """

    heads: int
    norm: Callable[[Tensor], Tensor]
    projections: Tensor
    output: Tensor
    feed_forward: Callable[[Tensor, Tensor], object]


# PyHealth's own. Any other class among the parts of a layer, or another forward of these, may do anything.
FORWARDS = {
    kind: kind.forward
    for kind in (
        Attention,
        MultiHeadedAttention,
        PositionwiseFeedForward,
        SublayerConnection,
        TransformerBlock,
        TransformerLayer,
        nn.Dropout,
        nn.GELU,
        nn.LayerNorm,
        nn.Linear,
        nn.ModuleList,
        nn.Softmax,
    )
}


def blocks_of(layer: Any) -> list[Block] | None:
    """The blocks of PyHealth's `TransformerLayer`; None where one row more or less could be told by anyone.

    So it is when a part is of another class, has another forward or numbers of its own, is in training mode or on a
    GPU, or someone's hook is in it.
    """
    if type(layer) is not TransformerLayer or not all(map(_is_own, layer.modules())):
        return None
    if any(linear.bias is not None for linear in _without_bias(layer)):
        return None
    return [_block(part) for part in layer.transformer] or None


def _is_own(part: nn.Module) -> bool:
    kind = type(part)
    if FORWARDS.get(kind) is not kind.forward or foreign_forward(part) is not None:
        return False
    if part.training or part._forward_hooks or part._forward_pre_hooks or part._buffers:
        return False
    parameters = [p for p in part._parameters.values() if p is not None]
    plain = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in parameters)  # one quantized is of its own
    return plain and (not parameters or kind in (nn.LayerNorm, nn.Linear))


def _without_bias(layer: Any) -> Iterator[nn.Linear]:
    for block in layer.transformer:
        yield from (*block.attention.linear_layers, block.attention.output_linear)


def _block(part: Any) -> Block:
    """The block with its numbers detached: in autograd nothing is kept for gradients that nobody asks for."""
    attention, feed_forward, activation = part.attention, part.feed_forward, part.feed_forward.activation
    inner, outer = _affine(feed_forward.w_1), _affine(feed_forward.w_2)
    norm = _norm(part.output_sublayer.norm)

    def feed(x: Tensor, out: Tensor) -> None:
        out.addmm_(activation(functional.linear(norm(x), *inner)), outer[0].T)
        if outer[1] is not None:
            out += outer[1]

    return Block(
        attention.h,
        _norm(part.input_sublayer.norm),
        torch.cat([linear.weight.detach() for linear in attention.linear_layers]),
        attention.output_linear.weight.detach(),
        feed,
    )


def _affine(part: Any) -> tuple[Any, Any]:
    """Weight and bias of a linear layer or a norm, each a tensor or None."""
    weight, bias = (each if each is None else each.detach() for each in (part.weight, part.bias))
    return weight, bias


def _norm(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    weight, bias = _affine(norm)
    return lambda x: functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
