"""Argument checks. Every message reads `function: argument must be …, got …`.

Checks of shapes and dtypes cost nothing and always run. Checks of values read small tensors back from the device, so
they run only under `validate`.
"""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def tensor_list(name: str, argument: str, values: object, what: str) -> list[Tensor]:
    """`values` as a non-empty list of floating-point tensors, detached.

    Raises:
        TypeError: not a sequence of tensors, or a tensor that is not floating-point.
        ValueError: empty.
    """
    if isinstance(values, Tensor):
        raise TypeError(
            f"{name}: {argument} must be a sequence of L tensors {what}, got one tensor {list(values.shape)}; "
            f"pass [tensor] for one layer, or list(tensor) when its first axis is the layer"
        )
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | dict):
        raise TypeError(f"{name}: {argument} must be a sequence of L tensors {what}, got {type(values).__name__}")
    tensors = list(values)
    if not tensors:
        raise ValueError(f"{name}: {argument} must have one tensor {what} per layer, got an empty sequence")
    first = tensors[0]
    _check_tensor(name, f"{argument}[0]", first, what)
    dtype, device = first.dtype, first.device
    for i, tensor in enumerate(tensors):
        # A layer like the first, which has been checked, needs no check of its own: the usual call is mostly these.
        if type(tensor) is Tensor and tensor.dtype == dtype and tensor.device == device:
            continue
        _check_tensor(name, f"{argument}[{i}]", tensor, what)
        same_device(name, device, f"{argument}[{i}]", tensor)
    return [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]


