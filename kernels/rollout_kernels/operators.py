"""The public operations as operators of `torch.library`, for calls that are traced instead of run.

    rollout_kernels::attention_rollout       rows and the full matrix from maps
    rollout_kernels::attention_rollout_qk    the same from queries and keys

Under `torch.compile`, `torch.export` and fake tensors a call becomes one node of the graph. Shapes and dtypes are
checked when it is traced, values when the graph runs: there the operator is the plain call, bit for bit. A program
exported with one of these needs `import rollout_kernels` where it is loaded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rollout_kernels import _checks, _checks_qk, _checks_values, ops
from rollout_kernels._problem import MapsProblem, Problem, QKProblem
from rollout_kernels.method import Method

# A query is a row of every sample, or a tensor; a method comes field by field.
_QUERY = "SymInt? query, Tensor? query_tensor, Tensor? lengths"
_METHOD = (
    "str head_fusion, Tensor? head_weights, float residual, float? attention, bool renormalize, "
    "bool normalize_attention, float discard_ratio, SymInt start_layer, str? gradient_form, str? value_form, "
    "bool own_path, bool matrices"
)
_VALUES = "Tensor[]? values, Tensor[]? output_weights, Tensor[]? inputs"
_MAPS_SCHEMA = (
    f"(Tensor[] attentions, Tensor[]? gradients, {_VALUES}, {_QUERY}, {_METHOD}, str backend, bool validate) -> Tensor"
)
_QK_SCHEMA = (
    "(Tensor[] queries, Tensor[] keys, Tensor[]? logsumexp, Tensor[]? sinks, Tensor?[]? bias, Tensor?[]? alibi_slopes, "
    "Tensor? key_mask, Tensor? query_mask, bool causal, SymInt? left, SymInt? right, float? scale, float? softcap, "
    f"{_VALUES}, Tensor[]? output_gradients, {_QUERY}, {_METHOD}, str backend, bool validate) -> Tensor"
)


def attention_rollout(attentions: Sequence[Tensor], **options: Any) -> Tensor:
    """One node of a graph for `rollout_kernels.attention_rollout`; every option of it must be given."""
    name, method = "attention_rollout", options["method"]
    maps = _checks.tensor_list(name, "attentions", attentions, "[B, H, S, S] or [B, S, S]")
    gradients = None if method.gradients is None else options["gradients"]
    if gradients is not None:
        gradients = _checks.tensor_list(name, "gradients", gradients, "[B, H, S, S] or [B, S, S]")
    return _maps_operator(
        maps, gradients, *_values(name, options), *_query_and_method(name, options, maps[0])
    )  # fmt: skip


def attention_rollout_qk(queries: Sequence[Tensor], keys: Sequence[Tensor], **options: Any) -> Tensor:
    """One node of a graph for `rollout_kernels.attention_rollout_qk`; every option of it must be given."""
    name = "attention_rollout_qk"
    qs = _checks.tensor_list(name, "queries", queries, "[B, H, S, D]")
    ks = _checks.tensor_list(name, "keys", keys, "[B, H_kv, S, D]")
    lse, sinks = (
        None if options[argument] is None else _checks.tensor_list(name, argument, options[argument], what)
        for argument, what in (("logsumexp", "[B, H, S]"), ("sinks", "[H]"))
    )
    bias, slopes = (_per_layer(options[argument], len(qs)) for argument in ("bias", "alibi_slopes"))
    return _qk_operator(
        qs, ks, lse, sinks, bias, slopes, _detached(options["key_mask"]), _detached(options["query_mask"]),
        _checks_qk.flag(name, "causal", options["causal"]), *_checks_qk.window(name, options["window"]),
        options["scale"], options["softcap"], *_values(name, options), _slopes(name, options),
        *_query_and_method(name, options, qs[0]),
    )  # fmt: skip


def _slopes(name: str, options: dict[str, Any]) -> list[Tensor] | None:
    """The gradients at the attention's output, where the method reads them."""
    given = options["output_gradients"]
    if options["method"].gradients is None or given is None:
        return None
    return _checks.tensor_list(name, "output_gradients", given, "[B, H, S, D_v]")


def _values(name: str, options: dict[str, Any]) -> list[list[Tensor] | None]:
    """Values, output weights and inputs, where the method reads them."""
    method = options["method"]
    read = method.values is not None or (method.gradients is not None and name == "attention_rollout_qk")
    return [
        _checks.tensor_list(name, argument, options[argument], shape)
        if read and options[argument] is not None
        else None
        for argument, shape in _checks_values.SHAPES.items()
    ]


