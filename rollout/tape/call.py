"""From the records of a stream to a call of `attention_rollout_qk`: its arguments, and which rows are meant."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rollout.tape.record import MASKS, Record

__all__ = ["call_arguments", "meant_rows"]

# A score with this added has no weight beside one without.
HIDDEN = -1e4


def meant_rows(query: Any, layers: Sequence[Record], has_lengths: bool, caller: str) -> Any:
    """Rows counted from each sample's own start or end, as positions of the padded batch.

    Raises:
        ValueError: a sample has no such row, or which it is cannot be told.
    """
    whole = isinstance(query, Tensor) and (query.is_floating_point() or query.dim() != 1)
    if query is None or whole or isinstance(query, bool) or has_lengths:
        return query
    valid = None
    for layer in layers:
        if layer.key_mask is not None:
            valid = layer.key_mask if valid is None else valid & layer.key_mask
        elif _hides_keys(layer.bias) and not (isinstance(query, Tensor) and bool((query >= 0).all())):
            raise ValueError(
                f"{caller}: query must name positions of the padded batch, as a long [B], or lengths be given, got "
                f"{query if isinstance(query, int) else 'negative ones'}: a layer's bias hides keys from all rows, or "
                f"all but their own, and not as padding does (sparse attention), so where a sample ends cannot be told"
            )
    if valid is None:
        return query
    seq = valid.shape[1]
    positions = torch.arange(seq, device=valid.device)
    some = valid.any(1)
    starts = torch.where(some, torch.where(valid, positions, seq).amin(1), 0)
    if all(layer.query_mask is not None for layer in layers):  # the model says what such rows are, and reads them
        starts = torch.zeros_like(starts)
    ends = torch.where(some, torch.where(valid, positions, -1).amax(1) + 1, seq)
    if isinstance(query, Tensor):
        given = query.to(valid.device)
        return torch.where(given < 0, given + ends, given)
    rows = starts + query if query >= 0 else ends + query
    outside = (rows < starts) | (rows >= ends)
    if bool(outside.any()):
        b = int(outside.nonzero()[0])
        raise ValueError(
            f"{caller}: query must be a row of every sample, got {query}; sample {b} has "
            f"{int(ends[b] - starts[b])} positions by the recorded mask"
        )
    return rows


def _hides_keys(bias: Tensor | None) -> bool:
    """Whether some key of a sample gets no weight from any row, or from none but its own."""
    if bias is None:
        return False
    reached = (bias > HIDDEN)[(None,) * (4 - bias.dim())].any(1)
    keys = reached.any(1)
    if reached.shape[1] == reached.shape[2]:
        others = (reached & ~torch.eye(reached.shape[1], dtype=torch.bool, device=reached.device)).any(1)
        if not bool(reached.triu(1).any()):
            others[:, -1] = True  # where no row looks ahead the last key has its own row alone
        keys = keys & others
    return not bool(keys.all())


def call_arguments(layers: Sequence[Record]) -> dict[str, Any]:
    """The arguments of `attention_rollout_qk` for the layers of a stream.

    Masks, windows and scales that all layers share are passed as they are. Where layers differ, a mask becomes part of
    that layer's bias (−inf), and scales are multiplied into the queries.

    Raises:
        ValueError: layers differ in how their scores are capped.
    """
    caps = {layer.softcap for layer in layers}
    if len(caps) > 1:
        raise ValueError(f"Tape: the layers of a stream must share their softcap, got {sorted(caps, key=str)}")
    shared: dict[str, Any] = {name: getattr(layers[0], name) for name in (*MASKS, "causal", "window")}
    for name, value in shared.items():
        if not all(_same(value, getattr(layer, name)) for layer in layers):
            shared[name] = False if name == "causal" else None
    scales = [layer.queries.shape[-1] ** -0.5 if layer.scale is None else float(layer.scale) for layer in layers]
    one_scale = len(set(scales)) == 1
    queries = [layer.queries if one_scale else layer.queries * s for layer, s in zip(layers, scales, strict=True)]
    biases = [_bias(layer, shared) for layer in layers]
    return {
        "queries": queries,
        "keys": [layer.keys for layer in layers],
        "bias": None if all(bias is None for bias in biases) else biases,
        "scale": scales[0] if one_scale else 1.0,
        "softcap": caps.pop(),
        "sinks": _sinks(layers),
        **shared,
    }


def _sinks(layers: Sequence[Record]) -> list[Tensor] | None:
    """The sinks of every layer; −inf is none."""
    if all(layer.sinks is None for layer in layers):
        return None
    return [
        torch.full((q.shape[1],), -math.inf, device=q.device) if layer.sinks is None else layer.sinks
        for layer, q in ((layer, layer.queries) for layer in layers)
    ]


def _same(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or torch.equal(first, second)
    return type(first) is type(second) and first == second


def _bias(layer: Record, shared: Mapping[str, Any]) -> Tensor | None:
    """A layer's bias, with the masks of its own that are not passed for all layers."""
    passed = [name for name, value in shared.items() if _same(value, getattr(layer, name))]
    without: dict[str, Any] = {name: False if name == "causal" else None for name in passed}
    rest = replace(layer, **without).allowed()
    if rest is None:
        return layer.bias
    bias = torch.zeros(rest.shape, dtype=torch.float32, device=rest.device).masked_fill_(~rest, -math.inf)
    return bias if layer.bias is None else bias + layer.bias
