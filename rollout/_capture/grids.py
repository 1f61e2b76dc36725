"""States of images, [B, C, H, W] or [B, H, W, C], as the sequences that attention makes of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["altered_rows", "as_sequence", "sequences"]

# Where the channels are: which of the two a state has is not known before an attention runs over it.
LAYOUTS = ("first", "last")


def altered_rows(state: Tensor) -> Tensor:
    """bool [1, 1, *, 1]: half of the third axis, which is one of positions wherever the channels are."""
    rows = torch.arange(state.shape[2], device=state.device) % 2 == 0
    return rows[None, None, :, None]


def sequences(shape: torch.Size, altered: Tensor, seq: int) -> Iterator[tuple[str, Tensor]]:
    """The layouts in which a state of this shape has `seq` positions, and bool [B, S] of those altered in each."""
    whole = altered.expand(shape)
    for layout in LAYOUTS:
        flat = as_sequence(whole, layout)[:, 0, :, 0]
        if flat.shape[1] == seq:
            yield layout, flat


def as_sequence(state: Tensor, layout: str) -> Tensor:
    """A state with its channels first or last as [B, 1, S, C], position by position in rows."""
    state = state.movedim(1, -1) if layout == "first" else state
    return state.flatten(1, 2).unsqueeze(1)
