"""Rollout through cross-attention: from a decoder's rows to the inputs of the streams it attends over."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rollout.api import attention_rollout_qk
from rollout.tape.call import call_arguments, meant_rows
from rollout.tape.record import Layer, Record
from rollout_kernels import Method, _checks

__all__ = ["roll_through"]


def roll_through(
    held: Mapping[str, Sequence[Layer]], top: str, query: Any, method: Method, caller: str, **options: Any
) -> dict[str, Tensor]:
    """Relevance of every stream's inputs for rows of one, through its cross-attention; see
    `Tape.encoder_decoder_rollout`.

    Args:
        held: the layers of each stream, in the order they ran.
        top: the stream whose rows are asked for.
        query: its rows, as `attention_rollout` takes them.
        method: how a layer's matrix is formed.
        caller: for messages.
        options: of `attention_rollout_qk`.

    Raises:
        ValueError: the method has no row form of cross-attention; as `attention_rollout_qk`.
    """
    if method.head_fusion != "mean" or method.discard_ratio or method.start_layer:
        raise ValueError(
            f"{caller}: method must fuse heads by their mean, discard nothing and start at the first layer, got "
            f"head_fusion={method.head_fusion!r}, discard_ratio={method.discard_ratio}, "
            f"start_layer={method.start_layer}"
        )
    if not method.own_path:
        raise ValueError(f"{caller}: method must have own_path=True through cross-attention, got False")
    first = held[top][0].record
    own = [layer.record for layer in held[top] if layer.source is None]
    rows = meant_rows(query, own, False, caller)
    start, weights, squeeze = _checks.query(
        caller, rows, None, first.batch, first.seq, first.queries.device, _dtype(first), options["validate"]
    )
    if weights is None:
        weights = torch.eye(first.seq, dtype=_dtype(first), device=first.queries.device)
        if start is None:
            weights = weights.expand(first.batch, -1, -1)
        elif isinstance(start, Tensor):
            weights = weights[start][:, None]
        else:
            weights = weights[start].expand(first.batch, 1, -1)
    relevance: dict[str, Tensor] = {}
    waiting = {top: weights}
    while waiting:
        stream = _complete(waiting, held)
        relevance[stream] = _descend(held[stream], waiting.pop(stream), waiting, method, caller, options)
    return {stream: rows[:, 0] if squeeze else rows for stream, rows in relevance.items()}


def _dtype(record: Record) -> torch.dtype:
    return torch.float64 if record.queries.dtype == torch.float64 else torch.float32


def _complete(waiting: Mapping[str, Tensor], held: Mapping[str, Sequence[Layer]]) -> str:
    """One of the streams that wait which no other of them attends over, at first or second hand."""
    return next(stream for stream in waiting if not any(stream in _attended(other, held) for other in waiting))


def _attended(stream: str, held: Mapping[str, Sequence[Layer]]) -> set[str]:
    sources = {layer.source for layer in held[stream] if layer.source is not None}
    return sources.union(*(_attended(source, held) for source in sources))


def _descend(
    layers: Sequence[Layer],
    weights: Tensor,
    waiting: dict[str, Tensor],
    method: Method,
    caller: str,
    options: dict[str, Any],
) -> Tensor:
    """Weights of a stream's rows, through its layers from the top; what leaves it is added to `waiting`."""
    total = method.residual + method.attention_weight if method.renormalize else 1.0
    for source, group in groupby(reversed(layers), key=lambda layer: layer.source):
        records = [layer.record for layer in group]
        if source is None:
            arguments = call_arguments(records[::-1])
            weights = attention_rollout_qk(query=weights, method=method, **arguments, **options)
            continue
        for record in records:
            _refuse_unread(record, caller)
            read = _read(record, weights, options) * (method.attention_weight / total)
            waiting[source] = read + waiting[source] if source in waiting else read
            weights = weights * (method.residual / total)
    return weights


def _refuse_unread(record: Record, caller: str) -> None:
    """A row with no key to attend would be uniform over padding that `_read` adds."""
    if record.sinks is not None:
        raise ValueError(f"{caller}: cross-attention with sinks has rows that do not sum to 1")
    if record.key_seq >= record.seq or (record.key_mask is record.query_mask is record.bias is None):
        return
    allowed = record.allowed()
    if record.bias is not None:
        open_ = record.bias > -torch.inf
        allowed = open_ if allowed is None else allowed & open_
    if allowed is not None and not bool(allowed.any(-1).all()):
        raise ValueError(f"{caller}: every position must attend over some position of the encoder, one has none")


MAPS_ALONE = Method(residual=0.0, attention=1.0, renormalize=False)


def _read(record: Record, weights: Tensor, options: dict[str, Any]) -> Tensor:
    """Weights [B, R, S] times the mean map [S, S'] of a cross-attention: [B, R, S'], as one square layer."""
    seq, key_seq = record.seq, record.key_seq
    both = max(seq, key_seq)
    key_mask = record.key_mask
    if key_mask is None:
        key_mask = torch.ones(record.batch, key_seq, dtype=torch.bool, device=record.keys.device)
    square = Record(
        queries=_longer(record.queries, both, -2),
        keys=_longer(record.keys, both, -2),
        key_mask=_longer(key_mask, both, -1),
        query_mask=None if record.query_mask is None else _longer(record.query_mask, both, -1),
        bias=None if record.bias is None else _square(record.bias, seq, key_seq, both),
        causal=record.causal,
        window=record.window,
        scale=record.scale,
        softcap=record.softcap,
    )
    rows = attention_rollout_qk(
        query=_longer(weights, both, -1), method=MAPS_ALONE, **call_arguments([square]), **options
    )
    return rows[..., :key_seq]


def _square(bias: Tensor, seq: int, key_seq: int, both: int) -> Tensor:
    """A bias over [S, S'] as one over [both, both]."""
    if bias.shape[-1] != 1:
        bias = _longer(bias.expand(*bias.shape[:-1], key_seq), both, -1)
    return bias if bias.shape[-2] == 1 else _longer(bias, both, -2)


def _longer(tensor: Tensor, size: int, dim: int) -> Tensor:
    """The tensor with zeros, or False, at its end."""
    missing = size - tensor.shape[dim]
    return functional.pad(tensor, (0, 0) * (-dim - 1) + (0, missing)) if missing else tensor
