"""An attention mask written out, taken apart into the key mask, causality and window that kernels know."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["LOW", "structure"]

# Added to a score or put in its place, it leaves a weight of exactly 0 where a row has another key.
LOW = -1e4


def structure(mask: Tensor, batch: int) -> dict[str, Any]:
    """The fields of a `Record` that say what a mask says.

    A mask that is the same for every head and says no more than which keys there are, that no row looks ahead, and how
    far a row looks, becomes `key_mask`, `causal` and `window`; it is put together again and compared. Any other becomes
    a bias.

    Args:
        mask: broadcastable to [B, H, S, S']; bool, True = may be attended, or additive. Additive values of −inf or of
            the dtype's lowest number mask, and other values up to `LOW` do when every row has a key left.
        batch: B.
    """
    if mask.shape[1] > 1 and mask.stride(1) == 0:
        mask = mask[:, :1]
    allowed = mask if mask.dtype == torch.bool else _allowed(mask)
    if allowed is None or allowed.shape[1] > 1:
        return {"bias": _additive(mask)} | ({"causal": True} if _never_ahead(mask) else {}) | _keys(mask, batch)
    allowed = allowed[:, 0]
    keys = allowed.any(1)
    if allowed.shape[1] not in (1, allowed.shape[2]):  # of cross-attention, whose rows are no positions of the keys
        same = torch.equal(keys[:, None].expand_as(allowed), allowed)
        return {"key_mask": keys.expand(batch, -1)} if same else {"bias": _additive(mask)}
    seq = allowed.shape[-1]
    allowed = allowed.expand(-1, seq, -1)
    for rows in _patterns(allowed.any(0)):
        if torch.equal(keys[:, None] & _pattern(seq, mask.device, **rows), allowed):
            masked = {} if bool(keys.all()) else {"key_mask": keys.expand(batch, -1)}
            return masked | rows
    return {"bias": _additive(mask)} | _keys(mask, batch)


def _keys(mask: Tensor, batch: int) -> dict[str, Tensor]:
    """The keys that a bias leaves to any row, when it is beside that no other than a masked row that has none."""
    reached = mask if mask.dtype == torch.bool else mask > LOW
    keys, alone = reached.any((1, 2)), ~reached.any(-1).all(1)
    if bool(keys.all()) or alone.shape[1] not in (1, keys.shape[1]):
        return {}
    if alone.shape[1] > 1 and bool((keys & ~reached.diagonal(dim1=2, dim2=3).any(1)).any()):
        return {}  # padding alone leaves every other position to itself
    if bool((alone & keys).any()) or (bool(alone.any()) and not _dead(mask, alone)):
        return {}
    return {"key_mask": keys.expand(batch, -1)}


def _dead(mask: Tensor, rows: Tensor) -> bool:
    """Whether rows, bool [B, S], are masked by no less than the dtype's lowest number everywhere."""
    if mask.dtype == torch.bool:
        return True
    return bool((mask.movedim(1, -1)[rows] <= torch.finfo(mask.dtype).min).all())


def _patterns(reached: Tensor) -> Iterator[dict[str, Any]]:
    """What `causal` and `window` could be, the simplest first; `reached` [S, S] are the keys a row has anywhere."""
    i, j = reached.nonzero().unbind(1)
    if not len(i):
        yield {}
        return
    left, right = int((i - j).amax().clamp(min=0)), int((j - i).amax().clamp(min=0))
    yield {}
    yield {"causal": True}
    yield {"causal": True, "window": (left, None)} if right == 0 else {"window": (left, right)}


def _pattern(seq: int, device: torch.device, causal: bool = False, window: Any = (None, None)) -> Tensor:
    i, j = torch.arange(seq, device=device)[:, None], torch.arange(seq, device=device)
    allowed = j <= i if causal else torch.ones(seq, seq, dtype=torch.bool, device=device)
    if window[0] is not None:
        allowed = allowed & (j >= i - window[0])
    if window[1] is not None:
        allowed = allowed & (j <= i + window[1])
    return allowed


def _allowed(mask: Tensor) -> Tensor | None:
    """Where an additive mask lets a row attend; None when it has values other than 0 and masking ones."""
    attended = mask == 0
    if not bool((attended | (mask <= LOW)).all()):
        return None
    masking = mask <= torch.finfo(mask.dtype).min
    return attended if bool((attended | masking).all()) or bool(attended.any(-1).all()) else None


def _never_ahead(mask: Tensor) -> bool:
    """Whether a bias masks every key ahead of its row, so that kernels need not look there."""
    if mask.dtype == torch.bool or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    ahead = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    return bool((mask[..., ahead] <= torch.finfo(mask.dtype).min).all())


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -math.inf)
