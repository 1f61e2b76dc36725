"""PyHealth's attention by torch's fused one, and the capture adapter for the models built of it.

PyHealth sets a score to −1e9 where its mask [B, 1, S, S] is 0, and its models make that mask of the valid positions of
each sample, valid ∧ validᵀ. So a valid row attends to the valid keys, as with the key mask alone; a row that is not
valid has equal scores, is uniform over all S keys, and gives the mean of V.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pyhealth.models import BaseModel
from pyhealth.models.transformer import Attention, MultiHeadedAttention
from torch import Tensor, nn
from torch.nn import functional

from rollout._capture.patch import Around, foreign_forward
from rollout._capture.readers import registered
from rollout._capture.recording import memo, whole
from rollout.errors import CaptureError
from rollout.tape import Record
from rollout.tape.handed import Handed

__all__ = ["CannotFuseError", "adapter", "fused_attention", "valid_positions"]

Forward = Callable[..., Any]


class CannotFuseError(ValueError):
    """An attention mask that is not made of valid positions, so that no key mask says the same."""


_streams: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
# The mask of the MultiHeadedAttention that is running.
_shared_mask: ContextVar[Tensor | None] = ContextVar("rollout_pyhealth_mask", default=None)


def adapter(model: nn.Module) -> dict[nn.Module, Around]:
    """Watches the `Attention` of every `MultiHeadedAttention` of the model; it runs as it always does.

    Raises:
        CaptureError: one of them, or its `Attention`, has a forward of its own.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, MultiHeadedAttention) and registered(module) is None
    }
    for path, module in found.items():
        for part, kind in ((module, MultiHeadedAttention), (module.attention, Attention)):
            if type(part).forward is not kind.forward or foreign_forward(part) is not None:
                raise CaptureError(
                    f"capture: {type(part).__name__} at {path or 'the root'} must run the forward of PyHealth's "
                    f"{kind.__name__}, it has its own: give rollout.register_capture a function for it"
                )
        _streams[module.attention] = _stream(model, path)
    heads: dict[nn.Module, Around] = dict.fromkeys(found.values(), _through_heads)
    return heads | {module.attention: _through_attention for module in found.values()}


def _stream(model: nn.Module, path: str) -> str | None:
    """The feature key whose attention the path leads to, after the path of the PyHealth model that has it."""
    parts = path.split(".")
    for depth in reversed(range(len(parts))):
        owner = model.get_submodule(".".join(parts[:depth]))
        if isinstance(owner, BaseModel):
            key = next((part for part in parts[depth:] if part in owner.feature_keys), None)
            return None if key is None else ".".join([*parts[:depth], key])
    return None


def _through_heads(module: nn.Module, call: Forward, *args: Any, **kwargs: Any) -> Any:
    """Keeps the mask: each layer hands its `Attention` a view of its own of the one mask."""
    token = _shared_mask.set(_mask_of(*args, **kwargs))
    try:
        return call(*args, **kwargs)
    finally:
        _shared_mask.reset(token)


def _mask_of(query: Any, key: Any, value: Any, mask: Any = None, register_hook: bool = False) -> Any:
    """The mask that `MultiHeadedAttention.forward` is called with."""
    return mask


def _through_attention(
    module: nn.Module,
    call: Forward,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    with whole(module, query, key, value) as found:
        output: tuple[Tensor, Tensor] = call(query, key, value, mask=mask, dropout=dropout)

    def make() -> Record:
        shared = _shared_mask.get()
        same = shared is not None and mask is not None and mask.data_ptr() == shared.data_ptr()
        masks: dict[str, Any] = {}
        if mask is not None:
            masks = memo(shared if same else mask, "pyhealth", lambda: _masks(mask))  # type: ignore[arg-type]
        return Record(queries=query, keys=key, **masks)

    handed = Handed(output[0], lambda each: each, lambda: value, query)
    for recording in found:
        recording.attended(module, (query, key, value), output[0], make, _streams.get(module), handed=handed)
        recording.give(output)
    return output


def _masks(mask: Tensor) -> dict[str, Any]:
    """The masks of a `Record` that say what a mask [B, 1, S, S] says, 0 = may not be attended."""
    try:
        valid = valid_positions(mask)
    except CannotFuseError:
        return {"bias": torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask == 0, -torch.inf)}
    return {} if valid is None else {"key_mask": valid, "query_mask": valid}


def fused_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, *, fill: bool = True) -> Tensor:
    """softmax(QKᵀ/√D, masked)·V [B, H, S, D] as PyHealth's `Attention` gives it, without a map.

    Args:
        query, key, value: [B, H, S, D]; of the query fewer rows will do when `fill` is False.
        valid: bool [B, S], or None when every position is.
        fill: give rows that are not valid the mean of V. False: what they get does not matter.
    """
    if valid is None:
        return functional.scaled_dot_product_attention(query, key, value)
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None])
    return torch.where(valid[:, None, :, None], mixed, value.mean(2, keepdim=True)) if fill else mixed


def valid_positions(mask: Tensor | None) -> Tensor | None:
    """The valid positions, bool [B, S], that a mask [B, 1, S, S] is made of; None when every position is valid.

    Raises:
        CannotFuseError: the mask is not valid ∧ validᵀ.
    """
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        raise CannotFuseError
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] != 0
    valid = allowed.diagonal(dim1=1, dim2=2)
    if bool(valid.all()) and bool(allowed.all()):
        return None
    if not torch.equal(allowed, valid[:, :, None] & valid[:, None, :]):
        raise CannotFuseError
    return valid.contiguous()
