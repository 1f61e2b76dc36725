"""Argument checks of `attention_rollout_qk`; the format is that of `_checks`."""

import math

import torch
from torch import Tensor

from rollout_kernels import _checks


def queries_and_keys(name: str, queries: object, keys: object) -> tuple[list[Tensor], list[Tensor]]:
    """Queries [B, H, S, D] and keys [B, H_kv, S, D] of every layer.

    Raises:
        TypeError, ValueError: a rank, size, dtype or device is wrong, or layers disagree in B or S.
    """
    qs = _checks.tensor_list(name, "queries", queries, "[B, H, S, D]")
    ks = _checks.tensor_list(name, "keys", keys, "[B, H_kv, S, D]")
    if len(qs) != len(ks):
        raise ValueError(f"{name}: keys must have one tensor per layer of queries, {len(qs)}, got {len(ks)}")
    for i, (q, k) in enumerate(zip(qs, ks, strict=True)):
        for argument, tensor, wanted in (("queries", q, "[B, H, S, D]"), ("keys", k, "[B, H_kv, S, D]")):
            if tensor.dim() != 4 or 0 in tensor.shape[1:]:
                raise ValueError(
                    f"{name}: {argument}[{i}] must be {wanted} with H, S and D of 1 or more, got {list(tensor.shape)}"
                )
            _checks.same_device(name, qs[0].device, f"{argument}[{i}]", tensor)
        batch, seq = qs[0].shape[0], qs[0].shape[2]
        if q.shape[0] != batch or q.shape[2] != seq:
            raise ValueError(
                f"{name}: queries[{i}] must have the B = {batch} and S = {seq} of queries[0], got {list(q.shape)}"
            )
        if (k.shape[0], k.shape[2], k.shape[3]) != (batch, seq, q.shape[3]) or q.shape[1] % k.shape[1]:
            raise ValueError(
                f"{name}: keys[{i}] must be [B, H_kv, S, D] = [{batch}, H_kv, {seq}, {q.shape[3]}] with "
                f"H = {q.shape[1]} a multiple of H_kv, got {list(k.shape)}"
            )
    return qs, ks


def logsumexp(name: str, values: object, queries: list[Tensor]) -> list[Tensor] | None:
    """The log-sum-exp [B, H, S] of every layer in float32 or float64, or None."""
    if values is None:
        return None
    tensors = _checks.tensor_list(name, "logsumexp", values, "[B, H, S]")
    if len(tensors) != len(queries):
        raise ValueError(f"{name}: logsumexp must have one tensor per layer, {len(queries)}, got {len(tensors)}")
    for i, (tensor, q) in enumerate(zip(tensors, queries, strict=True)):
        if tensor.shape != q.shape[:3] or tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}: logsumexp[{i}] must be float32 [B, H, S] = {list(q.shape[:3])}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        _checks.same_device(name, queries[0].device, f"logsumexp[{i}]", tensor)
    return tensors


def bias(name: str, value: object, queries: list[Tensor]) -> list[Tensor | None] | None:
    """The additive bias of every layer as a view [B, H, S, S]; one tensor serves all layers, None leaves one out."""
    values = _per_layer(name, "bias", value, len(queries))
    if values is None:
        return None
    views: list[Tensor | None] = []
    for i, (tensor, q) in enumerate(zip(values, queries, strict=True)):
        if tensor is None:
            views.append(None)
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in _checks.FLOATS:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"{name}: bias[{i}] must be a floating-point tensor (for a bool mask, use key_mask), got {got}"
            )
        _checks.same_device(name, queries[0].device, f"bias[{i}]", tensor)
        shape = (*q.shape[:3], q.shape[2])
        try:
            views.append(tensor.detach().expand(shape))
        except RuntimeError:
            raise ValueError(
                f"{name}: bias[{i}] must be broadcastable to [B, H, S, S] = {list(shape)}, got {list(tensor.shape)}"
            ) from None
    return views


