"""The public operations: check a call, hand it to a backend, check the result.

`rollout.attention_rollout` and `rollout.attention_rollout_qk` are these with methods by name; the arguments are
documented there.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rollout_kernels import _checks, _checks_qk, _checks_values, _diagnose, _dispatch
from rollout_kernels._problem import MapsProblem, Problem, QKProblem
from rollout_kernels.method import Method

ROLLOUT = Method()
"""Abnar & Zuidema's: mean over heads, α = ½, renormalised."""


def attention_rollout(
    attentions: Sequence[Tensor],
    *,
    query: int | Tensor | None = None,
    lengths: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    output_weights: Sequence[Tensor] | None = None,
    inputs: Sequence[Tensor] | None = None,
    method: Method,
    backend: str = "auto",
    validate: bool = True,
) -> Tensor:
    """Rollout from attention maps; see `rollout.attention_rollout`."""
    if is_traced(attentions):
        from rollout_kernels import operators  # which are built on this module

        return operators.attention_rollout(
            attentions, query=query, lengths=lengths, gradients=gradients, values=values,
            output_weights=output_weights, inputs=inputs, method=method, backend=backend, validate=validate,
        )  # fmt: skip
    with torch.no_grad():
        problem = maps_problem(
            attentions, query=query, lengths=lengths, gradients=gradients, values=values,
            output_weights=output_weights, inputs=inputs, method=method, validate=validate,
        )  # fmt: skip
        return run(problem, backend, validate)


def attention_rollout_qk(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    query: int | Tensor | None = None,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    alibi_slopes: Tensor | Sequence[Tensor | None] | None = None,
    scale: float | None = None,
    logsumexp: Sequence[Tensor] | None = None,
    softcap: float | None = None,
    sinks: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    output_weights: Sequence[Tensor] | None = None,
    inputs: Sequence[Tensor] | None = None,
    output_gradients: Sequence[Tensor] | None = None,
    method: Method,
    backend: str = "auto",
    validate: bool = True,
) -> Tensor:
    """Rollout from queries and keys; see `rollout.attention_rollout_qk`."""
    if is_traced(queries):
        from rollout_kernels import operators  # which are built on this module

        return operators.attention_rollout_qk(
            queries, keys, query=query, lengths=lengths, key_mask=key_mask, query_mask=query_mask, causal=causal,
            window=window, bias=bias, alibi_slopes=alibi_slopes, scale=scale, logsumexp=logsumexp, softcap=softcap,
            sinks=sinks, values=values, output_weights=output_weights, inputs=inputs, output_gradients=output_gradients,
            method=method, backend=backend, validate=validate,
        )  # fmt: skip
    with torch.no_grad():
        problem = qk_problem(
            queries,
            keys,
            query=query,
            lengths=lengths,
            key_mask=key_mask,
            query_mask=query_mask,
            causal=causal,
            window=window,
            bias=bias,
            alibi_slopes=alibi_slopes,
            scale=scale,
            logsumexp=logsumexp,
            softcap=softcap,
            sinks=sinks,
            values=values,
            output_weights=output_weights,
            inputs=inputs,
            output_gradients=output_gradients,
            method=method,
            validate=validate,
        )
        return run(problem, backend, validate)


def is_traced(tensors: object) -> bool:
    """Whether a call is recorded instead of run: by `torch.compile` or `torch.export`, or on fake tensors."""
    if torch.compiler.is_compiling():
        return True
    return isinstance(tensors, list | tuple) and bool(tensors) and isinstance(tensors[0], FakeTensor)


def run(problem: Problem, backend: str, validate: bool) -> Tensor:
    """The result of a problem, checked when `validate`."""
    with _without_autocast(problem.device):
        result = _dispatch.run(problem, backend)
    if validate:
        _diagnose.check_result(problem, result)
    return result


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    enabled = torch.is_autocast_enabled(device.type)  # asking costs a tenth of what entering does
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def maps_problem(
    attentions: Sequence[Tensor],
    *,
    query: int | Tensor | None = None,
    lengths: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    output_weights: Sequence[Tensor] | None = None,
    inputs: Sequence[Tensor] | None = None,
    method: Method = ROLLOUT,
    validate: bool = True,
) -> MapsProblem:
    """A checked call of `attention_rollout` in its normal form.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing has been computed.
    """
    name = "attention_rollout"
    maps = _checks.maps(name, "attentions", attentions)
    _check_supplied_matrices(name, maps, method)
    start = _start_layer(name, method, len(maps))
    grads = None if method.gradients is None else _checks.gradients(name, gradients, maps, len(maps))
    batch, seq, device = maps[0].shape[0], maps[0].shape[-1], maps[0].device
    wide = any(tensor.dtype == torch.float64 for tensor in maps)
    dtype = torch.float64 if wide else torch.float32
    valid = _checks.lengths(name, lengths, batch, seq, device, validate)
    rows, weights, squeeze = _checks.query(name, query, valid, batch, seq, device, dtype, validate)
    _checks_values.not_negative(name, method, weights, validate)
    heads = [tensor.shape[1] for tensor in maps]
    vectors = _checks_values.layer_values(name, method, (values, output_weights, inputs), heads, batch, seq, device)
    return MapsProblem(
        name=name,
        method=method,
        first_layer=start,
        head_weights=_head_weights(name, method, maps, start),
        values=None if vectors is None else vectors[start:],
        rows=rows,
        weights=weights,
        lengths=valid,
        squeeze=squeeze,
        batch=batch,
        seq=seq,
        device=device,
        compute_dtype=dtype,
        maps=tuple(maps[start:]),
        gradients=None if grads is None else tuple(grads[start:]),
    )


