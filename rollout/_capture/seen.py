"""One attention as it was seen to run, brought into the form of a `Record`, and checked against what it gave."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rollout._capture.masks import structure
from rollout._capture.scores import Scores, additive_mask, reshaped, scaled_queries
from rollout.errors import CaptureError
from rollout.tape import Record
from rollout.tape.handed import Handed

__all__ = ["Heads", "Seen", "batched", "check", "make_record", "rounding"]

# max|error| of a map, or of A·V against max|V|, by the dtype it was computed in: rounding, never another mask or scale.
BOUNDS = {torch.float64: 1e-5, torch.float32: 2e-3}
HALF_BOUND = 0.08


class Heads(NamedTuple):
    """How a batch of matrices was seen to be made of B and H: [B·H, S, D], with the heads first, [H·B, S, D], or with
    the batch behind, [S, B·H, D], which is turned next."""

    number: int
    first: bool = False
    behind: bool = False


@dataclass(frozen=True)
class Seen:
    """Queries, keys and values [.., S, D] of an attention, its output, and how its scores were formed.

    Attributes:
        mask, causal, scale: of a fused call.
        scores, maps, broken: of one written out; `broken` names an operation on the scores that is not known.
        heads: where a batch of matrices was seen to be made of B and H.
        given, rows: the output as the model goes on with it, and which of its dimensions is S.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor
    scale: float | None = None
    mask: Tensor | None = None
    causal: bool = False
    scores: Scores | None = None
    maps: Tensor | None = None
    broken: str | None = None
    heads: Heads | None = None
    given: Tensor | None = None
    rows: int = -2

    @property
    def handed(self) -> Handed:
        """What gradients are taken of."""
        return Handed(
            self.output if self.given is None else self.given,
            lambda each: batched(each.movedim(self.rows, -2), self.heads),
            lambda: batched(self.values, self.heads),
            self.queries,
        )


def batched(tensor: Tensor, heads: Heads | None) -> Tensor:
    """[S, D], [B, S, D], [B·H, S, D] or [H·B, S, D] as [B, H, S, D]."""
    if tensor.dim() == 2:
        return tensor[None, None]
    if tensor.dim() == 3:
        if heads is None or len(tensor) % heads.number:  # one for all of them
            return tensor.unsqueeze(1)
        if heads.first:
            return tensor.unflatten(0, (heads.number, -1)).transpose(0, 1)
        return tensor.unflatten(0, (-1, heads.number))
    return tensor


def make_record(seen: Seen, module: nn.Module, memo: Any) -> Record:
    """The record of an attention; `memo(tensors, compute)` computes once for the same tensors."""
    queries, keys = (batched(tensor, seen.heads) for tensor in (seen.queries, seen.keys))
    shape = torch.Size((*queries.shape[:2], queries.shape[2], keys.shape[2]))
    scale = seen.scale
    behind = partial(_heads_behind, seen.heads, len(queries) * queries.shape[1])
    fields: dict[str, Any] = {"causal": seen.causal}
    if seen.scores is not None:
        scores = replace(seen.scores, biases=behind(seen.scores.biases), masks=behind(seen.scores.masks))
        queries, scale = scaled_queries(scores, queries)
        parts = (*scores.biases, *scores.masks)
        fields = memo(parts, lambda: _said(additive_mask(scores, shape), shape)) if parts else {}
        fields = {**fields, "softcap": scores.softcap, "sinks": scores.sinks}
    elif seen.mask is not None:
        (mask,) = behind((seen.mask,))
        fields = memo((mask,), lambda: _said(reshaped(mask, shape), shape))
    if keys.shape[0] == 1 < shape[0]:
        keys = keys.expand(shape[0], -1, -1, -1)
    return Record(queries=queries, keys=_ungrouped(keys, module), scale=scale, **fields)


def _heads_behind(heads: Heads | None, matrices: int, masks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those that have one for each matrix of [H·B, S, S'] as [B, H, S, S']; the others as they are."""
    if heads is None or not heads.first:
        return masks
    return tuple(batched(mask, heads) if mask.dim() == 3 and len(mask) == matrices else mask for mask in masks)


def _said(mask: Tensor | None, shape: torch.Size) -> dict[str, Any]:
    """What a mask says, and a bias of its own that no one else can write."""
    if mask is None:
        return {}
    fields = structure(mask, shape[0])
    bias = fields.get("bias")
    if bias is mask:
        fields["bias"] = bias.clone()
    return fields


def _ungrouped(keys: Tensor, module: nn.Module) -> Tensor:
    """Keys that were repeated for the heads of a group, each once."""
    group = getattr(module, "num_key_value_groups", 1)
    if not isinstance(group, int) or group < 2 or keys.shape[1] % group:
        return keys
    parts = keys.unflatten(1, (-1, group))
    first = parts[:, :, :1]
    return first.squeeze(2).contiguous() if torch.equal(parts, first.expand_as(parts)) else keys


def rounding(kinds: Iterable[torch.dtype], device: torch.device) -> float:
    """How far what was computed in such dtypes may be from what is recomputed, against the largest number."""
    if torch.is_autocast_enabled(device.type):
        return HALF_BOUND
    return max(BOUNDS.get(kind, HALF_BOUND) for kind in kinds)


def check(seen: Seen, entry: Record, where: str) -> None:
    """Compare a record with what the attention gave, in the first and the last sample.

    Raises:
        CaptureError: they differ by more than rounding.
    """
    values, output = batched(seen.values, seen.heads), batched(seen.output, seen.heads)
    maps = None if seen.maps is None else (seen.maps if seen.maps.dim() == 4 else batched(seen.maps, seen.heads))
    kinds = {seen.queries.dtype, seen.output.dtype, *(() if seen.maps is None else (seen.maps.dtype,))}
    bound = rounding(kinds, seen.queries.device)
    for b in {0, entry.batch - 1}:
        one = _sample(entry, b)
        expected, allowed = one.maps(), one.allowed()
        counted = torch.ones_like(expected[..., :1], dtype=torch.bool)
        if allowed is not None:
            counted = counted & allowed.any(-1, keepdim=True)
        if one.bias is not None:
            counted = counted & (one.bias > torch.finfo(one.bias.dtype).min).any(-1, keepdim=True)
        if maps is not None:
            got, size = maps[b : b + 1].to(expected.dtype), 1.0
        else:
            v = values[b : b + 1].to(expected.dtype)
            v = v.repeat_interleave(expected.shape[1] // v.shape[1], 1)
            got, expected, size = output[b : b + 1].to(expected.dtype), expected @ v, float(v.abs().max())
        difference = torch.where(counted & ~got.isnan(), (got - expected).abs(), 0.0)
        error = float(difference.nan_to_num(math.inf).amax())
        if error > bound * max(size, 1e-30):
            raise CaptureError(
                f"capture: what {where} attended with must be what was recorded, its maps differ by "
                f"{error / size:.2g}: give rollout.register_capture a function for it"
            )


def _sample(entry: Record, b: int) -> Record:
    cut: dict[str, Any] = {name: getattr(entry, name)[b : b + 1] for name in ("queries", "keys")}
    for name in ("key_mask", "query_mask", "bias"):
        value = getattr(entry, name)
        if value is not None:
            cut[name] = value[b : b + 1] if value.shape[0] == entry.batch and value.dim() != 3 else value
    return replace(entry, **cut)