def _check_tensor(name: str, argument: str, tensor: object, what: str) -> None:
    if tensor is None:
        raise TypeError(
            f"{name}: {argument} must be a tensor {what}, got None; fused attention returns no maps: "
            f"run the model with its plain attention, or use attention_rollout_qk"
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor {what}, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: {argument} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: {argument} must hold data, got a tensor on the meta device")


def same_device(name: str, device: torch.device, argument: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(
            f"{name}: {argument} must be on the same device as the first layer, {device}, got {tensor.device}"
        )


def maps(name: str, argument: str, values: object) -> list[Tensor]:
    """The maps as [B, H, S, S] views; [B, S, S] becomes [B, 1, S, S].

    Raises:
        TypeError, ValueError: a rank, size, dtype or device is wrong, or layers disagree in B or S.
    """
    tensors = tensor_list(name, argument, values, "[B, H, S, S] or [B, S, S]")
    shapes = [tensor.shape for tensor in tensors]
    for i, shape in enumerate(shapes):
        if i == 0 or shape != shapes[0]:
            _check_shape(name, argument, i, list(shape), shapes[0])
    return [tensor if len(shape) == 4 else tensor.unsqueeze(1) for tensor, shape in zip(tensors, shapes, strict=True)]


def _check_shape(name: str, argument: str, i: int, shape: list[int], first: torch.Size) -> None:
    if len(shape) not in (3, 4):
        raise ValueError(f"{name}: {argument}[{i}] must be [B, H, S, S] or [B, S, S], got {shape}")
    if shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(
            f"{name}: {argument}[{i}] must be [B, H, S, S] or [B, S, S] with equal last sizes of 1 or more, got {shape}"
        )
    if len(shape) == 4 and shape[1] == 0:
        raise ValueError(f"{name}: {argument}[{i}] must have at least one head, got {shape}")
    batch, seq = first[0], first[-1]
    if shape[0] != batch or shape[-1] != seq:
        raise ValueError(
            f"{name}: {argument}[{i}] must have the B = {batch} and S = {seq} of {argument}[0], got {shape}"
        )


def gradients(name: str, values: object, attentions: list[Tensor], layers: int) -> list[Tensor]:
    """The gradients, shaped like the maps.

    Raises:
        ValueError: missing, or not of the maps' shapes.
    """
    if values is None:
        raise ValueError(
            f"{name}: gradients must be given for a gradient-weighted method: one tensor per map, got None"
        )
    tensors = maps(name, "gradients", values)
    if len(tensors) != layers:
        raise ValueError(f"{name}: gradients must have one tensor per layer, {layers}, got {len(tensors)}")
    for i, (tensor, attention) in enumerate(zip(tensors, attentions, strict=True)):
        if tensor.shape != attention.shape:
            raise ValueError(
                f"{name}: gradients[{i}] must have the shape of attentions[{i}], {list(attention.shape)}, "
                f"got {list(tensor.shape)}"
            )
        same_device(name, attentions[0].device, f"gradients[{i}]", tensor)
    return tensors


def lengths(name: str, value: object, batch: int, seq: int, device: torch.device, validate: bool) -> Tensor | None:
    """`lengths` as long [B], or None.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: not [B], on another device, or outside 1..S.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype not in INTEGERS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: lengths must be a long tensor [B], got {got}")
    if tuple(value.shape) != (batch,):
        raise ValueError(f"{name}: lengths must be [B] = [{batch}], got {list(value.shape)}")
    same_device(name, device, "lengths", value)
    value = value.detach().to(torch.int64)
    if validate and batch:
        low, high = int(value.min()), int(value.max())
        if low < 1 or high > seq:
            raise ValueError(f"{name}: lengths must be in 1..S = 1..{seq}, got values from {low} to {high}")
    return value


def query(
    name: str,
    value: object,
    lengths: Tensor | None,
    batch: int,
    seq: int,
    device: torch.device,
    dtype: torch.dtype,
    validate: bool,
) -> tuple[int | Tensor | None, Tensor | None, bool]:
    """`query` as (rows: an int or long [B], or None; weights [B, R, S] or None; whether the result is [B, S]).

    Raises:
        TypeError: neither None, an int, nor a tensor of integers or floats.
        ValueError: the wrong shape or device, or a row outside the sample.
    """
    if value is None:
        return None, None, False
    if not isinstance(value, Tensor):
        row = _row(name, value, seq)
        if validate and lengths is not None and batch:
            _check_rows(name, torch.full_like(lengths, row), lengths, seq)
        return row, None, True
    same_device(name, device, "query", value)
    value = value.detach()
    if value.dtype in INTEGERS:
        if tuple(value.shape) != (batch,):
            raise ValueError(f"{name}: an integer query must be [B] = [{batch}], got {list(value.shape)}")
        rows = value.to(torch.int64)
        if validate:
            _check_rows(name, rows, lengths, seq)
        return rows, None, True
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: query must be None, an int, a long tensor [B] or a float tensor [B, S] or [B, R, S], "
            f"got {value.dtype}"
        )
    if value.dim() not in (2, 3) or value.shape[0] != batch or value.shape[-1] != seq:
        raise ValueError(
            f"{name}: a float query must be [B, S] = [{batch}, {seq}] or [B, R, S] = [{batch}, R, {seq}], "
            f"got {list(value.shape)}"
        )
    weights = (value if value.dim() == 3 else value.unsqueeze(1)).to(dtype)
    if lengths is not None:
        padded = torch.arange(seq, device=device) >= lengths[:, None]
        weights = weights.masked_fill(padded[:, None], 0.0)
    if validate and not bool(torch.isfinite(weights).all()):
        raise ValueError(f"{name}: query weights must be finite, got NaN or Inf")
    return None, weights, value.dim() == 2


def _row(name: str, value: object, seq: int) -> int:
    """An int query, checked against S."""
    try:
        if isinstance(value, bool):
            raise TypeError
        row = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name}: query must be None, an int, a long tensor [B] or a float tensor [B, S] or [B, R, S], "
            f"got {value!r}"
        ) from None
    if not -seq <= row < seq:
        raise ValueError(f"{name}: query must be a row in -{seq}..{seq - 1}, got {row}")
    return row


def _check_rows(name: str, rows: Tensor, lengths: Tensor | None, seq: int) -> None:
    """Every row, counted from either end, must be inside its sample."""
    ends = torch.full_like(rows, seq) if lengths is None else lengths
    bad = (rows < -ends) | (rows >= ends)
    if bool(bad.any()):
        b = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{name}: query must be a row inside each sample, -{int(ends[b])}..{int(ends[b]) - 1} "
            f"for sample {b} of length {int(ends[b])}, got {int(rows[b])}"
        )
