"""Values that are not finite: found in the result, then named; and what `validate=False` leaves to the caller."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rollout
from rollout import Method
from rollout_kernels import ops
from tests.support import cases
from tests.support.cases import assert_refused, random_gradients, random_maps, random_qk, random_weights
from tests.support.oracles import assert_close, rollout_matrices

B, H, S, L = 2, 3, 5, 3
BACKENDS = pytest.mark.parametrize("backend", cases.BACKENDS)
MAP_BACKENDS = pytest.mark.parametrize("backend", cases.MAP_BACKENDS)
VALUES = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)


@MAP_BACKENDS
@VALUES
@pytest.mark.parametrize("query", [None, 0, "weights"], ids=["full", "row", "weights"])
def test_values_that_are_not_finite(backend: str, value: float, query: Any):
    """Named by layer, sample and place; layers are the caller's, counted from the input side."""
    start = random_weights(B, S) if query == "weights" else query
    maps = random_maps(B, H, S, layers=L)
    maps[1][1, 2, 3, 4] = value
    for method in (Method(), Method(start_layer=1)):
        call = lambda m=method: rollout.attention_rollout(maps, query=start, method=m, backend=backend)  # noqa: E731
        said = ("attentions[1]", "finite", f"got {value}", "layer 1", "sample 1", "[2, 3, 4]")
        assert_refused(ValueError, ("attention_rollout: ", *said), call)


@BACKENDS
@VALUES
@pytest.mark.parametrize("argument", ["queries", "keys"])
def test_queries_and_keys_that_are_not_finite(backend: str, value: float, argument: str):
    queries, keys = random_qk(B, H, S)
    {"queries": queries, "keys": keys}[argument][2][1, 0, 3, 2] = value
    if value == torch.inf and argument == "keys":
        queries[2][1, 0] = queries[2][1, 0].abs()  # else exp(−inf) = 0 hides it in some rows
    call = lambda: rollout.attention_rollout_qk(queries, keys, backend=backend)  # noqa: E731
    said = (f"{argument}[2]", "finite", f"got {value}", "layer 2", "sample 1", "[0, 3, 2]")
    assert_refused(ValueError, ("attention_rollout_qk: ", *said), call)


@BACKENDS
def test_other_arguments_that_are_not_finite(backend: str):
    maps = random_maps(B, H, S)
    slopes = random_gradients(maps)
    slopes[0][0, 1, 2, 3] = torch.nan
    call = lambda: rollout.attention_rollout(maps, gradients=slopes, method="chefer", backend=backend)  # noqa: E731
    assert_refused(ValueError, ("gradients[0]", "got nan", "layer 0", "sample 0"), call)
    queries, keys = random_qk(B, H, S)
    bias = [None, torch.zeros(B, 1, S, S), None]
    bias[1][1, 0, 2, 2] = torch.nan
    call = lambda: rollout.attention_rollout_qk(queries, keys, bias=bias, backend=backend)  # noqa: E731
    assert_refused(ValueError, ("bias[1]", "got nan", "layer 1", "sample 1"), call)
    lse = [torch.logsumexp(q @ k.mT * 8**-0.5, -1) for q, k in zip(queries, keys, strict=True)]
    lse[2][0, 1, 4] = torch.nan
    call = lambda: rollout.attention_rollout_qk(queries, keys, logsumexp=lse, backend=backend)  # noqa: E731
    assert_refused(ValueError, ("logsumexp[2]", "got nan", "layer 2", "sample 0"), call)


@MAP_BACKENDS
def test_finite_input_may_still_overflow(backend: str):
    zero = [torch.zeros(1, 1, 3, 3)]
    call = lambda: rollout.attention_rollout(zero, method=Method(residual=0.0), backend=backend)  # noqa: E731
    assert_refused(ValueError, ("sample 0", "every input is", "sums to 0"), call)
    huge = [torch.full((1, 3, 3), 1e30)] * 2
    call = lambda: rollout.attention_rollout(huge, method="product", backend=backend)  # noqa: E731
    assert_refused(ValueError, ("sample 0", "every input is", "overflows torch.float32"), call)


@MAP_BACKENDS
def test_validate_false_leaves_values_to_the_caller(backend: str):
    maps = random_maps(B, H, S)
    clean = rollout_matrices(maps, Method())[:, 0]
    maps[1][1, 2, 3, 4] = torch.nan
    result = rollout.attention_rollout(maps, query=0, backend=backend, validate=False)
    assert_close(result[:1], clean[:1])
    assert bool(result[1].isnan().any())
    with pytest.raises(ValueError, match="attentions"):
        rollout.attention_rollout([], validate=False, backend=backend)


def test_validate_false_asks_the_device_nothing():
    """Making the problem reads no value back: no element is turned into a number."""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(function)
            assert not any(read in name for read in ("_local_scalar_dense", "nonzero", "equal.default", "unique")), name
            return function(*args, **(kwargs or {}))

    maps, lengths = random_maps(B, H, S), torch.tensor([5, 3])
    for query in (None, 1, torch.tensor([-1, 2]), random_weights(B, S)):
        call = {"query": query, "lengths": lengths}
        with NoReads():
            problem = ops.maps_problem(maps, **call, validate=False)
        if problem.rows is not None:
            assert problem.start_rows.tolist() == ([1, 1] if isinstance(query, int) else [4, 2])
        with NoReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
            ops.maps_problem(maps, **call)


def test_numbers_of_numpy_are_refused_or_read_right():
    maps = random_maps(B, H, S)
    expected = rollout_matrices(maps, Method(residual=0.25, start_layer=1))[:, 2]
    method = Method(residual=float(np.float32(0.25)), start_layer=int(np.int64(1)))
    assert_close(rollout.attention_rollout(maps, query=np.int32(2), method=method), expected)
