"""Argument checks of the value-aware methods; the format is that of `_checks`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rollout_kernels import _checks
from rollout_kernels._problem import LayerValues
from rollout_kernels.method import Method

SHAPES = {"values": "[B, H_v, S, D_v]", "output_weights": "[H, D_v, E]", "inputs": "[B, S, E]"}


def layer_values(
    name: str, method: Method, given: Sequence[object], heads: Sequence[int], batch: int, seq: int, device: torch.device
) -> tuple[LayerValues, ...] | None:
    """Values, output weights and inputs of every layer; None for a method that reads none, whatever was given.

    Args:
        name, method: of the call.
        given: `values`, `output_weights` and `inputs` as the caller gave them.
        heads: H of each layer.
        batch, seq, device: of the call.

    Raises:
        TypeError, ValueError: one is missing, or a rank, size, dtype or device is wrong.
    """
    if method.values is None:
        return None
    lists = []
    for (argument, shape), value in zip(SHAPES.items(), given, strict=True):
        if value is None:
            raise ValueError(
                f"{name}: {argument} must be given for a value-aware method: a tensor {shape} per layer, got None"
            )
        tensors = _checks.tensor_list(name, argument, value, shape)
        if len(tensors) != len(heads):
            raise ValueError(f"{name}: {argument} must have one tensor per layer, {len(heads)}, got {len(tensors)}")
        for i, tensor in enumerate(tensors):
            _checks.same_device(name, device, f"{argument}[{i}]", tensor)
        lists.append(tensors)
    layers = tuple(LayerValues(*tensors) for tensors in zip(*lists, strict=True))
    for i, (layer, count) in enumerate(zip(layers, heads, strict=True)):
        _check_layer(name, i, layer, count, batch, seq)
    return layers


def _check_layer(name: str, i: int, layer: LayerValues, heads: int, batch: int, seq: int) -> None:
    v, w, x = layer.values, layer.output_weights, layer.inputs
    fits = v.dim() == 4 and (v.shape[0], v.shape[2]) == (batch, seq) and 0 not in v.shape[1:]
    if not fits or heads % v.shape[1]:
        raise ValueError(
            f"{name}: values[{i}] must be [B, H_v, S, D_v] = [{batch}, H_v, {seq}, D_v] with H = {heads} a multiple of "
            f"H_v, got {list(v.shape)}"
        )
    if w.dim() != 3 or tuple(w.shape[:2]) != (heads, v.shape[3]) or not w.shape[2]:
        raise ValueError(
            f"{name}: output_weights[{i}] must be [H, D_v, E] = [{heads}, {v.shape[3]}, E], got {list(w.shape)}; of an "
            f"nn.Linear over heads side by side it is weight.T.reshape(H, D_v, E)"
        )
    if tuple(x.shape) != (batch, seq, w.shape[2]):
        raise ValueError(f"{name}: inputs[{i}] must be [B, S, E] = [{batch}, {seq}, {w.shape[2]}], got {list(x.shape)}")


def not_negative(name: str, method: Method, weights: Tensor | None, validate: bool) -> None:
    """Raise ValueError for a weighting over rows that is negative somewhere, where the own path is left out."""
    if method.own_path or weights is None or not validate:
        return
    if bool((weights < 0).any()):
        raise ValueError(f"{name}: query must be a weighting of 0 or more with own_path=False, got negative weights")


def handed_on(
    name: str, method: Method, values: object, output_gradients: object, queries: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """(values, gradients at the attention's output) of every layer; nothing for a method without gradients.

    Raises:
        TypeError, ValueError: one is missing, or a rank, size, dtype or device is wrong.
    """
    if method.gradients is None:
        return ()
    lists = []
    for argument, given, shape in (
        ("values", values, "[B, H_v, S, D_v]"), ("output_gradients", output_gradients, "[B, H, S, D_v]"),
    ):  # fmt: skip
        if given is None:
            raise ValueError(
                f"{name}: {argument} must be given for a gradient-weighted method: a tensor {shape} per layer, got "
                f"None; or use attention_rollout with the gradients of the maps"
            )
        tensors = _checks.tensor_list(name, argument, given, shape)
        if len(tensors) != len(queries):
            raise ValueError(f"{name}: {argument} must have one tensor per layer, {len(queries)}, got {len(tensors)}")
        for i, tensor in enumerate(tensors):
            _checks.same_device(name, queries[0].device, f"{argument}[{i}]", tensor)
        lists.append(tensors)
    for i, (v, d, q) in enumerate(zip(*lists, queries, strict=True)):
        batch, heads, seq, _ = q.shape
        if v.dim() != 4 or (v.shape[0], v.shape[2]) != (batch, seq) or 0 in v.shape[1:] or heads % v.shape[1]:
            raise ValueError(
                f"{name}: values[{i}] must be [B, H_v, S, D_v] = [{batch}, H_v, {seq}, D_v] with H = {heads} a "
                f"multiple of H_v, got {list(v.shape)}"
            )
        if tuple(d.shape) != (batch, heads, seq, v.shape[3]):
            wanted = [batch, heads, seq, v.shape[3]]
            raise ValueError(f"{name}: output_gradients[{i}] must be [B, H, S, D_v] = {wanted}, got {list(d.shape)}")
    return tuple(zip(*lists, strict=True))
