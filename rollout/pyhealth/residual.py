"""What the value-aware methods need of PyHealth's own models beside queries and keys: W_O, and what the residual adds.

A `TransformerBlock` adds the attention's output to what its first `SublayerConnection` is called with, before its norm;
a `StageNetAttentionLayer` to what its `MultiHeadedAttention` is called with, and normalises the sum.
"""

from dataclasses import dataclass
from typing import Any

from pyhealth.models.stagenet_mha import StageNetAttentionLayer
from torch import Tensor, nn

from rollout._capture.patch import foreign_forward
from rollout.pyhealth.merged.blocks import FORWARDS
from rollout.pyhealth.watch import Sites, StageAttentionNet

__all__ = ["CannotMeasureError", "Residual", "residuals_of"]

_FORWARDS = {**FORWARDS, StageNetAttentionLayer: StageNetAttentionLayer.forward}


class CannotMeasureError(ValueError):
    """A layer of which it is not known what its attention's output is added to; the message says why."""


@dataclass(frozen=True)
class Residual:
    """How the attention's output of a layer is added up.

    Attributes:
        adder: the module that is called with what the output is added to, [B, S, E], as its first argument.
        heads: H.
        output: W_O, over heads side by side; a bias is left out, as in the papers.
    """

    adder: nn.Module
    heads: int
    output: nn.Linear

    @property
    def output_weights(self) -> Tensor:
        """W_O by heads, [H, D, E]."""
        weight = self.output.weight.detach()
        return weight.T.reshape(self.heads, -1, len(weight))


def residuals_of(model: Any, sites: Sites) -> dict[nn.Module, Residual]:
    """Per `Attention` of the sites its layer's `Residual`.

    Raises:
        CannotMeasureError: a part of a layer is of another class or has another forward, or someone's hook stands
            between the attention and the sum.
    """
    found = {}
    for key, layers in sites.items():
        for number, site in enumerate(layers):
            residual = (
                _stage(model.stagenet[key])
                if isinstance(model, StageAttentionNet)
                else _block(model.transformer[key].transformer[number])
            )
            if residual is None:
                raise CannotMeasureError(
                    f"of {key!r} layer {number} is not all PyHealth's own, or has a hook between attention and residual"
                )
            found[site] = residual
    return found


def _block(block: Any) -> Residual | None:
    if not (_is_own(block) and _is_own(block.input_sublayer) and _is_unseen(block.input_sublayer.dropout)):
        return None
    return _residual(block.input_sublayer, block.attention)


def _stage(layer: Any) -> Residual | None:
    if not _is_own(layer) or layer.mha._forward_pre_hooks:  # what they give is attended, and not added
        return None
    return _residual(layer.mha, layer.mha)


def _residual(adder: nn.Module, attention: Any) -> Residual | None:
    if not _is_own(attention) or attention._forward_hooks or not _is_unseen(attention.output_linear):
        return None
    return Residual(adder, attention.h, attention.output_linear)


def _is_own(part: nn.Module) -> bool:
    """Whether a part is of PyHealth's class or torch's, with the forward that it came with."""
    kind = type(part)
    return _FORWARDS.get(kind) is kind.forward and foreign_forward(part) is None


def _is_unseen(part: nn.Module) -> bool:
    return _is_own(part) and not (part._forward_hooks or part._forward_pre_hooks)