def alibi_slopes(name: str, value: object, queries: list[Tensor], validate: bool) -> list[Tensor | None] | None:
    """The slopes of every layer, [H]; one tensor serves all layers, None leaves one out."""
    values = _per_layer(name, "alibi_slopes", value, len(queries))
    if values is None:
        return None
    slopes: list[Tensor | None] = []
    for i, (tensor, q) in enumerate(zip(values, queries, strict=True)):
        if tensor is None:
            slopes.append(None)
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in _checks.FLOATS:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: alibi_slopes[{i}] must be a floating-point tensor [H], got {got}")
        if tuple(tensor.shape) != (q.shape[1],):
            raise ValueError(f"{name}: alibi_slopes[{i}] must be [H] = [{q.shape[1]}], got {list(tensor.shape)}")
        _checks.same_device(name, queries[0].device, f"alibi_slopes[{i}]", tensor)
        if validate and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: alibi_slopes[{i}] must be finite, got NaN or Inf")
        slopes.append(tensor.detach())
    return slopes


def _per_layer(name: str, argument: str, value: object, layers: int) -> list[object] | None:
    """`value` as a list of one tensor or None per layer; one tensor serves all."""
    if value is None:
        return None
    values = [value] * layers if isinstance(value, Tensor) else value
    wanted = f"{name}: {argument} must be one tensor, or a list of one tensor or None per layer ({layers})"
    if not isinstance(values, list | tuple):
        raise TypeError(f"{wanted}, got {type(values).__name__}")
    if len(values) != layers:
        raise ValueError(f"{wanted}, got {len(values)}")
    return list(values)


def mask(
    name: str, argument: str, meaning: str, value: object, batch: int, seq: int, device: torch.device
) -> Tensor | None:
    """`key_mask` or `query_mask` as bool [B, S], or None; `meaning` is what True stands for."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: {argument} must be a bool tensor [B, S], True = {meaning}, got {got}")
    if tuple(value.shape) != (batch, seq):
        raise ValueError(f"{name}: {argument} must be [B, S] = [{batch}, {seq}], got {list(value.shape)}")
    _checks.same_device(name, device, argument, value)
    return value.detach()


def flag(name: str, argument: str, value: object) -> bool:
    """A bool, and nothing that merely converts to one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be True or False, got {value!r}")
    return value


def window(name: str, value: object) -> tuple[int | None, int | None]:
    """`window` as (left, right); None and −1 mean unbounded."""
    if value is None:
        return None, None
    wanted = f"{name}: window must be (left, right), each an int of 0 or more, or None or -1 for unbounded"
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{wanted}, got {value!r}")
    sides: list[int | None] = []
    for side in value:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"{wanted}, got {value!r}")
        if side is not None and side < -1:
            raise ValueError(f"{wanted}, got {value!r}")
        sides.append(None if side in (None, -1) else side)
    return sides[0], sides[1]


def softcap(name: str, value: object) -> float | None:
    """The bound of soft-capped scores, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: softcap must be a real number or None, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: softcap must be finite and more than 0, got {value!r}")
    return float(value)


def sinks(name: str, value: object, queries: list[Tensor], validate: bool) -> list[Tensor] | None:
    """The sinks [H] of every layer, or None."""
    if value is None:
        return None
    tensors = _checks.tensor_list(name, "sinks", value, "[H]")
    if len(tensors) != len(queries):
        raise ValueError(f"{name}: sinks must have one tensor per layer, {len(queries)}, got {len(tensors)}")
    for i, (tensor, q) in enumerate(zip(tensors, queries, strict=True)):
        if tuple(tensor.shape) != (q.shape[1],):
            raise ValueError(f"{name}: sinks[{i}] must be [H] = [{q.shape[1]}], got {list(tensor.shape)}")
        _checks.same_device(name, queries[0].device, f"sinks[{i}]", tensor)
        if validate and bool((tensor.isnan() | (tensor == math.inf)).any()):
            raise ValueError(f"{name}: sinks[{i}] must be finite or -inf, got NaN or Inf")
    return tensors


def scale(name: str, value: object, head_dimension: int) -> float:
    """The factor on q·k, by default D^−½."""
    if value is None:
        return float(head_dimension) ** -0.5
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: scale must be a real number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: scale must be finite, got {value!r}")
    return float(value)