def qk_problem(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    query: int | Tensor | None = None,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    alibi_slopes: Tensor | Sequence[Tensor | None] | None = None,
    scale: float | None = None,
    logsumexp: Sequence[Tensor] | None = None,
    softcap: float | None = None,
    sinks: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    output_weights: Sequence[Tensor] | None = None,
    inputs: Sequence[Tensor] | None = None,
    output_gradients: Sequence[Tensor] | None = None,
    method: Method = ROLLOUT,
    validate: bool = True,
) -> QKProblem:
    """A checked call of `attention_rollout_qk` in its normal form.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing has been computed.
    """
    name = "attention_rollout_qk"
    if method.matrices:
        raise ValueError(
            f"{name}: method must form M_l, got one that needs the matrices themselves: use attention_rollout"
        )
    qs, ks = _checks_qk.queries_and_keys(name, queries, keys)
    batch, _, seq, _ = qs[0].shape
    start, device = _start_layer(name, method, len(qs)), qs[0].device
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in (*qs, *ks)) else torch.float32
    valid = _checks.lengths(name, lengths, batch, seq, device, validate)
    rows, weights, squeeze = _checks.query(name, query, valid, batch, seq, device, dtype, validate)
    _checks_values.not_negative(name, method, weights, validate)
    heads = [tensor.shape[1] for tensor in qs]
    vectors = _checks_values.layer_values(name, method, (values, output_weights, inputs), heads, batch, seq, device)
    biases = _checks_qk.bias(name, bias, qs)
    slopes = _checks_qk.alibi_slopes(name, alibi_slopes, qs, validate)
    lse = _checks_qk.logsumexp(name, logsumexp, qs)
    columns = _checks_qk.sinks(name, sinks, qs, validate)
    if lse is not None and columns is not None:
        raise ValueError(f"{name}: logsumexp must be left out with sinks, which are no part of it")
    return QKProblem(
        name=name,
        method=method,
        first_layer=start,
        head_weights=_head_weights(name, method, qs, start),
        values=None if vectors is None else vectors[start:],
        rows=rows,
        weights=weights,
        lengths=valid,
        squeeze=squeeze,
        batch=batch,
        seq=seq,
        device=device,
        compute_dtype=dtype,
        queries=tuple(qs[start:]),
        keys=tuple(ks[start:]),
        logsumexp=None if lse is None else tuple(lse[start:]),
        bias=None if biases is None else tuple(biases[start:]),
        alibi_slopes=None if slopes is None else tuple(slopes[start:]),
        key_mask=_checks_qk.mask(name, "key_mask", "may be attended", key_mask, batch, seq, device),
        query_mask=_checks_qk.mask(name, "query_mask", "attends", query_mask, batch, seq, device),
        causal=_checks_qk.flag(name, "causal", causal),
        window=_checks_qk.window(name, window),
        scale=_checks_qk.scale(name, scale, qs[0].shape[-1]),
        softcap=_checks_qk.softcap(name, softcap),
        sinks=None if columns is None else tuple(columns[start:]),
        handed_on=_checks_values.handed_on(name, method, values, output_gradients, qs)[start:] or None,
    )


def _start_layer(name: str, method: Method, layers: int) -> int:
    if method.start_layer >= layers:
        raise ValueError(f"{name}: start_layer must leave a layer, less than L = {layers}, got {method.start_layer}")
    return method.start_layer


def _check_supplied_matrices(name: str, maps: list[Tensor], method: Method) -> None:
    if not method.matrices:
        return
    for i, tensor in enumerate(maps):
        if tensor.shape[1] != 1:
            raise ValueError(
                f"{name}: attentions[{i}] must be a matrix [B, S, S] for a method of supplied matrices, "
                f"got {list(tensor.shape)}"
            )


def _head_weights(name: str, method: Method, tensors: list[Tensor], start: int) -> tuple[Tensor, ...] | None:
    """Per kept layer the normalised weights [H_l]; a map with one head has the weight 1."""
    if not isinstance(method.head_fusion, Tensor):
        return None
    heads = [tensor.shape[1] for tensor in tensors]
    many = sorted({h for h in heads if h > 1})
    if len(many) > 1:
        raise ValueError(f"{name}: head_fusion weights need the same H in every layer, got {many}")
    weights = method.head_weights(len(heads), many[0] if many else 1, name)
    assert weights is not None
    one = torch.ones(1, dtype=torch.float64)
    return tuple(weights[i] if h > 1 else one for i, h in enumerate(heads))[start:]
