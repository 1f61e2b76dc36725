"""What the gradient-weighted and the value-aware methods need of an attention beside its maps.

With O = A·V the output of a head before W_O, ∂y/∂A = ∂y/∂O·Vᵀ for whatever number y the model goes on to make.

Source: Chefer, Gur & Wolf 2021 (ICCV), arXiv:2103.15679, for what the maps are weighted with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from rollout.errors import CaptureError

__all__ = ["Handed", "Projected", "Slope", "gradients_of"]


@dataclass(frozen=True)
class Projected:
    """An output that is that of the heads times W_O already.

    Attributes:
        weights: gives W_O by heads, [H, D_v, E].
        seq_first: the output is [S, B, E], not [B, S, E].
        inputs: gives what the output is added to, [B, S, E]; None where that is still to be seen.
    """

    weights: Callable[[], Tensor]
    seq_first: bool = False
    inputs: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Handed:
    """What an attention handed on, as it was seen to run.

    Attributes:
        output: the tensor that the model goes on with; None where it was not seen.
        by_heads: that tensor, or its gradient → the same by heads, before W_O, [B, H, S, D_v].
        values: gives the values [B, H_v, S, D_v].
        queries: the tensor that the queries are, or were made of.
        projected: of an output that is not that of the heads alone.
    """

    output: Tensor | None
    by_heads: Callable[[Tensor], Tensor]
    values: Callable[[], Tensor]
    queries: Tensor | None = None
    projected: Projected | None = None

    def slope(self, where: str) -> "Slope":
        """The place of the output in autograd's graph.

        Raises:
            CaptureError: it is in none.
        """
        assert self.output is not None
        if not self.output.requires_grad:
            raise CaptureError(
                f"capture: with gradients=True the model must be called with autograd on, and something below every "
                f"attention must require gradients; the output of {where} does not: leave torch.no_grad() and "
                f"torch.inference_mode() out, and of a frozen model call requires_grad_() on what it embeds"
            )
        return Slope(where, self.output, self.output._version, get_gradient_edge(self.output), self.by_heads)


@dataclass(frozen=True)
class Slope:
    """Where the gradient of an attention's output arrives, and what makes it that by heads.

    Attributes:
        where: the module, for messages.
        output, version: the output, and its state when it was made.
        edge: its place in autograd's graph, which stays what it was when the output is changed in place. But for a
            view: autograd then goes past it.
    """

    where: str
    output: Tensor
    version: int
    edge: GradientEdge
    by_heads: Callable[[Tensor], Tensor]

    @property
    def is_lost(self) -> bool:
        """Whether a gradient would go past the output."""
        return self.output._is_view() and self.output._version != self.version


def gradients_of(target: Tensor, slopes: Sequence[Slope], caller: str, *, retain_graph: bool) -> list[Tensor | None]:
    """The gradient of a number at each output, [B, H, S, D_v]; None where the number does not depend on it.

    Raises:
        TypeError, ValueError: `target` is no number that has been made of anything that requires gradients; an output
            is a view that was changed in place.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"{caller}: target must be a tensor of one number, got {type(target).__name__}")
    if target.numel() != 1 or not target.requires_grad:
        raise ValueError(
            f"{caller}: target must be one number that requires gradients, as logits[:, 1].sum() does, got "
            f"{list(target.shape)}, requires_grad={target.requires_grad}"
        )
    for slope in slopes:
        if slope.is_lost:
            raise ValueError(
                f"{caller}: the output of {slope.where} must stay as it was made, it is a view that the model changed "
                f"in place, and gradients go past it: use stored maps, rollout.attention_rollout(maps, gradients=...)"
            )
    edges = [slope.edge for slope in slopes]
    found = torch.autograd.grad(target, edges, allow_unused=True, retain_graph=retain_graph)
    with torch.no_grad():
        return [None if each is None else slope.by_heads(each) for each, slope in zip(found, slopes, strict=True)]
