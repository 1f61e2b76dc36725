"""F_l from the heads of a block of maps, in pure torch: one pass over the heads, into a buffer that stays in cache.

Adding head by head reads each map once, in order; `sum(1)` reads H streams at once.
"""

import math

import torch
from torch import Tensor

from rollout_kernels.method import Method


class Scratch:
    """Buffers that are made once and reused: `take` gives a contiguous view of the shape asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of `shape`; the next call with the same name may reuse its memory."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers.pop(name, None)  # freed before the larger one is made
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self._device)
        return self._buffers[name][:size].view(shape)


def fuse_by_function(maps: Tensor, gradients: Tensor | None, method: Method, dtype: torch.dtype) -> Tensor:
    """F of one sample, [1, n, n], by the method's own function.

    Raises:
        TypeError: it gave no tensor.
        ValueError: it gave another shape.
    """
    assert callable(method.head_fusion)
    fused = method.head_fusion(maps.to(dtype), None if gradients is None else gradients.to(dtype))
    wanted = [maps.shape[0], *maps.shape[2:]]
    if not isinstance(fused, Tensor):
        raise TypeError(f"Method: the head_fusion function must return a tensor [b, n, n], got {type(fused).__name__}")
    if list(fused.shape) != wanted:
        raise ValueError(f"Method: the head_fusion function must return [b, n, n] = {wanted}, got {list(fused.shape)}")
    return fused.to(dtype)


def fuse_heads(
    maps: Tensor,
    gradients: Tensor | None,
    method: Method,
    weights: Tensor | None,
    scratch: Scratch,
    *,
    own: bool = False,
) -> tuple[Tensor, float]:
    """F = fuse_h(A), or of A∘G, over axis 1 of maps [b, H, r, n], as (values [b, r, n], factor): F = factor · values.

    The mean is left as a sum and a factor of 1/H. The values are in the accumulation dtype, in scratch memory or, when
    there is nothing to fuse and `own` does not ask for a copy the caller may write to, a view of the maps.
    """
    heads, dtype = maps.shape[1], scratch.dtype
    if heads == 1 and method.gradients is None and maps.dtype == dtype and not own:
        return maps[:, 0], 1.0

    shape = (maps.shape[0], *maps.shape[2:])
    fused = scratch.take("fused", *shape)
    mean = method.head_fusion == "mean"
    if mean and heads > 1 and method.gradients is None and maps.dtype == dtype:
        if maps.shape[2] == 1:  # one row a sample: too little for a call per head to pay
            return torch.sum(maps, 1, out=fused), 1.0 / heads
        torch.add(maps[:, 0], maps[:, 1], out=fused)
        for h in range(2, heads):
            fused.add_(maps[:, h])
        return fused, 1.0 / heads

    for h in range(heads):
        head = _head(maps, gradients, method, h, scratch)
        if weights is not None:
            weight = float(weights[h])
            torch.mul(head, weight, out=fused) if h == 0 else fused.add_(head, alpha=weight)
        elif h == 0:
            fused.copy_(head)
        elif mean:
            fused.add_(head)
        elif method.head_fusion == "max":
            torch.maximum(fused, head, out=fused)
        else:
            torch.minimum(fused, head, out=fused)
    if method.gradients == "fuse_then_clamp":
        fused.clamp_(min=0)
    return fused, 1.0 / heads if mean else 1.0


def _head(maps: Tensor, gradients: Tensor | None, method: Method, h: int, scratch: Scratch) -> Tensor:
    """One head of A, or of A∘G, in the accumulation dtype."""
    head = maps[:, h]
    if method.gradients is None and head.dtype == scratch.dtype:
        return head
    values = scratch.take("head", *head.shape).copy_(head)
    if method.gradients is not None:
        assert gradients is not None
        values.mul_(gradients[:, h])
        if method.gradients == "clamp_then_fuse":
            values.clamp_(min=0)
    return values


def discard_smallest(fused: Tensor, ratio: float, lengths: list[int]) -> Tensor:
    """A copy of F [b, n, n] whose ⌊q·m²⌋ smallest entries of each sample's valid m×m block are 0.

    Ties go by flat index; entry [0, 0] is spared.
    """
    kept = fused.clone()
    for b, m in enumerate(lengths):
        count = math.floor(ratio * m * m)
        if count == 0:
            continue
        block = fused[b, :m, :m].flatten()
        threshold = block.kthvalue(count).values
        below = block < threshold
        ties = (block == threshold).nonzero()[: count - int(below.sum()), 0]
        below[ties] = True
        below[0] = False
        kept[b, :m, :m].masked_fill_(below.view(m, m), 0.0)
    return kept