def _query_and_method(name: str, options: dict[str, Any], first: Tensor) -> tuple[Any, ...]:
    """The arguments that both operators end with; `first` is of the first layer."""
    query, method, row = options["query"], options["method"], None
    if query is not None and not isinstance(query, Tensor):
        if isinstance(query, bool) or not isinstance(query, int | torch.SymInt):
            raise TypeError(
                f"{name}: query must be None, an int, a long tensor [B] or a float tensor [B, S] or [B, R, S], "
                f"got {query!r}"
            )
        row, query = query, None
    fusion, weights = method.head_fusion, None
    if isinstance(fusion, Tensor):
        fake = isinstance(first, FakeTensor) and not torch.compiler.is_compiling()
        fusion, weights = "", first.fake_mode.from_tensor(fusion) if fake else fusion  # type: ignore[attr-defined]
    elif not isinstance(fusion, str):
        raise ValueError(
            f"{name}: head_fusion must be a string or a tensor of head weights where the call is compiled or exported, "
            f"got a Python function, which no operator can take: call it outside, or under torch.compiler.disable"
        )
    return (
        row, _detached(query), _detached(options["lengths"]), fusion, weights, float(method.residual),
        None if method.attention is None else float(method.attention), method.renormalize, method.normalize_attention,
        float(method.discard_ratio), method.start_layer, method.gradients, method.values, method.own_path,
        method.matrices, options["backend"], options["validate"],
    )  # fmt: skip


def _per_layer(value: Any, layers: int) -> list[Any] | None:
    """One tensor or None for each layer; one tensor serves all."""
    if value is None:
        return None
    return [_detached(each) for each in ([value] * layers if isinstance(value, Tensor) else value)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _method(
    head_fusion: str, head_weights: Tensor | None, residual: float, attention: float | None, renormalize: bool,
    normalize_attention: bool, discard_ratio: float, start_layer: int, gradient_form: Any, value_form: Any,
    own_path: bool, matrices: bool,
) -> Method:  # fmt: skip
    if isinstance(head_weights, FakeTensor):
        head_fusion, head_weights = "mean", None  # it has no values to check or to normalise
    return Method(
        head_fusion=head_fusion if head_weights is None else head_weights, residual=residual, attention=attention,
        renormalize=renormalize, normalize_attention=normalize_attention, discard_ratio=discard_ratio,
        start_layer=start_layer, gradients=gradient_form,
        values=value_form, own_path=own_path, matrices=matrices,
    )  # fmt: skip


def _maps_problem(
    attentions: list[Tensor], gradients: list[Tensor] | None, values: list[Tensor] | None,
    output_weights: list[Tensor] | None, inputs: list[Tensor] | None, row: int | None, query: Tensor | None,
    lengths: Tensor | None, *method: Any, validate: bool,
) -> MapsProblem:  # fmt: skip
    return ops.maps_problem(
        attentions, query=query if row is None else row, lengths=lengths, gradients=gradients, values=values,
        output_weights=output_weights, inputs=inputs, method=_method(*method), validate=validate,
    )  # fmt: skip


def _qk_problem(
    queries: list[Tensor], keys: list[Tensor], logsumexp: list[Tensor] | None, sinks: list[Tensor] | None,
    bias: list[Tensor | None] | None, alibi_slopes: list[Tensor | None] | None,
    key_mask: Tensor | None, query_mask: Tensor | None, causal: bool,
    left: int | None, right: int | None, scale: float | None, softcap: float | None, values: list[Tensor] | None,
    output_weights: list[Tensor] | None, inputs: list[Tensor] | None, output_gradients: list[Tensor] | None,
    row: int | None, query: Tensor | None, lengths: Tensor | None, *method: Any, validate: bool,
) -> QKProblem:  # fmt: skip
    return ops.qk_problem(
        queries, keys, query=query if row is None else row, lengths=lengths, key_mask=key_mask, query_mask=query_mask,
        causal=causal, window=(left, right), bias=bias, alibi_slopes=alibi_slopes, scale=scale, softcap=softcap,
        logsumexp=logsumexp, sinks=sinks, values=values, output_weights=output_weights, inputs=inputs,
        output_gradients=output_gradients, method=_method(*method), validate=validate,
    )  # fmt: skip


def _empty_result(problem: Problem) -> Tensor:
    """What a backend would return, without values."""
    sizes = [problem.batch, problem.seq, problem.seq]
    if problem.weights is not None:
        sizes[1] = problem.weights.shape[1]
    if problem.squeeze:
        del sizes[1]
    return torch.empty(sizes, dtype=problem.compute_dtype, device=problem.device)


def _define(name: str, schema: str, make_problem: Any) -> Any:
    """The operator `rollout_kernels::name`: run for real, and on fake tensors."""

    def run(*arguments: Any) -> Tensor:
        *given, backend, validate = arguments
        with torch.no_grad():
            return ops.run(make_problem(*given, validate=validate), backend, validate).contiguous()

    def run_fake(*arguments: Any) -> Tensor:
        *given, _, _ = arguments
        given = [0 if isinstance(each, torch.SymInt) else each for each in given]  # no guard on a row
        return _empty_result(make_problem(*given, validate=False))

    operator = torch.library.custom_op(f"rollout_kernels::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(run_fake)
    return operator


_maps_operator = _define("attention_rollout", _MAPS_SCHEMA, _maps_problem)
_qk_operator = _define("attention_rollout_qk", _QK_SCHEMA, _qk_problem)
