"""Attention written out by a model: followed from Q·Kᵀ through scale, bias and mask to the softmax and to A·V.

A `Scores` says how a tensor came from a product of queries and keys; a `Map` that it is the softmax of one. What an
operation does to them is either known here, exactly, or makes them broken, with the name of the operation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rollout._capture.masks import LOW

__all__ = [
    "Map",
    "Scores",
    "additive_mask",
    "apply",
    "apply_to_map",
    "mixes",
    "product",
    "reshaped",
    "scaled_queries",
    "softmax",
]


@dataclass(frozen=True)
class Scores:
    """scale·(queries·keysᵀ), capped, + Σ biases, with what `masks` say replaced by a number too low to count.

    Attributes:
        queries, keys: [..., S, D] and [..., S', D].
        scale: a number, or a tensor that is one over the last two dimensions.
        softcap: c of c·tanh(score/c), which is taken before biases are added.
        sinks: [H], the score of a further column of each head, that is left out after the softmax.
        biases: added, each with the shape that the scores had.
        masks: bool, True = replaced.
        zeroed: bool, True = multiplied by 0, which hides a key only together with what is added next.
        broken: the operation after which this is no longer what it is; None when it is.
    """

    queries: Tensor
    keys: Tensor
    shape: torch.Size
    scale: Any = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None
    biases: tuple[Tensor, ...] = ()
    masks: tuple[Tensor, ...] = ()
    zeroed: Tensor | None = None
    broken: str | None = None


@dataclass(frozen=True)
class Map:
    """The softmax of scores over the keys; `values` are the maps themselves."""

    scores: Scores
    values: Tensor
    broken: str | None = None


def product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Scores | None:
    """The scores that a multiplication of two batches of matrices may be; None when it is another thing."""
    if name == "einsum":
        return _einsum_product(args, output)
    if name == "baddbmm":
        given = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | kwargs
        added, left, right = given["input"], given["batch1"], given["batch2"]
        made = _matmul_product(left, right, output)
        alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
        if made is None or beta == 0:
            return made and replace(made, scale=float(alpha))
        return replace(made, scale=float(alpha), biases=(added * beta if beta != 1 else added,))
    if len(args) + len(kwargs) < 2:
        return None
    left, right = (*args, *kwargs.values())[:2]
    return _matmul_product(left, right, output)


def _matmul_product(left: Any, right: Any, output: Tensor) -> Scores | None:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.dim() < 3 or left.dim() != right.dim():
        return None
    return Scores(left, right.transpose(-1, -2), output.shape)


def _einsum_product(args: tuple[Any, ...], output: Tensor) -> Scores | None:
    parsed = _parse(args)
    if parsed is None:
        return None
    left, right, out = parsed
    for first, second, queries, keys in ((left, right, args[1], args[2]), (right, left, args[2], args[1])):
        batch = [c for c in out if c in first and c in second]
        summed = [c for c in first if c in second and c not in out]
        row = [c for c in first if c in out and c not in second]
        column = [c for c in second if c in out and c not in first]
        if not batch or not len(summed) == len(row) == len(column) == 1 or out != "".join(batch + row + column):
            continue
        q_order = [first.index(c) for c in batch + row + summed]
        k_order = [second.index(c) for c in batch + column + summed]
        return Scores(queries.permute(q_order), keys.permute(k_order), output.shape)
    return None


def _parse(args: tuple[Any, ...]) -> tuple[str, str, str] | None:
    """The letters of two operands and the result; those of an ellipsis are capitals."""
    if len(args) != 3 or not isinstance(args[0], str) or "->" not in args[0]:
        return None
    given, out = args[0].replace(" ", "").split("->")
    parts = given.split(",")
    if len(parts) != 2:
        return None
    hidden = {tensor.dim() - len(part.replace("...", "")) for part, tensor in zip(parts, args[1:], strict=True)}
    if "..." in args[0]:
        if len(hidden) != 1 or not all("..." in part for part in (*parts, out)) or args[0] != args[0].lower():
            return None
        letters = "ABCDEFGH"[: hidden.pop()]
        parts, out = [part.replace("...", letters) for part in parts], out.replace("...", letters)
    return parts[0], parts[1], out


def mixes(name: str, args: tuple[Any, ...], at: int, output: Tensor) -> tuple[Tensor, int] | None:
    """The values that a map (argument number `at`) is multiplied with, and the dimension of rows in the result.

    None when the operation is not A·V.
    """
    if name == "einsum":
        parsed = _parse(args)
        if parsed is None:
            return None
        mine, other, out = (parsed[0], parsed[1], parsed[2]) if at == 1 else (parsed[1], parsed[0], parsed[2])
        row, column = mine[-2], mine[-1]
        fits = column in other and column not in out and row in out and row not in other
        return (args[3 - at].movedim(other.index(column), -2), out.index(row)) if fits else None
    if name not in ("matmul", "bmm", "__matmul__") or at != 0 or args[1].dim() < 2:
        return None
    return args[1], output.dim() - 2


def softmax(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], scores: Scores, output: Tensor) -> Map:
    """The map of scores that a softmax is taken of."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim not in (-1, output.dim() - 1):
        return Map(scores, output, f"a softmax over dimension {dim}")
    return Map(scores, output, scores.broken or (ZEROED if scores.zeroed is not None else None))


def scaled_queries(scores: Scores, queries: Tensor) -> tuple[Tensor, float]:
    """Queries [B, H, S, D], and the number they and the keys are scaled by."""
    scale = scores.scale
    if isinstance(scale, Tensor):
        return queries * scale.to(queries.dtype), 1.0
    return queries, float(scale)


def additive_mask(scores: Scores, shape: torch.Size) -> Tensor | None:
    """What biases and masks say together, broadcastable to [B, H, S, S'], as `masks.structure` takes it."""
    mask: Tensor | None = None
    for bias in scores.biases:
        bias = reshaped(bias, shape)
        mask = bias if mask is None else mask + bias
    for hidden in (reshaped(hidden, shape) for hidden in scores.masks):
        if mask is None or mask.dtype == torch.bool:
            mask = ~hidden if mask is None else mask & ~hidden
        else:
            mask = mask.masked_fill(hidden, -math.inf)
    return mask


def reshaped(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask of scores in any shape, over [B, H, S, S']."""
    if mask.dim() == 3 and mask.shape[0] == shape[0] * shape[1] and shape[1] > 1:
        return mask.unflatten(0, shape[:2])
    if mask.dim() == 3 and shape[1] == 1:
        return mask.unsqueeze(1)
    return mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask


# What an operation that breaks scores is likely to be there for.
LIKELY = {"cat": "columns beside the scores that are not one sink a head: cat"}
ZEROED = "scores times 0 that nothing low was added to"

SAME = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach")
MAP_RULES = {*SAME, "dropout", "view", "reshape", "unsqueeze", "nan_to_num", "masked_fill"}


def apply_to_map(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], held: Map, at: int, output: Tensor) -> Map:
    """What an operation makes of a map that is its argument number `at`."""
    plain = name.rstrip("_")
    if held.broken is None and at == 0 and plain == "__getitem" and _without_sinks(held, args, output):
        return replace(held, values=output)
    scores = replace(held.scores, shape=held.values.shape, biases=(), masks=(), broken=None)
    if held.broken is None and at == 0 and plain in MAP_RULES:
        if plain == "masked_fill":  # 0 where there is 0 already
            given = dict(zip(("input", "mask", "value"), args, strict=False)) | kwargs
            known = any(given.get("mask") is mask for mask in held.scores.masks)
            if known and given.get("value") in (0, 0.0):
                return replace(held, values=output)
        elif plain == "nan_to_num" or RULES[plain](name, args, kwargs, scores, 0) is not None:
            return replace(held, values=output)
    return replace(held, values=output, broken=held.broken or name.strip("_"))


def _without_sinks(held: Map, args: tuple[Any, ...], output: Tensor) -> bool:
    """Whether an index leaves out the column of the sinks, and no more."""
    if held.scores.sinks is None or held.values.shape[-1] != held.scores.keys.shape[-2] + 1:
        return False
    whole = held.values[..., :-1]
    return (output.shape, output.stride(), output.data_ptr()) == (whole.shape, whole.stride(), whole.data_ptr())


def apply(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], held: Scores, at: int, output: Tensor) -> Scores:
    """What an operation makes of scores that are its argument number `at`."""
    rule = RULES.get(name.strip("_") if name.startswith("__") else name.rstrip("_"))
    lost = held.broken or rule is None or (held.zeroed is not None and rule not in (_add, _subtract))
    made = None if lost or rule is None else rule(name, args, kwargs, held, at)
    if made is None and held.zeroed is not None:
        return replace(held, broken=held.broken or ZEROED, shape=output.shape)
    if made is None:
        return replace(held, broken=held.broken or LIKELY.get(name, name.strip("_")), shape=output.shape)
    return replace(made, shape=output.shape)


def _one_per_map(value: Any) -> bool:
    """Whether a tensor is one number over the last two dimensions."""
    return isinstance(value, Tensor) and (value.dim() < 2 or value.shape[-2:] == (1, 1)) and value.dim() != 1


def _times(held: Scores, factor: Any) -> Scores | None:
    if held.sinks is not None:
        return None
    if isinstance(factor, Tensor) and factor.numel() == 1:
        factor = factor.item()
    if isinstance(factor, Tensor):
        if not _one_per_map(factor):
            return None
    elif not factor > 0:
        return None
    if held.softcap is not None:
        if isinstance(factor, Tensor):
            return None
        held = replace(held, softcap=held.softcap * factor)  # f·c·tanh(s/c) is (f·c)·tanh((f·s)/(f·c))
    return replace(held, scale=held.scale * factor, biases=tuple(bias * factor for bias in held.biases))


def _tanh(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    if at != 0 or held.biases or held.masks or held.softcap is not None or held.sinks is not None:
        return None
    return replace(held, softcap=1.0)


def _cat(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    """A column beside the scores that is one number for each head."""
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    tensors, dim = given.get("tensors", ()), given.get("dim", 0)
    if at != 0 or len(tensors) != 2 or held.sinks is not None or dim not in (-1, len(held.shape) - 1):
        return None
    column = tensors[1]
    if column.dim() != 4 or column.shape[-1] != 1:
        return None
    sinks = column[0, :, 0, 0]
    return replace(held, sinks=sinks) if torch.equal(column, sinks[:, None, None].expand_as(column)) else None


def _multiply(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    if len(args) < 2:
        return None
    factor = args[1 - at]
    if isinstance(factor, Tensor) and factor.numel() > 1 and not _one_per_map(factor):
        return _zero(held, factor)
    return _times(held, factor)


def _zero(held: Scores, factor: Tensor) -> Scores | None:
    """Scores times zeros and ones."""
    if held.sinks is not None or torch.broadcast_shapes(factor.shape, held.shape) != held.shape:
        return None
    hidden = factor == 0
    return replace(held, zeroed=hidden) if bool((hidden | (factor == 1)).all()) else None


def _lower(held: Scores, hidden: Tensor, added: Any) -> Scores | None:
    """What is added to scores that are 0 where `hidden` says: a mask when it is low there, and 0 elsewhere."""
    if not isinstance(added, Tensor) or torch.broadcast_shapes(added.shape, held.shape) != held.shape:
        return None
    masks = bool(torch.where(hidden, added <= LOW, added == 0).all())
    return replace(held, masks=(*held.masks, hidden), zeroed=None) if masks else None


def _divide(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    if at != 0 or len(args) < 2 or name.startswith("__r") or kwargs:
        return None
    return _times(held, 1.0 / args[1])


def _add(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    if len(args) < 2 or kwargs or held.sinks is not None:
        return None
    other = args[1 - at]
    if held.zeroed is not None:
        return _lower(held, held.zeroed, other)
    if not isinstance(other, Tensor):
        return held if isinstance(other, int | float) and math.isfinite(other) else None
    if other.dtype == torch.bool or torch.broadcast_shapes(other.shape, held.shape) != held.shape:
        return None
    return replace(held, biases=(*held.biases, other))


def _subtract(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    if len(args) < 2 or kwargs or at != 0 or name == "__rsub__" or not isinstance(args[1], Tensor):
        return None
    if held.zeroed is None and args[1].shape[-1:] == (1,):  # the same for every key of a row: softmax does not see it
        return held
    return _add(name, (args[0], -args[1]), kwargs, held, 0)


def _mask(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    given = dict(zip(("input", "mask", "value"), args, strict=False)) | kwargs
    return _hide(held, given.get("mask"), given.get("value")) if at == 0 else None


def _where(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    """torch.where(condition, scores, low) and (condition, low, scores)."""
    if len(args) != 3 or kwargs or at == 0:
        return None
    return _hide(held, ~args[0] if at == 1 else args[0], args[3 - at])


def _hide(held: Scores, mask: Any, value: Any) -> Scores | None:
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else math.nan
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not isinstance(value, int | float):
        return None
    if held.sinks is not None:
        return None
    if not value <= LOW or torch.broadcast_shapes(mask.shape, held.shape) != held.shape:
        return None
    return replace(held, masks=(*held.masks, mask))


def _floor(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    """max(scores, low): a guard against −inf that changes no weight."""
    low = args[1 - at] if len(args) == 2 else None
    low = low.item() if isinstance(low, Tensor) and low.numel() == 1 else low
    return held if isinstance(low, int | float) and low <= LOW else None


def _same(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    return held if at == 0 else None


def _dropout(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    training = given.get("training", given.get("train", True))
    return None if training and given.get("p", 0.5) else held


def _view(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list | torch.Size) else args[1:]
    if at != 0 or kwargs or len(sizes) < 2 or isinstance(sizes[0], torch.dtype):
        return None
    tail = (held.shape[-2], held.shape[-1])
    return held if all(size in (-1, wanted) for size, wanted in zip(sizes[-2:], tail, strict=True)) else None


def _unsqueeze(name: str, args: Any, kwargs: Any, held: Scores, at: int) -> Scores | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim is None or held.biases or held.masks:
        return None
    return held if dim in (0, 1) and len(held.shape) == 3 else None


Rule = Callable[[str, Any, Any, Scores, int], Scores | None]
RULES: dict[str, Rule] = {
    **dict.fromkeys(("mul", "multiply", "imul", "rmul"), _multiply),
    **dict.fromkeys(("div", "divide", "true_divide", "truediv", "itruediv"), _divide),
    **dict.fromkeys(("add", "iadd", "radd"), _add),
    **dict.fromkeys(("sub", "subtract", "isub"), _subtract),
    "tanh": _tanh,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "masked_fill": _mask,
    "where": _where,
    **dict.fromkeys(("max", "maximum"), _floor),
    **dict.fromkeys((*SAME, "requires_grad"), _same),
    "dropout": _dropout,
    **dict.fromkeys(("view", "reshape"), _view),
    "unsqueeze": _unsqueeze,
}
